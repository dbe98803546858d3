"""The frames of a segment, decoded one after the other.

A segment whose frames are known is decoded from its keyframe on, and what nobody wants and nothing
refers to is left out by the decoder (`NONREF`). Should it not begin with that very frame, whole,
then the keyframe was none, and decoding begins further back.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from evmp.errors import DecodeError
from evmp.video.container import SKIPPED, PictureType, told
from evmp.video.sampling import Grid, Sampler
from evmp.video.segment import Wanted

if TYPE_CHECKING:
    from av import VideoFrame
    from av.packet import Packet

    from evmp.video.container import OpenVideo
    from evmp.video.index import Index, Start
    from evmp.video.segment import Segment

MAX_DAMAGED: Final = 1000  # packets in a row that give nothing
# Frames that are decoded before another one and shown behind it, at most.
MAX_AHEAD: Final = {"h264": 16, "hevc": 16}
USUAL_AHEAD: Final = 1


class Frames:
    """Decodes the segments of one open video.

    Args:
        decode_type, sample_fps: of the job.
        beat: called for every packet.
    """

    def __init__(
        self,
        video: OpenVideo,
        decode_type: int,
        sample_fps: float,
        beat: Callable[[], object] = lambda: None,
    ) -> None:
        self._video, self._beat = video, beat
        self._decode_type, self._sample_fps = decode_type, sample_fps
        self.damage = ""
        """Where decoding has failed first."""
        self._index: Index

    def read(self, segment: Segment) -> Iterator[Wanted]:
        """Yield the frames that are wanted, in the order in which they are shown."""
        self.damage, self._index = "", segment.index
        if segment.frames is None:
            yield from self._chosen(segment)
            return
        wanted = iter(zip(segment.frames.tolist(), segment.index.times.tolist(), strict=True))
        at = next(wanted, None)
        for frame in self._from_keyframe(segment):
            while at is not None and at[1] < frame.pts:
                yield self._missing(*at)
                at = next(wanted, None)
            if at is None:
                return
            if at[1] == frame.pts:
                yield self._found(*at, frame)
                at = next(wanted, None)
            if at is None:
                return
        while at is not None:
            yield self._missing(*at)
            at = next(wanted, None)

    def _found(self, frame_id: int, time: int, frame: VideoFrame) -> Wanted:
        if frame.is_corrupt and self._decode_type != 1:
            self._note_damage(time, "damaged")
            return Wanted(frame_id, time, None, "the frame is damaged")
        return Wanted(frame_id, time, frame)

    def _missing(self, frame_id: int, time: int) -> Wanted:
        reason = self.damage or "nothing was decoded for it"
        return Wanted(frame_id, time, None, f"the frame cannot be decoded: {reason}")

    # --- frames that are known beforehand -----------------------------------------------------

    def _from_keyframe(self, segment: Segment) -> Iterator[VideoFrame]:
        times = frozenset(segment.index.times.tolist())
        skipped = SKIPPED[self._decode_type]
        for start in segment.starts:
            frames = self._decoded(self._packets_from(start), skipped, times)
            first = next(frames, None)
            while first is not None and (first.pts or 0) < start.pts:
                first = next(frames, None)  # shown before the keyframe, decoded after it
            if first is not None and first.pts == start.pts and not first.is_corrupt:
                yield first
                yield from frames
                return
        yield from self._decoded(self._video.packets(), skipped, times)

    def _packets_from(self, start: Start) -> Iterator[Packet[Any]]:
        """Yield the packets from a keyframe on; none where it cannot be found."""
        at = start.pts if start.dts is None else min(start.pts, start.dts)
        is_there = False
        for packet in self._video.packets(at):
            is_there = is_there or (packet.pts == start.pts and packet.is_keyframe)
            if is_there:
                yield packet
            elif packet.pts is None or (packet.is_keyframe and packet.pts > start.pts):
                return

    # --- frames that are chosen as they come --------------------------------------------------

    def _chosen(self, segment: Segment) -> Iterator[Wanted]:
        sampler = Sampler[Wanted](Grid(self._sample_fps, segment.index))
        for it in self._numbered(segment.index):
            yield from sampler.add(it.time, it)
        yield from sampler.end()

    def _numbered(self, index: Index) -> Iterator[Wanted]:
        """Yield the frames of the decode type, each with its number among all."""
        for place, frame in self._placed_by_time() if index.is_regular else self._placed_by_order():
            if place < index.n_frames and self._is_of_type(frame):
                yield self._found(place, int(index.times[place]), frame)

    def _placed_by_time(self) -> Iterator[tuple[int, VideoFrame]]:
        for frame in self._decoded(self._video.packets(), SKIPPED[self._decode_type]):
            yield int(np.searchsorted(self._index.times, frame.pts or 0)), frame

    def _placed_by_order(self) -> Iterator[tuple[int, VideoFrame]]:
        """Number frames that only their order tells apart; so all are decoded.

        After some were lost, the packets before the next one say how many: but for a few all are
        shown before it, and, where it is no B frame, all, with those behind its own up to the last
        that was shown. A packet may hold half of an interlaced one, so those are merely counted.
        """
        place = last = -1
        most = MAX_AHEAD.get(self._video.stream.codec_context.name, USUAL_AHEAD)
        for frame in self._decoded(_counted(self._video.packets()), SKIPPED[4]):
            place, number = place + 1, frame.pts or 0
            if not frame.interlaced_frame:
                place = max(place, number - most)
                if frame.pict_type != PictureType.B:
                    place = max(place, number, last)
            last = max(last, number)
            yield place, frame

    def _is_of_type(self, frame: VideoFrame) -> bool:
        """Say of a frame whether the decode type has it; some decoders leave nothing out."""
        match self._decode_type:
            case 1:
                return frame.pict_type == PictureType.I
            case 2:
                return bool(frame.key_frame)
            case 3:
                return frame.pict_type != PictureType.B
            case _:
                return True

    # --- decoding -----------------------------------------------------------------------------

    def _decoded(
        self, packets: Iterator[Packet[Any]], skipped: str, times: Container[int] | None = None
    ) -> Iterator[VideoFrame]:
        """Yield what the decoder makes of packets; what is damaged is noted and passed by.

        Args:
            skipped: what the decoder leaves out.
            times: of the frames that are wanted, where that is known.
        """
        context: Any = self._video.restart(skipped)
        is_alone = skipped in (SKIPPED[1], SKIPPED[2])
        n_damaged, last = 0, self._index.origin if self._index.is_regular else 0
        while n_damaged <= MAX_DAMAGED:
            packet: Packet[Any] | None = None
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                self._beat()
                if times is not None and packet.size:
                    if skipped == SKIPPED[2] and packet.pts not in times:
                        continue
                    context.skip_frame = skipped if packet.pts in times else "NONREF"
                frames = _alone(context, packet) if is_alone else _in_turn(context, packet)
            except DecodeError as error:
                if not is_alone or packet is None or packet.is_keyframe:
                    n_damaged += 1
                    self._note_damage(self._time(last), str(error))
                continue
            for frame in frames:
                if frame.pts is None and self._index.is_regular:
                    self._note_damage(self._time(last), "a frame came without its time")
                    continue
                n_damaged, last = 0, frame.pts or last
                yield frame

    def _time(self, pts: int) -> int:
        """Return when a frame is shown; of one without a time `pts` is the packet's number."""
        index = self._index
        return pts if index.is_regular else int(index.times[min(pts, index.n_frames - 1)])

    def _note_damage(self, time: int, reason: str) -> None:
        if not self.damage:
            self.damage = f"{reason} after {self._index.seconds(time):.3f} seconds"


def _counted(packets: Iterator[Packet[Any]]) -> Iterator[Packet[Any]]:
    """Give packets their number in the place of their time; their frames have it, too."""
    for i, packet in enumerate(packets):
        packet.pts = i
        yield packet


def _in_turn(context: Any, packet: Packet[Any]) -> Sequence[VideoFrame]:
    with told("damaged"):
        frames: Sequence[VideoFrame] = context.decode(packet)
        return frames


def _alone(context: Any, packet: Packet[Any]) -> Sequence[VideoFrame]:
    """Decode a frame that refers to no other.

    Were it to wait for its turn among frames that never come, FFmpeg would lose some.
    """
    if not packet.size:
        return ()
    try:
        with told("damaged"):
            return [*context.decode(packet), *context.decode(None)]
    finally:
        context.flush_buffers()
