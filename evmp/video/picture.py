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
from evmp.image import Frame
from evmp.video.container import told

if TYPE_CHECKING:
    from av import VideoFrame

MAX_ASPECT = 16  # of a pixel; beyond it a header lies


def displayed(
    frame: VideoFrame, aspect: Fraction | None, short_side: int, max_pixels: int
) -> Frame:
    """Return a frame as an image.

    Args:
        aspect: width of a pixel over its height; None for square ones.
        short_side: pixels of the shorter side; less than 1 keeps the size.
        max_pixels: height x width above which it is refused.

    Raises:
        DecodeError: it is too large, or of a kind that cannot be converted.
    """
    width, height = frame.width, frame.height
    shown = _width(width, aspect), height
    scale = short_side / min(shown) if short_side > 0 else 1.0
    columns, rows = (max(1, round(side * scale)) for side in shown)
    if max(columns * rows, width * height) > max_pixels:
        raise DecodeError(
            f"a frame of {columns} x {rows} pixels exceeds max_image_pixels {max_pixels}"
        )
    with told("the frame cannot be converted"):
        pixels: Any = frame.to_ndarray(format="rgb24")
    if (columns, rows) != (width, height):
        resized = np.empty((rows, columns, 3), np.uint8)
        _native.resize(np.ascontiguousarray(pixels), height, width, resized, rows, columns)
        pixels = resized
    turns = round(frame.rotation / 90) % 4
    if turns % 2:
        shown = shown[::-1]
    return Frame(np.ascontiguousarray(np.rot90(pixels, turns)), shown[1], shown[0])


def _width(width: int, aspect: Fraction | None) -> int:
    if not aspect or not 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
        return width
    return max(1, round(width * aspect))
