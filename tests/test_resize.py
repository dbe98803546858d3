"""Resizing in C against Pillow, torch and plain numpy, with every instruction set.

Every level is held to the same expectations here; that they give the same bytes is shown by
test_levels_give_the_same_bytes and, on random geometries, by test_sanitizers.py.
"""

from __future__ import annotations

import mmap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import fork, wait
from PIL import Image

from evmp import _native

pytestmark = pytest.mark.usefixtures("simd")

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
RESIZE_ERROR = 0.02  # grey levels before the last rounding; csrc/resize.h promises 0.1
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# (height, width) to (height, width): smaller, larger, both, odd, thin, tiny, the same.
GEOMETRIES = [
    ((375, 500), (224, 224)),
    ((100, 75), (224, 224)),
    ((40, 301), (113, 57)),
    ((33, 17), (16, 31)),
    ((1, 1), (5, 9)),
    ((300, 1), (7, 3)),
    ((2, 301), (3, 2)),
    ((31, 29), (1, 1)),
    ((64, 63), (64, 63)),
]


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> Pixels:
    """Round shapes, as photographs have: nothing that overshoots."""
    y, x = np.mgrid[:height, :width]
    return np.stack([127 + 100 * np.sin(y / 9 + c) * np.cos(x / 7) for c in range(3)], 2).astype(
        np.uint8
    )


def resize(src: Pixels, height: int, width: int, **options: Any) -> Pixels:
    dst = np.full((height, width, 3), 99, np.uint8)
    _native.resize(src, *src.shape[:2], dst, height, width, **options)
    return dst


def exact(src: Pixels, height: int, width: int, filter: str) -> np.ndarray[Any, Any]:
    """What torch makes of it in float64, without a rounding: (height, width, 3)."""
    image = torch.from_numpy(src).permute(2, 0, 1)[None].double()
    result = torch.nn.functional.interpolate(image, (height, width), mode=filter, antialias=True)
    return result[0].permute(1, 2, 0).clamp(0, 255).numpy()


def largest_difference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.abs(a.astype(np.float64) - b).max())


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("src", "dst"), GEOMETRIES)
def test_result_is_the_rounded_exact_one(
    src: tuple[int, int], dst: tuple[int, int], filter: str
) -> None:
    pixels = noise(*src)

    got = resize(pixels, *dst, filter=filter)

    assert largest_difference(got, exact(pixels, *dst, filter)) <= 0.5 + RESIZE_ERROR


@pytest.mark.parametrize(("src", "dst"), GEOMETRIES)
def test_bilinear_is_pillows_within_one_level(src: tuple[int, int], dst: tuple[int, int]) -> None:
    pixels = noise(*src)
    expected = Image.fromarray(pixels).resize(dst[::-1], Image.Resampling.BILINEAR)

    assert largest_difference(resize(pixels, *dst), np.asarray(expected)) <= 1


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("src", "dst"), GEOMETRIES)
def test_smooth_image_is_pillows_within_one_level(
    src: tuple[int, int], dst: tuple[int, int], filter: str
) -> None:
    pixels = smooth(*src)
    expected = Image.fromarray(pixels).resize(dst[::-1], FILTERS[filter])

    assert largest_difference(resize(pixels, *dst, filter=filter), np.asarray(expected)) <= 1


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("level", [0, 1, 127, 255])
def test_flat_image_stays_flat(level: int, filter: str) -> None:
    pixels = np.full((123, 457, 3), level, np.uint8)

    assert (resize(pixels, 89, 99, filter=filter) == level).all()
    assert (resize(pixels, 230, 500, filter=filter) == level).all()


def test_same_size_is_a_copy() -> None:
    pixels = noise(61, 67)

    assert (resize(pixels, 61, 67) == pixels).all()
    assert (resize(pixels, 61, 67, filter="bicubic") == pixels).all()


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(
    "box", [(10.0, 20.0, 110.0, 90.0), (0.0, 0.0, 50.5, 99.9), (7.3, 1.1, 7.9, 3.0)]
)
def test_box_is_pillows(box: tuple[float, float, float, float], filter: str) -> None:
    pixels = smooth(100, 120)
    expected = Image.fromarray(pixels).resize((31, 33), FILTERS[filter], box=box)

    assert largest_difference(resize(pixels, 33, 31, box=box, filter=filter), expected) <= 1


def test_box_is_the_centre_crop_of_a_resized_image() -> None:
    pixels = noise(300, 400)
    whole = resize(pixels, 150, 200)

    crop = resize(pixels, 100, 100, box=(100.0, 50.0, 300.0, 250.0))

    # The weights are the same, but for their rounding.
    assert largest_difference(crop, whole[25:125, 50:150]) <= 1


@pytest.mark.parametrize(
    "into", [(0, 0, 50, 40), (3, 5, 20, 10), (49, 39, 1, 1), (0, 7, 50, 30), (9, 0, 33, 40)]
)
def test_rectangle_is_filled_and_the_rest_painted(into: tuple[int, int, int, int]) -> None:
    pixels = noise(37, 51)
    left, top, width, height = into

    got = resize(pixels, 40, 50, into=into, fill=(1, 2, 3))

    assert (got[top : top + height, left : left + width] == resize(pixels, height, width)).all()
    got[top : top + height, left : left + width] = (1, 2, 3)
    assert (got == (1, 2, 3)).all()


def test_default_fill_is_black() -> None:
    got = resize(noise(8, 8), 10, 10, into=(1, 1, 8, 8))

    assert not got[0].any()
    assert not got[:, 9].any()


