"""The second stage of a job over videos: each is looked at, and cut into what decoders are given.

Rows of the input come in, segments of videos go out. From here on rows are numbered anew: each
frame or clip that may come has a number, so that its place in the later rings is known before it is
decoded. The decoders wait for those places in order, so that nothing can deadlock: the lowest
number waits for later stages alone.

A scout that has died is replaced, and its replacement finds in the ring of segments what is
published already. A video that kills scouts is marked by the supervisor and becomes an error row.
"""

from __future__ import annotations

import math
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import orjson

from evmp.errors import DecodeError
from evmp.metrics import Counter, Seat, State
from evmp.payload import FetchError, base64_room, decode_base64
from evmp.ring import Header, Mark, Ring
from evmp.source import Kind
from evmp.source.location import payload_of
from evmp.stage import HEARTBEAT_SECONDS, claims
from evmp.video.container import OpenVideo, check_installed
from evmp.video.footage import FootageOpener
from evmp.video.index import index_of
from evmp.video.segment import ENOUGH_FRAMES, Segment, segments_of
from evmp.video.spool import Spool
from evmp.video.task import FAILURE_BYTES, PIECE_BYTES, TROUBLES, Footage, Task, failure_of

if TYPE_CHECKING:
    from evmp.job import Job

KEEP_BYTES: Final = 1 << 20  # memory that a slot may keep after a large payload
NAMES: Final = ("video", "image")  # of the member of a JSON line that says where the video is
ALL: Final = 1 << 32  # tasks of a row are fewer
LEAST_PIECE_BYTES: Final = 64 << 10
IDLE_LOOKS: Final = 10  # without a row, before an open batch is filled up


