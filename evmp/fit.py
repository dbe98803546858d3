"""How an image of any size becomes the model's input: which part of it goes where.

The three resize modes of model.yaml differ only in two rectangles, the part of the image that is
used and the part of the input that it fills, so one antialiased pass from the one to the other does
them all. No intermediate image exists, whatever the mode.
"""

from __future__ import annotations

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
        side = spec.short_side if spec.resize == "short_side" else 0
        self.enough = (max(spec.height, side), max(spec.width, side))
        """Rows and columns from which on a smaller decoded image serves as well."""

    def into(self, frame: Frame, row: memoryview) -> None:
        """Write an image into a row of the batch.

        Args:
            frame: the image; one that was decoded at a fraction of its size goes where it would
                have gone whole.
            row: the (height, width, 3) uint8 of the model's input, in its colour order.
        """
        spec = self._spec
        height, width = frame.pixels.shape[:2]
        (left, top, right, bottom), into = self.rectangles(frame.height, frame.width)
        y, x = height / frame.height, width / frame.width
        _native.resize(
            frame.pixels,
            height,
            width,
            row,
            spec.height,
            spec.width,
            box=(left * x, top * y, min(right * x, float(width)), min(bottom * y, float(height))),
            into=into,
            fill=spec.pad_color,
            filter=spec.interpolation,
            swap=spec.color_order == "bgr",
        )

    def rectangles(self, height: int, width: int) -> tuple[Box, Rectangle]:
        """Return what of an image goes where.

        Args:
            height, width: pixels of the image.

        Returns: (left, top, right, bottom) in the image, fractions of pixels included, and
            (left, top, width, height) in the input.
        """
        whole = (0.0, 0.0, float(width), float(height))
        everywhere = (0, 0, self._spec.width, self._spec.height)
        if self._spec.resize == "short_side":
            return self._crop(height, width), everywhere
        if self._spec.resize == "letterbox":
            return whole, self._inner(height, width)
        return whole, everywhere

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

    def _crop(self, height: int, width: int) -> Box:
        """The centre crop of torchvision's Resize(short_side), CenterCrop(height, width)."""
        short, side = min(height, width), self._spec.short_side
        rows = max(side, side * height // short)
        columns = max(side, side * width // short)
        top = round((rows - self._spec.height) / 2)
        left = round((columns - self._spec.width) / 2)
        y, x = height / rows, width / columns
        return (
            left * x,
            top * y,
            min((left + self._spec.width) * x, float(width)),
            min((top + self._spec.height) * y, float(height)),
        )

    def _inner(self, height: int, width: int) -> Rectangle:
        """The largest rectangle of the image's aspect, in the middle of the input."""
        scale = min(self._spec.height / height, self._spec.width / width)
        rows = min(self._spec.height, max(1, round(height * scale)))
        columns = min(self._spec.width, max(1, round(width * scale)))
        return (
            (self._spec.width - columns) // 2,
            (self._spec.height - rows) // 2,
            columns,
            rows,
        )
