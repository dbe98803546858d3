"""What of a job is done: staged blocks of rows, and the records that make them count.

The ledger is a directory beside the output, the *staging place*. Execution is at least once; what
counts of a block of rows is its record, which is created once, by link(2), or not at all:

    job.json                 the fingerprint of the job this staging place belongs to
    lock                     flock of the run that works here; says who
    tmp/<run>.<start>        a block being written; swept when the run is over
    data/<start>.<run>       a finished block
    blocks/<start>.json      its record: the commit point

`start` is the block's first row, twelve digits. A record also says where the block stops, so that a
run that is stopped can commit a block that it has only begun: the rest is a block of its own.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from evmp.errors import ConfigError, SinkError

CHUNK_BYTES: Final = 1 << 20
FORMAT: Final = 1  # of the staging place; another version's is refused


@dataclass(frozen=True, slots=True)
class Block:
    """The rows [start, stop) of the input."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


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
    """

    start: int
    stop: int
    failed: int
    data: str
    bytes: int
    crc32: int
    reasons: dict[str, list[Any]]


class Ledger:
    """The staging place of one output. Any process may hold one; it keeps no file open."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def exists(self) -> bool:
        """Return whether a job has begun here."""
        return (self.root / "job.json").exists()

    def open(self, fingerprint: dict[str, object]) -> None:
        """Begin the job here, or go on with it. Only under lock().

        A job that has not committed anything makes way for another: what kept it from starting may
        be the very thing that has been corrected since.

        Raises:
            ConfigError: when another job, or another version of evmp, has begun here; says what
                differs.
            SinkError: when the directory cannot be made.
        """
        fingerprint = {"format": FORMAT, **fingerprint}
        text = json.dumps(fingerprint, indent=1, sort_keys=True).encode()
        try:
            for part in ("tmp", "data", "blocks"):
                (self.root / part).mkdir(parents=True, exist_ok=True)
            found = self._begin(text)
            if found and not any((self.root / "blocks").iterdir()):
                (self.root / "job.json").unlink()
                found = self._begin(text)
        except (OSError, ValueError) as error:
            raise SinkError(f"staging place {self.root} cannot be used: {error}") from error
        if found:
            raise ConfigError(
                f"{self.root} holds the unfinished run of another job; "
                "run that one again, or start over with --fresh. What differs:\n  "
                + "\n  ".join(found)
            )

    def _begin(self, text: bytes) -> list[str]:
        """Write job.json where there is none. Returns how the one that is there differs."""
        create_once(self.root / "job.json", text, self.root / "tmp")
        begun = json.loads((self.root / "job.json").read_bytes())
        return list(differences(begun, json.loads(text)))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the staging place for one run.

        Raises:
            SinkError: when another run holds it; says who.
        """
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(fd, 1000).decode("utf-8", "replace")
                raise SinkError(f"another run works on this output: {holder}") from None
            since = time.strftime("%Y-%m-%d %H:%M:%S %z")
            os.ftruncate(fd, 0)
            os.pwrite(
                fd, f"{socket.gethostname()}, process {os.getpid()}, since {since}".encode(), 0
            )
            yield
        finally:
            os.close(fd)

    def commits(self) -> list[Commit]:
        """Return the records of all blocks that are done, in input order.

        Raises:
            SinkError: when a record is damaged.
        """
        commits = []
        for path in sorted((self.root / "blocks").glob("*.json")):
            try:
                commits.append(Commit(**json.loads(path.read_bytes())))
            except (ValueError, TypeError) as error:
                raise SinkError(
                    f"ledger record {path} is damaged: {error}; delete it to do its rows again"
                ) from error
        return commits

    def stop_of(self, start: int) -> int | None:
        """Return where the committed block that begins at row `start` stops; None without one."""
        try:
            stop: int = json.loads(self._record(start).read_bytes())["stop"]
        except FileNotFoundError:
            return None
        return stop

    def stage(self, run: str, start: int) -> Path:
        """Return where the run writes the block that begins at row `start`."""
        return self.root / "tmp" / f"{run}.{start:012d}"

    def data(self, commit: Commit) -> Path:
        """Return the stage file of a committed block."""
        return self.root / "data" / commit.data

    def commit(self, stage: Path, block: Block, failed: int, reasons: dict[str, list[Any]]) -> bool:
        """Make the block in `stage` count, durably. The first to commit a block wins.

        A writer that dies in here is replaced: the stage file stays until there is a record.

        Returns: whether this call did it; if not, the stage file is gone and the winner's counts.

        Raises:
            OSError: when the file system refuses; the block is then not committed.
        """
        data = f"{block.start:012d}.{uuid.uuid4().hex}"
        with open(stage, "rb") as file:
            os.fsync(file.fileno())
            size, crc32 = _checksum(file.fileno())
        commit = Commit(block.start, block.stop, failed, data, size, crc32, reasons)
        # A second name, not another one: whoever dies before the record leaves the rows in place.
        os.link(stage, self.data(commit))
        _sync_directory(self.root / "data")
        text = json.dumps(asdict(commit)).encode()
        is_first = create_once(self._record(block.start), text, self.root / "tmp")
        if not is_first:
            os.unlink(self.data(commit))
        os.unlink(stage)
        return is_first

    def verify(self, commit: Commit) -> None:
        """Compare a stage file with its record.

        Raises:
            SinkError: when it is missing, or has changed since its commit.
        """
        try:
            with open(self.data(commit), "rb") as file:
                found = _checksum(file.fileno())
        except FileNotFoundError:
            raise SinkError(
                f"stage file {self.data(commit)} of rows {commit.start} to {commit.stop} is "
                f"missing; delete {self._record(commit.start)} to do them again"
            ) from None
        if found != (commit.bytes, commit.crc32):
            raise SinkError(
                f"stage file {self.data(commit)} has changed since its commit: {found[0]} bytes, "
                f"crc32 {found[1]:08x}, expected {commit.bytes} bytes, crc32 {commit.crc32:08x}; "
                f"delete {self._record(commit.start)} to do its rows again"
            )

    def sweep(self) -> None:
        """Delete what runs that are over have left unfinished. Only under lock()."""
        recorded = {commit.data for commit in self.commits()}
        for path in (self.root / "tmp").iterdir():
            _delete(path)
        for path in (self.root / "data").iterdir():
            if path.name not in recorded:
                _delete(path)

    def clear(self) -> None:
        """Delete everything but the lock. Only under lock()."""
        for path in self.root.iterdir():
            if path.name != "lock":
                _delete(path)

    def remove(self) -> None:
        """Delete the staging place."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.root)

    def _record(self, start: int) -> Path:
        return self.root / "blocks" / f"{start:012d}.json"


