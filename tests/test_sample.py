"""Samples through a ring's row: what goes in comes out, and belongs to whoever took it out."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from evmp.sample import ALIGNMENT, SampleTooLarge, pack, unpack


def through(samples: list[dict[str, Any]], n_bytes: int = 1 << 16) -> list[dict[str, Any]]:
    place = memoryview(bytearray(n_bytes))
    return unpack(place[: pack(samples, place)])


def test_every_member_comes_out_as_it_went_in() -> None:
    sample = {
        "image": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
        "boxes": np.ones((3, 4), np.float32),
        "file": io.BytesIO(b"prior"),
        "config": {"key1": 1, "key2": [None, "ü", 2.5]},
        3: ("a", b"b"),
    }

    (found,) = through([sample])

    assert list(found) == list(sample)
    np.testing.assert_array_equal(found["image"], sample["image"])
    assert found["boxes"].dtype == np.float32
    assert found["file"].read() == b"prior"
    assert (found["config"], found[3]) == (sample["config"], sample[3])


@pytest.mark.parametrize("samples", [[], [{}], [{"a": 1}, {"a": 2}, {}]])
def test_a_row_may_hold_any_number_of_samples(samples: list[dict[str, Any]]) -> None:
    assert through(samples) == samples


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 5, 3), np.uint8),
        np.arange(60).reshape(3, 4, 5)[::2, :, ::-1],
        np.asfortranarray(np.arange(12).reshape(3, 4)),
        np.array(7),
        np.array([{"a": 1}, None], object),
    ],
    ids=["empty", "strided", "fortran", "scalar", "objects"],
)
def test_arrays_of_any_layout_pass(array: np.ndarray) -> None:
    (found,) = through([{"array": array}])

    assert found["array"].tolist() == array.tolist()
    assert found["array"].shape == array.shape


def test_what_comes_out_is_writable_and_private() -> None:
    place = memoryview(bytearray(1 << 12))
    length = pack([{"image": np.zeros((4, 4, 3), np.uint8)}], place)
    (first,) = unpack(place[:length])

    first["image"][:] = 9
    place[:] = bytes(len(place))

    assert first["image"].min() == 9


def test_pixels_are_aligned() -> None:
    images = [np.zeros((n, 5, 3), np.uint8) for n in (1, 7, 3)]

    found = through([{"image": image} for image in images])

    offsets = [it["image"].__array_interface__["data"][0] % 16 for it in found]
    assert offsets == [0, 0, 0]
    assert ALIGNMENT % 16 == 0


def test_sample_that_does_not_fit_says_so() -> None:
    with pytest.raises(SampleTooLarge, match="exceeds the 4096 that a row may have"):
        pack([{"image": np.zeros((64, 64, 3), np.uint8)}], memoryview(bytearray(4096)))


def test_sample_that_cannot_be_pickled_raises() -> None:
    with pytest.raises((TypeError, AttributeError), match="pickle"):
        through([{"rows": (row for row in "ab")}])
