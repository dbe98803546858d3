"""Normalisation in C against numpy, with every instruction set: the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evmp import _native

pytestmark = pytest.mark.usefixtures("simd")

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
SCALE = tuple((1 / (255 * STD)).tolist())
BIAS = tuple((-MEAN / STD).tolist())
IDENTITY: dict[str, Any] = {"scale": (1.0, 1.0, 1.0), "bias": (0.0, 0.0, 0.0)}


def noise(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def normalize(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    n, height, width, _ = images.shape
    result = np.full((n, 3, height, width), np.nan, np.float32)
    _native.normalize(images, result, height, width, scale=SCALE, bias=BIAS)
    return result


def normalize_in_numpy(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    scaled = images.astype(np.float32) * np.float32(SCALE) + np.float32(BIAS)
    return scaled.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("width", [*range(1, 40), 224])
def test_every_value_has_numpys_bits(width: int) -> None:
    images = noise(1, 3, width, 3)

    assert normalize(images).tobytes() == normalize_in_numpy(images).tobytes()


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_batch_is_its_images(n: int) -> None:
    images = noise(n, 13, 17, 3)

    assert np.array_equal(normalize(images), normalize_in_numpy(images))


def test_result_is_mean_and_std() -> None:
    images = noise(2, 32, 32, 3)

    expected = (images / 255 - MEAN) / STD

    assert np.allclose(normalize(images).transpose(0, 2, 3, 1), expected, atol=1e-6)


def test_nothing_is_written_outside_the_destination() -> None:
    memory = np.full(7 * 9 * 3 + 32, 99, np.float32)

    _native.normalize(noise(7, 9, 3), memoryview(memory)[16:-16], 7, 9, **IDENTITY)

    assert (memory[:16] == 99).all()
    assert (memory[-16:] == 99).all()


@pytest.mark.parametrize(
    ("src", "dst", "message"),
    [
        (noise(2, 4, 4, 3), np.zeros(48, np.float32), "dst has 192 bytes, expected 4 for each"),
        (noise(47), np.zeros(47, np.float32), "src has 47 bytes, expected a multiple of 4 x 4 x 3"),
        (noise(48), np.zeros(193, np.uint8)[1:], "dst is not aligned to 4 bytes"),
    ],
)
def test_sizes_must_match(
    src: np.ndarray[Any, Any], dst: np.ndarray[Any, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _native.normalize(src, dst, 4, 4, **IDENTITY)


def test_scale_must_be_three_numbers() -> None:
    with pytest.raises(TypeError, match="scale must be a tuple of three numbers"):
        _native.normalize(noise(3), np.zeros(3, np.float32), 1, 1, scale=1, bias=(0, 0, 0))  # type: ignore[arg-type]
