"""How an image of any size becomes the model's input: which part of it goes where.

The three resize modes of model.yaml differ only in two rectangles, the part of the image that is
used and the part of the input that it fills, so one antialiased pass from the one to the other does
them all. No intermediate image exists, whatever the mode.

An input of a dynamic size is a pure function of the image's size, so that whoever knows the one
knows the other.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from evmp import _native

if TYPE_CHECKING:
    from evmp.image import Frame
    from evmp.model.package import ModelInput

Box = tuple[float, float, float, float]
Rectangle = tuple[int, int, int, int]
Points: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"


class Fit:
    """The resize mode, size, filter and colour order of a model's input."""

    def __init__(self, spec: ModelInput) -> None:
        self._spec = spec
        side = spec.short_side
        self.enough = (side, side) if spec.resize == "short_side" else (spec.height, spec.width)
        """Rows and columns from which on a smaller decoded image serves as well."""

    def into(self, frame: Frame, row: memoryview) -> None:
        """Write an image into a row of the batch.

        Args:
            frame: the image; one that was decoded at a fraction of its size goes where it would
                have gone whole.
            row: where the (height, width, 3) uint8 of the model's input go, in its colour order;
                the rest of it is left alone.
        """
        spec = self._spec
        rows, columns = self.size_of(frame.height, frame.width)
        height, width = frame.pixels.shape[:2]
        (left, top, right, bottom), into = self.rectangles(frame.height, frame.width)
        y, x = height / frame.height, width / frame.width
        _native.resize(
            frame.pixels,
            height,
            width,
            row[: rows * columns * 3],
            rows,
            columns,
            box=(left * x, top * y, min(right * x, float(width)), min(bottom * y, float(height))),
            into=into,
            fill=spec.pad_color,
            filter=spec.interpolation,
            swap=spec.color_order == "bgr",
        )

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of the input that an image of `height` x `width` becomes."""
        if self._spec.size == "fixed":
            return self._spec.height, self._spec.width
        rows, columns = self._resized(height, width)
        across, along = self._spec.sides
        return self._side(rows, *across), self._side(columns, *along)

    def rectangles(self, height: int, width: int) -> tuple[Box, Rectangle]:
        """Return what of an image goes where.

        Args:
            height, width: pixels of the image.

        Returns: (left, top, right, bottom) in the image, fractions of pixels included, and
            (left, top, width, height) in the input.
        """
        whole = (0.0, 0.0, float(width), float(height))
        rows, columns = self.size_of(height, width)
        if self._spec.resize == "short_side":
            return self._crop(height, width), (0, 0, columns, rows)
        if self._spec.resize == "letterbox":
            return whole, self._inner(height, width)
        return whole, (0, 0, columns, rows)

    def to_image(self, points: Points, height: int, width: int) -> Points:
        """Take points of the input back to where they are in an image; the inverse of `into`.

        Args:
            points: (..., 2) of x and y, in pixels of the input.
            height, width: pixels of the image.

        Returns: (..., 2) float64 of x and y, in pixels of the image; a point that lies outside it,
            as in a letterbox's padding, is moved to the nearest edge.
        """
        (left, top, right, bottom), (x, y, columns, rows) = self.rectangles(height, width)
        scale = (right - left) / columns, (bottom - top) / rows
        there: Points = (points - np.array((x, y))) * scale + (left, top)
        return there.clip(0, (width, height))

    def _side(self, length: float, least: int, most: int, divisor: int) -> int:
        """Turn the side of a resized image into one that the model takes."""
        parts = length / divisor
        match self._spec.resize:
            case "short_side":  # what is cut out of it
                whole = int(parts)
            case "letterbox":  # what it lies in
                whole = math.ceil(parts)
            case _:
                whole = round(parts)
        return min(max(whole * divisor, least), most)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of an image that was resized with its aspect kept."""
        if self._spec.resize == "short_side":
            short, side = min(height, width), self._spec.short_side
            return max(side, side * height // short), max(side, side * width // short)
        scale = min(self._spec.height / height, self._spec.width / width)
        if self._spec.enlarge_to:
            scale = min(scale, max(1.0, self._spec.enlarge_to / min(height, width)))
        return (
            min(self._spec.height, max(1, round(height * scale))),
            min(self._spec.width, max(1, round(width * scale))),
        )

    def _crop(self, height: int, width: int) -> Box:
        """The centre crop of torchvision's Resize(short_side), CenterCrop(height, width)."""
        rows, columns = self._resized(height, width)
        inner_rows, inner_columns = self.size_of(height, width)
        top = round((rows - inner_rows) / 2)
        left = round((columns - inner_columns) / 2)
        y, x = height / rows, width / columns
        return (
            left * x,
            top * y,
            min((left + inner_columns) * x, float(width)),
            min((top + inner_rows) * y, float(height)),
        )

    def _inner(self, height: int, width: int) -> Rectangle:
        """The rectangle of the image's aspect, in the middle of the input or at its start."""
        rows, columns = self._resized(height, width)
        if self._spec.align == "start":
            return 0, 0, columns, rows
        outer_rows, outer_columns = self.size_of(height, width)
        return (outer_columns - columns) // 2, (outer_rows - rows) // 2, columns, rows
