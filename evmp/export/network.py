"""Networks of Python: their weights, what they return, and how they are saved as TorchScript."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evmp.errors import ConfigError, ModelError
from evmp.model.network import explain
from evmp.model.package import ModelInput
from evmp.setting import nearest


def save_traced(network: nn.Module, file: Path, spec: ModelInput) -> None:
    """Trace a network for images of the input's size, and save it as TorchScript."""
    with torch.inference_mode():
        example = torch.zeros(1, 3, spec.height, spec.width)
        _save(lambda: torch.jit.trace(network.eval(), example, strict=False), file)


def save_scripted(network: nn.Module, file: Path, spec: ModelInput) -> None:
    """Script a network whose way through depends on the image, and save it as TorchScript."""
    _save(lambda: torch.jit.script(network.eval()), file)


def _save(compiled: Callable[[], Any], file: Path) -> None:
    try:
        torch.jit.save(compiled(), file)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ModelError(f"the network cannot be saved: {explain(error)}") from error


def load_weights(network: nn.Module, file: str) -> None:
    """Load a checkpoint into a network.

    Args:
        file: what torch.save wrote: a state_dict, or a dict that holds one as `state_dict` or
            `model`, of a network that may have been wrapped for several GPUs.

    Raises:
        ModelError: it cannot be read, or is of another network.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, pickle.PickleError) as error:
        raise ModelError(f"{file}: cannot be read as a checkpoint: {explain(error)}") from error
    for name in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict):
        raise ModelError(f"{file}: holds a {type(state).__name__}, expected a state_dict")
    try:
        network.load_state_dict({str(k).removeprefix("module."): it for k, it in state.items()})
    except RuntimeError as error:
        _, *details = [line.strip() for line in str(error).splitlines()] or [""]
        reason = "; ".join(details)[:300] or explain(error)
        remedy = "; --classes says how many it has" if "size mismatch" in reason else ""
        raise ModelError(f"{file}: is of another network: {reason}{remedy}") from error


def with_features(network: nn.Module, features: Sequence[str]) -> nn.Module:
    """Return a network that returns the named nodes of another, by name.

    Args:
        features: `layer4`, or `layer4=map` for another name.

    Raises:
        ConfigError: there is no such node.
        ModelError: the network's structure cannot be followed.
    """
    from torchvision.models import feature_extraction

    nodes = dict(_renamed(it) for it in features)
    try:
        _, there = feature_extraction.get_graph_node_names(network)
        for node in nodes:
            if not any(it == node or it.startswith(f"{node}.") for it in there):
                top = dict.fromkeys(it.partition(".")[0] for it in there)
                raise ConfigError(
                    f"--features: the network has no {node}{nearest(node, [*top, *there])}; it has "
                    f"{', '.join(top)}"
                )
        extractor: nn.Module = feature_extraction.create_feature_extractor(network, nodes)
        return extractor
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(f"--features: the network cannot be followed: {explain(error)}") from error


def _renamed(feature: str) -> tuple[str, str]:
    node, _, name = feature.partition("=")
    return node, name or node
