"""Every number of a feature, and the outputs that are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from modelfolder import head_of, result_of

from evmp.errors import ModelError

MAP = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)


def feature_of(row: Any, **options: Any) -> list[float]:
    result = result_of(head_of("feature_extractor", **options), row)
    assert list(result) == ["feature"]
    return result["feature"]


@pytest.mark.parametrize("shape", [(6,), (6, 1, 1), (1, 6)])
def test_a_vector_is_taken_as_it_is(shape: tuple[int, ...]) -> None:
    vector = np.float32([0.1, -2.5, 1 / 3, 4e-10, 1e30, 0])

    assert [np.float32(x) for x in feature_of({"0": vector.reshape(shape)})] == list(vector)


def test_a_map_is_averaged_in_double_precision() -> None:
    expected = MAP.astype(np.float64).mean((1, 2)).astype(np.float32)

    assert [np.float32(x) for x in feature_of({"0": MAP})] == list(expected)


@pytest.mark.parametrize("shape", [(1, 1, 5), (1, 5, 1), (1, 1, 7)])
def test_a_map_is_averaged_however_narrow(shape: tuple[int, ...]) -> None:
    assert feature_of({"0": np.full(shape, 0.5, np.float32)}) == [0.5]


@pytest.mark.parametrize("array", [MAP, MAP[0]])
def test_flatten_takes_all_numbers(array: np.ndarray) -> None:
    found = feature_of({"0": array}, output={"pooling": "flatten"})

    assert [np.float32(x) for x in found] == list(array.reshape(-1))


def test_feature_name_picks_an_output() -> None:
    row = {"resnet_v1_50/logits": [1, 2], "resnet_v1_50/block4": MAP}

    assert feature_of(row, feature_name="resnet_v1_50/logits") == [1, 2]
    assert len(feature_of(row, feature_name="resnet_v1_50/block4")) == 5


def test_integers_become_numbers() -> None:
    assert feature_of({"0": np.int64([3, -1])}) == [3, -1]


def test_nan_and_infinity_are_null() -> None:
    assert feature_of({"0": [1, np.nan, np.inf, -np.inf]}) == [1, None, None, None]
    assert feature_of({"0": np.full((2, 2, 2), np.nan, np.float32)}) == [None, None]


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(ModelError) as caught:
        feature_of({"logits": [1, 2], "pooled": MAP}, feature_name="logit")

    assert str(caught.value) == (
        'model/model.pt: feature_name: got "logit", but the model\'s outputs are '
        "logits: (2,), pooled: (5, 3, 4), did you mean logits?"
    )


@pytest.mark.parametrize("shape", [(7, 8), (2, 3, 4, 5), (0,), (0, 3, 3)])
def test_what_is_no_feature_is_refused(shape: tuple[int, ...]) -> None:
    message = (
        r"output 0 is \(1, .*\) for an image, expected \(1, D\) or \(1, C, H, W\); output.pool"
    )
    with pytest.raises(ModelError, match=message):
        feature_of({"0": np.zeros(shape, np.float32)})


def test_another_shape_later_fails_the_row() -> None:
    head = head_of("feature_extractor")
    head.check([{"0": MAP}])

    with pytest.raises(ModelError, match=r"is \(1, 3\) for this image, at first it was \(1, 5, 3"):
        head.results([{"0": np.zeros(3, np.float32)}], [(9, 9)])


@pytest.mark.parametrize("pooling", ["average", "flatten"])
def test_a_dynamic_input_may_give_another_map_where_it_is_averaged(pooling: str) -> None:
    head = head_of("feature_extractor", input={"size": "dynamic"}, output={"pooling": pooling})
    head.check([{"0": MAP}])
    larger = [{"0": np.repeat(MAP, 2, axis=2)}]

    if pooling == "flatten":
        with pytest.raises(ModelError, match=r"is \(1, 5, 3, 8\) for this image, at first"):
            head.results(larger, [(9, 9)])
    else:
        assert head.results(larger, [(9, 9)]) == head.results([{"0": MAP}], [(9, 9)])