@pytest.mark.parametrize(("src", "dst"), GEOMETRIES)
def test_swap_writes_blue_first(src: tuple[int, int], dst: tuple[int, int]) -> None:
    pixels = noise(*src)

    assert (resize(pixels, *dst, swap=True) == resize(pixels, *dst)[:, :, ::-1]).all()


def test_fill_is_swapped_like_pixels() -> None:
    got = resize(noise(5, 5), 10, 10, into=(0, 0, 5, 5), fill=(1, 2, 3), swap=True)

    assert tuple(got[9, 9]) == (3, 2, 1)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (4, 5), (7, 6), (224, 2)])
def test_nothing_is_written_outside_the_destination(size: tuple[int, int]) -> None:
    height, width = size
    memory = np.full(height * width * 3 + 128, 99, np.uint8)
    row = memoryview(memory)[64:-64]
    pixels = noise(20, 30)

    _native.resize(pixels, 20, 30, row, height, width)

    assert (memory[:64] == 99).all()
    assert (memory[-64:] == 99).all()
    assert bytes(row) == resize(pixels, height, width).tobytes()


@pytest.mark.parametrize("filter", FILTERS)
def test_wide_filters_keep_their_precision(filter: str) -> None:
    pixels = noise(1000, 3000)

    got = resize(pixels, 9, 10, filter=filter)

    assert largest_difference(got, exact(pixels, 9, 10, filter)) <= 0.5 + RESIZE_ERROR


def test_extreme_sizes_are_one_average() -> None:
    line = noise(1, 100_000)

    got = resize(line, 1, 1)

    assert largest_difference(got, exact(line, 1, 1, "bilinear")) <= 1


def test_threads_do_not_share_their_work() -> None:
    images = [noise(200 + 10 * i, 300 - 10 * i, i) for i in range(4)]
    expected = [resize(image, 50, 60) for image in images]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not np.array_equal(resize(images[i], 50, 60), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("shape", [(1, 1_000_000), (2_000_000, 1)])
def test_memory_for_a_giant_goes_back(shape: tuple[int, int]) -> None:
    def grow() -> int:
        giant, dst = bytes(shape[0] * shape[1] * 3), bytearray(224 * 224 * 3)
        before = resident_bytes()
        _native.resize(giant, *shape, dst, 224, 224)
        grown = resident_bytes() - before
        print(f"{grown >> 20} MiB more")
        return grown > 32 << 20

    assert wait(fork(grow)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box": (0.0, 0.0, 31.0, 20.0)}, "box .* not inside the 30 x 20 source"),
        ({"box": (-1.0, 0.0, 30.0, 20.0)}, "box"),
        ({"box": (5.0, 5.0, 5.0, 9.0)}, "box .* is empty"),
        ({"box": (float("nan"), 0.0, 30.0, 20.0)}, "box"),
        ({"into": (0, 0, 11, 10)}, "into .* not inside the 10 x 10 destination"),
        ({"into": (5, 5, 0, 5)}, "into .* is empty"),
        ({"into": (1, 0, 10, 10)}, "into"),
        ({"into": (0, 2**62, 1, 2**62)}, "into"),
        ({"fill": (0, 0, 256)}, "fill .* is outside 0 to 255"),
        ({"filter": "lanczos"}, "filter is 'lanczos', expected 'bilinear' or 'bicubic'"),
    ],
)
def test_bad_option_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize(noise(20, 30), 10, 10, **change)


@pytest.mark.parametrize("option", ["box", "into", "fill"])
def test_option_must_be_a_tuple(option: str) -> None:
    with pytest.raises(TypeError, match=f"{option} must be"):
        resize(noise(20, 30), 10, 10, **{option: 3})


@pytest.mark.parametrize(
    ("src", "dst", "message"),
    [
        ((20, 31), (10, 10), "src has 1800 bytes, expected 20 x 31 x 3 = 1860"),
        ((20, 30), (10, 9), "dst has 300 bytes, expected 10 x 9 x 3 = 270"),
        ((0, 30), (10, 10), "image of 0 x 30 pixels"),
        ((20, 30), (10, -1), "image of 10 x -1 pixels"),
        ((2**62, 2**62), (10, 10), "expected sides from 1 to 16777216"),
    ],
)
def test_sizes_must_match_the_buffers(
    src: tuple[int, int], dst: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _native.resize(noise(20, 30), *src, np.zeros((10, 10, 3), np.uint8), *dst)


def test_empty_image_is_refused() -> None:
    with pytest.raises(ValueError, match="image of 0 x 0 pixels"):
        _native.resize(b"", 0, 0, bytearray(3), 1, 1)


def test_refused_call_writes_nothing() -> None:
    dst = np.full((10, 10, 3), 99, np.uint8)

    with pytest.raises(ValueError, match="filter"):
        _native.resize(noise(4, 4), 4, 4, dst, 10, 10, filter="nearest")  # type: ignore[arg-type]

    assert (dst == 99).all()


@pytest.mark.parametrize("filter", FILTERS)
def test_levels_give_the_same_bytes(simd: str, filter: str) -> None:
    options = {"box": (3.3, 1.0, 90.0, 77.7), "into": (2, 3, 61, 57), "filter": filter}
    pixels = noise(80, 91)
    got = resize(pixels, 64, 64, **options)

    _native.set_simd_level("portable")

    assert (got == resize(pixels, 64, 64, **options)).all()
