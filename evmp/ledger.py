"""What of a job is done: staged blocks of rows, and the records that make them count.

The ledger lies beside the output, in the *staging place*. Execution is at least once; what counts
of a block of rows is its record, which is created once or not at all:

    grid.json                how the rows are cut into blocks, since the job began
    job.json                 the fingerprint of the job this staging place belongs to
    lock, lock.*             who works here, see evmp.lock
    tmp/<run>.<start>        a block being written; swept when the run is over
    tmp/<run>.reel           the results of a video's frames, until it is whole; likewise
    data/<start>.<id>        a finished block
    blocks/<start>.json      its record: the commit point
    names/<digest>           the row that has reserved the name of a file beside the output

What counts, all but locks and `tmp`, is kept by a Storage, which says what makes it safe.
`start` is the block's first row, twelve digits. A record also says where the block stops, so that a
run that is stopped can commit a block that it has only begun: the rest is a block of its own.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from evmp.errors import ConfigError, SinkError
from evmp.grid import Block, Grid
from evmp.lock import LOCK, Locks, Member
from evmp.storage import Storage
from evmp.storage.local import LocalStorage
from evmp.turn import turn

CHUNK_BYTES: Final = 1 << 20
MAX_DIFFERENCES: Final = 12  # of two jobs, shown
MAX_ASKED: Final = 8  # workers of other machines, whether they live
SHOWN_SECONDS: Final = 30.0  # ago, and a worker of another machine works here
HINTS: Final = ("leases", "chunks", "workers")  # folders that nothing depends on
FORMAT: Final = 1  # of the staging place; another version's is refused
_DATA: Final = re.compile(r"\d{12}\.[0-9a-f]{32}")  # the name of a stage file


@dataclass(frozen=True, slots=True)
class Commit:
    """The record of a block that is done.

    Attributes:
        start, stop: its rows, [start, stop).
        failed: how many of them are error rows.
        data: name of its stage file.
        bytes: size of the stage file.
        crc32: of the stage file.
        reasons: why rows failed, as report.Reasons counts them.
        attempt: the run of a worker that did it.
        job: the digest of the job that it is of.
    """

    start: int
    stop: int
    failed: int
    data: str
    bytes: int
    crc32: int
    reasons: dict[str, list[Any]]
    attempt: str = ""
    job: str = ""

    def __len__(self) -> int:
        return self.stop - self.start


class Ledger:
    """The staging place of one output. Any process may hold one; it keeps no file open.

    Args:
        root: a directory for what does not count: of this machine, or of a file system that
            machines share.
        storage: of what counts; by default the same directory.

    Attributes:
        tmp: a folder of `root` that is swept when a run begins.
        is_apart: whether `storage` is elsewhere, where locks of this machine keep nobody out.
    """

    def __init__(self, root: Path, storage: Storage | None = None) -> None:
        self.root, self.tmp, self.is_apart = root, root / "tmp", storage is not None
        self.storage: Storage = storage or LocalStorage(root, self.tmp)
        self._job = ""
        self._locks = Locks(root, self.storage.uri())

    @property
    def uri(self) -> str:
        """How people name the staging place."""
        return self.storage.uri()

    def exists(self) -> bool:
        """Return whether a run has begun here, and has not removed all that it has left."""
        return self.root.exists() or bool(self.begun())

    def prepare(self) -> None:
        """Make the folders for what does not count.

        Raises:
            OSError: when they cannot be made, or are another user's.
        """
        self.root.mkdir(mode=0o700 if self.is_apart else 0o777, parents=True, exist_ok=True)
        if self.is_apart and os.lstat(self.root).st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "belongs to another user", str(self.root))
        self.tmp.mkdir(exist_ok=True)

    def begun(self) -> dict[str, Any]:
        """Return the fingerprint of the job that has begun here; empty without one.

        Raises:
            SinkError: when it cannot be read.
        """
        try:
            found = json.loads(self.storage.read("job.json"))
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return {}
        except OSError as error:
            raise SinkError(
                f"staging place {self.uri} cannot be read: {error.strerror or error}"
            ) from error
        return found if isinstance(found, dict) else {}

    def open(self, fingerprint: dict[str, object], *, is_shared: bool = False) -> None:
        """Begin the job here, or go on with it. Only under lock().

        A job that has not committed anything makes way for another: what kept it from starting may
        be the very thing that has been corrected since.

        Args:
            is_shared: others work here, too, and the job does not make way.

        Raises:
            ConfigError: when another job, or another version of evmp, has begun here; says what
                differs.
            SinkError: when the directory cannot be made.
        """
        fingerprint = {"format": FORMAT, **fingerprint}
        text = _job_text(fingerprint)
        self._job = _digest(text)
        try:
            self.prepare()
            found = self._begin(text)
            if found and not is_shared and not self.storage.names("blocks"):
                self.storage.delete("job.json")
                self.storage.delete("grid.json")
                found = self._begin(text)
        except OSError as error:
            raise SinkError(f"staging place {self.uri} cannot be used: {error}") from error
        if found:
            raise ConfigError(
                f"{self.uri} holds the unfinished run of another job; "
                f"run that one again, or start over with --fresh. What differs:{listed(found)}"
            )

    def grid(self, wanted: Grid) -> Grid:
        """Return the grid of the job that has begun here: the first that was wanted.

        Raises:
            SinkError: when it cannot be told.
        """
        text = json.dumps(asdict(wanted)).encode()
        try:
            if self.storage.create("grid.json", text):
                return wanted
            grid = Grid(**json.loads(self.storage.read("grid.json")))
            if grid.n_rows == wanted.n_rows and min(grid.n_shards, grid.block_rows) > 0:
                return grid
            why = f"it is of {grid.n_rows} rows, expected {wanted.n_rows}"
        except (OSError, ValueError, TypeError, RecursionError) as error:
            why = str(error)
        raise SinkError(
            f"staging place {self.uri}: its grid.json is damaged: {why}; start over with --fresh"
        )

    def _begin(self, text: bytes) -> list[str]:
        """Write job.json where there is none. Returns how the one that is there differs."""
        if self.storage.create("job.json", text) and self.storage.names("blocks"):
            self.storage.delete("job.json")
            raise SinkError(
                f"staging place {self.uri} has lost its job.json, which says whose rows these "
                "are; start over with --fresh"
            )
        begun = self.begun()
        if not begun:
            raise SinkError(
                f"staging place {self.uri}: its job.json is damaged, which says whose rows these "
                "are; start over with --fresh"
            )
        if begun.get("format") != FORMAT:
            raise ConfigError(
                f"{self.uri} holds the unfinished run of another version of evmp: format "
                f"{begun.get('format')}, expected {FORMAT}; finish it with that version, or start "
                "over with --fresh"
            )
        return list(differences(begun, json.loads(text)))

    def lock(self, member: Member | None = None) -> AbstractContextManager[None]:
        """Hold the staging place for one run, or for one of several; see Locks.hold."""
        return self._locks.hold(member)

    @contextmanager
    def turn(self, member: Member | None) -> Iterator[bool]:
        """Wait until no other member begins or ends, and let none do so meanwhile.

        Only under lock(). Yields whether the staging place is still there; whoever has ended may
        have removed it.

        Raises:
            SinkError: when the staging place cannot be used.
        """
        if not self.is_apart:
            with self._locks.turn() as is_there:
                yield is_there
            return
        with ExitStack() as held:
            try:
                generation = held.enter_context(turn(self.storage)) if member else ""
            except OSError as error:
                raise SinkError(f"staging place {self.uri} cannot be used: {error}") from error
            yield True
            if generation and not self.begun():  # the job is over, and leaves nothing
                self.storage.delete(generation)

    def holders(self) -> str:
        """Say who holds the staging place, of whom this machine knows; empty where nobody does."""
        return self._locks.holders()

    def is_shared(self, member: Member | None) -> bool:
        """Return whether other members than this one hold the staging place. Only under lock()."""
        return bool(member and self._locks.others(member)) or self.is_worked_on()

    def is_worked_on(self) -> bool:
        """Return whether workers of other machines have shown themselves just now."""
        with suppress(OSError):
            workers = self.storage.names("workers") if self.is_apart else []
            now = self.storage.now() if workers else 0.0
            for worker in workers[:MAX_ASKED]:
                with suppress(FileNotFoundError):
                    if now - self.storage.stat(worker).modified < SHOWN_SECONDS:
                        return True
        return False

    def commits(self, n_rows: int | None = None) -> list[Commit]:
        """Return the records of all blocks that are done, in input order; no two share a row.

        Args:
            n_rows: how many rows there are, where that is known; what a list may not show yet is
                asked for by its name then.

        Raises:
            SinkError: when a record is damaged, or they cannot be read.
        """
        commits: list[Commit] = []
        try:
            names = self.storage.names("blocks")
            texts = self.storage.read_all(names)
            for name in names:
                commit = self._checked(name, partial(next, texts))
                if commits and commit.start < commits[-1].stop:
                    raise self._damaged(
                        _record(commits[-1].start),
                        f"it stops at row {commits[-1].stop}, another begins at {commit.start}",
                    )
                commits.append(commit)
        except OSError as error:
            raise SinkError(
                f"staging place {self.uri} cannot be read: {error.strerror or error}; give "
                "access, or, if it was removed, run the same command again to begin anew"
            ) from error
        if n_rows is not None and commits and commits[-1].stop > n_rows:
            why = f"it stops at row {commits[-1].stop}, expected {n_rows} rows"
            raise self._damaged(_record(commits[-1].start), why)
        return commits if n_rows is None else self._with_unlisted(commits, n_rows)

    def _with_unlisted(self, listed: list[Commit], n_rows: int) -> list[Commit]:
        """Add the commits that a list does not show yet, if with them every row is done."""
        commits: list[Commit] = []
        at = 0
        for commit in [*listed, None]:
            while at < (commit.start if commit else n_rows):
                try:
                    commits.append(self.commit_of(_record(at)))
                except OSError:
                    return listed
                at = commits[-1].stop
            if commit:
                commits.append(commit)
                at = commit.stop
        return commits

    def stop_of(self, start: int) -> int | None:
        """Return where the committed block that begins at row `start` stops; None without one.

        Raises:
            SinkError: when its record is damaged, or cannot be read.
        """
        try:
            return self.commit_of(_record(start)).stop
        except FileNotFoundError:
            return None
        except OSError as error:
            uri = self.storage.uri(_record(start))
            raise SinkError(f"{uri} cannot be read: {error.strerror or error}") from error

    def commit_of(self, name: str) -> Commit:
        """Read the record of this name.

        Raises:
            FileNotFoundError: when there is none.
            SinkError: when it is damaged, or of another job than the one that has begun here.
        """
        return self._checked(name, partial(self.storage.read, name))

    def _checked(self, name: str, read: Callable[[], bytes]) -> Commit:
        try:
            commit = _parsed(name, read())
        except (ValueError, TypeError, RecursionError, IsADirectoryError) as error:
            raise self._damaged(name, error) from error
        if self._job and commit.job not in ("", self._job):
            raise SinkError(
                f"ledger record {self.storage.uri(name)} is of another job, which works on this "
                "output from another machine; end one of them, and delete it"
            )
        return commit

    def _damaged(self, name: str, why: object) -> SinkError:
        return SinkError(
            f"ledger record {self.storage.uri(name)} is damaged: {why}; delete it to do its rows "
            "again"
        )

    def stage(self, run: str, start: int) -> Path:
        """Return where the run writes the block that begins at row `start`."""
        return self.tmp / f"{run}.{start:012d}"

    def reel(self, run: str) -> Path:
        """Return where the run gathers what a video's frames have come to."""
        return self.tmp / f"{run}.reel"

    def commit(self, stage: Path, block: Block, failed: int, reasons: dict[str, list[Any]]) -> bool:
        """Make the block in `stage` count, durably. The first to commit a block wins.

        A writer that dies in here is replaced: the stage file stays until there is a record.

        Returns: whether this call did it; if not, the stage file is gone and the winner's counts.

        Raises:
            OSError: when the file system refuses; the block is then not committed.
        """
        data = f"{block.start:012d}.{uuid.uuid4().hex}"
        with open(stage, "rb") as file:
            size, crc32 = _checksum(file.fileno())
        attempt = stage.name.partition(".")[0]
        numbers = (block.start, block.stop, failed)
        commit = Commit(*numbers, data, size, crc32, reasons, attempt, self._job)
        # The stage file stays as well: whoever dies before the record leaves the rows in place.
        self.storage.adopt(stage, f"data/{data}")
        record = _record(block.start)
        try:
            self.check_own()
        except SinkError:
            with suppress(OSError):
                self.storage.delete(f"data/{data}")
            raise
        is_first = self.storage.create(record, _text(commit)) or self.commit_of(record) == commit
        if not is_first:
            self.storage.delete(f"data/{data}")
        os.unlink(stage)
        return is_first

    def is_own(self) -> bool:
        """Return whether the job that was opened is still the one that has begun here.

        Raises:
            SinkError: when that cannot be read.
        """
        return not self._job or _digest(_job_text(self.begun())) == self._job

    def check_own(self) -> None:
        """Refuse to go on for a job that has made way for another, while this worker slept, say.

        Raises:
            SinkError: when it has.
        """
        if not self.is_own():
            raise SinkError(
                f"{self.uri} is not this job's any more: another run has ended it, or another job "
                "has begun there; run the same command again"
            )

    @contextmanager
    def data(self, commit: Commit) -> Iterator[Path]:
        """Provide the stage file of a committed block, compared with its record.

        Raises:
            SinkError: when it is missing, has changed since its commit, or cannot be read.
        """
        name = f"data/{commit.data}"
        uri, record = self.storage.uri(name), self.storage.uri(_record(commit.start))
        try:
            with self.storage.file(name) as path:
                with open(path, "rb") as file:
                    found = _checksum(file.fileno())
                if found != (commit.bytes, commit.crc32):
                    raise SinkError(
                        f"stage file {uri} has changed since its commit: {found[0]} bytes, crc32 "
                        f"{found[1]:08x}, expected {commit.bytes} bytes, crc32 {commit.crc32:08x}; "
                        f"delete {record} to do its rows again"
                    )
                yield path
        except FileNotFoundError:
            raise SinkError(
                f"stage file {uri} of rows {commit.start} to {commit.stop} is missing; delete "
                f"{record} to do them again"
            ) from None

    def owner_of(self, name: str) -> int | None:
        """Return the row that has reserved a name, or None."""
        try:
            return int(self.storage.read(_reservation(name)))
        except FileNotFoundError:
            return None

    def reserve(self, name: str, row: int) -> int:
        """Reserve a name for a row, durably. Returns whose it is: the first row's to ask.

        Raises:
            OSError: when the file system refuses.
        """
        if self.storage.create(_reservation(name), b"%d" % row):
            return row
        return int(self.storage.read(_reservation(name)))

    def sweep(self) -> None:
        """Delete what runs that are over have left unfinished. Only under lock().

        Locks keep out who works on the same directory. What others may be about to record, who work
        from other machines, stays until the staging place goes.
        """
        recorded = {f"data/{commit.data}" for commit in self.commits()}
        for path in self.tmp.iterdir():
            _delete(path)
        if self.is_apart:
            return
        for name in self.storage.names("data"):
            if name not in recorded:
                self.storage.delete(name)

    def clear(self) -> None:
        """Delete everything but the locks. Only under lock().

        The records go first and job.json last: whoever dies in here leaves no record without its
        rows, and none that another job could take for its own.
        """
        for folder in ("blocks", "data", "names", "turns", *HINTS):
            self.storage.clear(folder)
        for path in self.root.iterdir() if self.root.exists() else ():
            if path.name != "job.json" and not LOCK.fullmatch(path.name):
                _delete(path)
        for name in self.storage.names(""):
            if name != "job.json" and not LOCK.fullmatch(name):
                self.storage.delete(name)
        self.storage.delete("job.json")

    def forget_hints(self) -> None:
        """Delete what says of blocks that they are done, and is not their record."""
        for folder in HINTS:
            self.storage.clear(folder)

    def remove(self) -> None:
        """Delete the staging place, or of it what can be deleted; the locks last."""
        with suppress(OSError):
            self.clear()
            for name in sorted(os.listdir(self.root), reverse=True):
                (self.root / name).unlink(missing_ok=True)
            self.root.rmdir()  # unless another run has begun here just now


