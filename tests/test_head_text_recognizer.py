"""Every number of a line that was read, by CTC and by tokens, and what is no reading."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from modelfolder import head_of, result_of

from evmp.errors import ModelError

LABELS = ("a", "b", "c")


def steps(*numbers: int, n_classes: int = 4, sure: float = 0.9) -> np.ndarray:
    """(T, C) probabilities, `sure` for a class a step and what is left for the others."""
    table = np.full((len(numbers), n_classes), (1 - sure) / (n_classes - 1), np.float32)
    table[np.arange(len(numbers)), numbers] = sure
    return table


def read(row: Any, *, labels: tuple[str, ...] = LABELS, **text: Any) -> dict[str, Any]:
    activation = text.pop("activation", "none")
    head = head_of(
        "text_recognizer", labels=labels, output={"activation": activation, "text": text}
    )
    return result_of(head, row if isinstance(row, dict) else {"0": row})


def test_every_number_of_a_result() -> None:
    table = steps(0, 1, 1, 0, 1, 2, 0, 0, 3)
    table[4, 1], table[5, 2], table[8, 3] = 0.8, 0.5, 0.75

    result = read(table)

    assert result == {
        "sequence_predict_ids": [1, 1, 2, 3],
        "sequence_predict_text": "aabc",
        "sequence_probability": pytest.approx((0.9 + 0.8 + 0.5 + 0.75) / 4, rel=1e-6),
    }
    assert list(result) == [
        "sequence_predict_ids",
        "sequence_predict_text",
        "sequence_probability",
    ]


def test_scores_become_probabilities() -> None:
    table = np.float32([[0, 2, 0, 0], [0, 0, 0, 3]])

    result = read(table, activation="auto")

    parts = [np.exp(2) / (np.exp(2) + 3), np.exp(3) / (np.exp(3) + 3)]
    assert result["sequence_predict_text"] == "ac"
    assert result["sequence_probability"] == pytest.approx(np.mean(parts), rel=1e-6)


@pytest.mark.parametrize(
    ("text", "numbers", "expected"),
    [
        ({}, (1, 0, 2, 3), ([1, 2, 3], "abc")),
        ({"blank": -1}, (0, 3, 1, 2), ([0, 1, 2], "abc")),
        ({"blank": 1}, (0, 1, 2, 3), ([0, 2, 3], "abc")),
        ({"space": True}, (1, 4, 3), ([1, 4, 3], "a c")),
        ({"ignored": [-1]}, (1, 4, 3), ([1, 3], "ac")),
        ({"ignored": [1, 5], "space": True}, (2, 1, 6, 5, 4), ([2, 6, 4], "a c")),
        ({"decoding": "tokens"}, (1, 1, 2, 0, 3), ([1, 1, 2], "aab")),
        ({"decoding": "tokens", "end": -1, "ignored": [0]}, (0, 1, 3, 4, 2), ([1, 3], "ac")),
        ({"decoding": "tokens"}, (3, 2, 1), ([3, 2, 1], "cba")),
    ],
)
def test_classes_become_characters(
    text: dict[str, Any], numbers: tuple[int, ...], expected: tuple[list[int], str]
) -> None:
    n_classes = 4 + len(text.get("ignored", ())) + text.get("space", False)

    result = read(steps(*numbers, n_classes=n_classes), **text)

    assert (result["sequence_predict_ids"], result["sequence_predict_text"]) == expected
    assert result["sequence_probability"] == pytest.approx(0.9, rel=1e-6)


def test_what_comes_after_the_end_does_not_count() -> None:
    table = steps(1, 0, 2)
    table[2] = np.float32(0.25)

    assert read(table, decoding="tokens")["sequence_probability"] == np.float32(0.9)


@pytest.mark.parametrize("scores", [[0.5, 0.25, 0.125, 1], [0.375]])
def test_a_model_may_choose_by_itself(scores: list[float]) -> None:
    row = {"texts": np.int64([2, 1, 0, 3]), "scores": scores}

    assert read(row, decoding="tokens") == {
        "sequence_predict_ids": [2, 1],
        "sequence_predict_text": "ba",
        "sequence_probability": 0.375,
    }


def test_negative_numbers_pad_what_a_model_chose() -> None:
    row = {"texts": np.int64([2, 1, -1, -1]), "scores": np.float32([0.5, 0.25, np.nan, 0])}

    result = read(row, decoding="tokens")

    assert (result["sequence_predict_text"], result["sequence_probability"]) == ("ba", 0.375)


@pytest.mark.parametrize("numbers", [(), (0, 0, 0)])
def test_nothing_read_is_an_empty_text(numbers: tuple[int, ...]) -> None:
    nothing = {
        "sequence_predict_ids": [],
        "sequence_predict_text": "",
        "sequence_probability": 0,
    }

    assert read(steps(*numbers)) == nothing
    assert read(steps(*numbers), decoding="tokens") == nothing


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"0": np.zeros(4, np.float32)},
            r"returned 0: \(4,\) for an image, expected \(1, steps, c",
        ),
        ({"0": np.zeros((1, 4, 4), np.float32)}, r"expected \(1, steps, classes\) scores"),
        ({"0": np.int64([1, 2])}, r"texts of \(1, steps\) integers and scores"),
        ({"texts": np.int64([1, 2]), "scores": [1, 1, 1]}, r"scores of \(1, steps\) or \(1,\)"),
        ({"a": steps(1), "b": steps(1)}, "or one of them called texts; output.names can name it"),
    ],
)
def test_what_is_no_reading_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(row)


@pytest.mark.parametrize(
    ("n_classes", "text", "message"),
    [
        (
            4,
            {"labels": ("a", "b")},
            r"\(1, 1, 4\) .* expected \(1, 1, 3\) .* set output.text.space",
        ),
        (
            6,
            {},
            r"expected \(1, 1, 4\) for 4 classes: 3 labels, and what is no .* correct output.l",
        ),
        (4, {"space": True}, "for 5 classes: 3 labels, the space, and what is no character"),
    ],
)
def test_there_must_be_as_many_characters_as_classes(
    n_classes: int, text: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read(steps(1, n_classes=n_classes), **text)


@pytest.mark.parametrize("number", [-1, 4])
def test_a_number_that_is_no_class_fails_the_row(number: int) -> None:
    row = {"texts": np.int64([1, number]), "scores": np.float32([1])}

    with pytest.raises(ModelError, match=r"expected those from 0 to 3; correct output.labels"):
        read(row)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_fails_the_row(bad: float) -> None:
    table = steps(1, 2)
    table[0, 0] = bad

    with pytest.raises(ModelError, match="NaN or infinity for this image"):
        read(table)
    with pytest.raises(ModelError, match="NaN or infinity for this image"):
        read({"texts": np.int64([1, 2]), "scores": np.float32([1, bad])})
