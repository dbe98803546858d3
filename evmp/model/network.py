"""A network of torch on the CPU or on a GPU: uint8 frames in, named numpy arrays out.

On the CPU the images of a batch go through one by one, or in fours, as the job says: the
activations of many at once leave the caches, which cost EfficientNet-Lite0 half its speed or more,
while few at once share a ResNet's weights (12 % faster). A GPU gets the whole batch as uint8, and
normalises it there; while it works on one batch, the next is begun. Either way the shape never
changes, so that a result does not depend, to the bit, on what else is in the batch.

One thread and several are not the same to torch: it takes other kernels for 1x1 convolutions, and
results differ in their last bits. From two threads on their number does not matter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import torch

from evmp import _native, machine
from evmp.errors import ModelError
from evmp.model import Pending
from evmp.model.batch import Array, OutOfMemory, divided, filled_up, scale_and_bias
from evmp.model.device import Cpu, Device, Gpu, Mark

if TYPE_CHECKING:
    from evmp.model import Frames, Model, Outputs
    from evmp.model.package import ModelPackage

Finish: TypeAlias = Callable[[Any], Any]
Download: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

log = logging.getLogger(__name__)

DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# TorchScript profiles its first run and compiles in its second; the first is the probe.
WARM_UP_RUNS: Final = 2
# What a network may raise; torch.export asserts what it expects of its input.
FAILURES: Final = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AssertionError,
    torch.jit.Error,
)
MAX_INPUTS: Final = 8  # that a network on the CPU keeps, of different sizes
_HOST: Final = Cpu()
_MEMORY_ERRORS: Final = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")


def open_network(
    module: Any,
    package: ModelPackage,
    *,
    device: str,
    batch_size: int,
    cpu_batch_size: int = 1,
    least: int = 1,
    finish: Finish,
) -> Model:
    """Place a loaded network on a device.

    Args:
        module: a torch module in evaluation mode, on the CPU.
        device: `auto`, `cpu` or `cuda`.
        batch_size: rows that a GPU gets at once.
        cpu_batch_size: rows that a CPU does.
        least: rows that the network must get at once.
        finish: the last step of preparing it, once its weights are in place.

    Raises:
        ModelError: there is no such device, or the network cannot run on the package's input.
    """
    if resolve_device(device) == "cpu":
        return CpuNetwork(module, package, finish, cpu_batch_size)
    return BatchNetwork(module, package, finish, batch_size, Gpu(), least)


def resolve_device(device: str) -> str:
    """Turn `auto`, `cpu` or `cuda` into `cpu` or `cuda`.

    Raises:
        ModelError: `cuda` was asked for and there is none.
    """
    if device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise ModelError(
            f"device: got cuda, but torch {torch.__version__} finds no GPU; set device: cpu or auto"
        )
    if machine.gpus():
        log.warning(
            "torch %s cannot use the GPU, so one process on the CPU takes its place; install a "
            "torch that is built for this CUDA, or set device: cpu",
            torch.__version__,
        )
    return "cpu"


def set_threads(threads: int) -> None:
    """Give torch so many threads within an operator, and one between operators."""
    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:
        with suppress(RuntimeError):  # too late where this process has used them already
            torch.set_num_interop_threads(1)


class CpuNetwork:
    """A network on the CPU, few images at a time, in float32 whatever the package's precision."""

    device = "cpu"
    is_asynchronous = False

    def __init__(
        self, module: Any, package: ModelPackage, finish: Finish, rows_at_once: int = 1
    ) -> None:
        _native.keep_memory()
        self.rows_at_once = rows_at_once
        self._size = package.input.height, package.input.width
        self._scale, self._bias = scale_and_bias(package.input)
        self._inputs: dict[tuple[int, int], torch.Tensor] = {}
        probe = self._input_of(self._size)
        self._module, self._layout = settle(module.float(), finish, probe, package)

    def warm_up(self) -> Outputs:
        return self.predict(np.zeros((1, *self._size, 3), np.uint8), [0])

    def predict(self, frames: Frames, rows: Sequence[int]) -> Outputs:
        step = self.rows_at_once
        starts = range(0, len(rows), step)
        return [it for i in starts for it in self._predict(frames, rows[i : i + step])]

    def start(self, frames: Frames, rows: Sequence[int]) -> Pending[Outputs]:
        return Pending(partial(self.predict, frames, rows))

    def pin(self, memory: memoryview) -> None:
        pass

    def close(self) -> None:
        pass

    def _predict(self, frames: Frames, rows: Sequence[int]) -> Outputs:
        size = frames.shape[1], frames.shape[2]
        tensor = self._input_of(size)
        for place, row in zip(tensor.numpy(), filled_up(rows, self.rows_at_once), strict=True):
            _native.normalize(frames[row], place, *size, scale=self._scale, bias=self._bias)
        with torch.inference_mode():
            tensor = tensor.contiguous(memory_format=self._layout)
            return to_rows(run(self._module, tensor), self.rows_at_once)[: len(rows)]

    def _input_of(self, size: tuple[int, int]) -> torch.Tensor:
        """Return the input of a size; those of the last few are kept, as their memory is warm."""
        tensor = self._inputs.pop(size, None)
        if tensor is None:
            tensor = torch.zeros(self.rows_at_once, 3, *size)
        self._inputs[size] = tensor
        if len(self._inputs) > MAX_INPUTS:
            del self._inputs[next(iter(self._inputs))]
        return tensor


