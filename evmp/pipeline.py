"""The wiring of one worker: which stages, how many, which ring between.

    reader ─► payload ring ─► decoders ─► pixel ring ─► predictors ─► result ring ─► writer

Over videos, a scout comes before the decoders, and a ring of segments between them.

Where users' code takes part, the ring behind the decoders holds samples, and so do those behind
each link of a chain of processes, which stands between decoders and predictors.

A worker is a process group: this process, which supervises, and its stages. Everything here happens
in the worker's own process, after the job has forked it.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Final

from evmp import _native, logs
from evmp.agenda import Agenda
from evmp.custom import Caller
from evmp.decoder import Decoder
from evmp.engine import Engine, FrameEngine
from evmp.errors import ConfigError, EvmpError, Interrupted
from evmp.fit import Fit
from evmp.grid import Block
from evmp.keeper import Keeper
from evmp.layout import Layout, uses_samples
from evmp.lease import Leases
from evmp.ledger import Ledger
from evmp.metrics import Counter, Leave, Seat, State
from evmp.outputdir import OutputFiles
from evmp.placement import cpus_of, gpus_of
from evmp.predictor import Predictor
from evmp.processor import Processor
from evmp.reader import Reader
from evmp.ring import Mark, Ring
from evmp.sampleengine import CustomPredictor, ImagePredictor, SampleEngine, SamplePredictor
from evmp.scout import Scout, mark_failed
from evmp.stage import Stage, put_failure, run_stage
from evmp.supervisor import Post, Supervisor
from evmp.textpredictor import TextPredictor
from evmp.video.spool import Spool
from evmp.video.task import give_up, rows_of
from evmp.videodecoder import VideoDecoder
from evmp.writer import Writer
from evmp.zygote import Zygote

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.model.package import ModelPackage
    from evmp.source import SourceInfo
    from evmp.value import ProcessConfig

GRACE_SECONDS: Final = 0.5  # stages hold nothing that a kill could lose
# Of a worker; a zygote has its own.
_CHILDREN: Final = ("keeper", "reader", "scout", "decoder", "process", "zygote", "writer")


class _AllDone(EvmpError):
    """Others have committed what is still in flight here."""


class Worker:
    """One worker's shard of a job.

    Args:
        index: which worker, from 0.
        job, package, layout: what to run, and with how many processes.
        ledger: where the results go.
        source: the input, as it was when the job was planned.
        seats: of this worker, by layout.roles.
        todo: gives the blocks that are still to do, when the worker starts.
        finish: called when they are done.
        rows: the rows of the input that blocks count, ascending.
        code: the folder with the user's code, where there is some.
        lease: makes the leases of a worker of that name, where workers take any block; `todo` is
            not asked then.
    """

    def __init__(
        self,
        index: int,
        job: Job,
        package: ModelPackage | None,
        layout: Layout,
        ledger: Ledger,
        source: SourceInfo,
        seats: Sequence[Seat],
        todo: Callable[[], list[Block]],
        finish: Callable[[], None] = lambda: None,
        rows: Sequence[int] = range(sys.maxsize),
        code: Path | None = None,
        lease: Callable[[str], Leases] | None = None,
    ) -> None:
        self._index = index
        self._parent = os.getpid()
        self._job, self._package, self._layout = job, package, layout
        self._ledger, self._source = ledger, source
        self._seats, self._own = seats, seats[0]
        self._todo, self._finish, self._rows = todo, finish, rows
        self._caller, self._lease = Caller(code), lease
        self._agenda: Agenda
        self._rings: list[Ring]
        self._spool: Spool
        self._most_items = 0  # all

    def run(self) -> int:
        """Live the life of a worker's process. Returns its exit code."""
        _native.die_with_parent()
        if os.getppid() != self._parent:  # it has died before the kernel knew of the wish
            return 1
        _native.adopt_orphans()
        _native.set_process_name(self._own.process_name)
        os.sched_setaffinity(0, cpus_of(self._job, self._index))
        try:
            with suppress(_AllDone):
                self._supervise()
            if not self.is_draining():
                self._finish()
        except EvmpError as error:
            if not self.is_draining():
                words = {"error": type(error).__name__, "message": str(error)}
                self._own.set_last_words(words)
            return error.exit_code
        return 0

    def rehearse(self, blocks: list[Block], most_items: int) -> Ring:
        """Run the stages but the writer one after the other, in this process, over few rows.

        Args:
            most_items: frames or clips of each video.

        Returns: the result ring.
        """
        self._most_items = most_items
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
        make, last = self._stages(Agenda.of(blocks)), (-1, "")
        for number, seat in enumerate(self._seats):
            here = self._hop_of(number), seat.role
            if seat.role in make and here != last:
                yield seat.role, make[seat.role](number)
                last = here

    def is_draining(self) -> bool:
        """Return whether the worker shall finish what it holds and leave."""
        return self._leave() != Leave.NOT

    def _leave(self) -> Leave:
        return Leave(self._own.counters[Counter.LEAVE])

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
        if self._job.is_input_video:
            rows, segments, *_ = self._rings
            self._spool = Spool(segments.n_slots, rows.row_bytes)

    def _supervise(self) -> None:
        self._make_rings()
        self._agenda = Agenda() if self._lease else Agenda.of(self._todo())
        Supervisor(
            self._posts(self._agenda),
            stall_seconds=self._job.stall_timeout_seconds,
            progress=self._progress,
            drain=self._drain,
            stop=self._stop,
            tick=self._tick,
            grace_seconds=GRACE_SECONDS,
            emit=logs.say,
        ).run()

    # --- the stages ---------------------------------------------------------------------------

    def _posts(self, agenda: Agenda) -> list[Post]:
        make = self._stages(agenda)
        make["zygote"] = lambda number: Zygote(
            self._package,
            self._posts_of("predictor", make),
            self._seats[number],
            stall_seconds=self._job.stall_timeout_seconds,
            progress=self._progress,
        )
        return [post for role in _CHILDREN if role in make for post in self._posts_of(role, make)]

    def _posts_of(self, role: str, make: Mapping[str, Callable[[int], Stage]]) -> list[Post]:
        """Return the posts of a role, for the process that is to fill them."""
        return [self._post(number, make[role]) for number in self._numbers(role)]

    def _numbers(self, role: str) -> list[int]:
        return [number for number, seat in enumerate(self._seats) if seat.role == role]

    def _stages(self, agenda: Agenda) -> dict[str, Callable[[int], Stage]]:
        """Return what makes the stage of a role, given its seat's number."""
        run = uuid.uuid4().hex
        stages: dict[str, Callable[[int], Stage]] = {
            "reader": lambda number: Reader(
                self._job,
                self._source,
                agenda,
                self._rows,
                self._rings[:1] if self._job.is_input_video else self._rings,
                self._seats[number],
                self.is_draining,
            ),
            "scout": lambda number: Scout(
                self._job,
                self._rings,
                self._spool,
                self._seats[number],
                number,
                self.is_draining,
                self._most_items,
            ),
            "decoder": self._decoder,
            "process": lambda number: Processor(
                self._caller,
                self._link_of(number),
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
                self._source.keys,
                self._ledger,
                agenda,
                self._rows,
                run,
                self._rings[-1],
                self._seats[number],
                number,
            ),
        }
        if lease := self._lease:
            stages["keeper"] = lambda number: Keeper(
                lease(run), agenda, self._seats[number], self._seats[-1], self._leave
            )
        return stages

    def _decoder(self, number: int) -> Stage:
        fit, seat = None if uses_samples(self._job) else self._fit(), self._seats[number]
        if self._job.is_input_video:
            _, segments, *later = self._rings
            return VideoDecoder(self._job, fit, segments, later, self._spool, seat, number)
        before, after = self._rings_around(number)
        return Decoder(self._job, fit, before, after, self._rings[-1], seat, number)

    def _hop_of(self, number: int) -> int:
        """Return which ring the process of a seat takes rows from; -1 for one that takes none."""
        seat = self._seats[number]
        if seat.role == "process":
            links = accumulate(self._layout.n_processes)
            return self._first_link + sum(seat.ordinal >= stop for stop in links)
        n_rings, decoders = len(self._layout.hops), self._first_link - 1
        hops = {"scout": 0, "decoder": decoders, "predictor": n_rings - 2, "writer": n_rings - 1}
        return hops.get(seat.role, -1)

    @property
    def _first_link(self) -> int:
        """The ring behind the decoders."""
        return 2 if self._job.is_input_video else 1

    def _link_of(self, number: int) -> ProcessConfig:
        """Return which of the user's processes a seat is for."""
        return self._job.user_process_config[self._hop_of(number) - self._first_link]

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
        return OutputFiles(self._job, self._ledger, self._source.keys, self._rings[-1])

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
        is_video = self._job.is_input_video and seat.role in ("scout", "decoder")
        put_error = self._give_up_video if is_video else self._give_up
        fail = None if is_at_none else lambda n: put_error(n, number, cause)
        self._recover(number, fail, at)

    def _recover(
        self, number: int, fail: Callable[[int], object] | None, at: int | None = None
    ) -> None:
        before, after = self._rings_around(number)
        if self._job.is_input_video and self._seats[number].role in ("scout", "decoder"):
            n_failed = self._recover_video(number, fail, at)
        else:
            n_failed = before.recover(number, after.is_done, fail, at)
        self._seats[number].add(Counter.GIVEN_UP, n_failed)

    def _recover_video(
        self, number: int, fail: Callable[[int], object] | None, at: int | None
    ) -> int:
        """Settle what a process held whose rows become others, which are numbered anew."""
        rows, segments, after, *_ = self._rings
        if self._seats[number].role == "scout":
            return rows.recover(number, lambda r: False, fail, reached=lambda r: segments.published)

        def first_open(m: int) -> int:
            items = rows_of(segments.header(m))
            return next((n for n in items if not after.is_done(n)), items.stop)

        def is_done(m: int) -> bool:
            return first_open(m) == segments.header(m).next

        return segments.recover(number, is_done, fail, at, reached=first_open)

    def _give_up_video(self, n: int, number: int, cause: str) -> bool:
        """Mark a video, or a segment of one, that has killed whoever took it; its next claimer
        makes it an error."""
        role = self._seats[number].role
        message = f"the {role} died of this {'video' if role == 'scout' else 'segment'}: {cause}"
        if role == "scout":
            mark_failed(self._rings[0], n, message)
        else:
            give_up(self._rings[1], n, "decode", message)
        return True

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
            link = self._link_of(number)
            role = f"process {link.job_name or link.user_process_cls}"
        put_failure(results, n, header.row, stage, f"the {role} died of this row: {cause}")
        after.skip(n, header.row)

    # --- supervision --------------------------------------------------------------------------

    def _progress(self) -> int:
        writer = self._seats[-1].counters
        given_up = sum(seat.counters[Counter.GIVEN_UP] for seat in self._seats)
        return writer[Counter.ROWS] + writer[Counter.ITEMS] + given_up

    def _drain(self) -> None:
        self._own.counters[Counter.LEAVE] = Leave.DRAINED

    def _stop(self) -> None:
        for ring in self._rings:
            ring.stop()

    def _tick(self) -> None:
        self._own.enter(State.WAITING)
        if self._own.counters[Counter.LEAVE] == Leave.AT_ONCE:
            raise Interrupted(signal.SIGTERM)
        if self._agenda.is_over:
            raise _AllDone
        for i, ring in enumerate(self._rings):
            self._own.counters[Counter.FILL + i] = round(1000 * ring.fill)
