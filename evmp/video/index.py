"""When each frame of a video is shown, and where decoding may begin, read off its packets.

A pass over the packets costs a hundredth of decoding them. A stream is *regular* when they say all
that is needed: each has a presentation time, no two the same. Of another stream only the order of
its frames is known, once it is decoded from the first to the last.

Packets of interlaced H.264 may hold half a frame each. Which belong together only the decoder says,
so such a stream is decoded once for its index.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from evmp.errors import DecodeError
from evmp.video.container import SKIPPED, told

if TYPE_CHECKING:
    from av import VideoFrame
    from av.packet import Packet

    from evmp.video.container import OpenVideo

Times = np.ndarray[Any, np.dtype[np.int64]]

MAX_FRAMES: Final = 1 << 23
# Their packets have no presentation times, or times that FFmpeg makes up without knowing better.
UNTIMED_FORMATS: Final = ("avi", "h264", "hevc", "m4v", "mpegvideo", "mjpeg", "obu")
VP8_IS_SHOWN: Final = 0x10  # of a packet's first byte
UNSOUGHT_FORMATS: Final = ("mpeg",)  # FFmpeg guesses where in it a time is
UNKNOWN: Final = -(1 << 63)
NONE: Final = np.array([], np.int64)
BEAT_PACKETS: Final = 1024
PROGRESSIVE: Final = 1  # AV_FIELD_PROGRESSIVE
TRIED_PACKETS: Final = 64  # of an interlaced stream
MAX_LEADING: Final = 64  # frames shown ahead of a keyframe, decoded after it


class Start(NamedTuple):
    """A keyframe; its times as its packet has them, where it has."""

    pts: int
    dts: int | None


@dataclass(frozen=True, slots=True)
class Index:
    """The frames of a stream in the order in which they are shown.

    Attributes:
        time_base: seconds of one unit of the times.
        origin: the time of the first frame, from which all others count.
        end: when the last frame is over.
        n_frames: how many there are.
        times: (n_frames,) int64, ascending.
        keys: which of the frames decoding may begin with, ascending.
        starts: (len(keys), 2) int64, the times of each key's packet, presentation and decoding;
            UNKNOWN is none. Empty where the file is not sought in.
        is_regular: see above.
        damage: where the stream first breaks off; empty where it does not.
    """

    time_base: Fraction
    origin: int
    end: int
    n_frames: int
    times: Times
    keys: Times
    starts: Times
    is_regular: bool
    damage: str

    @property
    def duration_seconds(self) -> float:
        """From the first frame's time to the end of the last."""
        return self.seconds(self.end)

    def start(self, key: int) -> Start:
        """Return how to begin with one of the keys."""
        pts, dts = self.starts[key].tolist()
        return Start(pts, None if dts == UNKNOWN else dts)

    def seconds(self, time: int) -> float:
        """Return how long after the first frame a time is."""
        return (time - self.origin) * self.time_base.numerator / self.time_base.denominator


