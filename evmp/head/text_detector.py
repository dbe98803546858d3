"""Where lines of text are: the detector's keys, and the four corners of each line.

    {"detection_boxes": [[top, left, bottom, right], ...], "detection_scores": [0.9, ...],
     "detection_classes": [0, ...], "detection_class_names": ["text", ...],
     "detection_keypoints": [[[y, x], [y, x], [y, x], [y, x]], ...]}

The model gives a map of how likely each pixel is text, (N, 1, H, W), as DB has it; H and W may be a
fraction of the input's. `output.text` says what becomes a line. Lines come in reading order, from
the top down and from the left to the right. Corners run clockwise, as `quad` has them; they
and the boxes around them are in pixels of the original image, and end at its edges. A line of which
nothing is left is dropped. NaN and infinity fail the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evmp.errors import ModelError
from evmp.fit import Fit
from evmp.head.array import Array, Row, activate, dump, pick
from evmp.head.quad import Quads, find_quads, reading_order

if TYPE_CHECKING:
    from evmp.model import Outputs
    from evmp.model.package import ModelPackage

TEXT = "text"
"""The name of the one class that a model of text finds."""


class TextDetector:
    """The head of `model_type: text_detector`."""

    def __init__(self, package: ModelPackage) -> None:
        self._package = package
        self._fit = Fit(package.input)

    def check(self, outputs: Outputs) -> None:
        _map_of(outputs[0])
        if self._package.activation == "softmax":
            raise ModelError(
                "a map of text has one score a pixel, of which softmax can make nothing; set "
                "output.activation: sigmoid, or none"
            )

    def results(self, outputs: Outputs, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
        return [
            dump(detections(*self.find(row, *size)))
            for row, size in zip(outputs, sizes, strict=True)
        ]

    def find(self, row: Row, height: int, width: int) -> tuple[Quads, Array]:
        """Return the lines in an image of `height` x `width` pixels, in reading order.

        Returns: (N, 4, 2) of x and y in pixels of the image, and (N,) float32 scores.

        Raises:
            ModelError: as `results`.
        """
        found = activate(_map_of(row), self._package.activation)
        quads, scores = find_quads(found, self._package.output.text)
        rows, columns = self._fit.size_of(height, width)
        quads = quads * (columns / found.shape[1], rows / found.shape[0])
        quads = self._fit.to_image(quads, height, width)
        places = in_view(quads)
        return quads[places], scores[places]


def in_view(quads: Quads) -> list[int]:
    """Return the places of the lines that cover anything of the image, in reading order.

    Args:
        quads: (N, 4, 2) in pixels of the image, none outside it.
    """
    sides = quads.max(axis=1) - quads.min(axis=1)
    return [n for n in reading_order(quads) if sides[n].all()]


def detections(quads: Quads, scores: Array) -> dict[str, Any]:
    """Return the part of a result that says where lines are.

    Args:
        quads: (N, 4, 2) of x and y in pixels of the image.
        scores: (N,) float32.
    """
    points = quads[:, :, ::-1].astype(np.float32)
    return {
        "detection_boxes": np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1),
        "detection_scores": np.ascontiguousarray(scores),
        "detection_classes": [0] * len(quads),
        "detection_class_names": [TEXT] * len(quads),
        "detection_keypoints": np.ascontiguousarray(points),
    }


def _map_of(row: Row) -> Array:
    """Return the (H, W) map of an image.

    Raises:
        ModelError: the model gave anything else.
    """
    found = pick(row, "map", "how likely each pixel is text")
    if found.ndim == 3 and len(found) == 1:
        found = found[0]
    if found.ndim != 2 or found.size == 0:
        raise ModelError(
            f"the model returned {(1, *found.shape)} for an image, expected (1, 1, height, width), "
            "how likely each pixel is text"
        )
    return found
