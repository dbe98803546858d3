"""Every number of lines that one model finds and reads, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from modelfolder import head_of, result_of, to_image
from test_head_text_recognizer import LABELS, steps

from evmp.errors import ModelError

SIZE = (64, 96)
POINTS = np.float32(
    [
        [[4, 16], [20, 16], [20, 24], [4, 24]],
        [[8, 2], [24, 4], [23, 12], [7, 10]],
    ]
)
ROW = {
    "points": POINTS,
    "scores": np.float32([0.75, 0.9]),
    "texts": np.stack([steps(1, 0, 2), steps(3, 3, 3)]),
}
# What those say of an image of that size, stretched into 32 x 32; the upper line comes first.
EXPECTED = {
    "detection_boxes": [[4, 21, 24, 72], [32, 12, 48, 60]],
    "detection_scores": [np.float32(0.9), 0.75],
    "detection_classes": [0, 0],
    "detection_class_names": ["text", "text"],
    "detection_keypoints": [
        [[4, 24], [8, 72], [24, 69], [20, 21]],
        [[32, 12], [32, 60], [48, 60], [48, 12]],
    ],
    "detection_texts_ids": [[3], [1, 2]],
    "detection_texts": ["c", "ab"],
    "detection_texts_scores": [np.float32(0.9), np.float32(0.9)],
}
NOTHING = {name: [] for name in EXPECTED}


def spotted(row: dict[str, Any], size: tuple[int, int] = SIZE, **options: Any) -> dict[str, Any]:
    options["output"] = {"activation": "none", "text": options.pop("text", {})}
    return result_of(head_of("text_spotter", **{"labels": LABELS, **options}), row, size)


def test_every_number_of_a_result() -> None:
    result = spotted(ROW)

    assert result == EXPECTED and list(result) == list(EXPECTED)


def test_fractions_say_the_same() -> None:
    assert spotted({**ROW, "points": POINTS / 32}, text={"unit": "fraction"}) == EXPECTED


def test_the_chosen_class_numbers_say_the_same() -> None:
    row = {**ROW, "texts": np.int64([[1, 2, 0], [3, 0, 0]])}

    result = spotted(row, text={"decoding": "tokens"})

    assert result == {**EXPECTED, "detection_texts_scores": [np.float32(0.9), 0.75]}


def test_of_many_points_the_smallest_rectangle_counts_from_the_first_one_on() -> None:
    """Two lines written upside down: their top left is at the bottom right."""
    round_ = [[20, 24], [12, 24], [4, 24], [4, 16], [12, 16], [20, 16]]
    row = {**ROW, "points": np.float32([round_, round_])}

    (first, _) = spotted(row)["detection_keypoints"]

    np.testing.assert_allclose(first, [[48, 60], [48, 12], [32, 12], [32, 60]], atol=1e-3)


MODES = [
    {"resize": "stretch", "width": 48, "height": 32},
    {"resize": "short_side", "width": 48, "height": 32, "resize_size": 56},
    {"resize": "letterbox", "width": 48, "height": 32},
]


@pytest.mark.parametrize("size", [(64, 96), (333, 500), (500, 333), (1, 300)])
@pytest.mark.parametrize("spec", MODES, ids=lambda spec: spec["resize"])
def test_points_are_where_a_textbook_has_them(spec: dict[str, Any], size: tuple[int, int]) -> None:
    points = np.float32([[[18, 12], [30, 14], [29, 20], [17, 18]]])

    result = spotted({**ROW, "points": points.repeat(2, 0)}, size, input=spec)

    expected = [to_image(x, y, spec, size)[::-1] for x, y in points[0]]
    if np.ptp(expected, axis=0).all():
        np.testing.assert_allclose(result["detection_keypoints"], [expected] * 2, rtol=1e-5)
        (top, left), (bottom, right) = np.min(expected, 0), np.max(expected, 0)
        np.testing.assert_allclose(
            result["detection_boxes"], [[top, left, bottom, right]] * 2, rtol=1e-5
        )
    else:
        assert result == NOTHING


@pytest.mark.parametrize(
    ("text", "n_left"),
    [
        ({}, 2),
        ({"box_threshold": 0.8}, 1),
        ({"text_threshold": 0.95}, 0),
        ({"box_threshold": 1}, 0),
    ],
)
def test_lines_with_a_low_score_are_dropped(text: dict[str, Any], n_left: int) -> None:
    assert len(spotted(ROW, text=text)["detection_texts"]) == n_left


def test_nothing_found_is_empty_lists() -> None:
    assert spotted({name: array[:0] for name, array in ROW.items()}) == NOTHING
    assert spotted({**ROW, "count": np.int64([0])}) == NOTHING


def test_padding_behind_the_count_does_not_matter() -> None:
    row = {name: np.concatenate([it, np.full_like(it[:1], np.nan)]) for name, it in ROW.items()}

    assert spotted({**row, "count": np.int64([2])}) == EXPECTED


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"0": POINTS}, "expected points, scores and texts; name the outputs in output.names"),
        ({**ROW, "points": POINTS[:, :3]}, r"points of \(1, N, K, 2\), K at least 4"),
        ({**ROW, "scores": np.float32([1])}, r"scores of \(1, N\)"),
        ({**ROW, "texts": steps(1, 2)}, r"texts of \(1, N, T, C\)"),
        (
            {**ROW, "texts": ROW["texts"][..., :3]},
            r"\(1, 2, 3, 3\) for an image, expected \(1, 2, ",
        ),
        ({**ROW, "count": np.int64([1, 2])}, r"expected a count of \(1,\)"),
    ],
)
def test_what_is_no_text_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spotted(row)


@pytest.mark.parametrize("name", ["points", "scores", "texts"])
def test_what_is_no_number_fails_the_row(name: str) -> None:
    row = {**ROW, name: ROW[name].copy()}
    row[name][1] = np.nan

    with pytest.raises(ModelError, match="NaN or infinity for this image"):
        spotted(row)