class BatchNetwork:
    """A network that takes whole batches, on a GPU, in the package's precision.

    Args:
        batch_size: rows that it takes at once, as long as the device's memory holds them.
        device: where it runs.
        least: rows that it must get at once, whatever the device's memory holds.
    """

    is_asynchronous = True

    def __init__(
        self,
        module: Any,
        package: ModelPackage,
        finish: Finish,
        batch_size: int,
        device: Device,
        least: int = 1,
    ) -> None:
        self.device = str(device.place)
        self.rows_at_once, self._least = batch_size, least
        self._device, self._dtype = device, DTYPES[package.precision]
        self._size = package.input.height, package.input.width
        self._is_dynamic = package.input.size == "dynamic"
        scale, bias = scale_and_bias(package.input)
        self._scale = torch.tensor(scale, device=device.place).view(3, 1, 1)
        self._bias = torch.tensor(bias, device=device.place).view(3, 1, 1)
        module = run(lambda: module.to(device.place, self._dtype))
        while not (settled := self._settle(module, finish, package)):
            self._halve()
        self._module, self._layout = settled

    def warm_up(self) -> Outputs:
        for _ in range(WARM_UP_RUNS):
            outputs = self.predict(self._black(), range(self.rows_at_once))
        return outputs[:1]

    def predict(self, frames: Frames, rows: Sequence[int]) -> Outputs:
        return self.start(frames, rows).result()

    def start(self, frames: Frames, rows: Sequence[int]) -> Pending[Outputs]:
        parts: list[Pending[Outputs]] = []
        while rows:
            part = self._start(frames, rows[: self.rows_at_once])
            if part:
                parts.append(part)
                rows = rows[self.rows_at_once :]
            else:
                self._halve()
        return Pending(lambda: [it for part in parts for it in part.result()])

    def pin(self, memory: memoryview) -> None:
        self._device.pin(memory)

    def close(self) -> None:
        self._device.close()

    # What an exception knows is not freed while it is handled, so None tells of a lack of memory.

    def _settle(
        self, module: Any, finish: Finish, package: ModelPackage
    ) -> tuple[Any, torch.memory_format] | None:
        try:
            probe = run(lambda: self._normalize(torch.from_numpy(self._black())))
            return settle(module, finish, probe, package)
        except OutOfMemory:
            if self.rows_at_once // 2 < self._least:
                raise
        return None

    def _start(self, frames: Frames, rows: Sequence[int]) -> Pending[Outputs] | None:
        try:
            outputs, mark = self._run(lambda: self._begin(frames, rows))
        except OutOfMemory:
            if self.rows_at_once // 2 < self._least:
                raise
            return None
        return Pending(partial(self._outputs, outputs, mark))

    def _outputs(self, outputs: Outputs, mark: Mark) -> Outputs:
        self._run(mark)
        return outputs

    def _begin(self, frames: Frames, rows: Sequence[int]) -> tuple[Outputs, Mark]:
        """Ask the device for the outputs of some rows; they are there when it passes the mark."""
        batch_size = self._filled_size(len(rows))
        with torch.inference_mode():
            batch = self._normalize(self._chosen(frames, filled_up(rows, batch_size)))
            output = self._module(batch.contiguous(memory_format=self._layout))
            outputs = to_rows(output, batch_size, self._device.download)
            return outputs[: len(rows)], self._device.mark()

    def _run(self, work: Callable[[], Any]) -> Any:
        try:
            return run(work)
        except OutOfMemory:
            raise
        except ModelError:
            self._device.check()
            raise

    def _halve(self) -> None:
        """Take half as many rows at once from now on: the device's memory does not hold more.

        What is in flight goes on: torch had waited for it before it gave up.
        """
        self.rows_at_once //= 2
        self._device.free()
        log.warning(
            "out of GPU memory: from now on %d images at once; a lower batch_size avoids this",
            self.rows_at_once,
        )

    def _filled_size(self, n_rows: int) -> int:
        """Say how many rows a batch of so many is filled up to.

        Where sizes are dynamic, rows of one size are few, and shapes are many anyway.
        """
        if not self._is_dynamic:
            return self.rows_at_once
        return min(self.rows_at_once, max(self._least, 1 << (n_rows - 1).bit_length()))

    def _black(self) -> Frames:
        return np.zeros((self.rows_at_once, *self._size, 3), np.uint8)

    def _chosen(self, frames: Frames, places: list[int]) -> torch.Tensor:
        """Return these rows of a batch, in its own memory if they follow each other there."""
        first = places[0]
        if places == list(range(first, first + len(places))) and frames.flags.c_contiguous:
            return torch.from_numpy(frames[first : first + len(places)])
        chosen = self._device.staging((len(places), *frames.shape[1:]))
        np.take(frames, places, axis=0, out=chosen.numpy(), mode="clip")
        return chosen

    def _normalize(self, frames: torch.Tensor) -> torch.Tensor:
        """Copy a batch to the device as uint8, and normalise it there to (B, 3, H, W)."""
        # (B, H, W, 3) seen as (B, 3, H, W) is channels last as it stands.
        planes = self._device.upload(frames).permute(0, 3, 1, 2).to(torch.float32)
        return planes.mul_(self._scale).add_(self._bias).to(self._dtype)


