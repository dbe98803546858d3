"""The three resize modes, in fixed and dynamic sizes, and as pixels against Pillow's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from evmp.fit import Fit
from evmp.image import Frame
from evmp.model.spec import ModelInput

SIZES = st.integers(1, 5000)


def fit(**settings: object) -> Fit:
    return Fit(ModelInput.model_validate({"height": 224, "width": 224, **settings}))


def fitted(spec: ModelInput, pixels: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    size = size or pixels.shape[:2]
    row = np.full((spec.height, spec.width, 3), 77, np.uint8).reshape(-1)
    Fit(spec).into(Frame(pixels, *size), memoryview(row))
    shape = *Fit(spec).size_of(*size), 3
    assert (row[np.prod(shape) :] == 77).all()
    return row[: np.prod(shape)].reshape(shape)


def waves(height: int, width: int) -> np.ndarray:
    """Round shapes, as photographs have: Pillow clips what overshoots, after its first pass."""
    y, x = np.mgrid[:height, :width]
    return np.stack([127 + 100 * np.sin(y / 9 + c) * np.cos(x / 7) for c in range(3)], 2).astype(
        np.uint8
    )


def test_stretch_takes_all_to_all() -> None:
    assert fit(resize="stretch").rectangles(100, 333) == ((0, 0, 333, 100), (0, 0, 224, 224))


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((256, 256), (16, 16, 240, 240)),
        ((512, 256), (16, 144, 240, 368)),
        ((512, 1024), (288, 32, 736, 480)),
    ],
)
def test_short_side_takes_the_centre(size: tuple[int, int], box: tuple[float, ...]) -> None:
    assert fit(resize="short_side").rectangles(*size) == (box, (0, 0, 224, 224))


@pytest.mark.parametrize(
    ("size", "into"),
    [
        ((100, 200), (0, 56, 224, 112)),
        ((448, 224), (56, 0, 112, 224)),
        ((224, 224), (0, 0, 224, 224)),
        ((1, 5000), (0, 111, 224, 1)),
    ],
)
def test_letterbox_keeps_the_aspect_in_the_middle(
    size: tuple[int, int], into: tuple[int, ...]
) -> None:
    height, width = size

    assert fit(resize="letterbox").rectangles(height, width) == ((0, 0, width, height), into)


@given(SIZES, SIZES, st.integers(1, 600), st.integers(1, 600))
def test_rectangles_lie_inside_image_and_input(
    height: int, width: int, rows: int, columns: int
) -> None:
    for resize in ("stretch", "short_side", "letterbox"):
        of = fit(resize=resize, height=rows, width=columns)
        (left, top, right, bottom), (x, y, w, h) = of.rectangles(height, width)

        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= columns and y + h <= rows


@given(SIZES, SIZES)
def test_centre_crop_is_torchvisions_own(height: int, width: int) -> None:
    (left, top, right, bottom), _ = fit(resize="short_side").rectangles(height, width)

    # torchvision: the shorter side becomes 256, the other int(256 * long / short).
    short, long = min(height, width), max(height, width)
    rows, columns = (256, int(256 * long / short))[:: 1 if height <= width else -1]
    assert round(right * columns / width - left * columns / width) == 224
    assert round(bottom * rows / height - top * rows / height) == 224
    assert round(left * columns / width) == round((columns - 224) / 2)
    assert round(top * rows / height) == round((rows - 224) / 2)


@pytest.mark.parametrize("resize", ["stretch", "short_side", "letterbox"])
@given(height=SIZES, width=SIZES, x=st.floats(0, 224), y=st.floats(0, 224))
def test_points_of_the_input_go_back_to_where_they_came_from(
    resize: str, height: int, width: int, x: float, y: float
) -> None:
    of = fit(resize=resize)
    (left, top, right, bottom), (x0, y0, w, h) = of.rectangles(height, width)

    back_x, back_y = of.to_image(np.array([x, y]), height, width)

    assert 0 <= back_x <= width and 0 <= back_y <= height
    there = [(back_x - left) / (right - left) * w + x0, (back_y - top) / (bottom - top) * h + y0]
    if x0 <= x <= x0 + w and y0 <= y <= y0 + h:
        np.testing.assert_allclose(there, [x, y], atol=1e-6)


def test_points_in_the_padding_go_to_the_edge() -> None:
    points = np.array([[[0, 0], [112, 112]], [[224, 56], [9, 300]]])

    back = fit(resize="letterbox").to_image(points, 100, 200)

    assert back.tolist() == [[[0, 0], [100, 50]], [[200, 0], [9 * 200 / 224, 100]]]


def test_enough_is_what_the_input_or_its_short_side_needs() -> None:
    assert fit(resize="stretch", height=100, width=50).enough == (100, 50)
    assert fit(resize="short_side").enough == (256, 256)
    assert fit(resize="short_side", resize_size=300).enough == (300, 300)


@pytest.mark.parametrize("size", [(50, 80), (300, 201), (640, 480)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_stretched_pixels_are_pillows(size: tuple[int, int], interpolation: str) -> None:
    spec = ModelInput(height=64, width=48, resize="stretch", interpolation=interpolation)
    pixels = waves(*size)

    row = fitted(spec, pixels)

    method = Image.Resampling[interpolation.upper()]
    expected = np.asarray(Image.fromarray(pixels).resize((48, 64), method))
    assert np.abs(row.astype(int) - expected).max() <= 1


def test_letterbox_is_padded_in_its_colour() -> None:
    spec = ModelInput(height=64, width=64, resize="letterbox", pad_color=(10, 20, 30))

    row = fitted(spec, waves(32, 64))

    assert (row[:16] == (10, 20, 30)).all() and (row[48:] == (10, 20, 30)).all()
    assert (row[16:48] == waves(32, 64)).all()


def test_bgr_turns_pixels_and_padding() -> None:
    spec = ModelInput(
        height=64, width=64, resize="letterbox", pad_color=(10, 20, 30), color_order="bgr"
    )

    row = fitted(spec, waves(32, 64))

    assert (row[0] == (30, 20, 10)).all()
    assert (row[16:48] == waves(32, 64)[:, :, ::-1]).all()


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
def test_image_decoded_smaller_goes_where_the_whole_one_goes(resize: str) -> None:
    spec = ModelInput(height=96, width=80, resize=resize)
    whole = Image.fromarray(waves(427, 640) // 2 + 100)
    quarter = np.asarray(whole.resize((160, 107), Image.Resampling.BOX))

    expected = fitted(spec, np.asarray(whole)).astype(int)

    row = fitted(spec, quarter, size=(427, 640)).astype(int)
    assert ((row == 0) == (expected == 0)).all()
    assert np.abs(row - expected).mean() < 2


# --- dynamic sizes --------------------------------------------------------------------------------

DETECTOR = {"size": "dynamic", "height": 960, "width": 960, "resize": "stretch"}
RECOGNIZER = {
    "size": "dynamic",
    "height": 48,
    "min_height": 48,
    "width": 3200,
    "min_width": 320,
    "resize": "letterbox",
    "align": "start",
}


@pytest.mark.parametrize(
    ("spec", "size", "expected"),
    [
        # The longer side at most 960, the shorter in proportion, both rounded to 32.
        ({**DETECTOR, "enlarge_to": 1}, (1920, 1080), (960, 544)),
        ({**DETECTOR, "enlarge_to": 1}, (500, 333), (512, 320)),
        ({**DETECTOR, "enlarge_to": 1}, (5, 5000), (32, 960)),
        ({**DETECTOR, "enlarge_to": 1}, (1, 1), (32, 32)),
        # Enlarged until the shorter side is 480, or the longer 960.
        ({**DETECTOR, "enlarge_to": 480}, (240, 320), (480, 640)),
        ({**DETECTOR, "enlarge_to": 480}, (240, 600), (384, 960)),
        ({**DETECTOR, "enlarge_to": 480}, (600, 700), (608, 704)),
        # As large as there is room.
        (DETECTOR, (250, 320), (736, 960)),
        ({**DETECTOR, "multiple_of": 1}, (240, 320), (720, 960)),
        ({**DETECTOR, "min_height": 640}, (100, 400), (640, 960)),
        # One height, the width by the aspect.
        (RECOGNIZER, (48, 320), (48, 320)),
        (RECOGNIZER, (24, 40), (48, 320)),
        (RECOGNIZER, (32, 400), (48, 608)),
        (RECOGNIZER, (300, 200), (48, 320)),
        (RECOGNIZER, (10, 4000), (48, 3200)),
        # The shorter side 256, and of the longer what there is room for.
        ({"size": "dynamic", "width": 448, "resize_size": 256}, (300, 400), (224, 320)),
        ({"size": "dynamic", "width": 448, "resize_size": 256}, (300, 4000), (224, 448)),
    ],
)
def test_dynamic_sizes_follow_the_image(
    spec: dict[str, object], size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fit(**spec).size_of(*size) == expected


DYNAMIC = [
    DETECTOR,
    {**DETECTOR, "enlarge_to": 300},
    {**DETECTOR, "resize": "letterbox"},
    RECOGNIZER,
    {"size": "dynamic", "height": 320, "width": 448, "resize_size": 256},
]


@given(st.sampled_from(DYNAMIC), SIZES, SIZES, st.floats(0, 1), st.floats(0, 1))
def test_dynamic_rectangles_lie_inside_and_lead_back(
    spec: dict[str, object], height: int, width: int, x: float, y: float
) -> None:
    of = fit(**spec)
    rows, columns = of.size_of(height, width)
    (left, top, right, bottom), (x0, y0, w, h) = of.rectangles(height, width)
    inside = np.array([x0 + x * w, y0 + y * h])

    back = of.to_image(inside, height, width)

    for side, (least, most, divisor) in zip((rows, columns), of._spec.sides, strict=True):
        assert least <= side <= most and side % divisor == 0
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert x0 >= 0 and y0 >= 0 and w > 0 and h > 0 and x0 + w <= columns and y0 + h <= rows
    expected = [left + x * (right - left), top + y * (bottom - top)]
    np.testing.assert_allclose(back, expected, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("spec", DYNAMIC)
def test_dynamic_inputs_are_written_at_the_front_of_the_row(spec: dict[str, object]) -> None:
    pixels = waves(90, 300)

    row = fitted(fit(**spec)._spec, pixels)

    assert len(np.unique(row)) > 100


def test_what_lies_at_the_start_is_padded_behind() -> None:
    spec = fit(**RECOGNIZER, pad_color=(10, 20, 30))._spec

    row = fitted(spec, waves(48, 200))

    assert row.shape == (48, 320, 3)
    assert (row[:, :200] == waves(48, 200)).all() and (row[:, 200:] == (10, 20, 30)).all()
