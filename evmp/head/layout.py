"""The layouts in which detectors give their boxes, taken apart into one.

`output.boxes.layout` of model.yaml names them. `separate` is what torchvision's detectors return,
and, padded, most that end in a suppression of their own; `distances` are the bare heads of PicoDet,
NanoDet and the like; the others are single tensors, as the YOLO family has them. Scores stay in the
model's own terms, and so do boxes, but that distances become corners.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evmp.errors import ModelError
from evmp.head.array import Array, Row, check_finite, pick, shapes_of
from evmp.head.box import from_distances

if TYPE_CHECKING:
    from evmp.model.package import ModelBoxes

BOX = 4  # numbers of a box


@dataclass(frozen=True, slots=True)
class Raw:
    """What a model says of one image."""

    boxes: Array
    """(N, 4) in the format and unit of `output.boxes`."""
    scores: Array
    """(N,), or (N, C) with a column a class; no activation was applied."""
    labels: Array | None = None
    """(N,) the classes; None where `scores` is (N, C)."""
    objectness: Array | None = None
    """(N,) how likely there is anything at all; no activation was applied."""
    shape: tuple[int, ...] = ()
    """That of the output with the columns of `scores`, as the model gave it."""


def take_apart(row: Row, spec: ModelBoxes, size: tuple[int, int]) -> Raw:
    """Return what the outputs say of one image.

    Args:
        size: (height, width) of the model's input.

    Raises:
        ModelError: they are not of the layout, or have other shapes.
    """
    if spec.layout == "separate":
        return _separate(row, spec)
    if spec.layout == "distances":
        return _distances(row, spec, size)
    found = pick(row, "boxes", "the boxes with their scores")
    table = found.T if spec.transposed else found
    if spec.layout == "box_score_class":
        _expect(table.ndim == 2 and table.shape[1] == BOX + 2, row, spec, "(1, N, 6)")
        return Raw(table[:, :BOX], table[:, BOX], labels=table[:, BOX + 1])
    n_others = BOX + (spec.layout == "box_objectness_classes")
    is_wide = table.ndim == 2 and table.shape[1] > n_others + spec.background_last
    _expect(is_wide, row, spec, f"(1, N, {n_others} + classes)")
    objectness = table[:, BOX] if n_others > BOX else None
    return Raw(table[:, :BOX], table[:, n_others:], objectness=objectness, shape=found.shape)


def _separate(row: Row, spec: ModelBoxes) -> Raw:
    if "boxes" not in row or "scores" not in row:
        raise ModelError(
            f"the model returned {shapes_of(row)} for an image, expected boxes, scores and labels; "
            "name the outputs in output.names, or set output.boxes.layout"
        )
    boxes, scores, labels = row["boxes"], row["scores"], row.get("labels")
    if spec.transposed:
        boxes, scores = boxes.T, scores.T
    n = len(boxes) if boxes.ndim else 0
    _expect(boxes.shape == (n, BOX), row, spec, "boxes of (1, N, 4)")
    _expect(scores.shape[:1] == (n,) and scores.ndim < 3, row, spec, "scores of (1, N)")
    count = count_of(row, n)
    if scores.ndim == 1 and labels is not None:
        _expect(labels.shape == (n,), row, spec, "labels of (1, N)")
        return Raw(boxes[:count], scores[:count], labels=labels[:count])
    if scores.ndim == 1:
        expected = "scores of (1, N, classes) with background_last"
        _expect(not spec.background_last, row, spec, expected)
        return Raw(boxes[:count], scores[:count, None], shape=(n, 1))
    is_wide = scores.shape[1] > spec.background_last
    _expect(is_wide, row, spec, "scores of (1, N, classes)")
    return Raw(boxes[:count], scores[:count], shape=row["scores"].shape)


def _distances(row: Row, spec: ModelBoxes, size: tuple[int, int]) -> Raw:
    boxes, scores = [], []
    for stride in spec.strides:
        names = f"scores_{stride}", f"distances_{stride}"
        found = [row.get(name, np.empty(0)) for name in names]
        grades, distances = [it.T if spec.transposed else it for it in found]
        n_rows, n_columns = (math.ceil(side / stride) for side in size)
        n = n_rows * n_columns
        is_fit = (
            grades.ndim == distances.ndim == 2
            and len(grades) == len(distances) == n
            and grades.shape[1] > spec.background_last
            and distances.shape[1] > 0
            and distances.shape[1] % BOX == 0
        )
        _expect(is_fit, row, spec, f"{names[0]} of (1, {n}, C) and {names[1]} of (1, {n}, 4 * K)")
        scores.append(grades)
        boxes.append(from_distances(distances, n_columns, stride))
    _expect(len({it.shape[1] for it in scores}) == 1, row, spec, "one C for all strides")
    table = np.concatenate(scores)
    return Raw(
        np.concatenate(boxes), table, shape=table.T.shape if spec.transposed else table.shape
    )


def count_of(row: Row, n: int) -> int:
    """Return how many of the n rows of outputs are not padding, by the output `count`.

    Raises:
        ModelError: it is no number.
    """
    count = row.get("count", np.array(n))
    if count.size != 1:
        raise ModelError(
            f"the model returned {shapes_of(row)} for an image, expected a count of (1,)"
        )
    check_finite(count)
    return min(max(int(count.reshape(())), 0), n)


def _expect(is_so: bool, row: Row, spec: ModelBoxes, expected: str) -> None:
    if not is_so:
        turned = ", transposed" if spec.transposed else ""
        raise ModelError(
            f"the model returned {shapes_of(row)} for an image, expected {expected}{turned}, for "
            f"output.boxes.layout: {spec.layout}; correct output.boxes"
        )