def settle(
    module: Any, finish: Finish, probe: torch.Tensor, package: ModelPackage
) -> tuple[Any, torch.memory_format]:
    """Finish a network in the fastest memory layout that it runs in, and return both.

    Channels last is faster (EfficientNet-Lite0 by 18 %, ResNet-18 by 7 %, on the CPU). But the
    weights of an archive that was frozen before cannot be laid out so, and a network that takes a
    `view` of what it has convolved fails with it.

    Args:
        probe: (N, 3, H, W) on the module's device, of its type.
    """
    layouts = [torch.contiguous_format]
    if any(weight.dim() == 4 for weight in module.parameters()):
        layouts.insert(0, torch.channels_last)
    for layout in layouts:
        finished = finish(module.to(memory_format=layout))
        try:
            with torch.inference_mode():
                run(finished, probe.contiguous(memory_format=layout))
            return finished, layout
        except OutOfMemory:
            raise
        except ModelError as error:
            failure = error
    raise ModelError(
        f"{package.weights}: {failure}; it was given {tuple(probe.shape)} in {probe.dtype}, as "
        "input.height, input.width and precision say"
    ) from failure


def run(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a network, or what has to do with one.

    Raises:
        OutOfMemory: the device's memory does not hold what it needs.
        ModelError: it failed; the message says how, in one line.
    """
    try:
        return work(*arguments)
    except FAILURES as error:
        # TorchScript tells of torch.OutOfMemoryError in a RuntimeError of its own.
        is_memory = isinstance(error, torch.OutOfMemoryError) or any(
            words in str(error) for words in _MEMORY_ERRORS
        )
        kind = OutOfMemory if is_memory else ModelError
        raise kind(f"the model failed: {explain(error)}") from error


def to_rows(output: Any, batch_size: int, download: Download = _HOST.download) -> Outputs:
    """Name what a model returned, bring it over, and divide it among the rows.

    Args:
        output: a tensor, or a tuple, list or dict of them, each (batch_size, ...); or, as
            torchvision's detectors return it, a list of one dict a row, whose tensors may have
            another length in each.
        download: brings a tensor to the host; the rows may be read when it has come there.

    Returns: batch_size rows, sharing no memory with the model.

    Raises:
        ModelError: it is anything else, or not of as many rows.
    """
    each = _dicts_of(output)
    if each:
        if len(each) != batch_size:
            raise ModelError(
                f"the model returned a list of {len(each)} for a batch of {batch_size}, expected "
                "one dict an image"
            )
        return [
            {str(name): _bring(str(name), it, download) for name, it in row.items()} for row in each
        ]
    return divided(_to_arrays(output, download), batch_size)


def _dicts_of(output: Any) -> Sequence[dict[str, Any]]:
    """Return the dicts of a list of nothing else; otherwise nothing."""
    # A scripted detector of torchvision returns (losses, detections), and in evaluation no losses.
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], dict):
        losses, detections = output
        output = output if losses else detections
    if isinstance(output, (tuple, list)) and all(isinstance(it, dict) for it in output):
        return output
    return ()


def _to_arrays(output: Any, download: Download) -> dict[str, Array]:
    """Return arrays by name."""
    if isinstance(output, torch.Tensor):
        output = (output,)
    if isinstance(output, (tuple, list)):
        output = {str(index): tensor for index, tensor in enumerate(output)}
    if not isinstance(output, dict) or not output:
        found = "nothing" if output is None or output == {} else f"a {type(output).__name__}"
        raise ModelError(f"the model returned {found}, expected a tensor or several")
    return {str(name): _bring(str(name), it, download) for name, it in output.items()}


def _bring(name: str, tensor: Any, download: Download) -> Array:
    """Return a tensor as float32 or integers, C-contiguous, on the host."""
    if not isinstance(tensor, torch.Tensor):
        raise ModelError(
            f"the model's output {name} is a {type(tensor).__name__}, expected a tensor"
        )
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    array: Array = download(tensor.to(dtype)).numpy()
    return array


def explain(error: Exception) -> str:
    """Return the one line of a torch error that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = lines[-1] if "Traceback of TorchScript" in str(error) else lines[0]
    line = line.removeprefix("RuntimeError: ").partition(". This is an internal miniz error")[0]
    return line.rstrip(".")