class _Packets:
    """The times of packets, in the order of the file, in few bytes each."""

    def __init__(self) -> None:
        self._pts, self._dts, self._durations = array("q"), array("q"), array("q")
        self._is_key = bytearray()
        self.n_hidden = 0
        self.broken = array("q")
        """Which are not whole, or follow what is missing."""

    def __len__(self) -> int:
        return len(self._is_key)

    def add(self, it: Packet[Any] | VideoFrame, is_key: bool) -> None:
        """Take a packet that becomes a frame, or the frame."""
        self._pts.append(UNKNOWN if it.pts is None else it.pts)
        self._dts.append(UNKNOWN if it.dts is None else it.dts)
        self._durations.append(int(it.duration or 0))
        if it.is_corrupt:
            self.broken.append(len(self))
        self._is_key.append(is_key)

    @property
    def pts(self) -> Times:
        return np.frombuffer(self._pts, np.int64)

    @property
    def dts(self) -> Times:
        return np.frombuffer(self._dts, np.int64)

    @property
    def is_key(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return np.frombuffer(self._is_key, np.bool_)

    def keep(self, places: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        """Drop all others."""
        times = (self.pts, self.dts, np.frombuffer(self._durations, np.int64))
        self._pts, self._dts, self._durations = (array("q", it[places].tobytes()) for it in times)
        self._is_key = bytearray(self.is_key[places].tobytes())

    def duration(self, place: int) -> int:
        """Return how long a packet's frame is shown; 0 where that is not known."""
        return self._durations[place]

    def times(self, usual: int) -> Times:
        """Return when each frame is shown, or as good a guess as its times allow."""
        for times in (self.pts, self.dts):
            if (times != UNKNOWN).all():
                return times
        return np.arange(len(self), dtype=np.int64) * usual


def index_of(video: OpenVideo, beat: Callable[[], object] = lambda: None) -> Index:
    """Read all packets of a stream.

    Args:
        beat: called now and then.

    Raises:
        DecodeError: there is no frame in it.
    """
    packets, damage = _read(video, beat)
    if not packets:
        raise DecodeError(damage or "there is no frame in it")
    has_halves = _has_halves(video, beat)
    if has_halves:
        packets = _put_together(video, beat)
    else:
        _drop_orphans(packets, video, beat)
    usual = video.usual_duration
    unordered = packets.times(usual)
    order = np.argsort(unordered, kind="stable")
    times = unordered[order]
    is_timed = video.format not in UNTIMED_FORMATS and bool((packets.pts != UNKNOWN).all())
    is_regular = is_timed and not has_halves and bool((times[1:] > times[:-1]).all())
    keys = np.flatnonzero(packets.is_key[order]) if is_regular else NONE
    is_sought = not video.is_joined and video.format not in UNSOUGHT_FORMATS
    sought = keys if is_sought else NONE
    return Index(
        time_base=video.time_base,
        origin=int(times[0]),
        end=int(times[-1]) + (packets.duration(int(order[-1])) or usual),
        n_frames=len(times),
        times=times,
        keys=keys,
        starts=np.stack([times[sought], packets.dts[order[sought]]], axis=1),
        is_regular=is_regular,
        damage=damage,
    )


def _read(video: OpenVideo, beat: Callable[[], object]) -> tuple[_Packets, str]:
    """Return the packets that become frames, and where they break off."""
    packets, damage = _Packets(), ""
    is_vp8 = video.stream.codec_context.name == "vp8"
    try:
        for packet in video.packets():
            if packet.is_discard or (is_vp8 and packet.size and _is_hidden(packet)):
                packets.n_hidden += 1
            elif packet.size:
                packets.add(packet, packet.is_keyframe)
            if len(packets) % BEAT_PACKETS == 0:
                beat()
            if len(packets) > MAX_FRAMES:
                raise DecodeError(f"it has more than {MAX_FRAMES} frames")
    except DecodeError as error:
        if not packets or len(packets) > MAX_FRAMES:
            raise
        damage = f"the file cannot be read after {len(packets)} frames: {error}"
    return packets, _loss(packets) or damage or _cut(packets, video)


def _loss(packets: _Packets) -> str:
    """Say where the stream misses something; not at its end.

    Counters start anew where pieces were joined, each of which begins with a keyframe, and FFmpeg
    is a packet late to say so.
    """
    for place in packets.broken:
        if place < len(packets) - 1 and not packets.is_key[place + 1 : place + 3].any():
            return f"something is missing after {place} frames"
    return ""


def _cut(packets: _Packets, video: OpenVideo) -> str:
    """Say that the file has been cut, where it can be told."""
    n_frames = len(packets)
    if video.n_packets > n_frames + packets.n_hidden:
        return f"the file ends after {n_frames} of {video.n_packets} frames"
    if how := video.missing_end:
        return f"the file ends after {n_frames} frames, {how}"
    is_last_broken = packets.broken[-1:] == array("q", [n_frames - 1])
    return f"the file ends within frame {n_frames - 1}" if is_last_broken else ""


def _has_halves(video: OpenVideo, beat: Callable[[], object]) -> bool:
    """Say whether the first packets of an interlaced stream are more than their frames."""
    context: Any = video.stream.codec_context
    if context.name != "h264" or context.field_order == PROGRESSIVE:
        return False
    packets: list[Packet[Any] | None] = []
    with suppress(DecodeError):
        packets.extend(it for it in islice(video.packets(), TRIED_PACKETS) if it.size)
    return sum(1 for _ in _decoded(video, [*packets, None], beat)) < len(packets)


def _drop_orphans(packets: _Packets, video: OpenVideo, beat: Callable[[], object]) -> None:
    """Drop what is shown ahead of the first keyframe and refers to what has been cut off.

    Nothing is ahead of it in most files. Where something is, the decoder gives it or not.
    """
    first, *others = packets.pts[: MAX_LEADING + 1].tolist()
    leading = list(takewhile(lambda pts: UNKNOWN < pts < first, others))
    if not leading or not packets.is_key[0] or video.format in UNTIMED_FORMATS:
        return
    shown = {it.pts for it in _decoded(video, _through(video.packets(), leading[-1]), beat)}
    if first in shown:
        places = np.ones(len(packets), np.bool_)
        places[1 : 1 + len(leading)] = [pts in shown for pts in leading]
        packets.keep(places)


def _through(packets: Iterator[Packet[Any]], pts: int) -> Iterator[Packet[Any] | None]:
    """Yield packets up to that of a time, and what makes a decoder give all it has."""
    for packet in packets:
        yield packet
        if packet.pts == pts:
            break
    yield None


def _put_together(video: OpenVideo, beat: Callable[[], object]) -> _Packets:
    """Return the frames that all packets become, in the place of packets."""
    frames = _Packets()
    with suppress(DecodeError):
        for frame in _decoded(video, video.packets(), beat):
            frames.add(frame, bool(frame.key_frame))
    if not frames:
        raise DecodeError("there is no frame in it")
    return frames


def _decoded(
    video: OpenVideo, packets: Iterable[Packet[Any] | None], beat: Callable[[], object]
) -> Iterator[VideoFrame]:
    """Yield what packets become; what is damaged is passed by."""
    context: Any = video.restart(SKIPPED[4])
    for packet in packets:
        beat()
        with suppress(DecodeError), told("damaged"):
            yield from context.decode(packet)


def _is_hidden(packet: Packet[Any]) -> bool:
    return not memoryview(packet)[0] & VP8_IS_SHOWN
