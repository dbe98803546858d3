"""TorchScript archives (.pt): load, prepare, run.

TorchScript is deprecated upstream, which torch says at each load; it is what the jobs come with, so
the warning is filtered here. Loading an archive runs no code of its author's: its own language is
interpreted by torch, and evmp never unpickles a checkpoint.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evmp.errors import ModelError
from evmp.model.network import explain, open_network, set_threads
from evmp.model.operators import lacking, register_operators

if TYPE_CHECKING:
    from evmp.model import Model
    from evmp.model.package import ModelPackage


def open_torchscript(
    package: ModelPackage, device: str, batch_size: int, threads: int, cpu_batch_size: int
) -> Model:
    """Load an archive for a device; see `evmp.model.open_model`."""
    set_threads(threads)
    register_operators(package.weights)
    module = _load(package.weights)
    return open_network(
        module,
        package,
        device=device,
        batch_size=batch_size,
        cpu_batch_size=cpu_batch_size,
        finish=_prepare,
    )


def _load(file: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(str(file), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        message = f"torch {torch.__version__} cannot load it: {explain(error)}"
        message = lacking(error) or message
        raise ModelError(f"{file}: {message}") from error


def _prepare(module: Any) -> Any:
    """Fold weights and batch normalisation into the graph; let it take a batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        frozen = torch.jit.freeze(module)
    if not _takes_list(frozen):
        return frozen
    return lambda batch: frozen(list(batch.unbind()))


def _takes_list(module: Any) -> bool:
    """Say whether a module takes a list of images for a batch, as torchvision's detectors do."""
    arguments = module.forward.schema.arguments
    return len(arguments) > 1 and str(arguments[1].type) == "List[Tensor]"
