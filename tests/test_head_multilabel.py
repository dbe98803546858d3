"""Every number of a multi-label result, and the outputs that are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from modelfolder import head_of, result_of

from evmp.errors import ModelError

LABELS = ("day", "night", "rain")


def labels_of(scores: Any, **options: Any) -> dict[str, Any]:
    options = {"labels": LABELS, **options}
    return result_of(head_of("multilabel_classifier", **options), {"0": scores})


def test_every_number_of_a_result() -> None:
    result = labels_of([0.2, 0.9, 0.5], output={"activation": "none"})

    assert list(result.items()) == [
        ("class_probs", {"day": 0.2, "night": 0.9, "rain": 0.5}),
        ("classes", [1, 2]),
        ("class_names", ["night", "rain"]),
        ("predictions", [False, True, True]),
        ("probs", [0.2, 0.9, 0.5]),
    ]


def test_each_label_has_a_sigmoid_of_its_own() -> None:
    scores = np.float32([-800, 0.3, 90])

    found = labels_of(scores)["probs"]

    with np.errstate(over="ignore"):
        expected = (1 / (1 + np.exp(-scores.astype(np.float64)))).astype(np.float32)
    assert [np.float32(x) for x in found] == list(expected)


@pytest.mark.parametrize(
    ("threshold", "classes"), [(0.0, [0, 1, 2]), (0.7, [1, 2]), (0.75, [2]), (1.0, [])]
)
def test_threshold_is_what_a_probability_must_reach(threshold: float, classes: list[int]) -> None:
    result = labels_of(
        [0.1, 0.7, 0.9], output={"activation": "none"}, multilabel_threshold=threshold
    )

    assert result["classes"] == classes
    assert result["class_names"] == [LABELS[number] for number in classes]
    assert result["predictions"] == [number in classes for number in range(3)]


def test_nothing_found_is_empty_lists() -> None:
    result = labels_of([-9, -9, -9])

    assert (result["classes"], result["class_names"]) == ([], [])


def test_labels_fewer_than_classes_are_refused() -> None:
    message = r"model\.pt: the model returned \(1, 4\) for an image, expected \(1, 3\) for 3 labels"
    with pytest.raises(ModelError, match=message):
        labels_of([0, 0, 0, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_no_number_fails_the_row(bad: float) -> None:
    with pytest.raises(ModelError, match=r"^the model returned NaN or infinity for this image$"):
        labels_of([0, bad, 1], output={"activation": "none"})


def test_another_number_of_classes_later_fails_the_row() -> None:
    head = head_of("multilabel_classifier")
    head.check([{"0": np.zeros(3, np.float32)}])

    with pytest.raises(ModelError, match="returned 2 classes, at first it was 3"):
        head.results([{"0": np.zeros(2, np.float32)}], [(9, 9)])
