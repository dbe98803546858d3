"""Every number of a segmentation, and the outputs that are none."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from modelfolder import head_of, result_of
from PIL import Image

from evmp.errors import ModelError

SCORES = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)


def segments_of(array: np.ndarray, **options: Any) -> dict[str, Any]:
    return result_of(head_of("segmentor", **options), {"0": array})


def probabilities(scores: np.ndarray) -> np.ndarray:
    """(C, H, W) scores to (H, W, C) probabilities, as a textbook has it."""
    powers = np.exp(scores.astype(np.float64))
    return (powers / powers.sum(0)).astype(np.float32).transpose(1, 2, 0)


def test_every_number_of_a_result() -> None:
    result = segments_of(SCORES)

    assert list(result) == ["preds", "probs"]
    assert result["preds"] == SCORES.argmax(0).tolist()
    np.testing.assert_array_equal(np.float32(result["probs"]), probabilities(SCORES))


@pytest.mark.parametrize("part", ["preds", "probs"])
def test_the_job_says_what_a_result_holds(part: str) -> None:
    result = segments_of(SCORES, segmentation_output=part)

    assert result == {part: segments_of(SCORES)[part]}


def test_of_equal_scores_the_lower_class_is_taken() -> None:
    assert segments_of(np.zeros((3, 1, 2), np.float32))["preds"] == [[0, 0]]


def test_one_class_is_there_or_not() -> None:
    result = segments_of(np.float32([[[-1, 0, 2]]]), output={"activation": "sigmoid"})

    assert result["preds"] == [[0, 1, 1]]
    expected = (1 / (1 + np.exp([1.0, 0, -2]))).astype(np.float32)
    assert [np.float32(x) for (x,) in result["probs"][0]] == list(expected)


def test_one_class_by_softmax_is_refused() -> None:
    with pytest.raises(ModelError, match=r"\(1, 1, 2, 4\) .* set output.activation: sigmoid"):
        segments_of(SCORES[:1])


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.bool_])
@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3)])
def test_class_numbers_are_passed_on(dtype: type, shape: tuple[int, ...]) -> None:
    numbers = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype).reshape(shape)

    result = segments_of(numbers, segmentation_output="preds")

    assert result == {"preds": [[0, 1, 1], [1, 0, 1]]}


def test_class_numbers_have_no_probabilities() -> None:
    with pytest.raises(
        ModelError, match=r"class numbers, \(1, 2, 3\) int64 .* segmentation_output"
    ):
        segments_of(np.zeros((2, 3), np.int64))


def test_torchvisions_main_output_is_taken() -> None:
    result = result_of(head_of("segmentor"), {"aux": np.zeros((9, 1, 1)), "out": SCORES})

    assert result == segments_of(SCORES)


def test_labels_fewer_than_classes_are_refused() -> None:
    message = r"returned \(1, 3, 2, 4\) for an image, expected \(1, 2, 2, 4\) for 2 labels from cl"
    with pytest.raises(ModelError, match=message):
        segments_of(SCORES, labels=("cat", "dog"))


def test_labels_of_one_class_name_it_or_what_is_not_it_too() -> None:
    def look(*labels: str) -> dict[str, Any]:
        return segments_of(SCORES[:1], labels=labels, output={"activation": "sigmoid"})

    assert look("road") == look("nothing", "road") == look()
    with pytest.raises(ModelError, match=r"returned \(1, 1, 2, 4\) .* for 3 labels from class 0"):
        look("a", "b", "c")


def test_a_class_number_without_a_label_fails_the_row() -> None:
    def look(number: int) -> dict[str, Any]:
        numbers = np.array([[0, number]], np.int64)
        return segments_of(numbers, labels=("cat", "dog"), segmentation_output="preds")

    assert look(1) == {"preds": [[0, 1]]}
    with pytest.raises(ModelError, match="found class 77, but the labels end at class 1; correct"):
        look(77)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4, 5), (0, 2, 2), (3, 0, 2)])
def test_what_is_no_segmentation_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ModelError, match=r"float32 for an image, expected \(1, classes, height, wi"
    ):
        segments_of(np.zeros(shape, np.float32))


@pytest.mark.parametrize("part", ["preds", "probs", "both"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_no_number_fails_the_row(part: str, bad: float) -> None:
    scores = SCORES.copy()
    scores[1, 1, 1] = bad

    with pytest.raises(ModelError, match="NaN or infinity for this image"):
        segments_of(scores, segmentation_output=part)


def test_another_shape_later_fails_the_row() -> None:
    head = head_of("segmentor")
    head.check([{"0": SCORES}])

    with pytest.raises(ModelError, match=r"\(1, 2, 2, 4\) for this image, at first it was \(1, 3,"):
        head.results([{"0": SCORES[:2]}], [(9, 9)])


def test_a_dynamic_input_may_give_another_size_but_no_other_classes() -> None:
    head = head_of("segmentor", input={"size": "dynamic"}, segmentation_output="preds")
    head.check([{"0": SCORES}])

    (result,) = head.results([{"0": SCORES[:, :1]}], [(9, 9)])

    assert json.loads(result)["preds"] == segments_of(SCORES)["preds"][:1]
    with pytest.raises(ModelError, match="at first it was"):
        head.results([{"0": SCORES[:2]}], [(9, 9)])


def png_of(array: np.ndarray, **output: Any) -> Image.Image:
    head = head_of("segmentor", segmentation_output="png", output=output)
    head.check([{"0": array}])
    (file,) = head.results([{"0": array}], [(32, 32)])
    return Image.open(io.BytesIO(file))


def test_png_holds_the_class_of_each_pixel() -> None:
    image = png_of(SCORES, palette=[[1, 2, 3], [40, 50, 60]])

    assert (image.format, image.mode) == ("PNG", "P")
    np.testing.assert_array_equal(np.asarray(image), SCORES.argmax(0))
    colours = image.getpalette() or []
    assert colours[:9] == [1, 2, 3, 40, 50, 60, 0, 128, 0]


def test_colours_are_those_of_pascal_voc_by_default() -> None:
    colours = png_of(np.array([[0, 255]], np.int64)).getpalette() or []

    assert colours[3 * 1 : 3 * 4] == [128, 0, 0, 0, 128, 0, 128, 128, 0]
    assert colours[3 * 15 : 3 * 16] == [192, 128, 128]
    assert colours[3 * 20 : 3 * 21] == [0, 64, 128]
    assert colours[3 * 255 :] == [224, 224, 192]


@pytest.mark.parametrize("number", [-1, 256])
def test_class_that_no_palette_holds_fails_the_row(number: int) -> None:
    with pytest.raises(ModelError, match="of which a PNG holds 0 to 255"):
        png_of(np.array([[0, number]], np.int64))
