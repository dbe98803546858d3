"""The third stage: batches of pixels through the model, and its tensors into results.

One process a GPU, or `predict_thread_num` processes on the CPU. A GPU gets whole batches, a CPU a
few rows or one at a time. Those whose prediction raises, and a batch that has killed a process
before, are worked on row by row, so that a bad row costs only itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import numpy as np

from evmp.metrics import Counter, Seat, State
from evmp.ring import Header, Mark, Ring
from evmp.stage import claims, put_failure

if TYPE_CHECKING:
    from evmp.head import Head
    from evmp.job import Job
    from evmp.model import Model
    from evmp.model.package import ModelPackage

log = logging.getLogger(__name__)

MAX_LOGGED: Final = 10  # tracebacks of failing rows, per process


class Predictor:
    """Turns batches of `pixels` into rows of `results`.

    Args:
        job, package: which model, on which device, with which options.
        gpu: the one to use, as CUDA_VISIBLE_DEVICES names it; empty for the CPU.
        pixels, results: the rings around it.
        seat, number: where to count, and as whom to claim.
    """

    def __init__(
        self,
        job: Job,
        package: ModelPackage,
        gpu: str,
        pixels: Ring,
        results: Ring,
        seat: Seat,
        number: int,
    ) -> None:
        self._job, self._package, self._gpu = job, package, gpu
        self._pixels, self._results = pixels, results
        self._seat, self._number = seat, number
        self._n_logged = 0
        self._model: Model
        self._head: Head

    def open(self) -> None:
        """Load the model, run it once on zeros, and let the head check what comes out."""
        # CUDA reads this at its start, which is later: this process sees its own GPU only.
        os.environ["CUDA_VISIBLE_DEVICES"] = self._gpu
        from evmp.head import open_head
        from evmp.model import open_model

        self._head = open_head(self._package, self._job)
        self._model = open_model(
            self._package,
            self._job.device if self._gpu or self._job.device == "cuda" else "cpu",
            self._pixels.n_rows,
            self._job.torch_threads,
            self._job.cpu_batch_size,
        )
        self._head.check(self._model.warm_up())
        self._pixels.populate(self._pixels.row_bytes)
        self._results.populate(1)

    def run(self) -> None:
        """Predict until the pixel ring has drained."""
        shape = (self._pixels.n_rows, self._package.input.height, self._package.input.width, 3)
        for seq in claims(self._pixels, self._seat, self._number):
            rows = self._pixels.rows(seq)
            frames = np.frombuffer(self._pixels.batch(seq), np.uint8).reshape(shape)
            todo = [n for n in rows if not self._results.is_done(n)]
            has_killed = self._pixels.peek(seq)[2] > 0
            step = 1 if has_killed else self._model.rows_at_once
            for start in range(0, len(todo), step):
                self._predict_all(frames, rows, todo[start : start + step])
                self._seat.enter(State.BUSY)
            self._pixels.release(seq, self._number)

    def _predict_all(self, frames: np.ndarray, rows: range, todo: Sequence[int]) -> None:
        """Predict the rows `todo` of a batch, at once if that goes well."""
        if len(todo) > 1:
            with suppress(Exception):
                self._predict(frames, rows, todo)
                return
        for n in todo:
            self._predict_one(frames, rows, n)

    def _predict_one(self, frames: np.ndarray, rows: range, n: int) -> None:
        if self._results.is_done(n):
            return
        try:
            self._predict(frames, rows, [n])
        except Exception as error:
            self._log(n)
            message = f"{type(error).__name__}: {error}"
            put_failure(self._results, n, self._pixels.header(n).row, "predict", message)
            self._seat.add(Counter.FAILED, 1)

    def _predict(self, frames: np.ndarray, rows: range, todo: Sequence[int]) -> None:
        headers = [self._pixels.header(n) for n in todo]
        outputs = self._model.predict(frames, [n - rows.start for n in todo])
        results = self._head.results(outputs, [(h.height, h.width) for h in headers])
        for n, header, result in zip(todo, headers, results, strict=True):
            self._put(n, header.row, result)

    def _put(self, n: int, row: int, result: bytes) -> None:
        room = self._results.room(n)
        if len(result) > room:
            message = f"result of {len(result)} bytes does not fit the {room} that a row may have"
            put_failure(self._results, n, row, "predict", message)
            return
        self._results.put(n, Header(row, mark=Mark.DATA), result)
        self._seat.add(Counter.ROWS, 1)
        self._seat.add(Counter.BYTES, len(result))

    def _log(self, n: int) -> None:
        self._n_logged += 1
        if self._n_logged <= MAX_LOGGED:
            log.warning("row %d failed", self._pixels.header(n).row, exc_info=True)
