"""How far a job is, for whoever asks from anywhere: a login node, another terminal.

All of it is read from the staging place, and nothing is written. Who reads again and again reads
each record once.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from evmp.errors import SinkError
from evmp.ledger import Commit
from evmp.progress import clock
from evmp.target import open_target

if TYPE_CHECKING:
    from evmp.job import Job

WINDOW_SECONDS: Final = 60.0  # over which the rate is taken, where somebody watches


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker of any block has shown last.

    Attributes:
        worker: its number in its command.
        host, pid: of the command.
        n_blocks: that it holds.
        rows, failed: what it has written.
        seen_seconds: ago.
        is_dead: whether it has lost its blocks to whoever takes them.
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
class JobStatus:
    """A job at one moment.

    Attributes:
        state: `not begun`, `unfinished` or `done`.
        uri: of the result.
        rows, failed, total: rows that are committed, of these failed, and all rows.
        blocks: that are committed.
        rate: rows a second: over the last minute where somebody watches, else since the job began,
            pauses included; 0 where that is not known.
        holders: what the commands that run on this machine or file system say of themselves.
        workers: of any block, the dead ones included.
    """

    state: str
    uri: str
    rows: int = 0
    failed: int = 0
    total: int = 0
    blocks: int = 0
    rate: float = 0.0
    holders: str = ""
    workers: tuple[WorkerStatus, ...] = ()

    def as_json(self) -> str:
        """Return it as one line for programs."""
        return json.dumps(asdict(self))

    def in_words(self) -> str:
        """Return it as lines for people."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.uri}: {self.state}"
        if self.state == "not begun":
            return
        percent = 100 * self.rows / max(1, self.total)
        yield f"rows      {self.rows} of {self.total} ({percent:.1f} %), {self.failed} failed"
        if self.state == "done":
            return
        left = (self.total - self.rows) / self.rate if self.rate else None
        leased = sum(worker.n_blocks for worker in self.workers if not worker.is_dead)
        lost = sum(worker.n_blocks for worker in self.workers if worker.is_dead)
        yield f"rate      {self.rate:.1f} rows/s, ETA {clock(left)}"
        yield f"blocks    {self.blocks} done, {leased} leased, {lost} leased by the dead"
        yield f"runs      {self.holders or 'none that can be seen from here'}"
        for it in sorted(self.workers, key=lambda it: (it.host, it.pid, it.worker)):
            seen = f"{'DEAD, ' * it.is_dead}seen {it.seen_seconds:.0f} s ago"
            yield (
                f"worker    {it.host}, process {it.pid}, worker {it.worker}: {it.n_blocks} blocks "
                f"leased, {it.rows} rows, {it.failed} failed, {seen}"
            )


class Observer:
    """Looks at a job again and again."""

    def __init__(self, job: Job) -> None:
        self._job, self._target = job, open_target(job, ())
        self._commits: dict[str, Commit] = {}
        self._history: deque[tuple[float, int]] = deque()

    def look(self) -> JobStatus:
        """Return the job as it is now.

        Raises:
            SinkError: when the staging place, or the result, is not what it should be.
        """
        uri = self._target.uri
        if record := self._target.finished():
            return JobStatus("done", uri, record["rows"], record["failed"], record["rows"])
        ledger = self._target.ledger
        if not ledger.begun():
            return JobStatus("not begun", uri)
        try:
            self._read_commits()
            rows = sum(len(commit) for commit in self._commits.values())
            return JobStatus(
                "unfinished",
                uri,
                rows,
                sum(commit.failed for commit in self._commits.values()),
                self._total(),
                len(self._commits),
                self._rate(rows),
                ledger.holders() if ledger.root.exists() else "",
                tuple(self._workers()),
            )
        except OSError as error:
            raise SinkError(f"staging place {ledger.uri} cannot be read: {error}") from error

    def _read_commits(self) -> None:
        ledger = self._target.ledger
        names = ledger.storage.names("blocks")
        for name in set(names) - self._commits.keys():
            self._commits[name] = ledger.commit_of(name)
        for name in self._commits.keys() - set(names):
            del self._commits[name]

    def _total(self) -> int:
        with suppress(FileNotFoundError, ValueError, KeyError):
            return int(json.loads(self._target.ledger.storage.read("grid.json"))["n_rows"])
        return 0

    def _rate(self, rows: int) -> float:
        now = time.monotonic()
        self._history.append((now, rows))
        while now - self._history[0][0] > WINDOW_SECONDS and len(self._history) > 2:
            self._history.popleft()
        then, rows_then = self._history[0]
        if rows > rows_then:
            return (rows - rows_then) / (now - then)
        storage = self._target.ledger.storage
        with suppress(FileNotFoundError):
            return rows / max(1.0, storage.now() - storage.stat("job.json").modified)
        return 0.0

    def _workers(self) -> Iterator[WorkerStatus]:
        storage = self._target.ledger.storage
        names = storage.names("workers")
        now = storage.now() if names else 0.0
        for name in names:
            with suppress(FileNotFoundError, ValueError, KeyError):
                shown: dict[str, Any] = json.loads(storage.read(name))
                seen = max(0.0, now - storage.stat(name).modified)
                yield WorkerStatus(
                    shown["number"],
                    shown["host"],
                    shown["pid"],
                    len(shown["held"]),
                    shown.get("rows", 0),
                    shown.get("failed", 0),
                    seen,
                    seen > self._job.lease_seconds,
                )
