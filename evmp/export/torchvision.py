"""A package of a network of torchvision, with the preprocessing and the labels of its weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.error import URLError

import torch
from torch import nn

from evmp.errors import ConfigError, ModelError
from evmp.export import Request
from evmp.export.draft import ARCHIVE, Draft
from evmp.export.network import load_weights, save_scripted, save_traced, with_features
from evmp.model.network import explain
from evmp.setting import nearest, show

try:
    from torchvision import models
except (ImportError, OSError, RuntimeError) as error:
    raise ModelError(
        f"torchvision cannot be imported ({explain(error)}); install the one that belongs to torch "
        f"{torch.__version__}"
    ) from error

TYPES: Final = {
    "torchvision.models.detection": "detector",
    "torchvision.models.segmentation": "segmentor",
}
OTHERS: Final = ("video", "optical_flow")


def draft_of_torchvision(request: Request) -> Draft:
    """Draft a package of a network such as `torchvision:resnet18`.

    Raises:
        ConfigError: there is no such network, or it has no such weights or features.
        ModelError: the weights cannot be had, or are of another network.
    """
    name = request.source.partition(":")[2]
    if name not in models.list_models():
        hint = nearest(name, models.list_models())
        raise ConfigError(f"{request.source}: torchvision has no such network{hint}")
    family = models.get_model_builder(name).__module__.rpartition(".")[0]
    if family.rpartition(".")[2] in OTHERS:
        raise ConfigError(f"{request.source}: is no network for single images")
    model_type = "feature_extractor" if request.features else TYPES.get(family, "classifier")
    theirs = _weights_of(name, request)
    network = _network(name, model_type, request, theirs)
    spec: dict[str, Any] = {
        "model_type": request.model_type or model_type,
        "input": _input(model_type, theirs, network),
    }
    labels = tuple(theirs.meta.get("categories", ())) if theirs else ()
    if request.n_classes and request.n_classes != len(labels):
        labels = ()
    if request.features:
        network = with_features(network, request.features)
    save = save_scripted if family in TYPES and not request.features else save_traced
    known = request.weights or (theirs.name if theirs else "none")
    origin = f"torchvision's {name}, weights {show(Path(known).name)}"
    return Draft(origin, ARCHIVE, partial(save, network), spec, labels)


def _weights_of(name: str, request: Request) -> Any:
    """Return the library's weights that are asked for, or those whose preprocessing to take."""
    each = models.get_model_weights(name)
    best = getattr(each, "DEFAULT", None)
    wanted = request.weights
    if wanted in each.__members__:
        return each[wanted]
    is_file = wanted and Path(wanted).is_file()
    if wanted not in ("", "none") and not is_file:
        names = ", ".join([*each.__members__, "none"])
        raise ConfigError(f"--weights: {wanted} is no file, and none of {names}")
    if not wanted and best is None:
        raise ConfigError(f"--weights: torchvision has none for {name}, name a file")
    return best


def _network(name: str, model_type: str, request: Request, theirs: Any) -> nn.Module:
    options: dict[str, Any] = {}
    if request.n_classes:
        options["num_classes"] = request.n_classes
    is_theirs = theirs is not None and request.weights in ("", theirs.name)
    if not is_theirs and model_type in TYPES.values():
        options["weights_backbone"] = None
    try:
        network: nn.Module = models.get_model(
            name, weights=theirs if is_theirs else None, **options
        )
    except URLError as error:
        raise ModelError(
            f"the weights of {name} cannot be downloaded: {error.reason}; name a file by --weights"
        ) from error
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"torchvision cannot make a {name} so: {explain(error)}") from error
    if not is_theirs and request.weights != "none":
        load_weights(network, request.weights)
    return network.eval()


def _input(model_type: str, theirs: Any, network: Any) -> dict[str, Any]:
    """Return what model.yaml says of the input, as the weights' own transforms have it."""
    if model_type == "detector":
        # The network normalises by itself, and resizes to this shorter side.
        side = int(min(network.transform.min_size))
        plain = {"mean": [0, 0, 0], "std": [1, 1, 1]}
        return {"height": side, "width": side, "resize": "letterbox", **plain}
    if theirs is None:
        return {}
    preset = theirs.transforms()
    pixels = {
        "interpolation": preset.interpolation.value,
        "mean": list(preset.mean),
        "std": list(preset.std),
    }
    side = preset.resize_size[0]
    if model_type == "segmentor":
        return {"height": side, "width": side, "resize": "stretch", **pixels}
    crop = preset.crop_size[0]
    return {"height": crop, "width": crop, "resize": "short_side", "resize_size": side, **pixels}
