"""A decoded frame as RGB, as it is displayed: upright, with square pixels, at the size asked for.

Anamorphic pixels are widened, so that the height stays. Size and shape come in one antialiased pass
from the frame's own RGB, the turn last.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from evmp import _native
from evmp.errors import DecodeError
from evmp.image import Frame, Pixels
from evmp.video.container import told

if TYPE_CHECKING:
    from av import VideoFrame

MAX_ASPECT = 16  # of a pixel; beyond it a header lies


class Display:
    """Makes images of frames. Keeps what FFmpeg needs for that, which costs more than one frame.

    Args:
        short_side: pixels of the shorter side; less than 1 keeps the size.
        max_pixels: height x width above which a frame is refused.
    """

    def __init__(self, short_side: int, max_pixels: int) -> None:
        from av.video.reformatter import VideoReformatter

        self._short_side, self._max_pixels = short_side, max_pixels
        self._reformatter = VideoReformatter()

    def show(self, frame: VideoFrame, aspect: Fraction | None) -> Frame:
        """Return a frame as an image.

        Args:
            aspect: width of a pixel over its height; None for square ones.

        Raises:
            DecodeError: it is too large, or of a kind that cannot be converted.
        """
        width, height = frame.width, frame.height
        shown = _width(width, aspect), height
        scale = self._short_side / min(shown) if self._short_side > 0 else 1.0
        columns, rows = (max(1, round(side * scale)) for side in shown)
        if max(columns * rows, width * height) > self._max_pixels:
            raise DecodeError(
                f"a frame of {columns} x {rows} pixels exceeds max_image_pixels {self._max_pixels}"
            )
        with told("the frame cannot be converted"):
            rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)
            pixels = _pixels(rgb)
        if (columns, rows) != (width, height):
            resized = np.empty((rows, columns, 3), np.uint8)
            _native.resize(np.ascontiguousarray(pixels), height, width, resized, rows, columns)
            pixels = resized
        turns = round(frame.rotation / 90)
        if _is_mirrored(frame):  # FFmpeg's angle makes half a turn of it
            pixels, turns = pixels[:, ::-1], turns + 2
        if turns % 2:
            shown = shown[::-1]
        return Frame(np.ascontiguousarray(np.rot90(pixels, turns)), shown[1], shown[0])


def _pixels(rgb: VideoFrame) -> Pixels:
    """Return what a frame holds, without a copy where its rows have no gaps."""
    plane: Any = rgb.planes[0]
    if plane.line_size != rgb.width * 3:
        copied: Pixels = np.ascontiguousarray(rgb.to_ndarray(), np.uint8)
        return copied
    return np.frombuffer(plane, np.uint8).reshape(rgb.height, rgb.width, 3)


def _is_mirrored(frame: VideoFrame) -> bool:
    """Say whether the matrix of a frame turns it over, as front cameras have it."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    return bool(a * d < b * c)


def _width(width: int, aspect: Fraction | None) -> int:
    if not aspect or aspect == 1 or not 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
        return width
    return max(1, round(width * aspect))
