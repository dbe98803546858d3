"""A job from its start to its end, in the job's own process: plan, supervise, publish.

The plan is made anew at every start from what the ledger holds, so that running the same job again
resumes it, whatever has ended it before.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from evmp import publish
from evmp.child import call_in_child
from evmp.crew import Crew
from evmp.errors import ConfigError, EvmpError, Interrupted, SinkError, TooManyFailures
from evmp.grid import Grid
from evmp.job import MENDING
from evmp.ledger import SHOWN_SECONDS, Commit, differences, listed
from evmp.lock import Member
from evmp.plan import Plan, choose_block_rows
from evmp.report import Reasons, Report
from evmp.share import Leased, Shards, Share, Tally
from evmp.sink import open_sink

if TYPE_CHECKING:
    from evmp.progress import Display

EARLY_ROWS: Final = 1000  # from so many rows on, too many failures end the job


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
        self._is_dynamic = plan.job.enableDynamicCluster and not (fresh or retry)
        """Whether any worker, of any command, takes any block."""
        self._member: Member | None = None
        if self._is_dynamic:
            self._member = Member("any", uuid.uuid4().hex[:8], is_transient=True)
        elif plan.rank:
            self._member = Member(str(plan.rank.n_workers), str(plan.rank.worker))
        self._started = time.monotonic()
        self._code: Path | None = None
        self._grid: Grid
        self._share: Share
        self._crew: Crew

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
            self._share = self._open_share()
            self._crew = self._muster()
            self._leave_record(self._report(), "running")
            try:
                while True:
                    self._crew.work()
                    if report := self._end():
                        return report
            except EvmpError as error:
                if not isinstance(error, Interrupted) and self._have_others_published():
                    ledger = self._target.ledger
                    if ledger.is_own() or not ledger.begun():
                        self._clean_up()
                    return self._counted()
                report = self._report()
                self._leave(report, error)
                if isinstance(error, Interrupted):
                    where = self._share.in_words(Tally(report.rows, report.failed))
                    raise Interrupted(error.signum, where) from None
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
            # All who work on this cut it alike.
            n_shards = 1 if self._is_dynamic else self._plan.n_workers
            self._grid = ledger.grid(Grid(len(self._rows), n_shards, self._block_rows))
            self._code = self._unpack_code()
            return True

    def _refuse_if_worked_on(self) -> None:
        if self._target.ledger.is_worked_on():
            raise SinkError(
                f"workers of other machines are at work in {self._target.ledger.uri}: end them, "
                f"or wait for {SHOWN_SECONDS:g} s if they are dead, before starting over"
            )

    def _end(self) -> Report | None:
        """Publish, if every worker's part is done, and nobody else has.

        Returns None where any worker's part is this one's, and there is some left.
        """
        with self._target.ledger.turn(self._member) as is_there:
            if self._member and (not is_there or self._target.finished()):
                self._clean_up()
                return self._counted()
            if self._crew.was_hopeless:
                self._judge(self._report())
            commits = self._target.ledger.commits(len(self._rows))
            if self._member and sum(len(commit) for commit in commits) < len(self._rows):
                return self._rest(commits)
            report = self._report(commits)
            self._judge(report)
            self._publish(report)
            self._clean_up()
            return report

    def _rest(self, commits: Sequence[Commit]) -> Report | None:
        """Leave what is not done to others, or, where they would, do it after all."""
        if self._is_dynamic:
            self._target.ledger.check_own()
            self._target.ledger.forget_hints()  # a record was deleted that they tell of
            return None
        own = self._share.tally(self._crew.counted, commits)
        report = self._report_of(own, own, is_published=False)
        self._leave_record(report, "shard done")
        return report

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
        self._block_rows = choose_block_rows(job, len(self._rows), self._plan.n_workers)
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

    def _open_share(self) -> Share:
        """Return this command's part of the rows."""
        plan, ledger = self._plan, self._target.ledger
        if self._is_dynamic:
            return Leased(ledger, self._grid, plan.own_workers, self._job.lease_seconds)
        return Shards(ledger, self._grid, plan.n_workers, plan.own_workers)

    def _muster(self) -> Crew:
        """Return the workers of this part, and tell what it is."""
        share = self._share
        if self._plan.rank and not self._is_dynamic:
            self._display.note(f"{self._plan.rank}: {share.n_rows} of {len(self._rows)} rows")
        if share.before.rows:
            self._display.note(f"resuming: {share.before.rows} of {share.n_rows} rows are done")
        return Crew(
            self._plan,
            share,
            self._rows,
            self._code,
            self._write_part,
            self._has_failed,
            self._display,
        )

    def _write_part(self, worker: int) -> None:
        """Leave a worker's part of the result beside it; of a retry there are none."""
        if isinstance(self._share, Shards) and not self._retry:
            own = self._share.shard(worker)
            publish.write_part(self._job, self._target, worker, self._plan.n_workers, own)

    def _has_failed(self, tally: Tally) -> bool:
        """Return whether so many rows have failed that the job need not go on."""
        if self._retry:
            return False  # the result has been accepted with all of them failed
        is_late = tally.rows >= EARLY_ROWS
        return is_late and tally.failed > self._job.max_error_fraction * tally.rows

    def _report(self, commits: Sequence[Commit] | None = None) -> Report:
        """Report of the whole job, whose `commits` those are; else of this part of it."""
        own = self._share.tally(self._crew.counted, commits)
        return self._report_of(own if commits is None else Tally.of(commits), own)

    def _report_of(self, tally: Tally, own: Tally, *, is_published: bool = True) -> Report:
        return Report(
            tally.rows,
            tally.failed,
            own.rows - self._share.before.rows,
            time.monotonic() - self._started,
            tally.reasons,
            self._crew.readings(),
            self._plan.source.n_rows - len(self._rows),
            is_published,
        )

    def _counted(self) -> Report:
        """Report of what this command has counted, whatever became of it."""
        return self._report_of(self._crew.counted, self._crew.counted)

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
        if self._crew.was_hopeless or report.failed > limit or all_failed:
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
