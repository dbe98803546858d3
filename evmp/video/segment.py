"""A video cut into segments: what each decoder is to give, before any frame is decoded.

Of a regular stream the packets say which frames are wanted, so each segment knows its frames, and a
long video is cut at keyframes that can be sought: all decoders work on it. Where the frames cannot
be known (`decode_type` 1 and 3 leave out what only the decoder recognises) the video is one
segment, whose frames are chosen as they come.

An *item* is what the predictor gets at once: a frame, or a clip of frames. Each has a row of its
own on the way, so a segment says how many it has at most; the rows of those that do not come stay
empty. Clips are counted from the video's first frame, wherever it is cut.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from evmp.video.index import NONE, Index, Start, Times
from evmp.video.sampling import Grid

if TYPE_CHECKING:
    from av import VideoFrame

    from evmp.job import Job

LEAST_FRAMES: Final = 64  # of a segment: to begin one costs a few frames
ENOUGH_FRAMES: Final = 256
LEAST_OF_TWICE: Final = 10  # frames of a segment for one that the next one decodes as well
PLANNED_TYPES: Final = (2, 4)  # of `decode_type`: what they leave out, the packets say


@dataclass(slots=True)
class Wanted:
    """A frame that is wanted.

    Attributes:
        frame_id: its place among all frames of the stream, in the order in which they are shown.
        time: when it is shown, in the stream's time base.
        frame: None where it could not be decoded, for the `reason`, in a `stage`.
    """

    frame_id: int
    time: int
    frame: VideoFrame | None
    reason: str = ""
    stage: str = "decode"


@dataclass(frozen=True, slots=True)
class Clips:
    """How frames are put together; a clip of one is the frame itself."""

    size: int
    kept: int

    @property
    def stride(self) -> int:
        return self.size - self.kept

    def count(self, n_frames: int) -> int:
        """Return how many clips so many frames make; each has a frame that is new."""
        if n_frames <= self.size:
            return min(n_frames, 1)
        return 1 + -(-(n_frames - self.size) // self.stride)

    def frames(self, clip: int, n_frames: int) -> tuple[int, int]:
        """Return the frames of a clip, [start, stop)."""
        start = clip * self.stride
        return start, min(start + self.size, n_frames)


def clips_of(job: Job) -> Clips:
    """Return how a job's frames are put together."""
    if job.use_image_predictor:
        return Clips(1, 0)
    return Clips(job.decode_batch_size, job.decode_keep_size)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a video.

    Attributes:
        index: of the video, without its keys; its times are those of `frames`, or else of all.
        starts: keyframes to begin with: the first is the nearest, the others for when it does not
            serve; none is the beginning of the file.
        frames: which frames are wanted, ascending; None leaves it to the decoder.
        first: the number of its first clip, or frame, in the video.
        n_items: how many it has at most.
        is_last: whether the video ends with it.
    """

    index: Index
    starts: tuple[Start, ...]
    frames: Times | None
    first: int
    n_items: int
    is_last: bool

    def lost(self, n_seen: int, stage: str, reason: str) -> Iterator[Wanted]:
        """Yield what is wanted but for the first few, as frames that cannot be decoded."""
        if self.frames is not None:
            for frame_id, time in zip(
                self.frames[n_seen:].tolist(), self.index.times[n_seen:].tolist(), strict=True
            ):
                yield Wanted(frame_id, time, None, reason, stage)


def segments_of(
    index: Index, job: Job, enough_items: int | None, most: int = 0
) -> Iterator[Segment]:
    """Cut a video.

    Args:
        enough_items: with how many a segment need not become longer; None cuts nowhere.
        most: of all its items, take the first so many; 0 takes all.
    """
    clips = clips_of(job)
    if not index.is_regular or job.decode_type not in PLANNED_TYPES:
        grid = Grid(job.sample_fps, index)
        n_frames = index.n_frames if grid.takes_all else min(index.n_frames, grid.last + 1)
        n_items = clips.count(n_frames)
        n_items = min(n_items, most) if most else n_items
        yield Segment(_light(index, index.times), (), None, 0, n_items, True)
        return
    decoded = index.keys if job.decode_type == 2 else np.arange(index.n_frames)
    kept = Grid(job.sample_fps, index).kept(index.times[decoded])
    frames = decoded[kept]
    if most:
        frames = frames[: clips.frames(most - 1, len(frames))[1]]
    yield from _cut(index, frames, clips, enough_items)


def _cut(index: Index, frames: Times, clips: Clips, enough_items: int | None) -> Iterator[Segment]:
    """Cut at keyframes. A clip belongs to the segment that its first frame is in."""
    n_clips = clips.count(len(frames))
    bounds = [0, n_clips]
    if enough_items is not None and len(index.starts):
        bounds[1:1] = _bounds(index, frames, clips, enough_items)
    for begin, end in pairwise(bounds):
        if begin == end and n_clips:
            continue
        start = clips.frames(begin, len(frames))[0]
        stop = clips.frames(end - 1, len(frames))[1] if end else 0
        wanted = frames[start:stop]
        is_last = end == n_clips
        yield Segment(
            _light(index, index.times[wanted]),
            _starts(index, wanted),
            wanted,
            begin,
            end - begin,
            is_last,
        )


def _bounds(index: Index, frames: Times, clips: Clips, enough_items: int) -> Iterator[int]:
    """Yield with which clips new segments begin."""
    firsts = frames[: clips.count(len(frames)) * clips.stride : clips.stride]  # of each clip
    begin, start = 0, 0
    for key, following in pairwise(chain(map(int, index.keys), [index.n_frames])):
        clip, after = bisect_left(firsts, key), bisect_left(firsts, following)
        if not begin < clip < after:
            continue
        n_twice = int(frames[clips.frames(clip - 1, len(frames))[1] - 1]) + 1 - key
        least = max(LEAST_FRAMES, LEAST_OF_TWICE * n_twice)
        is_whole = key - start >= least and index.n_frames - key >= LEAST_FRAMES
        is_enough = following - start > max(ENOUGH_FRAMES, least) or after - begin > enough_items
        if is_whole and is_enough:
            yield clip
            begin, start = clip, key


def _starts(index: Index, wanted: Times) -> tuple[Start, ...]:
    """Return where to begin for these frames: at the last keyframe before, or further back."""
    if not len(wanted) or not len(index.starts):
        return ()
    place = bisect_left(index.keys, int(wanted[0]) + 1) - 1
    if place <= 0:
        return ()
    return tuple(index.start(i) for i in (place, place - 1) if i > 0)


def _light(index: Index, times: Times) -> Index:
    return replace(index, times=times, keys=NONE, starts=NONE)
