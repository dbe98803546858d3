"""How far a job is, for whoever asks from anywhere: a login node, another terminal.

All of it is read from the staging place, and nothing is written, not even to ask for the storage's
clock: what workers have shown tells enough of it. Who reads again and again reads each record once.
A job that goes on, ends, or begins anew meanwhile is looked at once more.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from evmp.errors import SinkError
from evmp.grid import Block, Grid
from evmp.ledger import Commit, differences, listed
from evmp.progress import clock
from evmp.storage.local import LocalStorage
from evmp.target import open_target
from evmp.turn import DIGITS, FOLDER, SECONDS

if TYPE_CHECKING:
    from evmp.job import Job

WINDOW_SECONDS: Final = 60.0  # over which the rate is taken, where somebody watches
LOOKS: Final = 3  # at a job that changes, or is damaged
PAUSE_SECONDS: Final = 0.2  # between them
QUIET_LEASES: Final = 12  # in whose time a worker that is to come back is there again
MAX_SHARDS: Final = 20  # that are shown to people
PATHS: Final = ("input_table", "input_oss_file", "model_path")  # that tell jobs apart


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker of any block has shown last.

    Attributes:
        worker: its number in its command.
        host, pid: of the command.
        n_blocks: that it holds.
        rows, failed: what it has written.
        seen_seconds: ago.
        is_dead: whether it has lost its blocks to whoever takes them: it has not shown itself
            within its own `lease_seconds`.
    """

    worker: int
    host: str
    pid: int
    n_blocks: int
    rows: int
    failed: int
    seen_seconds: float
    is_dead: bool


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """What is done of the rows of one worker of several, of which each has its own."""

    worker: int
    rows: int
    total: int


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job at one moment.

    Attributes:
        state: `not begun`, `unfinished`, `publishing` once all rows are committed, `failed` where
            nobody works on it and whoever did last has failed, or `done`.
        uri: of the result.
        rows, failed, total: rows that are committed, of these failed, and all rows.
        blocks: that are committed.
        left: blocks that are not, where nobody works on it.
        rate: rows a second: over the last minute where somebody watches, else since the job began,
            pauses included; 0 where that is not known.
        holders: what the commands that run on this machine or file system say of themselves.
        workers: of any block, the dead ones included.
        shards: of the job, where each worker has its own rows.
        is_deserted: whether nobody works on it, as far as that can be seen.
        is_given_up: whether that has been so for long while somebody watched.
        error: why it has failed.
        others: where what is here differs from the job that was asked for.
        damaged: what workers have shown that cannot be understood.
    """

    state: str
    uri: str
    rows: int = 0
    failed: int = 0
    total: int = 0
    blocks: int = 0
    left: int = 0
    rate: float = 0.0
    holders: str = ""
    workers: tuple[WorkerStatus, ...] = ()
    shards: tuple[ShardStatus, ...] = ()
    is_deserted: bool = False
    is_given_up: bool = False
    error: str = ""
    others: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()

    def as_json(self) -> str:
        """Return it as one line for programs."""
        return json.dumps(asdict(self))

    def in_words(self) -> str:
        """Return it as lines for people."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.uri}: {self.state}"
        if self.others:
            yield f"another   job than this one, it seems. What differs:{listed(self.others)}"
        if self.state == "not begun":
            return
        percent = 100 * self.rows / max(1, self.total)
        yield f"rows      {self.rows} of {self.total} ({percent:.1f} %), {self.failed} failed"
        if self.state == "done":
            return
        is_going_on = self.rate and not self.is_deserted
        left = (self.total - self.rows) / self.rate if is_going_on else None
        leased = sum(worker.n_blocks for worker in self.workers if not worker.is_dead)
        lost = sum(worker.n_blocks for worker in self.workers if worker.is_dead)
        yield f"rate      {self.rate:.1f} rows/s, ETA {clock(left)}"
        yield f"blocks    {self.blocks} done, {leased} leased, {lost} leased by the dead"
        yield f"runs      {self.holders or 'none that can be seen from here'}"
        if self.is_deserted:
            yield f"nobody    no worker lives; {self.left} blocks left"
        if self.error:
            yield f"error     {self.error}"
        open_ones = (it for it in self.shards if it.rows < it.total)
        for shard in islice(open_ones, MAX_SHARDS):
            yield f"shard     of worker {shard.worker}: {shard.rows} of {shard.total} rows"
        for it in sorted(self.workers, key=lambda it: (it.host, it.pid, it.worker)):
            seen = f"{'DEAD, ' * it.is_dead}seen {it.seen_seconds:.0f} s ago"
            yield (
                f"worker    {it.host}, process {it.pid}, worker {it.worker}: {it.n_blocks} blocks "
                f"leased, {it.rows} rows, {it.failed} failed, {seen}"
            )
        for name in self.damaged:
            yield f"damaged   {name}, which says what a worker does"


