"""A package of a network of timm, with the preprocessing of its configuration."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from evmp.errors import ConfigError, ModelError
from evmp.export import Request
from evmp.export.draft import ARCHIVE, Draft
from evmp.export.network import load_weights, save_traced, with_features
from evmp.model.network import explain
from evmp.setting import nearest, show

try:
    import timm
    from timm import data
except (ImportError, OSError, RuntimeError) as error:
    raise ModelError(
        f"timm cannot be imported ({explain(error)}); install it, and the torchvision that belongs "
        "to your torch"
    ) from error

RESIZES = {"center": "short_side", "squash": "stretch", "border": "letterbox"}


def draft_of_timm(request: Request) -> Draft:
    """Draft a package of a network such as `timm:efficientnet_lite0`.

    Raises:
        ConfigError: there is no such network, or it has no such features.
        ModelError: the weights cannot be had, or are of another network.
    """
    name = request.source.partition(":")[2]
    model_type = request.model_type or "classifier"
    if request.features:
        model_type = "feature_extractor"
    network = _network(name, request, without_head=model_type == "feature_extractor")
    settings = data.resolve_model_data_config(network)
    labels = _labels(network) if not request.n_classes else ()
    spec = {"model_type": model_type, "input": _input(settings)}
    if request.features:
        network = with_features(network, request.features)
    origin = f"timm's {name}, weights {show(Path(request.weights).name or 'its own')}"
    return Draft(origin, ARCHIVE, partial(save_traced, network), spec, labels)


def _network(name: str, request: Request, *, without_head: bool) -> Any:
    if not timm.is_model(name):
        raise ConfigError(
            f"{request.source}: timm has no such network{nearest(name, timm.list_models())}"
        )
    if request.weights not in ("", "none") and not Path(request.weights).is_file():
        raise ConfigError(f"--weights: {request.weights} is no file, and not none")
    options: dict[str, Any] = {"num_classes": request.n_classes} if request.n_classes else {}
    if without_head and not request.features:
        options["num_classes"] = 0
    try:
        network: nn.Module = timm.create_model(name, pretrained=not request.weights, **options)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise ModelError(
            f"timm's {name} cannot be made: {explain(error)}; --weights can name a file"
        ) from error
    if request.weights not in ("", "none"):
        load_weights(network, request.weights)
    return network.eval()


def _labels(network: Any) -> tuple[str, ...]:
    """Return the names of the classes, where they are one of ImageNet's sets."""
    subset = data.infer_imagenet_subset(network)
    if not subset:
        return ()
    info = data.ImageNetInfo(subset)
    return tuple(info.index_to_description(number) for number in range(info.num_classes()))


def _input(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what model.yaml says of the input, as timm's own evaluation has it."""
    _, height, width = settings["input_size"]
    resize = RESIZES[settings["crop_mode"]]
    crop = {}
    if resize == "short_side":
        crop["resize_size"] = math.floor(max(height, width) / settings["crop_pct"])
    return {
        "height": height,
        "width": width,
        "resize": resize,
        **crop,
        "interpolation": settings["interpolation"],
        "mean": list(settings["mean"]),
        "std": list(settings["std"]),
    }
