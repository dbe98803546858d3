"""A video file opened by PyAV, whatever it holds.

FFmpeg reads through a Python file alone. Formats that are lists of other files are not among those
it may take one for, and nothing that a file refers to is opened. What is wrong with a video is a
DecodeError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from evmp.errors import ConfigError, DecodeError
from evmp.video.ending import missing_end

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

OUTPUT_CORRUPT: Final = 8  # AV_CODEC_FLAG_OUTPUT_CORRUPT
READ_BYTES: Final = 256 << 10
DEFAULT_FPS: Final = Fraction(25)
# Formats that hold frames themselves.
FORMATS: Final = (
    "mov",
    "matroska",
    "avi",
    "mpegts",
    "mpeg",
    "flv",
    "asf",
    "ogg",
    "gif",
    "mxf",
    "nut",
    "rm",
    "dv",
    "ivf",
    "h264",
    "hevc",
    "m4v",
    "mpegvideo",
    "obu",
    "av1",
    "mjpeg",
    "yuv4mpegpipe",
)


class PictureType(IntEnum):
    """What FFmpeg says of a frame."""

    I = 1  # noqa: E741
    P = 2
    B = 3


SKIPPED: Final = {1: "NONINTRA", 2: "NONKEY", 3: "BIDIR", 4: "DEFAULT"}
"""What FFmpeg's decoder leaves out, by the job's `decode_type`."""


class OpenVideo:
    """The largest video stream of a file.

    Args:
        file: seekable; stays the caller's.
        max_pixels: height x width above which a frame is refused.

    Raises:
        DecodeError: the file is no video.
    """

    def __init__(self, file: BinaryIO, max_pixels: int) -> None:
        self._file, self._max_pixels = file, max_pixels
        self._container: InputContainer
        self.stream: VideoStream
        self.is_joined = False
        """Whether times were seen to start anew, as where two files have been put together."""
        self._is_read = False
        self._open()

    def __enter__(self) -> OpenVideo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def format(self) -> str:
        """FFmpeg's name of the container's format."""
        return self._container.format.name

    @property
    def n_packets(self) -> int:
        """How many packets the stream has, by what the header says; 0 where it does not."""
        n_frames: int = self.stream.frames
        if not self.format.startswith("mov"):
            return n_frames
        return min(n_frames, len(self.stream.index_entries))  # without what edit lists leave out

    @property
    def missing_end(self) -> str:
        """How the file falls short, where its bytes tell that it has been cut."""
        return missing_end(self._file, self.format)

    @property
    def time_base(self) -> Fraction:
        """Seconds of one unit of the stream's times."""
        return self.stream.time_base or 1 / self._fps

    @property
    def usual_duration(self) -> int:
        """How long a frame is shown, in units of the time base, by what the header says."""
        return max(1, round(1 / (self._fps * self.time_base)))

    @property
    def _fps(self) -> Fraction:
        return self.stream.average_rate or self.stream.guessed_rate or DEFAULT_FPS

    def close(self) -> None:
        self._container.close()

    def packets(self, start: int | None = None) -> Iterator[Packet[Any]]:
        """Yield the stream's packets in the order of the file; the empty last one flushes.

        From the beginning on, times that start anew are made to go on where those before end.

        Args:
            start: a time in the stream's time base; the last keyframe not behind it comes first.
                None starts at the beginning.

        Raises:
            DecodeError: the file cannot be read any further.
        """
        if start is None and self._is_read:  # some formats cannot be sought in
            self.close()
            self._open()
        self._is_read = True
        with told("damaged"):
            if start is None:
                yield from self._continued()
            else:
                self._container.seek(start, stream=self.stream)
                yield from self._container.demux(self.stream)

    def _continued(self) -> Iterator[Packet[Any]]:
        """Shift the times of what would be shown before what stands ahead of it is decoded."""
        usual = self.usual_duration
        shift, end, decoded = 0, 0, None
        for packet in self._container.demux(self.stream):
            if packet.pts is not None and packet.dts is not None:
                if decoded is not None and max(packet.pts, packet.dts + 1) <= decoded:
                    self.is_joined, shift = True, end - packet.pts
                first, decoded = decoded is None, packet.dts
                if shift:
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                shown = packet.pts + (packet.duration or usual)
                end = shown if first else max(end, shown)
            yield packet

    def restart(self, skipped: str) -> VideoCodecContext:
        """Return the decoder, with nothing in it, and on one thread.

        Args:
            skipped: what it leaves out, one of SKIPPED.
        """
        context: Any = self.stream.codec_context
        if context.is_open:
            context.flush_buffers()
        else:
            context.thread_type, context.thread_count = "NONE", 1
            context.options = {"max_pixels": str(self._max_pixels)}
        context.skip_frame = skipped
        # Of a frame that refers to no other it says nothing that others are missing.
        if skipped == SKIPPED[1]:
            context.flags |= OUTPUT_CORRUPT
        return context  # type: ignore[no-any-return]

    def _open(self) -> None:
        self._file.seek(0)
        with told("not a video"):
            self._container = _open(self._file, self._max_pixels)
        self._is_read = False
        try:
            self.stream = _largest(self._container)
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        context: Any = self.stream.codec_context
        if not _worth(self.stream)[0]:
            raise DecodeError("there is no decoder for this kind of video")
        if context.width * context.height > self._max_pixels:
            raise DecodeError(
                f"frames of {context.width} x {context.height} pixels exceed max_image_pixels "
                f"{self._max_pixels}"
            )


def check_installed() -> None:
    """Make sure that there is a PyAV.

    Raises:
        ConfigError: there is none.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError(f"videos need PyAV: pip install 'evmp[video]' ({error})") from None
    av.logging.set_level(av.logging.PANIC)


@contextmanager
def told(verdict: str) -> Iterator[None]:
    """Turn what PyAV raises into a DecodeError, in words without names of files."""
    import av

    try:
        yield
    except av.error.FFmpegError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise DecodeError(f"{verdict}: {reason}") from None
    except (ValueError, LookupError, OverflowError, RuntimeError, MemoryError) as error:
        raise DecodeError(f"{verdict}: {str(error).lower() or type(error).__name__}") from None


def _open(file: BinaryIO, max_pixels: int) -> InputContainer:
    import av

    return av.open(
        file,
        "r",
        container_options={
            "format_whitelist": ",".join(FORMATS),
            "protocol_whitelist": "none",
        },
        options={"max_pixels": str(max_pixels)},
        buffer_size=READ_BYTES,
        io_open=_refuse,
        metadata_errors="replace",
    )


def _refuse(url: str, flags: int, options: dict[str, Any]) -> object:
    raise PermissionError("a video may not refer to other files")


def _largest(container: InputContainer) -> VideoStream:
    """Return the video of the largest frames that can be decoded; a cover picture is none."""
    from av.stream import Disposition

    streams = [
        it for it in container.streams.video if not it.disposition & Disposition.attached_pic
    ]
    if not streams:
        kinds = sorted({it.type for it in container.streams})
        what = "a picture beside sound" if "video" in kinds else ", ".join(kinds) or "nothing"
        raise DecodeError(f"there is no video in it, only {what}")
    return max(streams, key=_worth)


def _worth(stream: VideoStream) -> tuple[bool, int]:
    context: Any = stream.codec_context
    if context is None or not context.codec.is_decoder:
        return False, 0
    return True, context.width * context.height
