"""Every number of a classifier's result, and the outputs that are no classifier's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import orjson
import pytest

from evmp.errors import ModelError
from evmp.head import Head, open_head
from evmp.model.package import ModelInput, ModelOutput, ModelPackage

LABELS = ("coho1", "coho2", "coho3", "coho4")
LOGITS = np.array([0.5, -2, 1, 3], np.float32)


def package_of(labels=LABELS, **output) -> ModelPackage:
    spec = ModelOutput(**output)
    return ModelPackage(
        Path("model"), Path("model/model.pt"), "classifier", "fp32", ModelInput(), spec, labels
    )


def head_of(n_classes=4, top_k=0, **options) -> Head:
    head = open_head(package_of(**options), SimpleNamespace(top_k=top_k))
    head.check([{"0": np.zeros(n_classes, np.float32)}])
    return head


def result_of(head: Head, scores) -> dict:
    (result,) = head.results([{"0": np.asarray(scores, np.float32)}], [(375, 500)])
    return json.loads(result)


def softmax(scores) -> np.ndarray:
    powers = np.exp(np.asarray(scores, np.float64))
    return (powers / powers.sum()).astype(np.float32)


def test_result_holds_every_class_in_the_models_order():
    result = result_of(head_of(), LOGITS)

    assert list(result) == ["class", "class_name", "class_probs"]
    assert (result["class"], result["class_name"]) == (3, "coho4")
    assert list(result["class_probs"]) == list(LABELS)
    np.testing.assert_array_equal(np.float32(list(result["class_probs"].values())), softmax(LOGITS))


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("softmax", softmax(LOGITS)),
        ("sigmoid", (1 / (1 + np.exp(-LOGITS.astype(float)))).astype(np.float32)),
    ],
)
def test_activation_makes_probabilities_of_scores(activation, expected):
    result = result_of(head_of(activation=activation), LOGITS)

    assert [np.float32(value) for value in result["class_probs"].values()] == list(expected)


def test_scores_that_are_no_probabilities_fail_the_row():
    head = head_of(activation="none")

    assert result_of(head, [1.001, 0, -0.001, 0])["class"] == 0
    with pytest.raises(ModelError, match=r"a score of 3\.0 .* set output\.activation: sigmoid, or"):
        result_of(head, LOGITS)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_infinite_scores_may_have_probabilities(activation):
    result = result_of(head_of(activation=activation), [-np.inf, 0, 1, -np.inf])

    assert list(result["class_probs"].values())[::3] == [0, 0]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_huge_scores_do_not_overflow(activation):
    result = result_of(head_of(activation=activation), [3e38, -3e38, -np.inf, 0])

    assert result["class"] == 0
    assert list(result["class_probs"].values())[:3] == [1, 0, 0]


def test_top_k_keeps_the_best_and_the_lower_number_of_two_equals():
    result = result_of(head_of(top_k=3, activation="none"), [0.25, 0.5, 0.5, 0.25])

    assert list(result["class_probs"].items()) == [("coho2", 0.5), ("coho3", 0.5), ("coho1", 0.25)]
    assert result["class"] == 1


def test_top_k_above_the_classes_keeps_all():
    assert len(result_of(head_of(top_k=9), LOGITS)["class_probs"]) == 4


def test_numbers_are_the_shortest_that_read_back_as_the_same_float32():
    (result,) = head_of(activation="none").results(
        [{"0": np.array([0.1, 4e-10, 1 / 3, 1e-45], np.float32)}], [(1, 1)]
    )

    values = b'{"coho1":0.1,"coho2":4e-10,"coho3":0.33333334,"coho4":1e-45}'
    assert result == b'{"class":2,"class_name":"coho3","class_probs":%b}' % values


def test_fast_writing_equals_dumping_a_dict():
    labels = tuple(f'class "{number}", \\ %b 茶' for number in range(1000))
    scores = np.random.default_rng(0).normal(0, 9, 1000).astype(np.float32)
    (result,) = head_of(1000, labels=labels).results([{"0": scores}], [(1, 1)])

    best = int(scores.argmax())
    probs = dict(zip(labels, softmax(scores), strict=True))
    expected = {"class": best, "class_name": labels[best], "class_probs": probs}
    assert result == orjson.dumps(expected, option=orjson.OPT_SERIALIZE_NUMPY)


def test_classes_without_labels_are_named_by_number():
    result = result_of(head_of(labels=()), LOGITS)

    assert result["class_name"] == "3" and list(result["class_probs"]) == ["0", "1", "2", "3"]


def test_classes_before_the_label_offset_are_background():
    result = result_of(head_of(5, label_offset=1), [*LOGITS, -1])

    assert (result["class"], result["class_name"]) == (3, "coho3")
    assert next(iter(result["class_probs"])) == "background"


def test_equal_labels_stay_apart():
    result = result_of(head_of(labels=("crane", "tench", "crane", "shark")), LOGITS)

    assert list(result["class_probs"]) == ["crane (0)", "tench", "crane (2)", "shark"]


@pytest.mark.parametrize("shape", [(4,), (4, 1, 1), (1, 4)])
def test_axes_of_one_do_not_matter(shape):
    assert result_of(head_of(), LOGITS.reshape(shape)) == result_of(head_of(), LOGITS)


def test_a_result_does_not_depend_on_the_batch():
    head = head_of()
    rows = [{"0": np.roll(LOGITS, n) + np.float32(n / 7)} for n in range(8)]

    together = head.results(rows, [(1, 1)] * 8)

    assert together == [head.results([row], [(9, 9)])[0] for row in rows]


@pytest.mark.parametrize(
    ("n_classes", "offset", "message"),
    [
        (
            5,
            0,
            "returned (1, 5) for an image, expected (1, 4) for 4 labels from class 0 on; "
            "set output.label_offset: 1, or",
        ),
        (4, 1, "expected (1, 5) for 4 labels from class 1 on; set output.label_offset: 0, or"),
        (3, 0, "returned (1, 3) for an image, expected (1, 4) for 4 labels from class 0 on; corr"),
    ],
)
def test_labels_that_do_not_fit_are_refused_with_both_shapes(n_classes, offset, message):
    with pytest.raises(ModelError) as caught:
        head_of(n_classes, label_offset=offset)

    assert message in str(caught.value) and "model/model.pt" in str(caught.value)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"0": np.zeros((7, 7, 4))}, "returned (1, 7, 7, 4) for an image, expected (1, classes)"),
        ({"0": np.zeros(0)}, "returned (1, 0) for an image, expected (1, classes)"),
        (
            {"boxes": np.zeros((9, 4)), "labels": np.zeros(9)},
            "returned 2 outputs for an image (boxes: (9, 4), labels: (9,)), expected one",
        ),
    ],
)
def test_what_is_no_classifiers_output_is_refused(outputs, message):
    with pytest.raises(ModelError) as caught:
        open_head(package_of(), SimpleNamespace(top_k=0)).check([outputs])

    assert message in str(caught.value)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_nan_fails_the_row(activation):
    with pytest.raises(ModelError, match=r"^the model returned NaN or infinity for this image$"):
        result_of(head_of(activation=activation), [0, np.nan, 1, 2])


@pytest.mark.parametrize("activation", ["softmax", "none"])
def test_infinity_fails_the_row(activation):
    with pytest.raises(ModelError, match="NaN or infinity"):
        result_of(head_of(activation=activation), [0, np.inf, 1, 2])


def test_another_number_of_classes_later_fails_the_row():
    with pytest.raises(ModelError, match="returned 3 classes, at first it was 4"):
        result_of(head_of(), [0, 1, 2])
