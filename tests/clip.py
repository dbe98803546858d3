"""Videos made by PyAV for the tests, each frame of which shows its number."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

HEIGHT, WIDTH = 72, 96
RATE = 25


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Return (height, width, 3) uint8 RGB, different for each number."""
    rows, columns = np.mgrid[:height, :width]
    red = (rows * 2 + number * 5) % 256
    green = (columns * 2 + number * 3) % 256
    blue = np.where(columns * 60 // width == number % 60, 255, 30)
    return np.stack([red, green, blue], axis=2).astype(np.uint8)


def make_clip(
    n_frames: int = 60,
    codec: str = "libx264",
    format: str = "mp4",
    *,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    pix_fmt: str = "yuv420p",
    aspect: Fraction | None = None,
    rotation: int = 0,
    movflags: str = "",
    avoid_negative_ts: str = "auto",
    **options: object,
) -> bytes:
    """Return a file.

    Args:
        pts: of each frame, in `time_base`; None is one frame after the other.
        aspect: of a pixel.
        rotation: degrees that the picture is to be turned, counterclockwise.
        movflags: of the muxer, which `faststart` makes want a file with a name.
        avoid_negative_ts: of the muxer; `disabled` lets times be as they are.
        options: of the encoder; `bf` and `g` for most.
    """
    texts: Mapping[str, str] = {key: str(value) for key, value in options.items()}
    muxing = {"avoid_negative_ts": avoid_negative_ts}
    if movflags:
        muxing["movflags"] = movflags
    with (
        tempfile.NamedTemporaryFile() as file,
        av.open(file.name, "w", format=format, options=muxing) as container,
    ):
        stream: Any = container.add_stream(codec, rate=RATE, options=dict(texts))
        stream.height, stream.width = size
        stream.pix_fmt, stream.thread_count = pix_fmt, 1
        if time_base:
            stream.time_base = stream.codec_context.time_base = time_base
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(n_frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            frame.pts = number if pts is None else pts[number]
            if time_base:
                frame.time_base = time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        container.close()
        return Path(file.name).read_bytes()
