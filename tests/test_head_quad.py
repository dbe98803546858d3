"""Quadrilaterals: straightened crops against Pillow's, and growing against the formula."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from evmp.head.quad import cut_out, find_quads, grow, reading_order, rectangle, starting_near
from evmp.model.package import ModelText


def waves(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([127 + 100 * np.sin(y / 9 + c) * np.cos(x / 7) for c in range(3)], 2).astype(
        np.uint8
    )


def corners(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float64)


def test_a_flat_crop_is_the_part_of_the_image() -> None:
    image = waves(60, 90)

    assert np.array_equal(cut_out(image, corners(10, 20, 50, 35)), image[20:35, 10:50])


def test_a_crop_that_is_much_higher_than_wide_is_turned_to_the_left() -> None:
    image = waves(60, 90)

    assert np.array_equal(cut_out(image, corners(10, 5, 30, 35)), np.rot90(image[5:35, 10:30]))
    assert np.array_equal(cut_out(image, corners(10, 6, 30, 35)), image[6:35, 10:30])


@pytest.mark.parametrize("angle", [-30, 15, 44])
def test_a_turned_crop_is_straightened(angle: int) -> None:
    image = waves(200, 200)
    turned = np.asarray(Image.fromarray(image).rotate(angle, Image.Resampling.BICUBIC))
    radians = np.radians(-angle)
    turn = np.array(
        [[np.cos(radians), np.sin(radians)], [-np.sin(radians), np.cos(radians)]]
    )  # of rows of x and y

    crop = cut_out(turned, (corners(60, 80, 140, 110) - 100) @ turn + 100)

    # Half a pixel aside it would be 7, elsewhere or mirrored 60.
    assert crop.shape == (30, 80, 3)
    assert np.abs(crop - image[80:110, 60:140].astype(int)).mean() < 5


def test_a_crop_over_the_edge_repeats_the_edge() -> None:
    crop = cut_out(waves(20, 30), corners(-5, 0, 10, 10))

    assert crop.shape == (10, 15, 3)
    assert (crop[:, :5] == crop[:, 5:6]).all()


@pytest.mark.parametrize("quad", [corners(3, 3, 3, 3), corners(3, 3, 9, 3)])
def test_a_crop_of_nothing_is_one_pixel_high(quad: np.ndarray) -> None:
    assert cut_out(waves(20, 30), quad).shape[0] == 1


@given(st.floats(4, 300), st.floats(4, 300), st.floats(0.1, 4), st.floats(-44, 44))
def test_a_rectangle_grows_by_the_same_on_each_side(
    width: float, height: float, ratio: float, angle: float
) -> None:
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    quad = corners(0, 0, width, height) @ np.array([[cosine, sine], [-sine, cosine]])

    grown, shorter = rectangle(grow(quad, ratio))

    distance = width * height * ratio / (2 * (width + height))
    assert shorter == pytest.approx(min(width, height) + 2 * distance, rel=0.01, abs=0.2)
    np.testing.assert_allclose(grown.mean(axis=0), quad.mean(axis=0), atol=0.2)


@pytest.mark.parametrize("angle", [-44, -20, 0, 20, 44])
@pytest.mark.parametrize("height", [60, 30])
def test_a_wide_text_turned_by_less_than_45_degrees_begins_at_its_top_left(
    height: int, angle: int
) -> None:
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    quad = corners(0, 0, 100, height) @ np.array([[cosine, sine], [-sine, cosine]])

    np.testing.assert_allclose(rectangle(quad[::-1])[0], quad, atol=0.01)


def test_a_text_that_is_turned_further_begins_at_the_upper_of_the_corners_to_the_left() -> None:
    cosine, sine = np.cos(np.radians(80)), np.sin(np.radians(80))
    quad = corners(0, 0, 100, 60) @ np.array([[cosine, sine], [-sine, cosine]])

    np.testing.assert_allclose(rectangle(quad)[0], np.roll(quad, 1, axis=0), atol=0.01)


def test_a_quadrilateral_may_start_anywhere() -> None:
    quad = corners(0, 0, 9, 5)

    assert starting_near(quad, np.array([8, 6])).tolist() == [[9, 5], [0, 5], [0, 0], [9, 0]]


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=12))
def test_reading_order_leaves_out_nothing(points: list[tuple[int, int]]) -> None:
    quads = np.array([corners(x, y, x + 5, y + 5) for x, y in points]).reshape(-1, 4, 2)

    assert sorted(reading_order(quads)) == list(range(len(points)))


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_any_map_gives_quadrilaterals_or_nothing(
    seed: int, rows: int, columns: int, dilate: bool
) -> None:
    found = np.random.default_rng(seed).random((rows, columns), np.float32)
    spec = ModelText(threshold=0.6, box_threshold=0, min_size=0, dilate=dilate, unclip_ratio=3)

    quads, scores = find_quads(found, spec)

    assert quads.shape == (len(scores), 4, 2) and np.isfinite(quads).all()
    assert ((scores >= 0) & (scores <= 1)).all()
