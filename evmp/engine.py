"""What predicts: rows of the ring before the predictors in, one JSON result a row out.

The predictor's stage claims, isolates rows that fail, and puts results; what it holds is an Engine,
and which one depends on what the rows are.

    FrameEngine     pixels at the model's size: a built-in model and its head
    SampleEngine    whole samples, see `sampleengine`
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from evmp.errors import ModelError
from evmp.fit import Fit
from evmp.model import Pending
from evmp.outputdir import OutputFiles, Place

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
            ring: where the rows will be; what of its memory is read for sure may be faulted in.

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
        """Let go of the ring and of what is open, when nothing is begun any more."""


class FrameEngine:
    """A built-in model, and pixels that the decoders have put where it reads them.

    Args:
        job, package: which model, on which device, with which options.
        gpu: the one to use, as CUDA_VISIBLE_DEVICES names it; empty for the CPU.
        batch_rows: rows of the ring's batches.
        files: where results go that are files; None where they are JSON.
    """

    def __init__(
        self,
        job: Job,
        package: ModelPackage,
        gpu: str,
        batch_rows: int,
        files: OutputFiles | None = None,
    ) -> None:
        self._job, self._package, self._gpu = job, package, gpu
        self._files = files
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
        ring.populate(ring.row_bytes)
        self._model, self._head = open_built_in(
            self._job, self._package, self._gpu, self._batch_rows
        )
        self._model.pin(ring.payloads)
        self._ring = ring

    def start(self, rows: Sequence[int]) -> Pending[list[bytes]]:
        ring = self._ring
        headers = [ring.header(n) for n in rows]
        sizes = [(header.height, header.width) for header in headers]
        parts: list[tuple[list[int], Pending[Outputs]]] = []
        for size, alike in by_size([self._fit.size_of(*size) for size in sizes]).items():
            frames = frames_of(ring.batch(rows[0] // ring.n_rows), ring.n_rows, size)
            begun = self._model.start(frames, [rows[i] % ring.n_rows for i in alike])
            parts.append((alike, begun))
        places = [Place(n, header.row) for n, header in zip(rows, headers, strict=True)]
        return Pending(partial(self._results, parts, sizes, places))

    def close(self) -> None:
        self._model.close()

    def _results(
        self,
        parts: Sequence[tuple[list[int], Pending[Outputs]]],
        sizes: Sequence[tuple[int, int]],
        places: Sequence[Place],
    ) -> list[bytes]:
        outputs: dict[int, Row] = {}
        for alike, begun in parts:
            outputs.update(zip(alike, begun.result(), strict=True))
        results = self._head.results([outputs[i] for i in range(len(sizes))], sizes)
        return self._files.save_maps(places, results) if self._files else results


def open_built_in(job: Job, package: ModelPackage, gpu: str, batch_rows: int) -> tuple[Model, Head]:
    """Load a package's model, run it once on zeros, and let its head check what comes out.

    Raises:
        ModelError: it cannot be loaded, or fails, or is not what the package says.
    """
    # CUDA reads this at its start, which is later: this process sees its own GPU only.
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    from evmp.head import open_head
    from evmp.model import open_model

    head = open_head(package, job)
    model = open_model(
        package,
        job.device if gpu or job.device == "cuda" else "cpu",
        batch_rows,
        job.torch_threads,
        job.cpu_batch_size,
    )
    head.check(model.warm_up())
    if package.input.size == "dynamic":
        _try_smallest(model, package)
    return model, head


def _try_smallest(model: Model, package: ModelPackage) -> None:
    """Refuse a model that takes the largest input only, as one that was traced can be."""
    height, width = (least for least, *_ in package.input.sides)
    try:
        model.predict(np.zeros((1, height, width, 3), np.uint8), [0])
    except ModelError as error:
        raise ModelError(
            f"{package.weights}: {error}; it was given {(1, 3, height, width)}, the smallest of "
            "the dynamic sizes; export it for any size, raise input.min_height and "
            "input.min_width, or set input.size: fixed"
        ) from error


def by_size(sizes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """Return the places of each size, in the order in which the sizes come first."""
    places: dict[tuple[int, int], list[int]] = {}
    for place, size in enumerate(sizes):
        places.setdefault(size, []).append(place)
    return places


def frames_of(batch: memoryview, n_rows: int, size: tuple[int, int]) -> Frames:
    """Return the rows of a batch as frames of one size, each at the front of its row."""
    _, width = size
    strides = (len(batch) // n_rows, width * 3, 3, 1)
    frames: Frames = np.ndarray((n_rows, *size, 3), np.uint8, batch, strides=strides)
    return frames
