"""Models: what a package of weights expects, and the adapters that run it.

`package` reads model.yaml and imports nothing heavy, so any process may use it. The adapters import
torch or onnxruntime and are for predictor processes only: `open_model` picks one by what the file
of weights holds, and loads it in the process that calls it.

    archive         what a file is, before a library touches it; `onnxfile` reads ONNX for it
    torchscript     .pt: what torch.jit.save writes
    exported        .pt2: what torch.export.save writes
    onnx            .onnx
    operators       those that an archive calls and torch itself does not have
    network         a network of torch on the CPU or a GPU, whichever adapter it came from
    batch           what becomes of the rows of a batch, whatever runs it
    device          the CPU or a GPU: how frames get there and outputs come back
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar, cast

from evmp.errors import ModelError
from evmp.model.archive import kind_of

if TYPE_CHECKING:
    import numpy as np

    from evmp.model.package import ModelPackage

Frames: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"
# One dict a row: the outputs by name, without the batch axis, as float32 or integers. What a model
# returns in order, or alone, is called "0", "1" and so on. Where a model returns a list of one dict
# a row, as torchvision's detectors do, the outputs of each row may have another length.
Outputs: TypeAlias = "list[dict[str, np.ndarray[Any, Any]]]"


T = TypeVar("T")


class DeviceLost(BaseException):
    """The device does nothing more for this process, though it may for another.

    The process must end and be replaced, so this is no Exception, which would be a row's failure.
    """


@dataclass(frozen=True, slots=True)
class Pending(Generic[T]):
    """What was begun.

    Attributes:
        result: waits for it and returns it, once, or raises what went wrong.
    """

    result: Callable[[], T]


class Model(Protocol):
    """A loaded model; only the process that opened it may use it."""

    @property
    def device(self) -> str:
        """Where it runs: `cpu`, or `cuda:0` and so on."""

    @property
    def rows_at_once(self) -> int:
        """How many rows of a call it works on together; fewer where they do not fit into memory."""

    @property
    def is_asynchronous(self) -> bool:
        """Whether it works by itself on what was started, so that more should be started."""

    def warm_up(self) -> Outputs:
        """Run on black images until the first real batch will not be slower than the next.

        Returns: the outputs of one row.

        Raises:
            ModelError: the model cannot run on input of this size and type.
        """

    def predict(self, frames: Frames, rows: Sequence[int]) -> Outputs:
        """Run the model on some rows of a batch. Blocks until the outputs are there.

        Args:
            frames: (batch_size, height, width, 3) uint8 in the package's colour order, each row
                C-contiguous; what stands in rows that are not asked for does not matter. It may be
                overwritten afterwards. Where sizes are dynamic, height and width may be others in
                each call.
            rows: which of them.

        Returns: one dict for each of `rows`, in their order; the arrays are the caller's.

        Raises:
            ModelError: the model failed, or did not return a batch.
            DeviceLost: so did its device, for good.
        """

    def start(self, frames: Frames, rows: Sequence[int]) -> Pending[Outputs]:
        """Begin what `predict` does; its errors are raised here, or with the result.

        Args:
            frames, rows: as there, but they may be overwritten only when the result is there.
        """

    def pin(self, memory: memoryview) -> None:
        """Tell where frames will lie, before the first: from there they are copied faster."""

    def close(self) -> None:
        """Let go of that memory. Nothing may be in flight, and nothing is started any more."""


def preload(package: ModelPackage) -> None:
    """Import what open_model will need for this package, before processes are forked that call it.

    Raises:
        ModelError: the weights are no model, or what they need is not installed.
    """
    _set_environment()
    for model in package.models:
        _preload(model)


def _preload(package: ModelPackage) -> None:
    kind = kind_of(package.weights)
    if kind == "onnx":
        import_onnx(package.weights)
        return
    from evmp.model.operators import register_operators

    register_operators(package.weights)
    import_module(f"evmp.model.{kind}")


def open_model(
    package: ModelPackage, device: str, batch_size: int, threads: int, cpu_batch_size: int = 1
) -> Model:
    """Load a package's weights, ready to run; imports torch, or for ONNX onnxruntime.

    Args:
        device: `auto`, `cpu` or `cuda`.
        batch_size: rows of the batches that `predict` will get.
        threads: within an operator, for a model on the CPU.
        cpu_batch_size: rows that a model on the CPU works on at once.

    Raises:
        ModelError: the weights are missing, damaged or of another kind, need an operator that is
            not there, or there is no such device.
    """
    _set_environment()
    options = package, device, batch_size, threads, cpu_batch_size
    kind = kind_of(package.weights)
    if kind == "onnx":
        return cast(Model, import_onnx(package.weights).open_onnx(*options))
    if kind == "exported":
        from evmp.model.exported import open_exported

        return open_exported(*options)
    from evmp.model.torchscript import open_torchscript

    return open_torchscript(*options)


def _set_environment() -> None:
    """Set what torch, OpenMP and onnxruntime read when they are imported."""
    # Threads that wait for each other sleep rather than take the decoders' cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # onnxruntime reports to its makers from version 1.29 on.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def import_onnx(file: Path) -> ModuleType:
    """Import the adapter of ONNX models, and onnxruntime with it.

    Raises:
        ModelError: it cannot be imported; the message says for which file.
    """
    _set_environment()
    try:
        return import_module("evmp.model.onnx")
    except (ImportError, OSError) as error:
        raise ModelError(
            f"{file}: an ONNX model needs onnxruntime, which cannot be imported ({error}); install "
            "evmp[onnx]"
        ) from error
