"""ONNX models (.onnx): load, check, run; by onnxruntime, without torch.

An ONNX file says of its input what a TorchScript archive does not: its name, its type, and which
sizes are fixed. A model that was exported for batches of a fixed size runs in that size. Its
outputs have the names that it was exported with.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state

from evmp import _native, machine
from evmp.errors import ModelError
from evmp.model import DeviceLost, Pending
from evmp.model.batch import Array, OutOfMemory, divided, filled_up, image_input, scale_and_bias

if TYPE_CHECKING:
    from evmp.model import Frames, Outputs
    from evmp.model.package import ModelPackage

log = logging.getLogger(__name__)

VERSION: Final = onnxruntime.__version__
# Its errors have no root of their own.
FAILURES: Final[tuple[type[Exception], ...]] = (
    RuntimeError,
    ValueError,
    *(
        it
        for it in vars(onnxruntime_pybind11_state).values()
        if isinstance(it, type) and issubclass(it, Exception)
    ),
)
DTYPES: Final = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}
CUDA: Final = "CUDAExecutionProvider"
MEMORY_ERRORS: Final = ("Failed to allocate memory", "out of memory")
QUIET: Final = 4  # onnxruntime's level of what is fatal; it raises what is an error


def open_onnx(
    package: ModelPackage, device: str, batch_size: int, threads: int, cpu_batch_size: int
) -> OnnxModel:
    """Load a model for a device; see `evmp.model.open_model`."""
    if package.precision != "fp32":
        raise ModelError(
            f"{package.weights}: precision: got {package.precision}, but an ONNX model computes in "
            "the types that it was exported with; leave precision out of model.yaml"
        )
    session = open_session(package.weights, device, threads)
    is_gpu = CUDA in session.get_providers()
    return OnnxModel(session, package, batch_size if is_gpu else cpu_batch_size)


def open_session(file: Path, device: str = "cpu", threads: int = 1) -> Any:
    """Load a file into onnxruntime.

    Raises:
        ModelError: it cannot, or there is no such device.
    """
    onnxruntime.set_default_logger_severity(QUIET)
    providers = _providers(device)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = QUIET
    # It would keep a plan of the memory for each size of image.
    options.enable_mem_pattern = False
    # Threads that wait for each other sleep rather than take the decoders' cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=providers)
    except FAILURES as error:
        raise ModelError(
            f"{file}: onnxruntime {VERSION} cannot load it: {explain(error)}"
        ) from error
    if CUDA in providers and CUDA not in session.get_providers():
        raise ModelError(
            f"device: got {device}, but onnxruntime {VERSION} cannot start CUDA; install the "
            "libraries that it wants, or set device: cpu"
        )
    return session


class OnnxModel:
    """A session of onnxruntime with one image input, and any number of outputs."""

    is_asynchronous = False

    def __init__(self, session: Any, package: ModelPackage, rows_at_once: int) -> None:
        _native.keep_memory()
        self._session, self._package = session, package
        self._input = _image_input(session, package)
        self._names = [output.name for output in session.get_outputs()]
        self._scale, self._bias = scale_and_bias(package.input)
        fixed = self._input.shape[0]
        self.rows_at_once = fixed if isinstance(fixed, int) else rows_at_once
        self._least = fixed if isinstance(fixed, int) else 1
        self.device = "cuda:0" if CUDA in session.get_providers() else "cpu"
        self._planes: Array = np.empty((0, 3, 0, 0), np.float32)

    def warm_up(self) -> Outputs:
        size = self._package.input.height, self._package.input.width
        try:
            return self.predict(np.zeros((1, *size, 3), np.uint8), [0])
        except ModelError as error:
            raise ModelError(
                f"{self._package.weights}: {error}; it was given {self._planes.shape} in "
                f"{self._input.type}, as input.height and input.width say"
            ) from error

    def predict(self, frames: Frames, rows: Sequence[int]) -> Outputs:
        done: Outputs = []
        while len(done) < len(rows):
            try:
                done += self._predict(frames, rows[len(done) : len(done) + self.rows_at_once])
            except OutOfMemory:
                if self.rows_at_once // 2 < self._least:
                    raise
                self._halve()
        return done

    def start(self, frames: Frames, rows: Sequence[int]) -> Pending[Outputs]:
        return Pending(partial(self.predict, frames, rows))

    def pin(self, memory: memoryview) -> None:
        pass

    def close(self) -> None:
        pass

    def _predict(self, frames: Frames, rows: Sequence[int]) -> Outputs:
        height, width = frames.shape[1:3]
        shape = (self.rows_at_once, 3, height, width)
        if self._planes.shape != shape:
            self._planes = np.empty(shape, np.float32)
        for place, row in zip(self._planes, filled_up(rows, self.rows_at_once), strict=True):
            _native.normalize(frames[row], place, height, width, scale=self._scale, bias=self._bias)
        arrays = self._run(self._planes.astype(DTYPES[self._input.type], copy=False))
        outputs = {name: _bring(name, it) for name, it in zip(self._names, arrays, strict=True)}
        return divided(outputs, self.rows_at_once)[: len(rows)]

    def _run(self, batch: Array) -> list[Any]:
        try:
            arrays: list[Any] = self._session.run(self._names, {self._input.name: batch})
            return arrays
        except FAILURES as error:
            reason = explain(error)
            if any(words in reason for words in MEMORY_ERRORS):
                raise OutOfMemory(f"the model failed: {reason}") from error
            if "CUDA failure" in reason:
                raise DeviceLost(reason) from error
            raise ModelError(f"the model failed: {reason}") from error

    def _halve(self) -> None:
        self.rows_at_once //= 2
        log.warning(
            "out of GPU memory: from now on %d images at once; a lower batch_size avoids this",
            self.rows_at_once,
        )


def explain(error: Exception) -> str:
    """Return what an error of onnxruntime says, in one line, without its code and source lines."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed: ?", "", text)
    return re.sub(r"^/\S+:\d+ .*?\) (?=[A-Z])", "", text).rstrip(".") or type(error).__name__


