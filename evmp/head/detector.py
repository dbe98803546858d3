"""Boxes around things: where in the original image, how sure, and which class.

    {"detection_boxes": [[top, left, bottom, right], ...], "detection_scores": [0.9, ...],
     "detection_classes": [17, ...], "detection_class_names": ["cat", ...]}

The best comes first, of equals the model's first. Boxes are in pixels of the original image, and
end at its edges; one of which nothing is left is dropped. Classes are the model's own numbers.
`output.boxes` of model.yaml says in which form the model gives boxes, and which are dropped: those
below a score, those too much like a better one, and all behind so many. A negative class marks
padding. NaN and infinity fail the row, in any score and in the boxes that are not dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from evmp.errors import ModelError
from evmp.fit import Fit
from evmp.head.array import (
    Array,
    Row,
    Scores,
    activate,
    check_finite,
    check_labelled,
    check_number,
    class_names,
    dump,
)
from evmp.head.box import Boxes, Numbers, corners, suppress
from evmp.head.layout import BOX, Raw, take_apart

if TYPE_CHECKING:
    from evmp.model import Outputs
    from evmp.model.package import ModelPackage


class Detector:
    """The head of `model_type: detector`."""

    def __init__(self, package: ModelPackage) -> None:
        self._package, self._spec = package, package.output.boxes
        self._fit = Fit(package.input)
        self._names: tuple[str, ...] = ()

    def check(self, outputs: Outputs) -> None:
        spec = self._package.input
        raw = take_apart(outputs[0], self._spec, (spec.height, spec.width))
        if raw.labels is None:
            self._names = self._names_of(raw)
        elif self._package.labels:
            n_classes = self._package.output.label_offset + len(self._package.labels)
            self._names = self._package.class_names(n_classes)
        self._check_activation(raw)

    def results(self, outputs: Outputs, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self._result(row, *size) for row, size in zip(outputs, sizes, strict=True)]

    def _names_of(self, raw: Raw) -> tuple[str, ...]:
        """Name the columns of the scores."""
        axis = 0 if self._spec.transposed and raw.scores.shape[1] != 1 else 1
        others = raw.shape[axis] - raw.scores.shape[1] + self._spec.background_last
        return class_names(self._package, raw.shape, axis, others)

    def _check_activation(self, raw: Raw) -> None:
        is_single = raw.labels is not None or raw.scores.shape[1] == 1
        if is_single and self._package.activation == "softmax":
            raise ModelError(
                f"the model returned one score a box, {(1, *raw.scores.shape)}, of which softmax "
                "can make nothing; set output.activation: sigmoid, or none"
            )

    def _result(self, row: Row, height: int, width: int) -> bytes:
        raw = take_apart(row, self._spec, self._fit.size_of(height, width))
        scores, classes = self._judge(raw)
        sure = (scores >= np.float32(self._spec.score_threshold)) & (classes >= 0)
        scores, classes = scores[sure], classes[sure]
        boxes = self._in_input(raw.boxes[sure], height, width)
        seen = self._into_image(boxes, height, width)
        places = np.flatnonzero((seen[:, 2] > seen[:, 0]) & (seen[:, 3] > seen[:, 1]))
        # By the model's own boxes: what is cut off at an edge makes them less alike.
        best = places[self._choose(boxes[places], scores[places], classes[places])]
        return self._write(seen[best], scores[best], classes[best])

    def _judge(self, raw: Raw) -> tuple[Scores, Numbers]:
        """Return the probability and the class of each box, (N,) and (N,)."""
        activation = self._package.activation
        scores = activate(raw.scores, activation)
        if raw.labels is not None:
            check_finite(raw.labels)
            return scores, np.rint(raw.labels).astype(np.int64)
        check_number(scores.shape[1] - self._spec.background_last, len(self._names))
        if raw.objectness is not None:
            # It is no choice among several, so it cannot be a softmax.
            scores *= activate(raw.objectness, "none" if activation == "none" else "sigmoid")[
                :, None
            ]
        first, end = self._package.output.label_offset, len(self._names)
        classes = first + scores[:, first:end].argmax(axis=1)
        return scores[np.arange(len(classes)), classes], classes

    def _in_input(self, boxes: Array, height: int, width: int) -> Boxes:
        """Return (N, 4) corners in pixels of the input."""
        rows, columns = self._fit.size_of(height, width)
        with np.errstate(over="ignore", invalid="ignore"):
            boxes = corners(boxes, self._spec.format)
            if self._spec.unit == "fraction":
                boxes *= (columns, rows, columns, rows)
        check_finite(boxes)
        return boxes

    def _into_image(self, boxes: Boxes, height: int, width: int) -> Scores:
        """Return (N, 4) corners in the original image, float32."""
        points = self._fit.to_image(boxes.reshape(-1, 2, 2), height, width)
        return points.reshape(-1, BOX).astype(np.float32)

    def _choose(self, boxes: Boxes, scores: Scores, classes: Numbers) -> Numbers:
        spec = self._spec
        return suppress(
            boxes,
            scores,
            np.zeros_like(classes) if spec.across_classes else classes,
            iou_threshold=spec.iou_threshold,
            limit=spec.max_detections,
        )

    def _write(self, boxes: Scores, scores: Scores, classes: Numbers) -> bytes:
        return dump(
            {
                "detection_boxes": np.ascontiguousarray(boxes[:, [1, 0, 3, 2]]),
                "detection_scores": scores,
                "detection_classes": classes,
                "detection_class_names": [self._name(int(number)) for number in classes],
            }
        )

    def _name(self, number: int) -> str:
        if not self._package.labels:
            return str(number)
        check_labelled(self._package, number)
        return self._names[number]
