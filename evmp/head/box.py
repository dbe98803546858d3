"""Boxes: from the forms that models give them in to corners, and of those that overlap the best.

A box is (left, top, right, bottom) in pixels here; results turn it into (top, left, bottom, right).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Boxes: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
Numbers: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"


def corners(boxes: np.ndarray[Any, Any], form: str) -> Boxes:
    """Turn boxes into corners.

    Args:
        boxes: (N, 4), whose columns are what `form` says.
        form: `xyxy` left, top, right, bottom; `yxyx` top, left, bottom, right; `xywh` left, top,
            width, height; `cxcywh` the centre's x and y, width, height.

    Returns: (N, 4) float64.
    """
    a, b, c, d = boxes.astype(np.float64).T
    if form == "yxyx":
        a, b, c, d = b, a, d, c
    elif form == "xywh":
        c, d = a + c, b + d
    elif form == "cxcywh":
        a, b, c, d = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    return np.stack([a, b, c, d], axis=1)


def from_distances(distances: np.ndarray[Any, Any], columns: int, stride: int) -> Boxes:
    """Turn distances from the centres of a grid's cells into corners.

    Args:
        distances: (N, 4 * K), for each cell, row by row, to the left, top, right and bottom side,
            in strides; where K is more than 1 as the scores of 0 to K - 1, whose mean counts.
        columns: cells of a row.
        stride: pixels of the input from cell to cell.

    Returns: (N, 4) float64.
    """
    parts = distances.astype(np.float64).reshape(len(distances), 4, -1)
    n_bins = parts.shape[2]
    if n_bins > 1:
        powers = np.exp(parts - parts.max(axis=2, keepdims=True))
        parts = powers @ np.arange(n_bins)[:, None] / powers.sum(axis=2, keepdims=True)
    rows, columns_ = np.divmod(np.arange(len(distances)), columns)
    centres = np.stack([columns_, rows], axis=1) + 0.5
    sides = [centres - parts[:, :2, 0], centres + parts[:, 2:, 0]]
    return np.concatenate(sides, axis=1) * stride


def suppress(
    boxes: Boxes,
    scores: np.ndarray[Any, Any],
    groups: Numbers,
    *,
    iou_threshold: float,
    limit: int,
) -> Numbers:
    """Choose boxes, the best first, each not too much like a better one of its group.

    That is non-maximum suppression. Of equal scores the earlier box comes first.

    Args:
        boxes: (N, 4) corners; none is empty.
        scores: (N,).
        groups: (N,); boxes of different groups do not suppress each other.
        iou_threshold: a box whose intersection over union with a better one is above this goes.
        limit: how many to choose at most.

    Returns: (M,) int64, the places of the chosen.
    """
    order = np.argsort(-scores, kind="stable")
    if iou_threshold >= 1:
        return order[:limit]
    columns, groups = boxes[order].T.copy(), groups[order]
    chosen = [
        _greedy(columns, np.flatnonzero(groups == group), iou_threshold, limit)
        for group in np.unique(groups)
    ]
    ranks = np.sort(np.concatenate([np.zeros(0, np.int64), *chosen]))
    places: Numbers = order[ranks[:limit]]
    return places


def _greedy(columns: Boxes, rest: Numbers, iou_threshold: float, limit: int) -> Numbers:
    """Choose among the boxes `rest` of (4, N), the best of which comes first."""
    chosen: list[int] = []
    while len(rest) and len(chosen) < limit:
        best, rest = rest[0], rest[1:]
        chosen.append(best)
        rest = rest[overlap(columns[:, best], columns[:, rest]) <= iou_threshold]
    return np.array(chosen, np.int64)


def overlap(box: Boxes, columns: Boxes) -> Boxes:
    """Return the intersection over union of a box, (4,), with each of (4, N): (N,).

    None may be empty.
    """
    left, top, right, bottom = columns
    width = np.minimum(box[2], right) - np.maximum(box[0], left)
    height = np.minimum(box[3], bottom) - np.maximum(box[1], top)
    common = width.clip(0) * height.clip(0)
    both = (box[2] - box[0]) * (box[3] - box[1]) + (right - left) * (bottom - top)
    share: Boxes = common / (both - common)
    return share
