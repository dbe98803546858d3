"""Where lines of text are and what they say, from a detector and a recognizer in turn.

The result is text_spotter's. Lines are cut out of the original image and straightened; one that
runs down is turned by a quarter to the left before it is read, as PP-OCR does. Those read with a
probability below `output.text.text_threshold` are dropped. Two models are between outputs and
results here, so this is no Head: `lines` takes what the detector gave, `results` what the
recognizer did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evmp.head.array import Array, dump, renamed
from evmp.head.quad import Quads, cut_out
from evmp.head.text_detector import TextDetector, detections
from evmp.head.text_recognizer import TextRecognizer
from evmp.head.text_spotter import is_legible, spoken

if TYPE_CHECKING:
    from evmp.head.array import Row
    from evmp.head.reading import Reading
    from evmp.model import Outputs
    from evmp.model.package import ModelPackage


@dataclass(frozen=True, slots=True)
class Line:
    """A line of text that was found in one of some images."""

    image: int
    """Which of them."""
    quad: Quads
    """(4, 2) of x and y in its pixels."""
    score: np.float32
    crop: Array
    """(H, W, 3) uint8, the line by itself, flat."""


class TextReader:
    """The post-processing of `model_type: text_detection_recognition`."""

    def __init__(self, package: ModelPackage) -> None:
        """Make it for a package with a detector and a recognizer as its parts."""
        self._detector, self._recognizer = package.parts
        self._find = TextDetector(self._detector).find
        self._read = TextRecognizer(self._recognizer).read
        self._threshold = package.output.text.text_threshold

    def lines(self, outputs: Outputs, images: Sequence[Array]) -> list[Line]:
        """Return the lines in some images, those of an image in reading order.

        Args:
            outputs: what the detector gave for each image.
            images: (H, W, 3) uint8 RGB each.

        Raises:
            ModelError: as the results of a text_detector.
        """
        return [
            Line(number, quad, score, cut_out(image, quad))
            for number, (row, image) in enumerate(zip(outputs, images, strict=True))
            for quad, score in zip(*self._find_in(row, image), strict=True)
        ]

    def results(self, lines: Sequence[Line], outputs: Outputs, n_images: int) -> list[bytes]:
        """Return a JSON object for each image.

        Args:
            lines: what `lines` returned for the images.
            outputs: what the recognizer gave for each line's crop.

        Raises:
            ModelError: as the results of a text_recognizer.
        """
        names = self._recognizer.output.names
        readings = [self._read(renamed(row, names)) for row in outputs]
        kept = [
            (line, reading)
            for line, reading in zip(lines, readings, strict=True)
            if is_legible(reading, self._threshold)
        ]
        return [self._result([it for it in kept if it[0].image == n]) for n in range(n_images)]

    def _find_in(self, row: Row, image: Array) -> tuple[Quads, Array]:
        height, width = image.shape[:2]
        return self._find(renamed(row, self._detector.output.names), height, width)

    def _result(self, read: Sequence[tuple[Line, Reading]]) -> bytes:
        quads = np.array([line.quad for line, _ in read]).reshape(-1, 4, 2)
        scores = np.array([line.score for line, _ in read], np.float32)
        return dump({**detections(quads, scores), **spoken([reading for _, reading in read])})
