"""What predicts: rows of the ring before the predictors in, one JSON result a row out.

The predictor's stage claims, isolates rows that fail, and puts results; what it holds is an Engine,
and which one depends on what the rows are.

    FrameEngine     pixels at the model's size: a built-in model and its head
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from evmp.fit import Fit
from evmp.model import Pending

if TYPE_CHECKING:
    from evmp.head import Head
    from evmp.head.array import Row
    from evmp.job import Job
    from evmp.model import Frames, Model, Outputs
    from evmp.model.package import ModelPackage
    from evmp.ring import Ring


class Engine(Protocol):
    """Turns rows into results. Only the process that opened it may use it."""

    @property
    def rows_at_once(self) -> int:
        """How many rows of a batch it takes in one call, once it is open."""

    @property
    def batches_at_once(self) -> int:
        """How many batches should be started before the results of the first are waited for."""

    def open(self, ring: Ring) -> None:
        """Load what predicts, run it once, and check what comes out.

        Args:
            ring: where the rows will be.

        Raises:
            EvmpError: when the job cannot start.
        """

    def start(self, rows: Sequence[int]) -> Pending[list[bytes]]:
        """Begin to predict the JSON result of each of `rows`, in their order.

        Args:
            rows: sequence numbers, ascending, of one batch, which this process has claimed, and
                does not release before the results are there.

        Raises:
            DeviceLost: this process can predict no more; so may the result.
            Exception: whatever is wrong with one of them; alone, it is to blame. So may the result.
        """

    def close(self) -> None:
        """Let go of the ring, when nothing is begun any more."""


class FrameEngine:
    """A built-in model, and pixels that the decoders have put where it reads them.

    Args:
        job, package: which model, on which device, with which options.
        gpu: the one to use, as CUDA_VISIBLE_DEVICES names it; empty for the CPU.
        batch_rows: rows of the ring's batches.
    """

    def __init__(self, job: Job, package: ModelPackage, gpu: str, batch_rows: int) -> None:
        self._job, self._package, self._gpu = job, package, gpu
        self._batch_rows = batch_rows
        self._fit = Fit(package.input)
        self._ring: Ring
        self._model: Model
        self._head: Head

    @property
    def rows_at_once(self) -> int:
        return self._model.rows_at_once

    @property
    def batches_at_once(self) -> int:
        return self._job.predict_thread_num if self._model.is_asynchronous else 1

    def open(self, ring: Ring) -> None:
        # CUDA reads this at its start, which is later: this process sees its own GPU only.
        os.environ["CUDA_VISIBLE_DEVICES"] = self._gpu
        from evmp.head import open_head
        from evmp.model import open_model

        self._head = open_head(self._package, self._job)
        self._model = open_model(
            self._package,
            self._job.device if self._gpu or self._job.device == "cuda" else "cpu",
            self._batch_rows,
            self._job.torch_threads,
            self._job.cpu_batch_size,
        )
        self._head.check(self._model.warm_up())
        self._model.pin(ring.payloads)
        self._ring = ring

    def start(self, rows: Sequence[int]) -> Pending[list[bytes]]:
        ring = self._ring
        headers = [ring.header(n) for n in rows]
        sizes = [(header.height, header.width) for header in headers]
        parts: list[tuple[list[int], Pending[Outputs]]] = []
        for size, alike in by_size([self._fit.size_of(*size) for size in sizes]).items():
            frames = _frames(ring, rows[0] // ring.n_rows, size)
            begun = self._model.start(frames, [rows[i] % ring.n_rows for i in alike])
            parts.append((alike, begun))
        return Pending(partial(self._results, parts, sizes))

    def close(self) -> None:
        self._model.close()

    def _results(
        self, parts: Sequence[tuple[list[int], Pending[Outputs]]], sizes: Sequence[tuple[int, int]]
    ) -> list[bytes]:
        outputs: dict[int, Row] = {}
        for places, begun in parts:
            outputs.update(zip(places, begun.result(), strict=True))
        return self._head.results([outputs[i] for i in range(len(sizes))], sizes)


def by_size(sizes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """Return the places of each size, in the order in which the sizes come first."""
    places: dict[tuple[int, int], list[int]] = {}
    for place, size in enumerate(sizes):
        places.setdefault(size, []).append(place)
    return places


def _frames(ring: Ring, batch: int, size: tuple[int, int]) -> Frames:
    """Return a batch as frames of one size, each at the front of its row."""
    _, width = size
    strides = (ring.row_bytes, width * 3, 3, 1)
    return np.ndarray((ring.n_rows, *size, 3), np.uint8, ring.batch(batch), strides=strides)
