"""A device that is as slow as a GPU may be, for tests of what is in flight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from evmp.model import DeviceLost
from evmp.model.device import Cpu, Mark


class Late(Cpu):
    """A device on which outputs arrive only when somebody waits for them, as late as they may."""

    def __init__(self) -> None:
        self._on_the_way: list[Callable[[], object]] = []
        self.failure: Exception | None = None
        self.is_lost = False

    def download(self, tensor: Tensor) -> Tensor:
        copy = torch.full(tensor.shape, 77, dtype=tensor.dtype)
        self._on_the_way.append(partial(copy.copy_, tensor))
        return copy

    def mark(self) -> Mark:
        return partial(self._pass, list(self._on_the_way))

    def _pass(self, arriving: list[Callable[[], object]]) -> None:
        if self.failure:
            raise self.failure
        with torch.inference_mode():
            for arrive in arriving:
                arrive()

    def check(self) -> None:
        if self.is_lost:
            raise DeviceLost("the device is gone")
