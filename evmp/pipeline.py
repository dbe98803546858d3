"""The wiring of one worker: which stages, how many, which ring between.

    reader ─► payload ring ─► decoders ─► pixel ring ─► predictors ─► result ring ─► writer

Where users' code takes part, the ring behind the decoders holds samples, and so do those behind
each link of a chain of processes, which stands between decoders and predictors.

A worker is a process group: this process, which supervises, and its stages. Everything here happens
in the worker's own process, after the job has forked it.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Final

from evmp import _native, logs, machine
from evmp.custom import Caller
from evmp.decoder import Decoder
from evmp.engine import Engine, FrameEngine
from evmp.errors import ConfigError, EvmpError, Interrupted
from evmp.fit import Fit
from evmp.ledger import Block, Ledger
from evmp.metrics import Counter, Leave, Seat, State
from evmp.outputdir import OutputFiles
from evmp.placement import cpus_of, gpus_of, uses_gpu
from evmp.predictor import Predictor
from evmp.processor import Processor
from evmp.reader import Reader
from evmp.ring import Mark, Ring
from evmp.rule import TEAM, has_custom_code
from evmp.sampleengine import CustomPredictor, ImagePredictor, SampleEngine, SamplePredictor
from evmp.stage import Stage, put_failure, run_stage
from evmp.supervisor import Post, Supervisor
from evmp.textpredictor import TextPredictor
from evmp.writer import Writer
from evmp.zygote import Zygote

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.key import KeyField
    from evmp.model.package import ModelPackage

GRACE_SECONDS: Final = 0.5  # stages hold nothing that a kill could lose
TYPICAL_PAYLOAD_BYTES: Final = 256 << 10  # memory of a payload slot that is faulted in at start
TYPICAL_SAMPLE_BYTES: Final = 3 << 20  # of a sample: a picture of a million pixels
TYPICAL_RESULT_BYTES: Final = 16 << 10
SPARE_RESULT_BYTES: Final = 1 << 20  # what a model says of a small image need not be small
# Memory of a process's own, somewhat less than was measured (bench/bench_start.py): of a light
# stage, of torch, once for all predictors, and of a predictor without the weights.
STAGE_BYTES: Final = 15 << 20
TORCH_BYTES: Final = 200 << 20
PREDICTOR_BYTES: Final = 40 << 20
MAX_SEATS: Final = 250
# Of a worker; a zygote has its own.
_CHILDREN: Final = ("reader", "decoder", "process", "zygote", "writer")
MAX_ADDRESS_BYTES: Final = 1 << 45  # of the 2^47 that a process has on most machines


@dataclass(frozen=True, slots=True)
class Hop:
    """A ring of a worker, before it is made.

    Attributes:
        n_batches: that fit at once.
        batch_rows: rows of a batch.
        row_bytes: address space of a row.
        usual_bytes: memory that a row usually takes.
    """

    name: str
    n_batches: int
    batch_rows: int
    row_bytes: int
    usual_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How many processes a worker has, and how large its rings are. Counts are per worker.

    Attributes:
        n_decoders, n_predictors: processes.
        n_processes: of each link of `user_process_config`.
        hops: the rings, in the order of the flow.
        own_bytes: memory that a predictor takes at least, the others being small.
    """

    n_decoders: int
    n_processes: tuple[int, ...]
    n_predictors: int
    hops: tuple[Hop, ...]
    own_bytes: int

    @property
    def roles(self) -> list[str]:
        """The seats of a worker, in order."""
        decoders = ["decoder"] * self.n_decoders
        processes = ["process"] * sum(self.n_processes)
        predictors = ["predictor"] * self.n_predictors
        return ["worker", "reader", *decoders, *processes, "zygote", *predictors, "writer"]

    @property
    def batch_rows(self) -> int:
        """Rows that a predictor gets at once."""
        return self.hops[-1].batch_rows

    @property
    def memory_bytes(self) -> int:
        """Shared memory that the worker's rings usually take."""
        return sum(hop.n_batches * hop.batch_rows * hop.usual_bytes for hop in self.hops)

    @property
    def process_bytes(self) -> int:
        """Memory that the worker's processes have at least of their own."""
        n_light = 3 + self.n_decoders + sum(self.n_processes)
        return n_light * STAGE_BYTES + TORCH_BYTES + self.n_predictors * self.own_bytes

    @property
    def address_bytes(self) -> int:
        """Address space that the worker's rings take; most of it is never touched."""
        return sum(hop.n_batches * hop.batch_rows * hop.row_bytes for hop in self.hops)

    def holding(self, n_rows: int) -> Layout:
        """Return the same with rings that hold so many rows, though no stage took any off."""
        whole = math.lcm(*(hop.batch_rows for hop in self.hops))
        n_rows = (n_rows // whole + 1) * whole
        hops = (
            replace(hop, n_batches=max(hop.n_batches, n_rows // hop.batch_rows))
            for hop in self.hops
        )
        return replace(self, hops=tuple(hops))


def plan_layout(job: Job, package: ModelPackage | None) -> Layout:
    """Size a worker.

    Args:
        package: the model's; None where the user's predictor opens it.

    Raises:
        ConfigError: when it would have too many processes, or not fit into memory.
    """
    n_decoders = job.preprocess_thread_num
    n_processes = tuple(process.num_threads for process in job.user_process_config)
    n_predictors, n_in_flight = job.predict_thread_num, 1
    if uses_gpu(job):
        n_predictors, n_in_flight = len(gpus_of(job, 0)) or 1, job.predict_thread_num
    if n_decoders + sum(n_processes) + n_predictors > MAX_SEATS:
        processes = f", {sum(n_processes)} processes of your own" if n_processes else ""
        raise ConfigError(
            f"a worker of {n_decoders} decoders{processes} and {n_predictors} predictors has too "
            f"many processes, expected at most {MAX_SEATS}; raise num_worker instead"
        )
    layout = Layout(
        n_decoders=n_decoders,
        n_processes=n_processes,
        n_predictors=n_predictors,
        hops=_hops(job, package, n_predictors, n_in_flight),
        own_bytes=PREDICTOR_BYTES + _size(package.files if package else ()),
    )
    _check_memory(job, layout)
    return layout


def _size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def uses_samples(job: Job) -> bool:
    """Return whether whole samples pass through the worker, and not the model's input."""
    return has_custom_code(job) or job.model_type == TEAM


def _hops(
    job: Job, package: ModelPackage | None, n_predictors: int, n_in_flight: int
) -> tuple[Hop, ...]:
    """Size the rings. Each is named after what it holds."""
    n_decoders, queue = job.preprocess_thread_num, job.queue_size
    payload_bytes = _whole_pages(job.max_row_bytes)
    n_payloads = max(2, min(queue, 4 * n_decoders + 16 + _n_downloads(job)))
    hops = [Hop("payloads", n_payloads, 1, payload_bytes, TYPICAL_PAYLOAD_BYTES)]
    if package is not None and not uses_samples(job):
        spec, batch = package.input, job.batch_size
        n_held = n_decoders + _n_downloads(job)
        wanted = (n_in_flight + 1) * n_predictors + 2 + -(-n_held // batch) + 32 // batch
        pixel_bytes = spec.height * spec.width * 3
        hops.append(Hop("pixels", min(queue // batch, wanted), batch, pixel_bytes, pixel_bytes))
    else:
        hops += _sample_hops(job, n_predictors)
    result_bytes = _whole_pages(2 * job.max_row_bytes + SPARE_RESULT_BYTES)
    n_results = queue // job.batch_size
    hops.append(Hop("results", n_results, job.batch_size, result_bytes, TYPICAL_RESULT_BYTES))
    return tuple(hops)


def _n_downloads(job: Job) -> int:
    """Return how many rows the decoders of a worker may hold while their files come."""
    if job.input_table and job.image_type == "base64":
        return 0
    return job.preprocess_thread_num * job.download_concurrency


def _sample_hops(job: Job, n_predictors: int) -> list[Hop]:
    """Size the rings before the links of a chain and before the predictors.

    Note [Batches of several sizes]
    The reader publishes a row when its place is free in every ring. A place becomes free when a
    batch is released, which may wait for batches of the rings before it, and these for rows that
    are not published yet. No ring may be so small that those are just the rows that its fullness
    keeps back: it must hold a batch of its own, and what the batches before may reach beyond.
    """
    row_bytes = _whole_pages(3 * job.max_image_pixels + 2 * job.max_row_bytes)
    links = [(it.num_threads, it.batch_size) for it in job.user_process_config]
    hops, before, n_before = list[Hop](), 1, job.preprocess_thread_num + _n_downloads(job)
    for n_consumers, batch in [*links, (n_predictors, job.batch_size)]:
        wanted = n_consumers + 2 + -(-n_before // batch)
        least = 1 - (math.gcd(before, batch) - before) // batch
        n_batches = max(least, min(job.queue_size // batch, wanted))
        name = f"samples{len(hops) + 1}" if hops else "samples"
        hops.append(Hop(name, n_batches, batch, row_bytes, TYPICAL_SAMPLE_BYTES))
        before, n_before = math.lcm(before, batch), n_consumers
    return hops


def _check_memory(job: Job, layout: Layout) -> None:
    if layout.address_bytes > MAX_ADDRESS_BYTES:
        raise ConfigError(
            f"queue_size {job.queue_size} times max_row_bytes {job.max_row_bytes} is more address "
            "space than a process has; lower one of them"
            + (", or max_image_pixels" if uses_samples(job) else "")
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
        code: the folder with the user's code, where there is some.
    """

    def __init__(
        self,
        index: int,
        job: Job,
        package: ModelPackage | None,
        layout: Layout,
        ledger: Ledger,
        keys: tuple[KeyField, ...],
        seats: Sequence[Seat],
        todo: Callable[[], list[Block]],
        finish: Callable[[], None] = lambda: None,
        rows: Sequence[int] = range(sys.maxsize),
        code: Path | None = None,
    ) -> None:
        self._index = index
        self._parent = os.getpid()
        self._job, self._package, self._layout = job, package, layout
        self._ledger, self._keys = ledger, keys
        self._seats, self._own = seats, seats[0]
        self._todo, self._finish, self._rows = todo, finish, rows
        self._caller = Caller(code)
        self._rings: list[Ring]

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
        return self._rings[-1]

    def stages(self, blocks: list[Block]) -> Iterator[tuple[str, Stage]]:
        """Yield one stage for each hop in the order of the flow, to be run in this process.

        One runs after the other, so that each ring must have room for all rows.
        """
        self._make_rings()
        make, last = self._stages(blocks), (-1, "")
        for number, seat in enumerate(self._seats):
            here = self._hop_of(number), seat.role
            if seat.role in make and here != last:
                yield seat.role, make[seat.role](number)
                last = here

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
        self._rings = [
            Ring(hop.name, hop.n_batches, hop.batch_rows, hop.row_bytes)
            for hop in self._layout.hops
        ]

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
                self._rings,
                self._seats[number],
                self.is_draining,
            ),
            "decoder": lambda number: Decoder(
                self._job,
                None if uses_samples(self._job) else self._fit(),
                *self._rings_around(number),
                self._rings[-1],
                self._seats[number],
                number,
            ),
            "process": lambda number: Processor(
                self._caller,
                self._job.user_process_config[self._hop_of(number) - 1],
                *self._rings_around(number),
                self._rings[-1],
                self._seats[number],
                number,
            ),
            "predictor": lambda number: Predictor(
                self._engine(number),
                *self._rings_around(number),
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
                self._rings[-1],
                self._seats[number],
                number,
            ),
        }

    def _hop_of(self, number: int) -> int:
        """Return which ring the process of a seat takes rows from; -1 for one that takes none."""
        seat = self._seats[number]
        if seat.role == "process":
            links = accumulate(self._layout.n_processes)
            return 1 + sum(seat.ordinal >= stop for stop in links)
        n_rings = len(self._layout.hops)
        return {"decoder": 0, "predictor": n_rings - 2, "writer": n_rings - 1}.get(seat.role, -1)

    def _rings_around(self, number: int) -> tuple[Ring, Ring]:
        """Return the rings that the process of a seat takes rows from, and hands them on to."""
        hop = self._hop_of(number)
        return self._rings[hop], self._rings[hop + 1]

    def _fit(self) -> Fit:
        assert self._package is not None
        return Fit(self._package.input)

    def _engine(self, number: int) -> Engine:
        gpu, seat = self._gpu_of(number), self._seats[number]
        if uses_samples(self._job):
            return SampleEngine(lambda: self._sample_predictor(gpu), lambda: seat.enter(State.BUSY))
        assert self._package is not None
        return FrameEngine(self._job, self._package, gpu, self._layout.batch_rows, self._maps())

    def _files(self) -> OutputFiles:
        return OutputFiles(self._job, self._ledger, self._keys, self._rings[-1])

    def _maps(self) -> OutputFiles | None:
        """Return where a segmentor's results go, if they are files."""
        return self._files() if self._job.segmentation_output == "png" else None

    def _sample_predictor(self, gpu: str) -> SamplePredictor:
        self._caller.enter(self._job.torch_threads)
        if self._package is None:
            return CustomPredictor(self._job, self._caller, gpu, self._files())
        rows = self._layout.batch_rows
        if self._package.parts:
            return TextPredictor(self._job, self._package, gpu, rows)
        return ImagePredictor(self._job, self._package, gpu, rows, self._maps())

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
            busy_seconds=self._job.process_timeout_seconds if self._is_custom(number) else 0.0,
        )

    def _is_custom(self, number: int) -> bool:
        """Return whether the process of a seat runs the user's code."""
        role = self._seats[number].role
        return role == "process" or (role == "predictor" and self._package is None)

    # --- after a death ------------------------------------------------------------------------

    def _settle(self, number: int, cause: str) -> None:
        """Settle what the dead process of a seat held, before the seat is filled again."""
        role = self._seats[number].role
        if role == "zygote":
            for predictor in self._numbers("predictor"):  # none of their rows is to blame
                self._recover(predictor, None)
        elif role == "writer":
            self._rings[-1].recover(number, lambda n: False, None)
        elif self._hop_of(number) >= 0:
            self._blame(number, cause)
        for ring in self._rings:
            ring.wake()

    def _blame(self, number: int, cause: str) -> None:
        """Settle what a process held that may have died of a row."""
        seat, at = self._seats[number], None
        if seat.role == "decoder":  # it holds rows that it is not at: their files are on the way
            at, seat.counters[Counter.AT] = seat.counters[Counter.AT] - 1, 0
        is_at_none = at is not None and at < 0
        fail = None if is_at_none else lambda n: self._give_up(n, number, cause)
        self._recover(number, fail, at)

    def _recover(
        self, number: int, fail: Callable[[int], None] | None, at: int | None = None
    ) -> None:
        before, after = self._rings_around(number)
        n_failed = before.recover(number, after.is_done, fail, at)
        self._seats[number].add(Counter.GIVEN_UP, n_failed)

    def _give_up(self, n: int, number: int, cause: str) -> None:
        """Make row n the error that it is, which has killed whoever took it."""
        role = self._seats[number].role
        before, after = self._rings_around(number)
        header, results = before.header(n), self._rings[-1]
        if header.mark == Mark.EMPTY:
            results.skip(n, header.row)
        if cause == "hung" and self._is_custom(number):
            limit = self._job.process_timeout_seconds
            cause = f"no answer within process_timeout_seconds, {limit:g}"
        stage = {"decoder": "decode", "predictor": "predict"}.get(role, role)
        if role == "process":
            link = self._job.user_process_config[self._hop_of(number) - 1]
            role = f"process {link.job_name or link.user_process_cls}"
        put_failure(results, n, header.row, stage, f"the {role} died of this row: {cause}")
        after.skip(n, header.row)

    # --- supervision --------------------------------------------------------------------------

    def _progress(self) -> int:
        writer = self._seats[-1].counters
        given_up = sum(seat.counters[Counter.GIVEN_UP] for seat in self._seats)
        return writer[Counter.ROWS] + given_up

    def _drain(self) -> None:
        self._own.counters[Counter.LEAVE] = Leave.DRAINED

    def _stop(self) -> None:
        for ring in self._rings:
            ring.stop()

    def _tick(self) -> None:
        self._own.enter(State.WAITING)
        if self._own.counters[Counter.LEAVE] == Leave.AT_ONCE:
            raise Interrupted(signal.SIGTERM)
        for i, ring in enumerate(self._rings):
            self._own.counters[Counter.FILL + i] = round(1000 * ring.fill)