class Scout:
    """Turns `rows` into `segments`.

    Args:
        job: limits and options.
        rings: of the worker: of rows, of segments, and the later ones, of frames or clips.
        spool: where to lay videos that come in cells.
        seat, number: where to count, and as whom to claim.
        is_draining: whether to stop at the next row.
        most: plan so many frames or clips of each video at most; for a rehearsal.
    """

    def __init__(
        self,
        job: Job,
        rings: Sequence[Ring],
        spool: Spool,
        seat: Seat,
        number: int,
        is_draining: Callable[[], bool],
        most: int = 0,
    ) -> None:
        self._job, self._seat, self._number = job, seat, number
        self._rows, self._segments, *self._later = rings
        self._spool = spool
        self._spooled = deque[tuple[int, int]]()  # videos, and the tasks that they end before
        self._is_draining, self._most = is_draining, most
        self._stride = math.lcm(*(ring.n_rows for ring in self._later))
        n_places = min(ring.n_slots * ring.n_rows for ring in self._later)
        self._enough = max(1, n_places // (job.preprocess_thread_num + 1))
        self._opener: FootageOpener
        self._m = self._n = 0  # the next task, and the next row of the later rings
        self._n_idle = 0

    def open(self) -> None:
        """Get ready to open videos."""
        check_installed()
        self._opener = FootageOpener(self._job, self._spool, self._beat)
        self._segments.populate(1)

    def run(self) -> None:
        """Look at videos until the ring of rows has drained."""
        self._resume()
        if self._segments.end is None:
            for r in claims(
                self._rows, self._seat, self._number, ordered=True, meanwhile=self._idle
            ):
                if self._is_draining():
                    break
                self._n_idle = 0
                self._publish_video(r)
                self._rows.release(r, self._number, KEEP_BYTES)
        self._finish()

    def _resume(self) -> None:
        self._m = self._segments.published
        if self._m:
            self._n = self._segments.header(self._m - 1).next

    def _publish_video(self, r: int) -> None:
        header = self._rows.header(r)
        n_published = self._n_published(header.row)
        for place, (task, n_rows, is_last) in enumerate(self._tasks(r, header)):
            if place >= n_published and self._publish(header.row, task, n_rows, place, is_last):
                break
        self._spooled.append((r, self._m))
        self._seat.add(Counter.ROWS, 1)

    def _n_published(self, row: int) -> int:
        """Return how many of the row's tasks are in the ring."""
        if not self._m:
            return 0
        last = self._segments.header(self._m - 1)
        if last.row != row:
            return 0
        return ALL if last.height else last.kind + 1

    def _tasks(self, r: int, header: Header) -> Iterator[tuple[Task, int, bool]]:
        """Yield the tasks of a row, the rows that each is to fill, and whether it is the last."""
        keys, payload = pickle.loads(self._rows.note(r)), self._rows.data(r)
        try:
            if header.mark == Mark.ERROR:
                raise DecodeError(str(payload, "utf-8"))
            footage, members = self._footage(r, header.kind, payload)
            for planned, it in self._planned(footage):
                task = Task(r, keys, planned, members, it)
                yield task, it.n_items + it.is_last, it.is_last
        except TROUBLES as trouble:
            yield Task(r, keys, failure=failure_of(trouble)), 1, True

    def _beat(self) -> None:
        self._seat.enter(State.BUSY)

    def _planned(self, footage: Footage) -> Iterator[tuple[Footage, Segment]]:
        with (
            closing(self._opener.open(footage)) as file,
            OpenVideo(file, self._job.max_image_pixels) as video,
        ):
            index = index_of(video, self._beat)
            size = file.seek(0, os.SEEK_END)
        if index.duration_seconds > self._job.max_video_seconds:
            raise DecodeError(
                f"{index.duration_seconds:.2f} seconds exceed max_video_seconds "
                f"{self._job.max_video_seconds:g}"
            )
        self._seat.add(Counter.MILLISECONDS, round(1000 * index.duration_seconds))
        planned = replace(footage, piece_bytes=self._piece_bytes(size, index.n_frames))
        for segment in segments_of(index, self._job, self._enough, self._most):
            yield planned, segment

    def _piece_bytes(self, size: int, n_frames: int) -> int:
        """Return what a decoder is to fetch at once of a video, whose other segments others decode.

        Args:
            size: of the file, in bytes.
        """
        if self._job.preprocess_thread_num == 1:
            return PIECE_BYTES
        of_segment = size * ENOUGH_FRAMES // max(1, n_frames)
        return min(max(of_segment // 2, LEAST_PIECE_BYTES), PIECE_BYTES)

    def _footage(
        self, r: int, kind: int, payload: memoryview
    ) -> tuple[Footage, dict[str, Any] | None]:
        members = None
        if kind == Kind.SAMPLE:
            members = orjson.loads(payload)
            kind, payload = _located(members, self._job)
        match kind:
            case Kind.PATH:
                return Footage(path=str(payload, "utf-8")), members
            case Kind.URL:
                return Footage(url=str(payload, "utf-8")), members
            case Kind.BASE64:
                return Footage(cell=r, n_bytes=self._lay_down(r, payload)), None
            case _:
                raise FetchError(str(payload, "utf-8", "replace"))

    def _lay_down(self, r: int, payload: memoryview) -> int:
        """Decode a cell into the spool. Returns how many bytes it holds."""
        scratch = bytearray(base64_room(payload))
        length, limit = decode_base64(self._job, payload, scratch), self._job.max_video_bytes
        if length > limit:
            raise FetchError(f"{length} bytes exceed max_video_bytes {limit}")
        self._wait()
        self._spool.write(r, memoryview(scratch)[:length])
        return length

    def _tidy(self) -> None:
        """Free the spool of videos all of whose tasks are released."""
        while self._spooled and self._spooled[0][1] <= self._segments.cursor:
            self._spool.free(self._spooled.popleft()[0])

    # --- publishing ---------------------------------------------------------------------------

    def _publish(self, row: int, task: Task, n_rows: int, place: int, is_last: bool) -> bool:
        """Put a task into the ring; one that is too large ends its video as an error.

        Returns: whether it is the video's last.
        """
        data = pickle.dumps(task, protocol=pickle.HIGHEST_PROTOCOL)
        room = self._segments.row_bytes - FAILURE_BYTES
        if len(data) > room:
            message = f"a plan of {len(data)} bytes exceeds the {room} of a row"
            failure = Task(task.n, task.keys, failure=("decode", f"{message}; raise max_row_bytes"))
            data, n_rows, is_last = pickle.dumps(failure), 1, True
        self._n += n_rows
        header = Header(row, self._n, kind=place, height=is_last, width=n_rows)
        self._put(header, data)
        return is_last

    def _fill_up(self) -> None:
        """Fill the batches that the next row would be in up with EMPTY rows."""
        n_rows = -self._n % self._stride
        if n_rows:
            last = self._segments.header(self._m - 1)
            self._n += n_rows
            self._put(last._replace(next=self._n, width=n_rows, mark=Mark.EMPTY), b"")

    def _put(self, header: Header, data: bytes) -> None:
        self._wait()
        self._segments.put(self._m, header, data)
        self._m += 1

    def _wait(self) -> None:
        """Wait until there is room for the next task."""
        while not self._segments.is_open(self._m):
            self._seat.enter(State.WAITING)
            self._segments.wait_open(self._m, HEARTBEAT_SECONDS)
        self._seat.enter(State.BUSY)
        self._tidy()

    def _idle(self) -> bool:
        """Let what waits for nothing but its neighbours go on, where no rows come for a while."""
        self._tidy()
        self._n_idle += 1
        if self._n_idle == IDLE_LOOKS:
            self._fill_up()
        return False

    def _finish(self) -> None:
        """Fill the last batch up, and close the rings."""
        if self._segments.end is None:
            self._fill_up()
        for ring in reversed(self._later):
            ring.close(self._n)
        self._segments.close(self._m)


def mark_failed(rows: Ring, r: int, message: str) -> None:
    """Make a video that has killed its scouts one that fails. For the supervisor."""
    start, data = len(rows.note(r)), message.encode("utf-8")
    rows.payload(r)[start : start + len(data)] = data
    rows.set_header(r, rows.header(r)._replace(mark=Mark.ERROR, length=len(data)))


def _located(members: dict[str, Any], job: Job) -> tuple[Kind, memoryview]:
    """Take the location of its video out of a JSON line."""
    name = next((it for it in NAMES if it in members), NAMES[0])
    location = members.get(name)
    if not isinstance(location, str) or not location:
        found = "no such key" if name not in members else f"{location!r:.40}"
        raise FetchError(f"{name}: got {found}, expected the path or URL of a video")
    try:
        kind, payload = payload_of(location, job)
    except ValueError as error:
        raise FetchError(str(error)) from None
    del members[name]
    return kind, memoryview(payload)
