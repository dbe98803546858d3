"""The wiring of one worker: which stages, how many, which ring between.

    reader ─► payload ring ─► decoders ─► pixel ring ─► predictors ─► result ring ─► writer

A worker is a process group: this process, which supervises, and its stages. Everything here happens
in the worker's own process, after the job has forked it.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from evmp import _native, logs, machine
from evmp.decoder import Decoder
from evmp.engine import FrameEngine
from evmp.errors import ConfigError, EvmpError, Interrupted
from evmp.fit import Fit
from evmp.ledger import Block, Ledger
from evmp.metrics import Counter, Leave, Seat, State
from evmp.placement import cpus_of, gpus_of, uses_gpu
from evmp.predictor import Predictor
from evmp.reader import Reader
from evmp.ring import Mark, Ring
from evmp.stage import Stage, put_failure, run_stage
from evmp.supervisor import Post, Supervisor
from evmp.writer import Writer
from evmp.zygote import Zygote

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.key import KeyField
    from evmp.model.package import ModelPackage

GRACE_SECONDS: Final = 0.5  # stages hold nothing that a kill could lose
TYPICAL_PAYLOAD_BYTES: Final = 256 << 10  # memory of a payload slot that is faulted in at start
SPARE_RESULT_BYTES: Final = 1 << 20  # what a model says of a small image need not be small
# Memory of a process's own, somewhat less than was measured (bench/bench_start.py): of a light
# stage, of torch, once for all predictors, and of a predictor without the weights.
STAGE_BYTES: Final = 15 << 20
TORCH_BYTES: Final = 200 << 20
PREDICTOR_BYTES: Final = 40 << 20
MAX_SEATS: Final = 250
_CHILDREN: Final = ("reader", "decoder", "zygote", "writer")  # of a worker; a zygote has its own
MAX_ADDRESS_BYTES: Final = 1 << 45  # of the 2^47 that a process has on most machines


@dataclass(frozen=True, slots=True)
class Layout:
    """How many processes a worker has, and how large its rings are. Counts are per worker.

    Attributes:
        n_decoders, n_predictors: processes.
        n_payloads: rows in the first ring.
        n_pixel_batches, n_result_batches: batches in the others.
        batch_rows: rows of a batch.
        pixel_bytes: of a row in the pixel ring.
        result_bytes: address space of a row in the last ring.
        payload_bytes: address space of a row in the first.
        weights_bytes: of the model's files.
    """

    n_decoders: int
    n_predictors: int
    n_payloads: int
    n_pixel_batches: int
    n_result_batches: int
    batch_rows: int
    pixel_bytes: int
    payload_bytes: int
    result_bytes: int
    weights_bytes: int

    @property
    def roles(self) -> list[str]:
        """The seats of a worker, in order."""
        decoders = ["decoder"] * self.n_decoders
        predictors = ["predictor"] * self.n_predictors
        return ["worker", "reader", *decoders, "zygote", *predictors, "writer"]

    @property
    def memory_bytes(self) -> int:
        """Shared memory that the worker's rings usually take."""
        pixels = self.n_pixel_batches * self.batch_rows * self.pixel_bytes
        results = self.n_result_batches * self.batch_rows * 16384
        return self.n_payloads * TYPICAL_PAYLOAD_BYTES + pixels + results

    @property
    def process_bytes(self) -> int:
        """Memory that the worker's processes have at least of their own."""
        predictors = PREDICTOR_BYTES + self.weights_bytes
        n_light = 3 + self.n_decoders
        return n_light * STAGE_BYTES + TORCH_BYTES + self.n_predictors * predictors

    @property
    def address_bytes(self) -> int:
        """Address space that the worker's rings take; most of it is never touched."""
        results = self.n_result_batches * self.batch_rows * self.result_bytes
        return self.n_payloads * self.payload_bytes + results


