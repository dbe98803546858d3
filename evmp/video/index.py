"""When each frame of a video is shown, and where decoding may begin, read off its packets.

A pass over the packets costs a hundredth of decoding them. A stream is *regular* when they say all
that is needed: each has a presentation time, no two the same. Of another stream only the order of
its frames is known, once it is decoded from the first to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from evmp.errors import DecodeError

if TYPE_CHECKING:
    from av.packet import Packet

    from evmp.video.container import OpenVideo

Times = np.ndarray[Any, np.dtype[np.int64]]

DEFAULT_FPS: Final = Fraction(25)
MAX_FRAMES: Final = 1 << 23
# Their packets have no presentation times, or times that FFmpeg makes up without knowing better.
UNTIMED_FORMATS: Final = ("avi", "h264", "hevc", "m4v", "mpegvideo", "mjpeg", "obu")
VP8_IS_SHOWN: Final = 0x10  # of a packet's first byte
BEAT_PACKETS: Final = 1024


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
        starts: of each key.
        is_regular: see above.
        damage: where the stream breaks off; empty where it does not.
    """

    time_base: Fraction
    origin: int
    end: int
    n_frames: int
    times: Times
    keys: Sequence[int]
    starts: Sequence[Start]
    is_regular: bool
    damage: str

    @property
    def duration_seconds(self) -> float:
        """From the first frame's time to the end of the last."""
        return self.seconds(self.end)

    def seconds(self, time: int) -> float:
        """Return how long after the first frame a time is."""
        return float((time - self.origin) * self.time_base)


class _Entry(NamedTuple):
    pts: int | None
    dts: int | None
    duration: int
    is_key: bool


def index_of(video: OpenVideo, beat: Callable[[], object] = lambda: None) -> Index:
    """Read all packets of a stream.

    Args:
        beat: called now and then.

    Raises:
        DecodeError: there is no frame in it.
    """
    entries, damage = _entries(video, beat)
    stream = video.stream
    if not entries:
        raise DecodeError(damage or "there is no frame in it")
    if not damage and stream.frames > len(entries):
        damage = f"the file ends after {len(entries)} of {stream.frames} frames"
    fps = stream.average_rate or stream.guessed_rate or DEFAULT_FPS
    time_base = stream.time_base or 1 / fps
    usual = max(1, round(1 / (fps * time_base)))
    unordered = _times(entries, usual)
    order = np.argsort(unordered, kind="stable")
    times = unordered[order]
    in_order = [entries[i] for i in order.tolist()]
    is_regular = video.format not in UNTIMED_FORMATS and bool(
        all(it.pts is not None for it in entries) and (np.diff(times) > 0).all()
    )
    keys = [i for i, it in enumerate(in_order) if it.is_key and is_regular]
    return Index(
        time_base=time_base,
        origin=int(times[0]),
        end=int(times[-1]) + (in_order[-1].duration or usual),
        n_frames=len(times),
        times=times,
        keys=keys,
        starts=[Start(int(times[i]), in_order[i].dts) for i in keys],
        is_regular=is_regular,
        damage=damage,
    )


def _entries(video: OpenVideo, beat: Callable[[], object]) -> tuple[list[_Entry], str]:
    """Return the packets that become frames, in the order of the file, and where they break off."""
    entries: list[_Entry] = []
    is_vp8 = video.stream.codec_context.name == "vp8"
    try:
        for packet in video.packets():
            if packet.size and not packet.is_discard and not (is_vp8 and _is_hidden(packet)):
                duration = int(packet.duration or 0)
                entries.append(_Entry(packet.pts, packet.dts, duration, packet.is_keyframe))
            if len(entries) % BEAT_PACKETS == 0:
                beat()
            if len(entries) > MAX_FRAMES:
                raise DecodeError(f"it has more than {MAX_FRAMES} frames")
    except DecodeError as error:
        if not entries or len(entries) > MAX_FRAMES:
            raise
        return entries, f"the file cannot be read after {len(entries)} frames: {error}"
    return entries, ""


def _is_hidden(packet: Packet[Any]) -> bool:
    return not memoryview(packet)[0] & VP8_IS_SHOWN


def _times(entries: Sequence[_Entry], usual: int) -> Times:
    """Return a time for each packet: when it is shown, or as good a guess as its times allow."""
    for times in ([it.pts for it in entries], [it.dts for it in entries]):
        if None not in times:
            return np.array(times, np.int64)
    return np.arange(len(entries), dtype=np.int64) * usual