class _Clock:
    """The storage's clock, as far as the times of what is there tell how it differs from ours."""

    def __init__(self) -> None:
        self._least, self._most = -math.inf, math.inf
        self._newest, self._looked = -math.inf, -math.inf

    def look(self, times: list[float]) -> float:
        """Return the storage's time, which is not before anything there was made.

        Args:
            times: when things were made that are made again and again.
        """
        now, newest = time.time(), max(times, default=-math.inf)
        self._least = max(self._least, newest - now)
        if newest > self._newest:
            self._most = min(self._most, newest - self._looked)  # made since the last look
        self._newest, self._looked = max(self._newest, newest), now
        return now + max(self._least, min(self._most, 0.0))


class Observer:
    """Looks at a job again and again."""

    def __init__(self, job: Job) -> None:
        self._job, self._target = job, open_target(job, ())
        self._storage = self._target.ledger.storage
        self._commits: dict[str, Commit] = {}
        self._history: deque[tuple[float, int]] = deque()
        self._clock, self._now = _Clock(), 0.0
        self._etag = ""
        self._quiet_rows, self._quiet_since = -1, 0.0
        self._has_turn = False

    def look(self) -> JobStatus:
        """Return the job as it is now.

        Raises:
            SinkError: when the staging place, or the result, is not what it should be.
        """
        for _ in range(LOOKS - 1):
            try:
                return self._look()
            except SinkError as error:
                if not _may_pass(error):
                    raise
            time.sleep(PAUSE_SECONDS)
        return self._look()

    def _look(self) -> JobStatus:
        if done := self._done():
            return done
        try:
            seen = self._unfinished()
        except OSError as error:
            uri, why = self._target.ledger.uri, error.strerror or error
            raise SinkError(f"staging place {uri} cannot be read: {why}") from error
        return self._done() or seen  # what was seen may be half gone, if it has ended meanwhile

    def _unfinished(self) -> JobStatus:
        begun = self._begun()
        if not begun:
            return JobStatus("not begun", self._target.uri)
        self._read_commits()
        grid, (rows, failed) = self._grid(), self._counted()
        shown, holders = self._shown(), self._holders()
        workers = tuple(it for it in shown.values() if it)
        is_alive = bool(holders) or self._has_turn or any(not it.is_dead for it in workers)
        is_deserted = self._sees_all(begun, grid) and not is_alive
        runs = self._runs(is_deserted)
        error = str(runs[-1].get("error", "")) if runs and runs[-1].get("state") == "failed" else ""
        state = "publishing" if 0 < grid.n_rows == rows else "unfinished"
        return JobStatus(
            "failed" if is_deserted and error else state,
            self._target.uri,
            rows,
            failed,
            grid.n_rows,
            len(self._commits),
            len(grid.cut(self._commits.values(), Block(0, grid.n_rows))) if is_deserted else 0,
            self._rate(rows),
            holders,
            workers,
            tuple(self._shards(grid)) if "retry" not in begun else (),
            is_deserted,
            self._is_given_up(is_deserted, rows),
            error.partition("\n")[0] if is_deserted else "",
            self._others(begun, runs[-1] if runs else {}),
            tuple(self._storage.uri(name) for name, it in shown.items() if it is None),
        )

    # --- what is there ------------------------------------------------------------------------

    def _done(self) -> JobStatus | None:
        record = self._target.finished()
        if not record:
            return None
        numbers = record.get("rows", 0), record.get("failed", 0), record.get("rows", 0)
        others = self._others(_mapping(record.get("fingerprint")), record)
        return JobStatus("done", self._target.uri, *numbers, others=others)

    def _begun(self) -> dict[str, Any]:
        """Return the fingerprint of the job that has begun here; empty without one."""
        if begun := self._target.ledger.begun():
            etag = self._storage.stat("job.json").etag
            if etag != self._etag:
                self._commits.clear()
                self._history.clear()
            self._etag = etag
            return begun
        with suppress(FileNotFoundError, NotADirectoryError):
            self._storage.stat("job.json")
            raise self._damaged("job.json", "it is no JSON object")
        with suppress(FileNotFoundError, NotADirectoryError):
            if self._storage.names("blocks"):
                raise self._damaged("job.json", "it is missing")
        return {}

    def _grid(self) -> Grid:
        try:
            grid = Grid(**dict(json.loads(self._storage.read("grid.json"))))
            numbers = tuple(asdict(grid).values())
            if all(type(number) is int for number in numbers) and min(numbers[1:]) > 0:
                return grid
            why = f"its numbers are {numbers}"
        except FileNotFoundError:
            if not self._commits:  # the job begins just now
                return Grid(0, 1, 1)
            why = "it is missing"
        except (ValueError, TypeError, RecursionError) as error:
            why = str(error)
        raise self._damaged("grid.json", why)

    def _damaged(self, name: str, why: str) -> SinkError:
        return SinkError(
            f"staging place {self._target.ledger.uri}: its {name} is damaged: {why}; start over "
            "with --fresh"
        )

    def _read_commits(self) -> None:
        names = self._storage.names("blocks")
        for name in set(names) - self._commits.keys():
            self._commits[name] = self._target.ledger.commit_of(name)
        for name in self._commits.keys() - set(names):
            del self._commits[name]

    def _counted(self) -> tuple[int, int]:
        """Return how many rows are committed, and how many of them failed, none twice."""
        rows = failed = at = 0
        for commit in sorted(self._commits.values(), key=lambda it: it.start):
            n_new = max(0, commit.stop - max(commit.start, at))
            rows, failed = rows + n_new, failed + min(commit.failed, n_new)
            at = max(at, commit.stop)
        return rows, failed

    def _shards(self, grid: Grid) -> Iterator[ShardStatus]:
        commits = deque(sorted(self._commits.values(), key=lambda it: it.start))
        for worker in range(grid.n_shards if grid.n_shards > 1 else 0):
            own, rows = grid.shard(worker, grid.n_shards), 0
            while commits and commits[0].start < own.stop:
                rows += len(commits.popleft())
            yield ShardStatus(worker, min(rows, len(own)), len(own))

    def _shown(self) -> dict[str, WorkerStatus | None]:
        """Return what workers of any block have shown; None for what cannot be understood."""
        found: dict[str, tuple[bytes, float]] = {}
        for name in self._storage.names("workers"):
            with suppress(FileNotFoundError):
                text = self._storage.read(name)
                found[name] = text, self._storage.stat(name).modified
        turns = self._turns()
        self._now = self._clock.look([*(modified for _, modified in found.values()), *turns])
        self._has_turn = any(self._now - modified < SECONDS for modified in turns)
        return {name: self._worker(*it) for name, it in found.items()}

    def _turns(self) -> list[float]:
        """Return when those have shown themselves last that begin, end, or publish."""
        times = []
        for name in self._storage.names(FOLDER):
            if len(name) > len(FOLDER) + 1 + DIGITS:
                with suppress(FileNotFoundError):
                    times.append(self._storage.stat(name).modified)
        return times

    def _worker(self, text: bytes, modified: float) -> WorkerStatus | None:
        seen = max(0.0, self._now - modified)
        try:
            shown: dict[str, Any] = dict(json.loads(text))
            return WorkerStatus(
                int(shown["number"]),
                str(shown["host"]),
                int(shown["pid"]),
                len(shown["held"]),
                int(shown.get("rows", 0)),
                int(shown.get("failed", 0)),
                seen,
                seen > float(shown.get("lease_seconds", self._job.lease_seconds)),
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def _rate(self, rows: int) -> float:
        now = time.monotonic()
        self._history.append((now, rows))
        while now - self._history[0][0] > WINDOW_SECONDS and len(self._history) > 2:
            self._history.popleft()
        then, rows_then = self._history[0]
        if rows > rows_then:
            return (rows - rows_then) / (now - then)
        return rows / max(1.0, self._now - self._storage.stat("job.json").modified)

    # --- who works on it ----------------------------------------------------------------------

    def _holders(self) -> str:
        ledger = self._target.ledger
        with suppress(PermissionError):  # of another user
            return ledger.holders() if ledger.root.exists() else ""
        return ""

    def _sees_all(self, begun: Mapping[str, Any], grid: Grid) -> bool:
        """Return whether whoever works on the job is seen: by a lock, or by what it shows."""
        is_for_all = self._job.enableDynamicCluster and grid.n_shards == 1 and "retry" not in begun
        return is_for_all or isinstance(self._storage, LocalStorage)

    def _is_given_up(self, is_deserted: bool, rows: int) -> bool:
        now = time.monotonic()
        if not is_deserted or rows != self._quiet_rows:
            self._quiet_rows, self._quiet_since = rows, now
        return is_deserted and now - self._quiet_since > QUIET_LEASES * self._job.lease_seconds

    def _runs(self, is_every: bool) -> list[dict[str, Any]]:
        """Return the records of runs without a result, the last one last; or any one of them."""
        names = [it for it in self._storage.names("", "run") if it.endswith(".json")]
        found = []
        for name in names if is_every else names[:1]:
            with suppress(FileNotFoundError, ValueError, TypeError, RecursionError):
                record = dict(json.loads(self._storage.read(name)))
                found.append((self._storage.stat(name).modified, name, record))
        return [record for _, _, record in sorted(found, key=lambda it: it[:2])]

    def _others(self, begun: Mapping[str, Any], run: Mapping[str, Any]) -> tuple[str, ...]:
        """Return where the job here differs from ours, as far as that can be told by our file."""
        ours, found = json.loads(json.dumps(self._job.fingerprint())), _mapping(begun.get("job"))
        described, told = self._job.describe(), _mapping(run.get("job"))
        ours.update({key: described[key] for key in PATHS})
        theirs = {key: {**told, **found}.get(key, it) for key, it in ours.items()}
        return tuple(differences(theirs, ours))


def _may_pass(error: SinkError) -> bool:
    """Return whether the next look may find it otherwise."""
    cause = error.__cause__
    return not isinstance(cause, OSError) or isinstance(cause, FileNotFoundError)


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
