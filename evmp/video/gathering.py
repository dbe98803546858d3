"""The results of a video's frames or clips, gathered until it is whole, on disk.

The writer appends each to the *reel*, a file beside the block's stage file, and what the last stage
then releases is safe: a writer that dies is replaced by one that cuts a torn end off the reel,
knows from it what is there, and goes on behind it. Memory holds the summary alone.

    reel    for each result: n, the video's row, two lengths, failed (8 bytes each) | clue | JSON

A *clue* is what a result tells of the whole video: of a damage, and of the size of its frames.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

import orjson

from evmp.sink import Record, write_whole, writing
from evmp.stage import error_result
from evmp.video.part import Of, Part
from evmp.video.summary import summary_of

if TYPE_CHECKING:
    from evmp.job import Job

MAX_BYTES: Final = 4 << 20  # of a result in memory
_HEAD: Final = struct.Struct("<QQQQQ")


class _Entry(NamedTuple):
    n: int
    row: int
    failed: bool
    clue: bytes
    data: bytes

    def pack(self) -> bytes:
        head = _HEAD.pack(self.n, self.row, len(self.clue), len(self.data), self.failed)
        return b"".join((head, self.clue, self.data))


class Gathering:
    """Puts the results of one video after the other together.

    Args:
        job: says what they are of.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._name = b"frames" if job.use_image_predictor else b"clips"
        self._file: BinaryIO | None = None
        self._row = self._last = -1  # of what is gathered: the video's, and the last result's n
        self._n_good = self._n_failed = 0
        self._failure: tuple[dict[str, float], dict[str, str]] | None = None
        self._damage: tuple[str, str] | None = None
        self._shape: list[int] | None = None
        self._summary = summary_of(job)
        self.seconds = self._at = 0.0
        """Of videos, that have gone by since it was opened; and where in this one that is."""

    def open(self, path: Path) -> None:
        """Go on with a reel, or begin one."""
        self.close()
        with writing(path):
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        self._row = -1
        size = 0
        for entry in _entries(self._file):
            self._count(entry)
            size += len(entry.pack())
        with writing(path):
            self._file.truncate(size)

    def close(self) -> None:
        """Let go of the reel, and remove it."""
        if self._file is not None:
            with writing(self._file.name):
                self._file.close()
                os.unlink(self._file.name)
            self._file = None

    def add(
        self, n: int, row: int, keys: tuple[object, ...], part: Part, failed: bool, data: bytes
    ) -> Record | None:
        """Take a result of the last ring. Returns the video's own if that is now whole.

        Args:
            n: its number in the last ring, ascending; what is there already is not taken again.
            row: of the input.
            part: what it is of.

        The reel keeps a whole video until the next one's first result comes: the caller must have
        put the record into the stage file by then.
        """
        if part.of == Of.ROW:
            return Record(row, keys, data, failed)
        if part.of == Of.END:
            record = Record(row, keys, *self._whole(row, part, data))
            self._go_to(orjson.loads(data)["duration_seconds"])
            self._at = 0.0
            return record
        assert self._file is not None
        if row == self._row and n <= self._last:
            return None
        if row != self._row:
            with writing(self._file.name):
                self._file.truncate(0)
        whole = b"".join((part.head, b',"result":', data, b"}"))
        entry = _Entry(n, row, failed, orjson.dumps((part.damage, part.shape)), whole)
        write_whole(self._file, entry.pack())
        self._go_to(list(self._count(entry).values())[-1])
        return None

    def _go_to(self, seconds: float) -> None:
        """Note how far the video is."""
        self.seconds += max(0.0, seconds - self._at)
        self._at = max(self._at, seconds)

    def _count(self, entry: _Entry) -> dict[str, float]:
        """Count a result. Returns what stands beside it."""
        if entry.row != self._row:
            self._start_over(entry.row)
        self._last = entry.n
        damage, shape = orjson.loads(entry.clue)
        self._damage, self._shape = self._damage or damage, shape or self._shape
        members: dict[str, Any] = orjson.loads(entry.data)
        result = members.pop("result")
        if entry.failed:
            self._n_failed += 1
            if not self._failure:
                self._failure = members, result
        else:
            self._n_good += 1
            self._summary.add(members, result)
        return members

    def _start_over(self, row: int) -> None:
        self._row, self._last = row, -1
        self._n_good = self._n_failed = 0
        self._failure = None
        self._damage = self._shape = None
        self._summary = summary_of(self._job)

    def _whole(self, row: int, part: Part, facts: bytes) -> tuple[bytes | memoryview, bool]:
        """Return a video's result, and whether that is an error."""
        video = orjson.loads(facts)
        if row != self._row:
            self._start_over(row)
        if damage := self._damage or part.damage:
            video["error_msg"] = damage[1]
        if self._n_good == 0:
            return self._nothing(damage), True
        if self._shape:
            video["height"], video["width"] = self._shape
        if self._failure is not None and "error_msg" not in video:
            members, result = self._failure
            video["error_msg"] = (
                f"{self._n_failed} {self._name.decode()} failed, the first at "
                f"{next(iter(members.values()))}: {result['error_msg']}"
            )
        assert self._file is not None
        folder = str(Path(self._file.name).parent)
        with writing(folder), tempfile.SpooledTemporaryFile(MAX_BYTES, dir=folder) as whole:
            whole.writelines((b'{"video":', orjson.dumps(video), b',"', self._name, b'":['))
            for i, entry in enumerate(_entries(self._file)):
                whole.writelines((b"," if i else b"", entry.data))
            whole.write(b"]")
            if self._job.use_image_predictor:
                whole.writelines((b',"summary":', self._summary.result()))
            whole.write(b"}")
            return _content(whole), False

    def _nothing(self, damage: tuple[str, str] | None) -> bytes:
        """Return the error of a video none of whose frames has a result."""
        if self._failure is None:
            stage, reason = damage or ("decode", "")
            return error_result(stage, f"no frame came out of it{reason and f': {reason}'}")
        result = self._failure[1]
        message = f"all of its {self._n_failed} {self._name.decode()} failed; {result['error_msg']}"
        return error_result(result["error_stage"], message)


def _content(file: tempfile.SpooledTemporaryFile[bytes]) -> bytes | memoryview:
    """Return what was written to a file, by a view if it is much; the file may then be closed."""
    length = file.tell()
    if length <= MAX_BYTES:
        file.seek(0)
        return file.read()
    file.flush()
    return memoryview(mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ))


def _entries(file: BinaryIO) -> Iterator[_Entry]:
    """Yield what a reel holds; what was not written whole is its end."""
    file.seek(0)
    while len(head := file.read(_HEAD.size)) == _HEAD.size:
        n, row, n_clue, n_data, failed = _HEAD.unpack(head)
        clue, data = file.read(n_clue), file.read(n_data)
        if len(data) < n_data:
            return
        yield _Entry(n, row, bool(failed), clue, data)
