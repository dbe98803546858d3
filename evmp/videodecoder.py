"""The third stage of a job over videos: segments become frames or clips, for the model to read.

A frame is decoded, made upright and of the size asked for, and goes at once to its place: for a
built-in model as its input, otherwise as a sample. What cannot be decoded is the error of that
frame alone. The last task of a video ends it with what is known of the whole.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson

from evmp.errors import DecodeError
from evmp.image import Frame
from evmp.metrics import Counter, Seat, State
from evmp.ring import Header, Mark, Ring
from evmp.sample import SampleTooLarge, pack
from evmp.stage import HEARTBEAT_SECONDS, claims, put_failure
from evmp.video.container import OpenVideo, check_installed
from evmp.video.footage import FootageOpener
from evmp.video.frames import Frames
from evmp.video.part import Of, Part, leave_part
from evmp.video.picture import Display
from evmp.video.segment import Clips, Wanted, clips_of
from evmp.video.spool import Spool
from evmp.video.task import TROUBLES, Task, failure_of, rows_of

if TYPE_CHECKING:
    from evmp.fit import Fit
    from evmp.job import Job
    from evmp.video.segment import Segment

KEEP_BYTES: Final = 1 << 20  # memory that a slot may keep after a large task
REMEDY: Final = "raise max_image_pixels, or lower reshape_size or decode_batch_size"


@dataclass(frozen=True, slots=True)
class _Shot:
    """A frame that is wanted, and its picture; None where it cannot be decoded, or was dropped for
    lack of room."""

    wanted: Wanted
    seconds: float
    picture: Frame | None
    is_dropped: bool = False

    @property
    def n_bytes(self) -> int:
        return self.picture.pixels.nbytes if self.picture is not None else 0


class VideoDecoder:
    """Turns tasks of `segments` into rows of the later rings.

    Args:
        job: limits and options.
        fit: how an image becomes the model's input; None hands samples on.
        segments, later: the ring of tasks, and those behind it.
        spool: where videos of cells are.
        seat, number: where to count, and as whom to claim.
    """

    def __init__(
        self,
        job: Job,
        fit: Fit | None,
        segments: Ring,
        later: Sequence[Ring],
        spool: Spool,
        seat: Seat,
        number: int,
    ) -> None:
        self._job, self._fit, self._clips = job, fit, clips_of(job)
        self._segments, self._later, self._spool = segments, later, spool
        self._pixels, self._results = later[0], later[-1]
        self._seat, self._number = seat, number
        self._opener: FootageOpener
        self._display: Display
        self._open: tuple[int, Any, OpenVideo] | None = None  # the last video, by its number
        self._at = 0  # the task that is worked on
        # Of the segment: what has failed first, and as how large its frames are shown.
        self._damage: tuple[str, str] | None = None
        self._shape = 0, 0

    def open(self) -> None:
        """Get ready to open videos, and fault the memory in."""
        check_installed()
        self._opener = FootageOpener(self._job, self._spool, self._beat)
        self._display = Display(self._job.reshape_size, self._job.max_image_pixels)
        self._pixels.populate(self._pixels.row_bytes if self._fit else 1)

    def run(self) -> None:
        """Decode until the ring of segments has drained."""
        for m in claims(self._segments, self._seat, self._number):
            header = self._segments.header(m)
            self._at = m
            self._beat()
            self._work(header, self._segments.data(m))
            self._seat.counters[Counter.AT] = 0
            self._segments.release(m, self._number, KEEP_BYTES)
        self._close()

    def _work(self, header: Header, data: memoryview) -> None:
        rows = rows_of(header)
        if header.mark == Mark.EMPTY:
            self._pass_by(rows, header.row)
            return
        task: Task = pickle.loads(data)
        if task.segment is None:
            self._refuse(task, rows[0], header.row)
        else:
            self._decode(task, task.segment, rows, header.row)

    def _pass_by(self, rows: Sequence[int], row: int) -> None:
        for n in rows:
            self._admit(n)
            self._results.skip(n, row)
            self._pixels.skip(n, row)

    def _refuse(self, task: Task, n: int, row: int) -> None:
        """Let a whole video be an error."""
        assert task.failure is not None
        self._admit(n)
        if not self._results.is_done(n):
            leave_part(self._results, n, task.keys, Part(task.n, Of.ROW))
            put_failure(self._results, n, row, *task.failure)
            self._seat.add(Counter.FAILED, 1)
        self._pixels.skip(n, row)

    def _decode(self, task: Task, segment: Segment, rows: Sequence[int], row: int) -> None:
        n_items = 0
        for shots in _cut(self._shots(task, segment), self._clips, self._pixels.row_bytes):
            if n_items == segment.n_items:
                break
            n = rows[n_items]
            self._admit(n)
            if not self._pixels.is_done(n):
                self._put(task, n, row, segment.first + n_items, shots)
            n_items += 1
        self._pass_by(rows[n_items : segment.n_items], row)
        if segment.is_last:
            self._end(task, segment, rows[-1], row)

    def _end(self, task: Task, segment: Segment, n: int, row: int) -> None:
        """Hand on what is known of the whole video."""
        self._admit(n)
        if not self._results.is_done(n):
            leave_part(self._results, n, task.keys, Part(task.n, Of.END, damage=self._damage))
            self._results.put(n, Header(row), orjson.dumps(self._facts(segment)))
        self._pixels.skip(n, row)

    def _facts(self, segment: Segment) -> dict[str, Any]:
        index, (height, width) = segment.index, self._shape
        seconds = index.duration_seconds
        facts: dict[str, Any] = {
            "duration_seconds": round(seconds, 6),
            "fps": round(index.n_frames / seconds, 3),
            "width": width,
            "height": height,
            "n_frames": index.n_frames,
        }
        if self._damage:
            facts["error_msg"] = self._damage[1]
        return facts

    def _admit(self, n: int) -> None:
        """Wait for room for row n in every later ring."""
        for ring in self._later:
            while not (ring.is_open(n) or ring.is_done(n)):
                self._seat.counters[Counter.AT] = 0  # whoever dies here dies of no row
                self._seat.enter(State.WAITING)
                ring.wait_open(n, HEARTBEAT_SECONDS)
        self._beat()

    def _beat(self) -> None:
        self._seat.counters[Counter.AT] = self._at + 1
        self._seat.enter(State.BUSY)

    # --- pictures -----------------------------------------------------------------------------

    def _shots(self, task: Task, segment: Segment) -> Iterator[_Shot]:
        """Yield every frame that is wanted of a segment, with its picture or what became of it."""
        n_seen, self._damage, self._shape = 0, None, (0, 0)
        self._note_damage(segment.index.damage)
        if task.failure:
            yield from self._lost(segment, n_seen, *task.failure)
            return
        try:
            frames = self._frames_of(task)
            for it in frames.read(segment):
                n_seen += 1
                self._note_damage(frames.damage)
                yield self._shot(segment, it)
            self._note_damage(frames.damage)
            if frames.damage:
                self._close()  # it may be one that could not be opened again
        except TROUBLES as trouble:
            self._close()
            yield from self._lost(segment, n_seen, *failure_of(trouble))

    def _lost(self, segment: Segment, n_seen: int, stage: str, reason: str) -> Iterator[_Shot]:
        """Yield what is wanted of a segment but for the first few frames, as lost."""
        self._note_damage(reason, stage)
        for it in segment.lost(n_seen, stage, reason):
            yield self._shot(segment, it)

    def _frames_of(self, task: Task) -> Frames:
        """Return what reads the frames of a video, which stays open for its next segment."""
        if self._open is None or self._open[0] != task.n:
            self._close()
            file = self._opener.open(task.footage)
            try:
                video = OpenVideo(file, self._job.max_image_pixels)
            except BaseException:
                file.close()
                raise
            self._open = task.n, file, video
        video = self._open[2]
        self._shape = video.stream.codec_context.height, video.stream.codec_context.width
        return Frames(video, self._job.decode_type, self._job.sample_fps, self._beat)

    def _close(self) -> None:
        if self._open is not None:
            _, file, video = self._open
            self._open = None
            video.close()
            file.close()

    def _shot(self, segment: Segment, wanted: Wanted) -> _Shot:
        seconds = round(segment.index.seconds(wanted.time), 6)
        picture = None
        if wanted.frame is not None:
            assert self._open is not None
            aspect = self._open[2].stream.sample_aspect_ratio
            try:
                picture = self._display.show(wanted.frame, aspect)
                self._shape = picture.height, picture.width
            except DecodeError as error:
                wanted.reason = str(error)
        wanted.frame = None
        if picture is None:
            self._note_damage(f"{wanted.reason} at {seconds:.3f} seconds")
        return _Shot(wanted, seconds, picture)

    def _note_damage(self, reason: str, stage: str = "decode") -> None:
        if reason and self._damage is None:
            self._damage = stage, reason

    # --- items --------------------------------------------------------------------------------

    def _put(self, task: Task, n: int, row: int, number: int, shots: Sequence[_Shot]) -> None:
        """Hand on a frame or clip."""
        if not self._results.is_done(n):
            leave_part(self._results, n, task.keys, self._part(task, number, shots))
            try:
                self._pixels.set_header(n, self._made(task, n, row, shots))
                self._pixels.commit(n)
                self._seat.add(Counter.ROWS, 1)
                return
            except DecodeError as error:
                put_failure(self._results, n, row, shots[0].wanted.stage, str(error))
                self._seat.add(Counter.FAILED, 1)
        self._pixels.skip(n, row)

    def _part(self, task: Task, number: int, shots: Sequence[_Shot]) -> Part:
        first, last = shots[0], shots[-1]
        if self._job.use_image_predictor:
            members = {"frame_id": first.wanted.frame_id, "pts_seconds": first.seconds}
            number = first.wanted.frame_id
        else:
            members = {"start_seconds": first.seconds, "end_seconds": last.seconds}
        shapes = [(it.picture.height, it.picture.width) for it in shots if it.picture is not None]
        return Part(
            task.n,
            Of.ITEM,
            f"_{number}",
            orjson.dumps(members)[:-1],
            self._damage,
            shapes[-1] if shapes else None,
        )

    def _made(self, task: Task, n: int, row: int, shots: Sequence[_Shot]) -> Header:
        """Write an item to its place, and return its header.

        Raises:
            DecodeError: there is nothing to write, or no room for it.
        """
        place = self._pixels.payload(n)
        pictures = [shot.picture for shot in shots if shot.picture is not None]
        if any(shot.is_dropped for shot in shots):
            room = f"the {len(place)} bytes that a row may have"
            raise DecodeError(f"a clip of {len(shots)} frames exceeds {room}; {REMEDY}")
        if not pictures:
            raise DecodeError(shots[0].wanted.reason)
        if self._fit:
            self._fit.into(pictures[0], place)
            return Header(row, height=pictures[0].height, width=pictures[0].width)
        try:
            return Header(row, length=pack([self._sample(task, shots, pictures)], place))
        except SampleTooLarge as error:
            raise DecodeError(f"{error}; {REMEDY}") from None

    def _sample(
        self, task: Task, shots: Sequence[_Shot], pictures: Sequence[Frame]
    ) -> dict[str, Any]:
        seen = [shot for shot in shots if shot.picture is not None]
        members = dict(task.members or {})
        if self._job.use_image_predictor:
            return {
                **members,
                "image": pictures[0].pixels,
                "frame_id": seen[0].wanted.frame_id,
                "pts_seconds": seen[0].seconds,
            }
        if len({it.pixels.shape for it in pictures}) > 1:
            raise DecodeError("the frames of this clip have several sizes")
        return {
            **members,
            "image": np.stack([it.pixels for it in pictures]),
            "valid_frame_ids": [shot.wanted.frame_id for shot in seen],
            "pts_seconds": [shot.seconds for shot in seen],
        }


def _cut(shots: Iterator[_Shot], clips: Clips, room: int) -> Iterator[list[_Shot]]:
    """Put frames together to clips; the last has what is left, if any of it is new.

    Args:
        room: bytes that a clip may have. Of a larger one the first pictures are dropped as the
            others come, which the next clip may begin with.
    """
    held: list[_Shot] = []
    n_old = n_dropped = n_bytes = 0
    for shot in shots:
        held.append(shot)
        n_bytes += shot.n_bytes
        while clips.size > 1 and n_bytes > room:
            n_bytes -= held[n_dropped].n_bytes
            held[n_dropped] = replace(held[n_dropped], picture=None, is_dropped=True)
            n_dropped += 1
        if len(held) == clips.size:
            yield held
            n_bytes -= sum(it.n_bytes for it in held[: clips.stride])
            held, n_old = held[clips.stride :], clips.kept
            n_dropped = max(0, n_dropped - clips.stride)
    if len(held) > n_old:
        yield held
