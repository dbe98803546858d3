"""What the heads share: names for outputs, probabilities, JSON."""

from __future__ import annotations

import numpy as np
import pytest
from modelfolder import head_of

from evmp.errors import ModelError
from evmp.head.array import activate, dump, pick

ROW = {"0": np.float32([1, 2, 3]), "1": np.zeros((2, 4, 4), np.float32)}


def named(names: object, row: dict[str, np.ndarray]) -> list[bytes]:
    """Return the feature `mean` of outputs that are renamed first."""
    head = head_of("feature_extractor", output={"names": names}, feature_name="mean")
    head.check([row])
    return head.results([row], [(8, 8)])


@pytest.mark.parametrize("names", [["mean", "map"], {"0": "mean"}, {"1": "x", "0": "mean"}])
def test_outputs_get_the_packages_names(names: object) -> None:
    assert named(names, ROW) == [b'{"feature":[1.0,2.0,3.0]}']


def test_a_mapping_renames_what_the_model_has_named() -> None:
    assert named({"a": "mean"}, {"a": ROW["0"], "b": ROW["1"]}) == named(["mean", "map"], ROW)


@pytest.mark.parametrize(
    ("names", "row"),
    [
        (["mean"], ROW),
        (["mean", "map", "more"], ROW),
        ({"2": "mean"}, ROW),
        (["mean", "map"], {"a": ROW["0"], "b": ROW["1"]}),
        ({"0": "1"}, ROW),
    ],
)
def test_names_that_do_not_fit_are_refused(names: object, row: dict[str, np.ndarray]) -> None:
    with pytest.raises(ModelError, match=r"model\.pt: the model returned .*: \(3,\), .*: \(2, 4, "):
        named(names, row)


def test_one_of_several_outputs_is_picked_by_name() -> None:
    assert pick(ROW, "1", "it") is ROW["1"]
    assert pick({"x": ROW["0"]}, "scores", "it") is ROW["0"]
    with pytest.raises(ModelError, match="expected one, it, or one of them called scores; output"):
        pick(ROW, "scores", "it")


def test_softmax_runs_along_any_axis() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)

    along = activate(scores, "softmax", axis=0)

    np.testing.assert_allclose(along.sum(axis=0), np.ones((4, 5)), rtol=1e-6)
    np.testing.assert_array_equal(along[:, 1, 2], activate(scores[:, 1, 2], "softmax"))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_nothing_has_no_probabilities(activation: str) -> None:
    assert activate(np.zeros((0, 5), np.float32), activation).shape == (0, 5)
    if activation != "softmax":
        assert activate(np.zeros(0, np.float32), activation).shape == (0,)


def test_numbers_are_shortest_float32_and_null() -> None:
    array = np.float32([0.1, 4e-10, np.nan, np.inf, -np.inf])

    assert dump(array) == b"[0.1,4e-10,null,null,null]"
