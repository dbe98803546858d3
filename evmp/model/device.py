"""Where a network of torch runs, and how frames get there and outputs come back.

A GPU works by itself: what is asked of it waits in a stream, and the caller goes on. So a batch is
*begun*, and its outputs may be read when the *mark* that was set behind it has been passed. The CPU
is the same thing without streams: what is asked of it has happened, and each mark is passed.

A process must not touch CUDA before it forks, so all of this is for predictor processes only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol, TypeAlias

import torch

from evmp.errors import ModelError
from evmp.model import DeviceLost

log = logging.getLogger(__name__)

Mark: TypeAlias = Callable[[], None]
"""Waits until the device has passed it, and raises what went wrong there, until then or before."""

_HOST_REGISTER_DEFAULT: Final = 0


class Device(Protocol):
    """A device that one process works on, from one thread."""

    @property
    def place(self) -> torch.device:
        """What torch calls it; tensors there may be used by networks that run there."""

    def staging(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return uninitialised uint8 memory of the host, from which `upload` is fast."""

    def upload(self, frames: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor of the host to the device.

        Args:
            frames: contiguous; it must not change until a later mark is passed.

        Returns: the copy, for all that is asked of the device from now on.
        """

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor of the device to the host.

        Returns: the copy, contiguous, of its own memory, to be read when a later mark is passed.
        """

    def mark(self) -> Mark:
        """Set a mark behind all that the device has been asked for until now."""

    def pin(self, memory: memoryview) -> None:
        """Let `upload` copy out of this memory without a detour, where the system allows it."""

    def close(self) -> None:
        """Let go of the memory that was pinned, which may be unmapped from then on."""

    def free(self) -> None:
        """Give memory that the network does not use now back to the device."""

    def check(self) -> None:
        """Ask whether the device still works for this process.

        Raises:
            DeviceLost: it does not, and never will.
        """


class Cpu:
    """The host itself."""

    place = torch.device("cpu")

    def staging(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.uint8)

    def upload(self, frames: torch.Tensor) -> torch.Tensor:
        return frames

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cpu", copy=True).contiguous()

    def mark(self) -> Mark:
        return lambda: None

    def pin(self, memory: memoryview) -> None:
        pass

    def close(self) -> None:
        pass

    def free(self) -> None:
        pass

    def check(self) -> None:
        pass


class Gpu:
    """A GPU. Frames go up, networks run and outputs come down in three streams, at the same time.

    Networks run in the stream that is torch's default, one after the other: two batches in flight
    share the memory of their activations, and the second is there when the first has ended. Torch
    frees device memory when its owner is gone, but a block goes to another owner in its own stream
    only, so each stream that reads what was made in another is recorded.

    Raises:
        ModelError: CUDA cannot be used, although torch finds a GPU.
    """

    def __init__(self, index: int = 0) -> None:
        self.place = torch.device("cuda", index)
        self._pinned: list[torch.Tensor] = []
        try:
            self._compute = torch.cuda.current_stream(self.place)
            self._up, self._down = torch.cuda.Stream(self.place), torch.cuda.Stream(self.place)
            self.check()
        except (RuntimeError, DeviceLost) as error:
            reason = str(error).partition("\n")[0]
            raise ModelError(f"the GPU cannot be used: {reason}; set device: cpu") from error

    def staging(self, shape: tuple[int, ...]) -> torch.Tensor:
        # Torch keeps pinned memory that is given back, and waits for the copies that read it.
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)

    def upload(self, frames: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(self._up):
            copy = frames.to(self.place, non_blocking=True)
        self._compute.wait_stream(self._up)
        copy.record_stream(self._compute)
        return copy

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_cuda:
            return tensor.clone(memory_format=torch.contiguous_format)
        tensor = tensor.contiguous()
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._down.wait_stream(self._compute)
        with torch.cuda.stream(self._down):
            copy.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._down)
        return copy

    def mark(self) -> Mark:
        self._down.wait_stream(self._compute)
        # Blocking: a process that waits must not take a core from the decoders.
        event = torch.cuda.Event(blocking=True)
        event.record(self._down)
        return event.synchronize

    def pin(self, memory: memoryview) -> None:
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        code = torch.cuda.cudart().cudaHostRegister(
            tensor.data_ptr(), tensor.nbytes, _HOST_REGISTER_DEFAULT
        )
        if int(code) == 0:
            self._pinned.append(tensor)
            return
        log.warning(
            "memory of %d MiB cannot be pinned (%s): copies to the GPU will be slower",
            tensor.nbytes >> 20,
            torch.cuda.CudaError(int(code)),
        )
        self._forget_failure()

    def _forget_failure(self) -> None:
        """Make CUDA tell of a call that has failed, lest it tell the next who starts a kernel."""
        with suppress(RuntimeError):
            torch.ones(1, device=self.place)

    def close(self) -> None:
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop().data_ptr())

    def free(self) -> None:
        torch.cuda.empty_cache()

    def check(self) -> None:
        # After an illegal access, say, every call fails until the process ends. Nothing else tells
        # such an error from one of the network's own: its type and text change with torch.
        try:
            torch.cuda.synchronize(self.place)
        except RuntimeError as error:
            raise DeviceLost(str(error).partition("\n")[0]) from error
