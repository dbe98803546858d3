"""Every number of a line of text that was found, in every resize mode, and what is no map."""

from __future__ import annotations

import json
import math
from typing import Any

import cv2
import numpy as np
import pytest
from modelfolder import head_of, result_of, to_image

from evmp.errors import ModelError

ROWS, COLUMNS = 64, 96  # of the input, and of the map
KEYS = [
    "detection_boxes",
    "detection_scores",
    "detection_classes",
    "detection_class_names",
    "detection_keypoints",
]
NOTHING = {name: [] for name in KEYS}
INPUT = {"height": ROWS, "width": COLUMNS, "resize": "stretch"}
MODES = [
    INPUT,
    {**INPUT, "resize": "short_side", "resize_size": 100},
    {**INPUT, "resize": "letterbox"},
    {**INPUT, "resize": "letterbox", "align": "start"},
]


def map_of(*lines: tuple[int, int, int, int, float]) -> np.ndarray:
    """A map with lines at (left, top, right, bottom), the last pixels included, and its value."""
    found = np.zeros((1, ROWS, COLUMNS), np.float32)
    for left, top, right, bottom, value in lines:
        found[0, top : bottom + 1, left : right + 1] = value
    return found


def grown(left: int, top: int, right: int, bottom: int, ratio: float = 1.5) -> tuple[float, ...]:
    """Where the box around a line ends up, by the formula of the DB paper."""
    width, height = right - left, bottom - top
    distance = width * height * ratio / (2 * (width + height))
    return left - distance, top - distance, right + distance, bottom + distance


def found(
    map_: np.ndarray, size: tuple[int, int] = (ROWS, COLUMNS), **options: Any
) -> dict[str, Any]:
    options["output"] = {"text": options.pop("text", {}), **options.pop("output", {})}
    head = head_of("text_detector", **{"input": INPUT, **options})
    return result_of(head, {"0": map_}, size)


@pytest.mark.parametrize("size", [(64, 96), (300, 451), (451, 300), (41, 29)])
@pytest.mark.parametrize("spec", MODES, ids=lambda it: f"{it['resize']}-{it.get('align')}")
def test_every_number_of_a_result(spec: dict[str, Any], size: tuple[int, int]) -> None:
    result = found(map_of((40, 25, 60, 35, 0.75)), size, input=spec)

    left, top, right, bottom = grown(40, 25, 60, 35)
    left, top = to_image(left, top, spec, size)
    right, bottom = to_image(right, bottom, spec, size)
    points = [[top, left], [top, right], [bottom, right], [bottom, left]]
    tolerance = 0.02 * max(size[0] / ROWS, size[1] / COLUMNS, 1)
    np.testing.assert_allclose(result["detection_keypoints"], [points], atol=tolerance)
    np.testing.assert_allclose(
        result["detection_boxes"], [[top, left, bottom, right]], atol=tolerance
    )
    assert result["detection_scores"] == [0.75]
    assert result["detection_classes"] == [0] and result["detection_class_names"] == ["text"]
    assert list(result) == KEYS


