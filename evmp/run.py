"""A job from its start to its end, in the job's own process: plan, supervise, publish.

The plan is made anew at every start from what the ledger holds, so that running the same job again
resumes it, whatever has ended it before.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from evmp import _native, publish, resource
from evmp.asset import localize
from evmp.child import call_in_child
from evmp.errors import ConfigError, EvmpError, Interrupted, SinkError, TooManyFailures
from evmp.grid import Block, Grid
from evmp.job import MENDING
from evmp.layout import Layout, plan_layout
from evmp.lease import Leases
from evmp.ledger import SHOWN_SECONDS, Commit, differences, listed
from evmp.lock import Member
from evmp.metrics import Board, Counter, Leave, Seat
from evmp.model.package import ModelPackage, check_model_type, digests_of, load_package
from evmp.pipeline import Worker
from evmp.placement import shortages
from evmp.progress import Display, Meter
from evmp.rank import Rank
from evmp.report import Reasons, Report
from evmp.rule import CUSTOM
from evmp.sink import open_sink
from evmp.source import SourceInfo, open_source
from evmp.supervisor import Post, Supervisor
from evmp.target import Target, open_target

if TYPE_CHECKING:
    from evmp.job import Job

Settle = Callable[[str], None]

log = logging.getLogger(__name__)

GRACE_SECONDS: Final = 5.0  # a worker ends its own stages within less
EARLY_ROWS: Final = 1000  # from so many rows on, too many failures end the job
BLOCKS_PER_WORKER: Final = 8
MAX_BLOCK_ROWS: Final = 4096
MIN_BLOCK_ROWS: Final = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job means on this machine, with this input and this model.

    Attributes:
        package: the model's; None where the user's predictor opens it.
        block_rows: rows committed at once.
        fingerprint: what must be the same for a run to go on with the work of another.
        rank: the worker that this command is; None where it is all of them.
        copies: of keys whose values are elsewhere, where the copies are on this machine.
    """

    job: Job
    package: ModelPackage | None
    layout: Layout
    source: SourceInfo
    target: Target
    block_rows: int
    fingerprint: dict[str, Any]
    rank: Rank | None = None
    copies: Mapping[str, str] = field(default_factory=dict)

    @property
    def here(self) -> Job:
        """The job with the files, workers, CPUs and GPUs that it has on this machine."""
        job = self.job.model_copy(update=self.copies)
        return self.rank.fit(job) if self.rank else job

    def unpack_code(self, folder: Path) -> Path | None:
        """Unpack the user's code into a new folder within `folder`, and return that, if any.

        `folder` is made where it is missing.

        Raises:
            ConfigError: when that fails.
        """
        if not self.job.user_resource:
            return None
        folder.mkdir(exist_ok=True)
        resource.unpack(self.here.user_resource, folder / "code")
        return folder / "code"


def make_plan(job: Job, rank: Rank | None = None) -> Plan:
    """Look at the model package, the machine and the input; fetch what is elsewhere of them.

    Args:
        rank: the worker that this command is, if it is one.

    Raises:
        EvmpError: when the job cannot start; nothing has been written yet.
    """
    copies = call_in_child(lambda: localize(job))
    here = job.model_copy(update=copies)
    package = None if job.model_type == CUSTOM else load_package(here.model_path)
    if package is not None:
        check_model_type(package, job.model_type)
    layout = plan_layout(rank.fit(job) if rank else job, package)
    model: dict[str, Any] = {}
    code = (
        call_in_child(lambda: resource.fingerprint(here.user_resource)) if job.user_resource else {}
    )
    source = call_in_child(
        lambda: open_source(job).describe(),
        lambda: model.update(package.fingerprint() if package else digests_of(here.model_path)),
    )
    parts = {
        "input": source.fingerprint,
        "job": job.fingerprint(),
        "model": model,
        **({"code": code} if code else {}),
    }
    fingerprint = json.loads(json.dumps(parts))
    block_rows = choose_block_rows(job, source.n_rows, n_workers_of(job, rank))
    target = open_target(job, source.keys)
    return Plan(job, package, layout, source, target, block_rows, fingerprint, rank, copies)


def n_workers_of(job: Job, rank: Rank | None) -> int:
    """Return how many workers a job has, on all machines."""
    return rank.n_workers if rank else job.num_worker


