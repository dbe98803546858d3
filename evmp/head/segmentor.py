"""One class a pixel, at the model's output size: `{"preds": [H, W], "probs": [H, W, C]}`.

`segmentation_output` says which of the two a result holds. A pixel's class is that of its highest
score, of equal ones the lowest number. A model of one class gives 1 where its probability is at
least 0.5, and 0 elsewhere. A model that ends in an argmax gives class numbers, and has no `probs`.
A pixel whose best score is NaN or infinite fails the row.

With `segmentation_output: png` the result is a file: a PNG whose pixels are class numbers, shown in
the colours of `output.palette`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from evmp.errors import ModelError
from evmp.head.array import (
    Array,
    Row,
    activate,
    check_finite,
    check_labelled,
    class_names,
    dump,
    pick,
)

if TYPE_CHECKING:
    from evmp.model import Outputs
    from evmp.model.package import ModelPackage

FOREGROUND = 0.5
"""The probability from which on a pixel is of the one class of a model that has no other."""
MAX_COLORS: Final = 256  # of a PNG with a palette


class Segmentor:
    """The head of `model_type: segmentor`."""

    def __init__(self, package: ModelPackage, *, parts: str) -> None:
        """Make the head of a package.

        Args:
            parts: `preds`, `probs`, `both` or `png`.
        """
        self._package = package
        self._palette = _whole_palette(package.output.palette)
        self._parts = ("preds", "probs") if parts == "both" else (parts,)
        self._shape: tuple[int, ...] = ()

    def check(self, outputs: Outputs) -> None:
        found = _map_of(outputs[0])
        self._shape = self._lasting(found)
        if found.ndim == 2:
            self._check_numbers(found)
        elif len(found) > 1:
            class_names(self._package, found.shape)
        else:
            self._check_single(found)

    def results(self, outputs: Outputs, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self._result(_map_of(row)) for row in outputs]

    def _check_numbers(self, found: Array) -> None:
        if "probs" in self._parts:
            raise ModelError(
                f"the model returned class numbers, {(1, *found.shape)} {found.dtype} for an "
                "image, which have no probabilities; set segmentation_output: preds in the job"
            )

    def _check_single(self, found: Array) -> None:
        """Labels name the one class, or both of what is not it, 0, and what is, 1."""
        if self._package.activation == "softmax":
            raise ModelError(
                f"the model returned {(1, *found.shape)} for an image, one class, which softmax "
                "makes 1 everywhere; set output.activation: sigmoid, or none"
            )
        are_both = self._package.output.label_offset + len(self._package.labels) == 2
        class_names(self._package, found.shape, others=-1 if are_both else 0)

    def _result(self, found: Array) -> bytes:
        if self._lasting(found) != self._shape:
            raise ModelError(
                f"the model returned {(1, *found.shape)} for this image, at first it was "
                f"{(1, *self._shape)}"
            )
        if self._parts == ("png",):
            return self._png(self._preds(found))
        parts = {"preds": self._preds, "probs": self._probs}
        return dump({name: parts[name](found) for name in self._parts})

    def _png(self, preds: Array) -> bytes:
        """Return a file.

        Raises:
            ModelError: a class has no place in a palette.
        """
        if preds.min() < 0 or preds.max() >= MAX_COLORS:
            raise ModelError(
                f"the model returned classes from {preds.min()} to {preds.max()} for this image, "
                f"of which a PNG holds 0 to {MAX_COLORS - 1}; set segmentation_output: preds"
            )
        image = Image.fromarray(preds.astype(np.uint8))
        image.putpalette(self._palette)
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    def _lasting(self, found: Array) -> tuple[int, ...]:
        """Return what is the same for every image: the shape, or the classes in a dynamic one."""
        shape: tuple[int, ...] = found.shape
        return shape if self._package.input.size == "fixed" else shape[:-2]

    def _preds(self, found: Array) -> Array:
        """Return (H, W) integers."""
        if found.ndim == 2:
            check_labelled(self._package, int(found.max()))
            return found
        if len(found) == 1:
            found = activate(found[0], self._package.activation)
            foreground: Array = found >= np.float32(FOREGROUND)
            return foreground.astype(np.uint8)
        check_finite(found.max(axis=0))
        preds: Array = found.argmax(axis=0)
        return preds

    def _probs(self, found: Array) -> Array:
        """Return (H, W, C) float32."""
        probabilities = activate(found, self._package.activation, axis=0)
        return np.ascontiguousarray(probabilities.transpose(1, 2, 0))


def _whole_palette(colors: Sequence[tuple[int, int, int]]) -> bytes:
    """Return red, green and blue of 256 classes: those given, and for the rest PASCAL VOC's."""
    return b"".join(
        bytes(colors[number] if number < len(colors) else _voc_color(number))
        for number in range(MAX_COLORS)
    )


def _voc_color(number: int) -> tuple[int, ...]:
    """Return the colour of a class: its bits, dealt to red, green and blue from their top down."""
    return tuple(
        sum((number >> 3 * place + channel & 1) << 7 - place for place in range(3))
        for channel in range(3)
    )


def _map_of(row: Row) -> Array:
    """Return the (C, H, W) scores of an image, or its (H, W) class numbers.

    Raises:
        ModelError: the model gave anything else.
    """
    found = pick(row, "out", "the score of each class at each pixel")
    if found.dtype == np.bool_:
        found = found.astype(np.uint8)
    is_number = np.issubdtype(found.dtype, np.integer)
    if is_number and found.ndim == 3 and len(found) == 1:
        found = found[0]
    if found.size == 0 or found.ndim != (2 if is_number else 3):
        raise ModelError(
            f"the model returned {(1, *found.shape)} {found.dtype} for an image, expected "
            "(1, classes, height, width) scores or (1, height, width) integers"
        )
    return found