def _providers(device: str) -> list[str]:
    """Say by what a model shall be run.

    Raises:
        ModelError: `cuda` was asked for, and this onnxruntime has it not.
    """
    if device != "cpu" and CUDA in onnxruntime.get_available_providers():
        return [CUDA, "CPUExecutionProvider"]
    if device == "cuda":
        raise ModelError(
            f"device: got cuda, but onnxruntime {VERSION} is built without it; "
            "install onnxruntime-gpu instead, or set device: cpu or auto"
        )
    if device == "auto" and machine.gpus():
        log.warning(
            "onnxruntime %s cannot use the GPU, so one process on the CPU takes its place; install "
            "onnxruntime-gpu instead, or set device: cpu",
            VERSION,
        )
    return ["CPUExecutionProvider"]


def _image_input(session: Any, package: ModelPackage) -> Any:
    """Return the model's only input, which takes images as model.yaml says.

    Raises:
        ModelError: there are others, or it takes something else.
    """
    inputs = {it.name: it for it in session.get_inputs()}
    name = image_input({name: it.shape for name, it in inputs.items()}, package)
    kind = inputs[name].type
    if kind not in DTYPES:
        raise ModelError(
            f"{package.weights}: the model's input {name} is {kind}, expected float, float16 or "
            "uint8"
        )
    if kind == "tensor(uint8)" and scale_and_bias(package.input) != ((1, 1, 1), (0, 0, 0)):
        raise ModelError(
            f"{package.weights}: the model's input {name} is of bytes from 0 to 255, but "
            "model.yaml normalises them; say scale: 1, mean: [0, 0, 0] and std: [1, 1, 1] in input"
        )
    return inputs[name]


def _bring(name: str, value: Any) -> Array:
    """Return an output as float32 or integers."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise ModelError(f"the model's output {name} is a {kind}, expected a tensor of numbers")
    if value.dtype.kind != "f":
        return value
    return value.astype(np.float32, copy=False)