def plan_layout(job: Job, package: ModelPackage) -> Layout:
    """Size a worker.

    Raises:
        ConfigError: when it would have too many processes, or not fit into memory.
    """
    n_decoders = job.preprocess_thread_num
    n_predictors, n_in_flight = job.predict_thread_num, 1
    if uses_gpu(job):
        n_predictors, n_in_flight = len(gpus_of(job, 0)) or 1, job.predict_thread_num
    if n_decoders + n_predictors > MAX_SEATS:
        raise ConfigError(
            f"a worker of {n_decoders} decoders and {n_predictors} predictors has too many "
            f"processes, expected at most {MAX_SEATS}; raise num_worker instead"
        )
    batch = job.batch_size
    n_result_batches = job.queue_size // batch
    wanted = (n_in_flight + 1) * n_predictors + 2 + -(-n_decoders // batch) + 32 // batch
    layout = Layout(
        n_decoders=n_decoders,
        n_predictors=n_predictors,
        n_payloads=max(2, min(job.queue_size, 4 * n_decoders + 16)),
        n_pixel_batches=min(n_result_batches, wanted),
        n_result_batches=n_result_batches,
        batch_rows=batch,
        pixel_bytes=package.input.height * package.input.width * 3,
        payload_bytes=_whole_pages(job.max_row_bytes),
        result_bytes=_whole_pages(2 * job.max_row_bytes + SPARE_RESULT_BYTES),
        weights_bytes=sum(file.stat().st_size for file in package.files),
    )
    _check_memory(job, layout)
    return layout


def _check_memory(job: Job, layout: Layout) -> None:
    if layout.address_bytes > MAX_ADDRESS_BYTES:
        raise ConfigError(
            f"queue_size {job.queue_size} times max_row_bytes {job.max_row_bytes} is more address "
            "space than a process has; lower one of them"
        )
    rings, processes = layout.memory_bytes * job.num_worker, layout.process_bytes * job.num_worker
    have = job.memory_limit_bytes or machine.memory_bytes()
    if rings + processes > have:
        raise ConfigError(
            f"the rings of {job.num_worker} workers need {rings >> 20} MiB of shared memory and "
            f"their processes at least {processes >> 20} MiB, but there are {have >> 20} MiB; "
            f"lower batch_size ({job.batch_size}), queue_size ({job.queue_size}), "
            f"predict_thread_num ({job.predict_thread_num}) or num_worker"
        )


def _whole_pages(n_bytes: int) -> int:
    return -(-n_bytes // 4096) * 4096


class Worker:
    """One worker's shard of a job.

    Args:
        index: which worker, from 0.
        job, package, layout: what to run, and with how many processes.
        ledger: where the results go.
        keys: the input's key columns.
        seats: of this worker, by layout.roles.
        todo: gives the blocks that are still to do, when the worker starts.
        finish: called when they are done.
        rows: the rows of the input that blocks count, ascending.
    """

    def __init__(
        self,
        index: int,
        job: Job,
        package: ModelPackage,
        layout: Layout,
        ledger: Ledger,
        keys: tuple[KeyField, ...],
        seats: Sequence[Seat],
        todo: Callable[[], list[Block]],
        finish: Callable[[], None] = lambda: None,
        rows: Sequence[int] = range(sys.maxsize),
    ) -> None:
        self._index = index
        self._parent = os.getpid()
        self._job, self._package, self._layout = job, package, layout
        self._ledger, self._keys = ledger, keys
        self._seats, self._own = seats, seats[0]
        self._todo, self._finish, self._rows = todo, finish, rows
        self._payload: Ring
        self._pixels: Ring
        self._results: Ring

    def run(self) -> int:
        """Live the life of a worker's process. Returns its exit code."""
        _native.die_with_parent()
        if os.getppid() != self._parent:  # it has died before the kernel knew of the wish
            return 1
        _native.adopt_orphans()
        _native.set_process_name(self._own.process_name)
        os.sched_setaffinity(0, cpus_of(self._job, self._index))
        try:
            self._supervise()
            if not self.is_draining():
                self._finish()
        except EvmpError as error:
            if not self.is_draining():
                words = {"error": type(error).__name__, "message": str(error)}
                self._own.set_last_words(words)
            return error.exit_code
        return 0

    def rehearse(self, blocks: list[Block]) -> Ring:
        """Run the stages but the writer one after the other, in this process, over few rows.

        Returns: the result ring.
        """
        for role, stage in self.stages(blocks):
            if role != "writer":
                stage.open()
                stage.run()
        return self._results

    def stages(self, blocks: list[Block]) -> Iterator[tuple[str, Stage]]:
        """Yield one stage of each role in the order of the flow, to be run in this process.

        One runs after the other, so that each ring must have room for all rows.
        """
        self._make_rings()
        for role, make in self._stages(blocks).items():
            yield role, make(self._layout.roles.index(role))

    def is_draining(self) -> bool:
        """Return whether the worker shall finish what it holds and leave."""
        return self._own.counters[Counter.LEAVE] != Leave.NOT

    def _make_rings(self) -> None:
        try:
            self._map_rings()
        except OSError as error:
            raise ConfigError(
                f"the rings need {self._layout.address_bytes >> 30} GiB of address space, and the "
                f"system gives no more: {error.strerror}; lower max_row_bytes or queue_size, or "
                "raise `ulimit -v`"
            ) from error

    def _map_rings(self) -> None:
        layout = self._layout
        self._payload = Ring("payload", layout.n_payloads, 1, layout.payload_bytes)
        self._pixels = Ring("pixels", layout.n_pixel_batches, layout.batch_rows, layout.pixel_bytes)
        self._results = Ring(
            "results", layout.n_result_batches, layout.batch_rows, layout.result_bytes
        )

    def _supervise(self) -> None:
        self._make_rings()
        Supervisor(
            self._posts(self._todo()),
            stall_seconds=self._job.stall_timeout_seconds,
            progress=self._progress,
            drain=self._drain,
            stop=self._stop,
            tick=self._tick,
            grace_seconds=GRACE_SECONDS,
            emit=logs.say,
        ).run()

    # --- the stages ---------------------------------------------------------------------------

    def _posts(self, blocks: list[Block]) -> list[Post]:
        make = self._stages(blocks)
        make["zygote"] = lambda number: Zygote(
            self._package,
            self._posts_of("predictor", make),
            self._seats[number],
            stall_seconds=self._job.stall_timeout_seconds,
            progress=self._progress,
        )
        return [post for role in _CHILDREN for post in self._posts_of(role, make)]

    def _posts_of(self, role: str, make: Mapping[str, Callable[[int], Stage]]) -> list[Post]:
        """Return the posts of a role, for the process that is to fill them."""
        return [self._post(number, make[role]) for number in self._numbers(role)]

    def _numbers(self, role: str) -> list[int]:
        return [number for number, seat in enumerate(self._seats) if seat.role == role]

    def _stages(self, blocks: list[Block]) -> dict[str, Callable[[int], Stage]]:
        """Return what makes the stage of a role, given its seat's number."""
        run = uuid.uuid4().hex
        return {
            "reader": lambda number: Reader(
                self._job,
                blocks,
                self._rows,
                (self._payload, self._pixels, self._results),
                self._seats[number],
                self.is_draining,
            ),
            "decoder": lambda number: Decoder(
                self._job,
                Fit(self._package.input),
                self._payload,
                self._pixels,
                self._results,
                self._seats[number],
                number,
            ),
            "predictor": lambda number: Predictor(
                FrameEngine(
                    self._job, self._package, self._gpu_of(number), self._layout.batch_rows
                ),
                self._pixels,
                self._results,
                self._seats[number],
                number,
            ),
            "writer": lambda number: Writer(
                self._job,
                self._keys,
                self._ledger,
                blocks,
                self._rows,
                run,
                self._results,
                self._seats[number],
                number,
            ),
        }

    def _gpu_of(self, number: int) -> str:
        gpus = gpus_of(self._job, self._index)
        return gpus[self._seats[number].ordinal] if gpus else ""

    def _post(self, number: int, make: Callable[[int], Stage]) -> Post:
        seat, parent = self._seats[number], os.getpid()
        return Post(
            seat=seat,
            run=lambda: run_stage(make(number), seat, parent),
            settle=lambda cause: self._settle(number, cause),
            has_children=seat.role == "zygote",
        )

    # --- after a death ------------------------------------------------------------------------

    def _settle(self, number: int, cause: str) -> None:
        """Settle what the dead process of a seat held, before the seat is filled again."""
        role = self._seats[number].role
        n_failed = 0
        if role == "decoder":
            n_failed = self._payload.recover(
                number, self._pixels.is_done, lambda n: self._give_up(n, role, cause)
            )
        elif role == "predictor":
            n_failed = self._pixels.recover(
                number, self._results.is_done, lambda n: self._give_up(n, role, cause)
            )
        elif role == "zygote":
            for predictor in self._numbers("predictor"):  # none of their rows is to blame
                self._pixels.recover(predictor, self._results.is_done, None)
        elif role == "writer":
            self._results.recover(number, lambda n: False, None)
        self._seats[number].add(Counter.GIVEN_UP, n_failed)
        for ring in (self._payload, self._pixels, self._results):
            ring.wake()

    def _give_up(self, n: int, role: str, cause: str) -> None:
        header = (self._payload if role == "decoder" else self._pixels).header(n)
        stage = "decode" if role == "decoder" else "predict"
        if header.mark == Mark.EMPTY:
            self._results.skip(n, header.row)
        message = f"the {role} died of this row: {cause}"
        put_failure(self._results, n, header.row, stage, message)
        self._pixels.skip(n, header.row)

    # --- supervision --------------------------------------------------------------------------

    def _progress(self) -> int:
        writer = self._seats[-1].counters
        given_up = sum(seat.counters[Counter.GIVEN_UP] for seat in self._seats)
        return writer[Counter.ROWS] + given_up

    def _drain(self) -> None:
        self._own.counters[Counter.LEAVE] = Leave.DRAINED

    def _stop(self) -> None:
        for ring in (self._payload, self._pixels, self._results):
            ring.stop()

    def _tick(self) -> None:
        self._own.enter(State.WAITING)
        if self._own.counters[Counter.LEAVE] == Leave.AT_ONCE:
            raise Interrupted(signal.SIGTERM)
        for i, ring in enumerate((self._payload, self._pixels, self._results)):
            self._own.counters[Counter.FILL + i] = round(1000 * ring.fill)
