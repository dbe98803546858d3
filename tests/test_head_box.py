"""Boxes in every format, and their suppression against the textbook's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evmp.head.box import corners, from_distances, overlap, suppress


@pytest.mark.parametrize(
    ("form", "box"),
    [
        ("xyxy", [10, 20, 40, 25]),
        ("yxyx", [20, 10, 25, 40]),
        ("xywh", [10, 20, 30, 5]),
        ("cxcywh", [25, 22.5, 30, 5]),
    ],
)
def test_every_format_becomes_corners(form: str, box: list[float]) -> None:
    found = corners(np.float32([box, [0, 0, 0, 0]]), form)

    assert found.dtype == np.float64
    assert found.tolist() == [[10, 20, 40, 25], [0, 0, 0, 0]]


def test_distances_start_at_the_centres_of_cells() -> None:
    distances = np.zeros((6, 4), np.float32)
    distances[0], distances[5] = (0.5, 0.25, 1, 2), (1, 1, 1, 1)

    found = from_distances(distances, 3, 8)

    assert found[0].tolist() == [0, 2, 12, 20]
    assert found[1].tolist() == [12, 4, 12, 4]
    assert found[5].tolist() == [12, 4, 28, 20]


def test_distances_may_be_the_mean_of_bins() -> None:
    bins = np.full((1, 4, 4), -50, np.float32)
    bins[0, 0, 2] = bins[0, 1, 0] = bins[0, 2, 3] = 50
    bins[0, 3, :2] = 1e4, 1e4

    found = from_distances(bins.reshape(1, 16), 1, 10)

    np.testing.assert_allclose(found, [[5 - 20, 5, 5 + 30, 5 + 5]])


def test_overlap_is_intersection_over_union() -> None:
    box = np.array([0.0, 0, 10, 10])
    others = np.array([[0.0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10], [2, 2, 4, 4]])

    assert overlap(box, others.T).tolist() == [1, 50 / 150, 0, 4 / 100]


def random_boxes(rng: np.random.Generator, n: int) -> np.ndarray:
    low = rng.uniform(0, 80, (n, 2))
    return np.hstack([low, low + rng.uniform(1, 40, (n, 2))])


def textbook(boxes: list, scores: list, classes: list, threshold: float) -> list[int]:
    """Non-maximum suppression as its definition has it, one pair of boxes after the other."""
    kept: list[int] = []
    for n in sorted(range(len(boxes)), key=lambda n: -scores[n]):
        for other in kept:
            (a, b, c, d), (e, f, g, h) = boxes[n], boxes[other]
            common = max(min(c, g) - max(a, e), 0) * max(min(d, h) - max(b, f), 0)
            union = (c - a) * (d - b) + (g - e) * (h - f) - common
            if classes[n] == classes[other] and common / union > threshold:
                break
        else:
            kept.append(n)
    return kept


@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.floats(0.05, 0.95))
def test_suppression_is_the_textbooks(seed: int, n: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    boxes, scores = random_boxes(rng, n), rng.integers(0, 30, n) / 30
    classes = rng.integers(0, 3, n)

    found = suppress(boxes, scores, classes, iou_threshold=threshold, limit=100)

    expected = textbook(boxes.tolist(), scores.tolist(), classes.tolist(), threshold)
    assert found.tolist() == expected


def test_an_overlap_of_just_the_threshold_is_allowed() -> None:
    boxes = np.array([[0.0, 0, 2, 1], [1, 0, 3, 1]])

    for threshold, n_left in ((1 / 3, 2), (0.33, 1)):
        found = suppress(boxes, np.ones(2), np.zeros(2, int), iou_threshold=threshold, limit=9)
        assert len(found) == n_left


def test_equals_stay_in_the_models_order_and_the_limit_keeps_the_best() -> None:
    boxes, scores = np.tile([0.0, 0, 1, 1], (4, 1)), np.array([0.5, 0.9, 0.5, 0.9])

    for threshold in (1.0, 0.5):
        found = suppress(boxes, scores, np.arange(4), iou_threshold=threshold, limit=3)
        assert found.tolist() == [1, 3, 0]


def test_nothing_is_chosen_of_nothing() -> None:
    for threshold in (1.0, 0.5):
        found = suppress(
            np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), iou_threshold=threshold, limit=3
        )
        assert found.tolist() == []