def choose_block_rows(job: Job, n_rows: int, n_workers: int) -> int:
    """Return how many rows are committed at once, so that each worker has several blocks."""
    per_worker = -(-n_rows // (n_workers * BLOCKS_PER_WORKER))
    least = 1 if job.is_input_video else MIN_BLOCK_ROWS  # a video is worth committing by itself
    return job.block_rows or min(MAX_BLOCK_ROWS, max(least, per_worker))


class Run:
    """One run of a plan.

    Args:
        plan: what to do.
        display: where progress and logs go.
        fresh: forget what earlier runs have done, and replace their result.
        retry: do the failed rows of the finished result again, and replace them in it.
    """

    def __init__(
        self, plan: Plan, display: Display, *, fresh: bool = False, retry: bool = False
    ) -> None:
        self._plan, self._job, self._target = plan, plan.job, plan.target
        self._display, self._fresh, self._retry = display, fresh, retry
        self._rows: Sequence[int] = range(plan.source.n_rows)
        """Of the input, those that this run is about; blocks and commits count them."""
        self._block_rows, self._fingerprint = plan.block_rows, plan.fingerprint
        self._n_workers = n_workers_of(plan.job, plan.rank)
        self._is_dynamic = plan.job.enableDynamicCluster and not (fresh or retry)
        """Whether any worker, of any command, takes any block."""
        self._own = [plan.rank.worker] if plan.rank else list(range(self._n_workers))
        """Of all workers, those that this command runs."""
        self._member: Member | None = None
        if self._is_dynamic:
            self._member = Member("any", uuid.uuid4().hex[:8], is_transient=True)
        elif plan.rank:
            self._member = Member(str(plan.rank.n_workers), str(plan.rank.worker))
        self._started, self._pid = time.monotonic(), os.getpid()
        self._workers: list[int] = []
        self._code: Path | None = None
        self._is_hopeless = False
        self._grid: Grid

    def finished(self) -> dict[str, Any] | None:
        """Return the record of the run that has done this job already, or None.

        Raises:
            SinkError: when something else stands where the result shall go.
            ConfigError: when another job's result stands there.
        """
        if self._fresh:
            return None
        record = self._target.finished()
        if record:
            self._compare(record)
        return record

    def _compare(self, record: dict[str, Any]) -> None:
        """Refuse to go on with the result of another job."""
        changes = list(differences(record.get("fingerprint"), self._plan.fingerprint))
        if self._retry:
            mending = tuple(f"job.{key}: " for key in MENDING)
            changes = [change for change in changes if not change.startswith(mending)]
        if changes:
            raise ConfigError(
                f"output {self._target.uri} holds the result of another job; name another "
                f"output, or replace it with --fresh. What differs:{listed(changes)}"
            )

    def run(self) -> Report | None:
        """Do what is left to do, and publish. Returns None where nothing was left.

        One worker of several does its shard; the one that finds all others' done, too, publishes.

        Raises:
            EvmpError: when the job ends without a result; what was committed stays.
        """
        try:
            return self._run()
        except SinkError:
            if self._have_others_published():
                return None
            raise

    def _run(self) -> Report | None:
        if not self._target.is_begun() and self._is_nothing_left():
            return None
        if self._fresh:
            self._target.check_replaceable()
        self._target.prepare()
        with self._target.ledger.lock(self._member):
            if not self._begin():
                return None
            meter, before = self._prepare()
            self._leave_record(self._report(meter, before), "running")
            try:
                while True:
                    self._supervise(meter)
                    if report := self._end(meter, before):
                        return report
            except EvmpError as error:
                if not isinstance(error, Interrupted) and self._have_others_published():
                    ledger = self._target.ledger
                    if ledger.is_own() or not ledger.begun():
                        self._clean_up()
                    return self._counted(meter, before)
                report = self._report(meter, before)
                self._leave(report, error)
                if isinstance(error, Interrupted):
                    raise Interrupted(error.signum, self._where(report)) from None
                raise

    def _begin(self) -> bool:
        """Make the staging place ready. Returns whether there is anything to do."""
        ledger = self._target.ledger
        with ledger.turn(self._member) as is_there:
            if not is_there:
                raise SinkError("another run has just ended here; run the same command again")
            self._target.restore()
            if self._fresh:
                self._refuse_if_worked_on()
                self._target.start_over()
            elif self._target.settle():
                self._clean_up()
                return False
            else:
                self._check_begun()
                if self._is_nothing_left():
                    self._clean_up()
                    return False
                if self._retry:
                    self._choose_failed()
            ledger.open(self._fingerprint, is_shared=ledger.is_shared(self._member))
            if not self._member:  # which alone is sure to be alone
                ledger.sweep()
            n_shards = 1 if self._is_dynamic else self._n_workers
            self._grid = ledger.grid(Grid(len(self._rows), n_shards, self._block_rows))
            self._code = self._unpack_code()
            return True

    def _refuse_if_worked_on(self) -> None:
        if self._target.ledger.is_worked_on():
            raise SinkError(
                f"workers of other machines are at work in {self._target.ledger.uri}: end them, "
                f"or wait for {SHOWN_SECONDS:g} s if they are dead, before starting over"
            )

    def _end(self, meter: Meter, before: int) -> Report | None:
        """Publish, if every worker's part is done, and nobody else has.

        Returns None where any worker's part is this one's, and there is some left.
        """
        with self._target.ledger.turn(self._member) as is_there:
            if self._member and (not is_there or self._target.finished()):
                self._clean_up()
                return self._counted(meter, before)
            if self._is_hopeless:
                self._judge(self._report(meter, before))
            commits = self._target.ledger.commits(len(self._rows))
            if self._member and sum(len(commit) for commit in commits) < len(self._rows):
                return self._rest(meter, before, commits)
            report = self._report(meter, before, commits)
            self._judge(report)
            self._publish(report)
            self._clean_up()
            return report

    def _rest(self, meter: Meter, before: int, commits: Sequence[Commit]) -> Report | None:
        """Leave what is not done to others, or, where they would, do it after all."""
        if self._is_dynamic:
            self._target.ledger.check_own()
            self._target.ledger.forget_hints()  # a record was deleted that they tell of
            return None
        report = self._report(meter, before, self._of_own(commits))
        self._leave_record(report, "shard done")
        return replace(report, is_published=False)

    def _have_others_published(self) -> bool:
        """Return whether others have published, and removed what this run works with."""
        if not (self._member or self._target.ledger.is_apart):
            return False
        with suppress(EvmpError):
            return self._target.finished() is not None
        return False

    def _is_nothing_left(self) -> bool:
        if not self._retry:
            return self.finished() is not None
        return not self._standing()["failed"]

    def _standing(self) -> dict[str, Any]:
        """Return the record of the result whose failed rows are to be done again."""
        record = self._target.standing()
        if record is None:
            self._target.finished()  # says so where something else stands there
            raise ConfigError(
                f"there is no result in {self._target.uri} whose failed rows could be done again; "
                "run the job without --retry-failed first"
            )
        self._compare(record)
        return record

    def _choose_failed(self) -> None:
        """Make the failed rows of the result the rows of this run."""
        record = self._standing()
        self._fingerprint = {**self._plan.fingerprint, "retry": record["result"]}
        job, keys = self._job, self._plan.source.keys
        self._rows = call_in_child(lambda: self._target.failures(open_sink(job, keys)))
        if not self._target.is_to_be_replaced():
            # What says that this is a retry comes first: until the rest is there, too, the result
            # that stands here is finished.
            self._target.ledger.clear()
            self._target.ledger.open(self._fingerprint)
            self._target.replace_standing()
        self._block_rows = choose_block_rows(job, len(self._rows), self._n_workers)
        self._display.note(f"doing {len(self._rows)} failed rows again")

    def _check_begun(self) -> None:
        """Refuse to go on with a retry as a plain run, or the other way round."""
        begun = self._target.ledger.begun()
        if not begun or not self._target.is_to_be_replaced():
            if "retry" in begun and self._target.standing() is None:
                self._target.ledger.clear()  # the result whose rows they were is gone
            return
        if "retry" in begun and not self._retry:
            raise ConfigError(
                f"the failed rows of {self._target.uri} are being done again: go on with "
                "--retry-failed, or start over with --fresh"
            )
        if self._retry and "retry" not in begun:
            raise ConfigError(
                f"a run with --fresh that replaces {self._target.uri} is unfinished: run the job "
                "without --retry-failed first"
            )

    def _unpack_code(self) -> Path | None:
        """Unpack the user's code to where the next run sweeps it, if this one does not."""
        folder = self._target.ledger.tmp / f"code-{uuid.uuid4().hex}"
        return call_in_child(lambda: self._plan.unpack_code(folder))

    # --- the work -----------------------------------------------------------------------------

    def _prepare(self) -> tuple[Meter, int]:
        """Return a meter over the workers that have something to do, and the rows done before."""
        if self._is_dynamic:
            return self._meter(self._own, (0, 0)), 0
        n_rows = self._n_own_rows()
        commits = self._of_own(self._target.ledger.commits(len(self._rows)))
        before, _ = _totals(commits)
        if self._plan.rank:
            self._display.note(f"{self._plan.rank}: {n_rows} of {len(self._rows)} rows")
        if before:
            self._display.note(f"resuming: {before} of {n_rows} rows are done")
        workers = [k for k in self._own if self._left(k, commits)]
        done = {k: _totals(self._of_worker(k, commits)) for k in workers}
        meter = self._meter(workers, _difference(_totals(commits), *done.values()))
        for place, worker in enumerate(workers):
            meter.rebase(place, *done[worker])
        return meter, before

    def _meter(self, workers: list[int], elsewhere: tuple[int, int]) -> Meter:
        for shortage in shortages(self._plan.here):
            log.warning("%s", shortage)
        self._workers = workers
        board = Board(self._plan.layout.roles, len(workers))
        queues = [hop.name for hop in self._plan.layout.hops]
        return Meter(board.workers, self._n_own_rows(), elsewhere, queues)

    def _report(self, meter: Meter, before: int, commits: Sequence[Commit] | None = None) -> Report:
        """Report of the blocks in `commits`; without them, of what this command has done."""
        if commits is None and self._is_dynamic:
            return self._counted(meter, before)
        if commits is None:
            commits = self._of_own(self._target.ledger.commits())
        rows, failed = _totals(commits)
        n_own = meter.rows()[0] if self._is_dynamic else _totals(self._of_own(commits))[0]
        reasons = Reasons()
        reasons.merge(commit.reasons for commit in commits)
        seconds = time.monotonic() - self._started
        return Report(
            rows,
            failed,
            n_own - before,
            seconds,
            reasons.as_dict(),
            meter.readings(),
            kept=self._plan.source.n_rows - len(self._rows),
        )

    def _counted(self, meter: Meter, before: int) -> Report:
        """Report of what this command has counted, whatever became of it."""
        rows, failed = meter.rows()
        seconds = time.monotonic() - self._started
        return Report(rows, failed, rows - before, seconds, {}, meter.readings())

    def _where(self, report: Report) -> str:
        if self._is_dynamic:
            return f"{report.rows} rows were done here, the others are left to others"
        failed = f", {report.failed} of them failed" if report.failed else ""
        return f"{report.rows} of {self._n_own_rows()} rows are done{failed}"

    def _leave(self, report: Report, error: EvmpError) -> None:
        """Leave the staging place, if anything is there, with the record of the run.

        A run that has committed nothing leaves nothing, but for what --fresh has been told.
        """
        if not self._member:
            self._target.remove_parts()
            if not self._target.ledger.is_own():
                return
            if report.rows == 0 and not self._fresh:
                self._target.retreat()
                return
        state = "stopped" if isinstance(error, Interrupted) else "failed"
        self._leave_record(report, state, str(error))

    def _leave_record(self, report: Report, state: str, error: str = "") -> None:
        """Write the record of a run that has no result yet to the staging place."""
        record = report.record(self._job.describe(), self._plan.fingerprint)
        record.update(state=state, error=error)
        with suppress(OSError):
            text = json.dumps(record, indent=1).encode()
            suffix = f".{self._member.name}" if self._member else ""
            self._target.ledger.storage.write(f"run{suffix}.json", text)

    def _shard(self, worker: int) -> Block:
        return self._grid.shard(worker, self._n_workers)

    def _n_own_rows(self) -> int:
        if self._is_dynamic:
            return len(self._rows)
        return sum(len(self._shard(worker)) for worker in self._own)

    def _of_own(self, commits: Sequence[Commit]) -> list[Commit]:
        """Return those of the workers that this command runs, which follow one another."""
        first, last = self._shard(self._own[0]), self._shard(self._own[-1])
        return [c for c in commits if first.start <= c.start < last.stop]

    def _of_worker(self, worker: int, commits: Sequence[Commit]) -> list[Commit]:
        own = self._shard(worker)
        return [c for c in commits if own.start <= c.start < own.stop]

    def _left(self, worker: int, commits: Sequence[Commit]) -> list[Block]:
        """Return the blocks of a worker's shard that are not committed."""
        return self._grid.cut(commits, self._shard(worker))

    def _todo(self, worker: int) -> list[Block]:
        return self._left(worker, self._target.ledger.commits())

    def _supervise(self, meter: Meter) -> None:
        workers, seats_of = self._workers, meter.workers
        _native.adopt_orphans()

        asked = Leave.NOT

        deadline = math.inf

        def drain() -> None:
            nonlocal deadline
            self._display.note("stopping: finishing what is in flight; once more stops at once")
            leave(Leave.DRAINED)
            deadline = time.monotonic() + self._job.drain_seconds

        def leave(how: Leave) -> None:
            nonlocal asked
            asked = how
            for seats in seats_of:
                seats[0].counters[Counter.LEAVE] = how

        def tick() -> None:
            self._display.show(meter.read())
            if asked == Leave.NOT and self._has_failed(meter):
                self._is_hopeless = True
                leave(Leave.DRAINED)
            if asked == Leave.DRAINED and time.monotonic() > deadline:
                log.warning("what is in flight takes longer than drain_seconds: left")
                leave(Leave.AT_ONCE)

        def settle(place: int, cause: str) -> None:
            """What a dead worker had not committed is done, and counted, again."""
            log.info("%s goes on from its last commit", seats_of[place][0].name)
            if not self._is_dynamic:
                commits = self._of_worker(workers[place], self._target.ledger.commits())
                meter.rebase(place, *_totals(commits))
            # A worker that a stray signal has drained goes on; the job alone sends workers home.
            seats_of[place][0].counters[Counter.LEAVE] = asked

        Supervisor(
            [
                self._post(worker, seats_of[place], partial(settle, place))
                for place, worker in enumerate(workers)
            ],
            stall_seconds=self._job.stall_timeout_seconds,
            progress=lambda: meter.rows()[0],
            drain=drain,
            stop=lambda: leave(Leave.AT_ONCE),
            tick=tick,
            grace_seconds=GRACE_SECONDS,
            emit=self._display.emit,
        ).run()

    def _post(self, worker: int, seats: Sequence[Seat], settle: Settle) -> Post:
        plan = self._plan
        process = Worker(
            plan.rank.place if plan.rank else worker,
            plan.here,
            plan.package,
            plan.layout,
            self._target.ledger,
            plan.source,
            seats,
            partial(self._todo, worker),
            self._write_part(worker),
            self._rows,
            self._code,
            partial(self._lease, worker) if self._is_dynamic else None,
        )
        return Post(seat=seats[0], run=process.run, settle=settle, is_group=True)

    def _lease(self, worker: int, name: str) -> Leases:
        """Return the leases of one life of a worker."""
        about = {"host": socket.gethostname(), "pid": self._pid, "number": worker}
        seconds = self._job.lease_seconds
        return Leases(self._target.ledger, self._grid, name, seconds, about=about)

    def _write_part(self, worker: int) -> Callable[[], None]:
        if self._retry or self._is_dynamic:
            return lambda: None  # a part is of a shard of the whole result
        own = self._shard(worker)
        return partial(publish.write_part, self._job, self._target, worker, self._n_workers, own)

    def _has_failed(self, meter: Meter) -> bool:
        """Return whether so many rows have failed that the job need not go on."""
        rows, failed = meter.rows()
        if self._retry:
            return False  # the result has been accepted with all of them failed
        return rows >= EARLY_ROWS and failed > self._job.max_error_fraction * rows

    # --- the end ------------------------------------------------------------------------------

    def _judge(self, report: Report) -> None:
        """Refuse to publish a result that is mostly errors.

        Raises:
            TooManyFailures: more rows failed than the job allows, or all of them.
        """
        if self._retry:
            return
        limit = self._job.max_error_fraction * report.rows
        all_failed = report.rows and report.failed == report.rows
        if self._is_hopeless or report.failed > limit or all_failed:
            reasons = Reasons()
            reasons.merge([report.reasons])
            lines = "".join(f"\n  {line}" for line in reasons.in_words())
            raise TooManyFailures(self._too_many(report.rows, report.failed) + lines)

    def _too_many(self, rows: int, failed: int) -> str:
        n_rows = self._plan.source.n_rows
        if failed == n_rows:
            return (
                f"all {rows} rows failed; nothing is published. Correct the cause, and start over "
                "with --fresh"
            )
        so_far = " so far" if rows < n_rows else ""
        return (
            f"{failed} of {rows} rows failed{so_far}, more than max_error_fraction "
            f"{self._job.max_error_fraction:g} allows; nothing is published. What was done is kept "
            f"in {self._target.ledger.uri}: to accept it, raise max_error_fraction and run again"
        )

    def _publish(self, report: Report) -> None:
        plan = self._plan
        record = report.record(plan.job.describe(), plan.fingerprint)
        failed = self._rows if self._retry else None
        arguments = (plan.job, plan.source.keys, plan.source.n_rows, self._target, record, failed)
        call_in_child(partial(publish.publish, *arguments))

    def _clean_up(self) -> None:
        self._target.remove_parts()
        if not self._job.keep_staging:
            self._target.clean_up()


def _difference(all_rows: tuple[int, int], *parts: tuple[int, int]) -> tuple[int, int]:
    return all_rows[0] - sum(p[0] for p in parts), all_rows[1] - sum(p[1] for p in parts)


def _totals(commits: Sequence[Commit]) -> tuple[int, int]:
    """Return how many rows are committed, and how many of them failed."""
    return sum(c.stop - c.start for c in commits), sum(c.failed for c in commits)