def create_once(path: Path, text: bytes, tmp: Path) -> bool:
    """Create `path` holding `text`, durably and as a whole, unless it exists.

    Returns: whether it was created. On a network file system the answer of link(2) can be lost: two
    links on our own file mean that it was.
    """
    own = tmp / uuid.uuid4().hex
    fd = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        try:
            rest = memoryview(text)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        try:
            os.link(own, path)
        except FileExistsError:
            if os.stat(own).st_nlink != 2:
                return False
        _sync_directory(path.parent)
        return True
    finally:
        os.unlink(own)


def cut(n_rows: int, commits: Iterable[Commit], shard: Block, block_rows: int) -> list[Block]:
    """Return the blocks of `shard` that are still to do, in order.

    Blocks begin at the start of the shard and at every `block_rows` from there, and where a
    committed block stops.
    """
    todo: list[Block] = []
    at = shard.start
    for done in [*sorted(commits, key=lambda c: c.start), None]:
        stop = min(shard.stop, n_rows) if done is None else min(done.start, shard.stop)
        while at < stop:
            boundary = shard.start + ((at - shard.start) // block_rows + 1) * block_rows
            todo.append(Block(at, min(boundary, stop)))
            at = todo[-1].stop
        if done is not None:
            at = max(at, done.stop)
    return todo


def shard(n_rows: int, worker: int, n_workers: int) -> Block:
    """Return the contiguous rows of worker `worker` of 0 to n_workers - 1; sizes differ by one."""
    return Block(n_rows * worker // n_workers, n_rows * (worker + 1) // n_workers)


def _checksum(fd: int) -> tuple[int, int]:
    size = crc32 = 0
    os.lseek(fd, 0, os.SEEK_SET)
    while chunk := os.read(fd, CHUNK_BYTES):
        size += len(chunk)
        crc32 = zlib.crc32(chunk, crc32)
    return size, crc32


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
    elif begun != now:
        yield f"{path}: {_short(begun)} then, {_short(now)} now"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
