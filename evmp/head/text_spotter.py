"""Where lines of text are and what they say, from one model that does both.

    text_detector's keys, and {"detection_texts_ids": [[12, 5, ...], ...],
     "detection_texts": ["...", ...], "detection_texts_scores": [0.98, ...]}

The model gives, by name, for N lines of an image:

    points   (N, K, 2) of x and y, K >= 4, in pixels of the input or in fractions of its sides:
             clockwise from the text's top left; of more than four the smallest rectangle counts
    scores   (N,) how likely each is a line
    texts    (N, T, C) scores, for each step one a class; or (N, T) class numbers, for which the
             score of a line is that of its text as well
    count    how many of the N are not padding; all, where it is not there

Lines come in reading order. NaN and infinity fail the row, in any score and in the points that are
not dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evmp.errors import ModelError
from evmp.fit import Fit
from evmp.head.array import Array, Row, check_finite, dump, shapes_of
from evmp.head.layout import count_of
from evmp.head.quad import Quads, rectangle, starting_near
from evmp.head.reading import Reading, TextDecoder, is_numbers
from evmp.head.text_detector import detections, in_view

if TYPE_CHECKING:
    from evmp.model import Outputs
    from evmp.model.package import ModelPackage

CORNERS = 4


class TextSpotter:
    """The head of `model_type: text_spotter`."""

    def __init__(self, package: ModelPackage) -> None:
        self._package, self._spec = package, package.output.text
        self._fit = Fit(package.input)
        self._decoder = TextDecoder(package)

    def check(self, outputs: Outputs) -> None:
        _, _, texts = _take_apart(outputs[0])
        self._decoder.check(texts)

    def results(self, outputs: Outputs, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self._result(row, *size) for row, size in zip(outputs, sizes, strict=True)]

    def _result(self, row: Row, height: int, width: int) -> bytes:
        points, scores, texts = _take_apart(row)
        check_finite(scores)
        sure = np.flatnonzero(scores >= np.float32(self._spec.box_threshold))
        check_finite(points[sure])
        quads = self._into_image(points[sure], height, width)
        readings = [self._read(texts[n], scores[n]) for n in sure]
        kept = [n for n in in_view(quads) if is_legible(readings[n], self._spec.text_threshold)]
        return dump(
            {
                **detections(quads[kept], scores[sure][kept].astype(np.float32)),
                **spoken([readings[n] for n in kept]),
            }
        )

    def _read(self, steps: Array, score: Array) -> Reading:
        return self._decoder.read(steps, score if is_numbers(steps) else None)

    def _into_image(self, points: Array, height: int, width: int) -> Quads:
        """Return (N, 4, 2) in pixels of the original image."""
        points = points.astype(np.float64)
        if self._spec.unit == "fraction":
            points *= self._fit.size_of(height, width)[::-1]
        if points.shape[1] > CORNERS:
            points = np.array([starting_near(rectangle(it)[0], it[0]) for it in points])
        return self._fit.to_image(points.reshape(-1, CORNERS, 2), height, width)


def is_legible(reading: Reading, threshold: float) -> bool:
    """Say whether a line was read with at least a probability."""
    return bool(reading.probability >= np.float32(threshold))


def spoken(readings: Sequence[Reading]) -> dict[str, Any]:
    """Return the part of a result that says what is written in lines."""
    return {
        "detection_texts_ids": [it.ids for it in readings],
        "detection_texts": [it.text for it in readings],
        "detection_texts_scores": [it.probability for it in readings],
    }


def _take_apart(row: Row) -> tuple[Array, Array, Array]:
    """Return points (N, K, 2), scores (N,), and texts (N, T, C) or (N, T).

    Raises:
        ModelError: the model gave anything else.
    """
    if not row.keys() >= {"points", "scores", "texts"}:
        raise ModelError(
            f"the model returned {shapes_of(row)} for an image, expected points, scores and texts; "
            "name the outputs in output.names"
        )
    points, scores, texts = row["points"], row["scores"], row["texts"]
    n = len(points) if points.ndim else 0
    is_whole = (
        points.ndim == 3
        and points.shape[1] >= CORNERS
        and points.shape[2] == 2
        and scores.shape == (n,)
        and texts.shape[:1] == (n,)
        and texts.ndim == (2 if is_numbers(texts) else 3)
    )
    if not is_whole:
        raise ModelError(
            f"the model returned {shapes_of(row)} for an image, expected points of (1, N, K, 2), "
            "K at least 4, scores of (1, N), and texts of (1, N, T, C), or (1, N, T) integers"
        )
    count = count_of(row, n)
    return points[:count], scores[:count], texts[:count]