def _job_text(fingerprint: dict[str, object]) -> bytes:
    return json.dumps(fingerprint, indent=1, sort_keys=True).encode()


def _digest(job: bytes) -> str:
    return hashlib.sha256(job).hexdigest()[:16]


def _record(start: int) -> str:
    return f"blocks/{start:012d}.json"


def _reservation(name: str) -> str:
    return f"names/{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()}"


def _text(commit: Commit) -> bytes:
    """Return the record of a commit, with a checksum of itself."""
    return json.dumps({**asdict(commit), "check": _check(commit)}).encode()


def _check(commit: Commit) -> int:
    return zlib.crc32(json.dumps(asdict(commit), sort_keys=True).encode())


def _parsed(name: str, text: bytes) -> Commit:
    """Return the record of this name.

    Raises:
        ValueError, TypeError: when `text` is not such a record.
    """
    fields = dict(json.loads(text))
    check = fields.pop("check", None)
    commit = Commit(**fields)
    numbers = (commit.start, commit.stop, commit.failed, commit.bytes, commit.crc32)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"its numbers are {numbers}")
    if name != _record(commit.start) or not commit.failed <= commit.stop - commit.start > 0:
        raise ValueError(f"it is of rows {commit.start} to {commit.stop}, {commit.failed} failed")
    if not _DATA.fullmatch(commit.data) or int(commit.data[:12]) != commit.start:
        raise ValueError(f"its stage file is {commit.data!r}")
    if not isinstance(commit.reasons, dict):
        raise ValueError(f"its reasons are {commit.reasons!r}")
    for reason in commit.reasons.values():
        if [type(it) for it in reason] != [int, int, str]:
            raise ValueError(f"a reason is {reason!r}")
    if check != _check(commit):
        raise ValueError("its checksum does not fit")
    return commit


def _checksum(fd: int) -> tuple[int, int]:
    size = crc32 = 0
    os.lseek(fd, 0, os.SEEK_SET)
    while chunk := os.read(fd, CHUNK_BYTES):
        size += len(chunk)
        crc32 = zlib.crc32(chunk, crc32)
    return size, crc32


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def differences(begun: object, now: object, path: str = "") -> Iterator[str]:
    """Yield in words where two fingerprints differ: key, the value then, the value now."""
    if isinstance(begun, dict) and isinstance(now, dict):
        for key in sorted(begun.keys() | now.keys()):
            yield from differences(begun.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif isinstance(begun, list) and isinstance(now, list) and len(begun) == len(now):
        for place, (then, it) in enumerate(zip(begun, now, strict=True)):
            yield from differences(then, it, f"{path}[{place}]")
    elif begun != now:
        yield f"{path}: {_short(begun)} then, {_short(now)} now"


def listed(lines: Sequence[str]) -> str:
    """Return the first of some lines, each on a line of its own, and how many more there are."""
    rest = len(lines) - MAX_DIFFERENCES
    more = [f"and {rest} more"] if rest > 0 else []
    return "".join(f"\n  {line}" for line in [*lines[:MAX_DIFFERENCES], *more])


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