@pytest.mark.parametrize("size", [(64, 96), (300, 451), (2000, 100), (10, 10)])
def test_a_dynamic_input_has_a_map_of_its_own_size(size: tuple[int, int]) -> None:
    spec = {"size": "dynamic", "height": 640, "width": 640, "resize": "stretch", "enlarge_to": 1}
    head = head_of("text_detector", input=spec)
    rows, columns = head._head._fit.size_of(*size)
    map_ = np.zeros((1, rows // 4, columns // 4), np.float32)  # some give a quarter of the input
    map_[0, 2:6, 2:6] = 0.9

    head.check([{"0": np.zeros((1, 160, 160), np.float32)}])
    (result,) = head.results([{"0": map_}], [size])

    left, top, right, bottom = (at * 4 for at in grown(2, 2, 5, 5))
    y, x = size[0] / rows, size[1] / columns
    expected = [top * y, left * x, min(bottom * y, size[0]), min(right * x, size[1])]
    np.testing.assert_allclose(
        json.loads(result)["detection_boxes"], [expected], rtol=0.01, atol=0.01
    )


@pytest.mark.parametrize("angle", [-60, -35, -10, 0, 10, 35, 60])
def test_corners_run_clockwise_from_the_texts_top_left(angle: float) -> None:
    map_ = np.zeros((ROWS, COLUMNS), np.float32)
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    along, down = np.array([cosine, sine]) * 22, np.array([-sine, cosine]) * 5
    centre = np.array([48, 32])
    corners = [centre - along - down, centre + along - down, centre + along + down]
    corners.append(centre - along + down)
    cv2.fillPoly(map_, [np.rint(corners).astype(np.int32)], (0.9,))

    (points,) = found(map_, text={"unclip_ratio": 0})["detection_keypoints"]

    np.testing.assert_allclose(points, np.array(corners)[:, ::-1], atol=1.6)


def test_lines_come_in_reading_order() -> None:
    lines = [(50, 42, 80, 50), (8, 46, 40, 54), (10, 5, 80, 15), (60, 24, 90, 32), (5, 25, 40, 32)]

    result = found(map_of(*((*line, 0.9) for line in lines)), text={"unclip_ratio": 0})

    assert [box[:2] for box in result["detection_boxes"]] == [
        [5, 10],
        [25, 5],
        [24, 60],
        [46, 8],
        [42, 50],
    ]


def test_a_score_is_the_mean_inside_the_line() -> None:
    map_ = map_of((10, 10, 29, 19, 0.8), (20, 10, 29, 19, 0.6))

    result = found(map_)

    np.testing.assert_allclose(result["detection_scores"], [0.7], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "n_left"),
    [
        ({}, 2),
        ({"box_threshold": 0.8}, 1),
        ({"box_threshold": 0.5}, 3),
        ({"threshold": 0.75}, 1),
        ({"threshold": 0.9, "box_threshold": 0}, 0),
        ({"min_size": 8}, 1),
        ({"min_size": 0, "unclip_ratio": 0}, 0),
        ({"max_candidates": 1, "box_threshold": 0.5}, 1),
    ],
)
def test_lines_that_are_improbable_or_small_are_dropped(text: dict[str, Any], n_left: int) -> None:
    map_ = map_of((5, 5, 80, 15, 0.9), (5, 30, 80, 35, 0.7), (5, 50, 80, 60, 0.5))
    if text.get("min_size") == 0:
        map_ = map_of((5, 5, 80, 6, 0.9))

    assert len(found(map_, text=text)["detection_boxes"]) == n_left


def test_dilation_joins_what_one_pixel_parts() -> None:
    map_ = map_of((10, 10, 39, 19, 0.9), (41, 10, 70, 19, 0.9))

    assert len(found(map_)["detection_boxes"]) == 2
    assert len(found(map_, text={"dilate": True})["detection_boxes"]) == 1


def test_lines_end_at_the_edges_of_the_image() -> None:
    result = found(map_of((0, 0, 95, 9, 0.9)), (640, 960))

    distance = 95 * 9 * 1.5 / (2 * (95 + 9))
    np.testing.assert_allclose(
        result["detection_boxes"], [[0, 0, (9 + distance) * 10, 960]], atol=0.1
    )


def test_a_line_in_the_padding_is_dropped() -> None:
    result = found(map_of((10, 2, 80, 6, 0.9)), (32, 96), input=MODES[2], text={"unclip_ratio": 0})

    assert result == NOTHING


def test_scores_may_need_a_sigmoid() -> None:
    map_ = np.where(map_of((10, 10, 60, 20, 1)) > 0, 2, -9)

    (score,) = found(map_, output={"activation": "sigmoid"})["detection_scores"]

    assert score == pytest.approx(1 / (1 + math.exp(-2)), rel=1e-6)


def test_nothing_found_is_empty_lists() -> None:
    assert found(map_of()) == NOTHING


@pytest.mark.parametrize("shape", [(3, 64, 96), (64,), (1, 1, 64, 96), (1, 0, 9)])
def test_what_is_no_map_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"for an image, expected \(1, 1, height, width\)"):
        found(np.zeros(shape, np.float32))


def test_softmax_of_one_score_is_refused() -> None:
    with pytest.raises(ModelError, match=r"softmax can make nothing; set output.activation"):
        found(map_of(), output={"activation": "softmax"})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_fails_the_row(bad: float) -> None:
    map_ = map_of((10, 10, 60, 20, 0.9))
    map_[0, 3, 3] = bad

    with pytest.raises(ModelError, match="NaN or infinity for this image"):
        found(map_)
