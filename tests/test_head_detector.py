"""Every number of a detection, in every layout and resize mode, and the outputs that are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelfolder import head_of, result_of, to_image

from evmp.errors import ModelError

BOXES = np.float32([[2, 4, 10, 8], [0, 0, 32, 32], [20.5, 1.25, 30, 31]])
SCORES = np.float32([0.9, 0.25, 0.5])
CLASSES = np.int64([2, 0, 1])
LABELS = ("cat", "dog", "bird")
SIZE = (64, 96)
# What those say of an image of that size, stretched into 32 x 32.
EXPECTED = {
    "detection_boxes": [[8, 6, 16, 30], [2.5, 61.5, 62, 90], [0, 0, 64, 96]],
    "detection_scores": [0.9, 0.5, 0.25],
    "detection_classes": [2, 1, 0],
    "detection_class_names": ["bird", "dog", "cat"],
}
NOTHING = {name: [] for name in EXPECTED}


def separate(n: int = 3) -> dict[str, np.ndarray]:
    """The outputs as torchvision's detectors give them, the first n boxes."""
    return {"boxes": BOXES[:n], "labels": CLASSES[:n], "scores": SCORES[:n]}


def one_hot(*others: np.ndarray) -> np.ndarray:
    """(3, 4 + others + 3): the boxes, other columns, and a column of scores for each class."""
    columns = np.zeros((3, 3), np.float32)
    columns[np.arange(3), CLASSES] = SCORES
    return np.hstack([BOXES, *others, columns])


def found(row: dict[str, Any], size: tuple[int, int] = SIZE, **options: Any) -> dict[str, Any]:
    boxes = options.pop("boxes", {})
    options["output"] = {"boxes": boxes, **options.pop("output", {})}
    return result_of(head_of("detector", **options), row, size)


def test_every_number_of_a_result() -> None:
    result = found(separate(), labels=LABELS)

    assert result == EXPECTED and list(result) == list(EXPECTED)


@pytest.mark.parametrize(
    ("layout", "table"),
    [
        ("box_score_class", np.hstack([BOXES, SCORES[:, None], CLASSES[:, None]])),
        ("box_classes", one_hot()),
        ("box_objectness_classes", one_hot(np.ones((3, 1)))),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_layout_says_the_same(layout: str, table: np.ndarray, transposed: bool) -> None:
    table = table.astype(np.float32)
    boxes = {"layout": layout, "transposed": transposed}

    result = found({"0": table.T if transposed else table}, boxes=boxes, labels=LABELS)

    assert result == EXPECTED


def test_scores_of_each_class_beside_the_boxes_say_the_same() -> None:
    assert found({"boxes": BOXES, "scores": one_hot()[:, 4:]}, labels=LABELS) == EXPECTED


def distances() -> dict[str, np.ndarray]:
    """The same boxes at strides of 8 and 16: which cells have them, and how far the sides are."""
    row = {
        name: np.zeros((n, width), np.float32)
        for stride, n in ((8, 16), (16, 4))
        for name, width in ((f"scores_{stride}", 3), (f"distances_{stride}", 4))
    }
    centres = np.float32([[4, 4], [24, 24], [20, 4]])
    for number, (stride, cell) in enumerate([(8, 0), (16, 3), (8, 2)]):
        sides = np.concatenate([centres[number] - BOXES[number, :2], BOXES[number, 2:]])
        sides[2:] -= centres[number]
        row[f"scores_{stride}"][cell, CLASSES[number]] = SCORES[number]
        row[f"distances_{stride}"][cell] = sides / stride
    return row


@pytest.mark.parametrize("transposed", [False, True])
def test_distances_at_many_strides_say_the_same(transposed: bool) -> None:
    boxes = {"layout": "distances", "strides": [8, 16], "transposed": transposed}
    row = {name: it.T if transposed else it for name, it in distances().items()}

    assert found(row, boxes=boxes, labels=LABELS) == EXPECTED


@pytest.mark.parametrize("transposed", [False, True])
def test_one_score_without_classes_is_of_one_class(transposed: bool) -> None:
    boxes = BOXES.T if transposed else BOXES
    result = found({"boxes": boxes, "scores": SCORES}, boxes={"transposed": transposed})

    assert result["detection_scores"] == EXPECTED["detection_scores"]
    assert result["detection_classes"] == [0, 0, 0]
    assert result["detection_class_names"] == ["0", "0", "0"]


@pytest.mark.parametrize(
    ("form", "columns"),
    [
        ("yxyx", BOXES[:, [1, 0, 3, 2]]),
        ("xywh", np.hstack([BOXES[:, :2], BOXES[:, 2:] - BOXES[:, :2]])),
        ("cxcywh", np.hstack([(BOXES[:, :2] + BOXES[:, 2:]) / 2, BOXES[:, 2:] - BOXES[:, :2]])),
    ],
)
@pytest.mark.parametrize("unit", ["pixel", "fraction"])
def test_every_format_says_the_same(form: str, columns: np.ndarray, unit: str) -> None:
    row = {**separate(), "boxes": columns / 32 if unit == "fraction" else columns}

    assert found(row, boxes={"format": form, "unit": unit}, labels=LABELS) == EXPECTED


def test_fractions_are_of_the_inputs_own_sides() -> None:
    row = {"boxes": np.float32([[0.25, 0.5, 0.75, 1]]), "scores": np.float32([1])}

    result = found(row, (50, 100), boxes={"unit": "fraction"}, input={"height": 64, "width": 128})

    assert result["detection_boxes"] == [[25, 25, 50, 75]]


def test_fractions_of_a_dynamic_input_are_of_the_size_that_the_image_has() -> None:
    spec = {"size": "dynamic", "height": 64, "width": 64, "multiple_of": 1, "resize": "letterbox"}
    row = {"boxes": np.float32([[0.25, 0.5, 0.75, 1]]), "scores": np.float32([1])}

    result = found(row, (50, 100), boxes={"unit": "fraction"}, input=spec)

    assert result["detection_boxes"] == [[25, 25, 50, 75]]


# --- back into the image --------------------------------------------------------------------------

MODES = [
    {"resize": "stretch", "width": 48, "height": 32},
    {"resize": "short_side", "width": 48, "height": 32, "resize_size": 56},
    {"resize": "letterbox", "width": 48, "height": 32},
]


@pytest.mark.parametrize("size", [(64, 96), (333, 500), (500, 333), (7, 5), (1, 300), (32, 48)])
@pytest.mark.parametrize("spec", MODES, ids=lambda spec: spec["resize"])
def test_boxes_are_where_a_textbook_has_them(spec: dict[str, Any], size: tuple[int, int]) -> None:
    boxes = np.float32([[18, 9, 30, 23], [0, 0, 48, 32], [23.5, 15.5, 24.5, 16.5]])

    result = found({"boxes": boxes, "scores": SCORES}, size, input=spec)

    corners = [to_image(*box[:2], spec, size) + to_image(*box[2:], spec, size) for box in boxes]
    expected = [[y, x, bottom, right] for x, y, right, bottom in corners]
    in_order = [expected[0], expected[2], expected[1]]
    left = [box for box in in_order if box[2] > box[0] and box[3] > box[1]]
    np.testing.assert_allclose(result["detection_boxes"], left, rtol=1e-5, atol=1e-5)


@given(
    st.sampled_from(MODES),
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.lists(st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 4), min_size=1, max_size=5),
)
def test_boxes_lie_inside_the_image(spec: dict, size: tuple[int, int], boxes: list) -> None:
    row = {"boxes": np.float32(boxes), "scores": np.ones(len(boxes), np.float32)}

    for top, left, bottom, right in found(row, size, input=spec)["detection_boxes"]:
        assert 0 <= top < bottom <= size[0] and 0 <= left < right <= size[1]


def test_a_box_in_the_padding_is_dropped() -> None:
    boxes = np.float32([[0, 0, 48, 4], [0, 4, 48, 28]])

    result = found({"boxes": boxes, "scores": SCORES[:2]}, (48, 96), input=MODES[2])

    assert result["detection_boxes"] == [[0, 0, 48, 96]]
    assert result["detection_scores"] == [0.25]


# --- what is dropped ------------------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "n_left"), [(0, 3), (0.25, 3), (0.3, 2), (0.9, 1), (1, 0)])
def test_scores_below_the_threshold_are_dropped(threshold: float, n_left: int) -> None:
    result = found(separate(), boxes={"score_threshold": threshold})

    assert result["detection_scores"] == EXPECTED["detection_scores"][:n_left]


def test_the_best_so_many_are_kept() -> None:
    assert found(separate(), boxes={"max_detections": 2})["detection_scores"] == [0.9, 0.5]


@pytest.mark.parametrize(
    ("boxes", "scores"),
    [
        ({}, [0.9, 0.8, 0.7]),
        ({"iou_threshold": 0.5}, [0.9, 0.7]),
        ({"iou_threshold": 0.5, "across_classes": True}, [0.9]),
        ({"iou_threshold": 0.95}, [0.9, 0.8, 0.7]),
    ],
)
def test_a_box_too_much_like_a_better_one_is_dropped(
    boxes: dict[str, Any], scores: list[float]
) -> None:
    row = {
        "boxes": [[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 9, 10]],
        "scores": [0.9, 0.8, 0.7],
        "labels": np.int64([0, 0, 1]),
    }

    assert found(row, boxes=boxes)["detection_scores"] == scores


def test_boxes_that_are_alike_only_inside_the_image_stay() -> None:
    row = {"boxes": np.float32([[-60, 0, 10, 10], [0, 0, 10, 10]]), "scores": SCORES[[0, 2]]}

    result = found(row, (32, 32), boxes={"iou_threshold": 0.5})

    assert result["detection_boxes"] == [[0, 0, 10, 10]] * 2


def test_nothing_found_is_empty_lists() -> None:
    assert found(separate(0), labels=LABELS) == NOTHING
    assert found({"0": one_hot()[:0]}, boxes={"layout": "box_classes"}) == NOTHING
    assert found(separate(), boxes={"score_threshold": 0.95}) == NOTHING


def test_padding_behind_the_count_does_not_matter() -> None:
    padding = np.full((2, 4), np.nan, np.float32)
    row = {
        "boxes": np.vstack([BOXES, padding]),
        "scores": np.append(SCORES, [np.nan, 2]),
        "labels": np.append(CLASSES, [9, 9]),
        "count": np.int32([3]),
    }

    assert found(row, labels=LABELS) == EXPECTED
    assert found({**row, "count": np.int32(0)}, labels=LABELS) == NOTHING


def test_padding_of_a_negative_class_or_without_a_score_does_not_matter() -> None:
    row = {
        "boxes": np.vstack([BOXES, np.ones((2, 4), np.float32)]),
        "scores": np.append(SCORES, [0.9, 0]),
        "labels": np.append(CLASSES, [-1, 0]),
    }

    assert found(row, labels=LABELS) == EXPECTED


# --- scores and classes ---------------------------------------------------------------------------


def test_objectness_multiplies_the_scores() -> None:
    table = one_hot(np.float32([[0.5], [1], [0.5]]))

    result = found({"0": table}, boxes={"layout": "box_objectness_classes"})

    assert result["detection_scores"] == [np.float32(x) for x in (0.45, 0.25, 0.25)]
    assert result["detection_classes"] == [2, 0, 1]


def test_sigmoid_applies_to_scores_and_objectness() -> None:
    table = one_hot(np.float32([[0], [1], [2]]))

    result = found(
        {"0": table}, boxes={"layout": "box_objectness_classes"}, output={"activation": "sigmoid"}
    )

    expected = sorted(1 / (1 + np.exp(-SCORES)) / (1 + np.exp(-np.arange(3))), reverse=True)
    np.testing.assert_allclose(result["detection_scores"], expected, rtol=1e-6)


def test_softmax_leaves_the_last_column_for_nothing() -> None:
    """As DETR has it: the third box is probably nothing, and what else it may be improbable."""
    scores = np.float32([[5, 0, 0], [0, 5, 0], [1, 0, 9]])
    boxes = {"background_last": True}

    result = found(
        {"boxes": BOXES, "scores": scores},
        boxes=boxes,
        output={"activation": "softmax"},
        labels=("cat", "dog"),
    )

    probability = np.exp(5) / (np.exp(5) + 2)
    np.testing.assert_allclose(result["detection_scores"], [probability] * 2, rtol=1e-6)
    assert result["detection_class_names"] == ["cat", "dog"]


def test_classes_before_the_labels_are_never_found() -> None:
    scores = np.float32([[0.9, 0.5, 0.1], [0.2, 0.1, 0.3], [0.9, 0.01, 0.02]])

    result = found(
        {"boxes": BOXES, "scores": scores}, labels=("cat", "dog"), output={"label_offset": 1}
    )

    assert result["detection_scores"] == [0.5, np.float32(0.3)]
    assert result["detection_classes"] == [1, 2]
    assert result["detection_class_names"] == ["cat", "dog"]


def test_classes_are_the_models_own_numbers() -> None:
    row = {**separate(), "labels": CLASSES + 1}

    result = found(row, labels=LABELS, output={"label_offset": 1})

    assert result["detection_classes"] == [3, 2, 1]
    assert result["detection_class_names"] == ["bird", "dog", "cat"]
    assert found(row)["detection_class_names"] == ["3", "2", "1"]


def test_a_class_without_a_label_fails_the_row() -> None:
    with pytest.raises(
        ModelError, match=r"class 2, but the labels end at class 1; set output\.label_offset: 1, or"
    ):
        found(separate(), labels=("cat", "dog"))
    with pytest.raises(ModelError, match=r"labels end at class 0; correct output\.labels"):
        found(separate(), labels=("cat",))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "boxes", "message"),
    [
        (
            {"0": one_hot()},
            {},
            r"returned 0: \(3, 7\) .* expected boxes, scores and labels; name t",
        ),
        (
            {**separate(), "boxes": BOXES[:2]},
            {},
            r"boxes: \(2, 4\), .* expected scores of \(1, N\)",
        ),
        ({**separate(), "boxes": BOXES[:, :3]}, {}, r"expected boxes of \(1, N, 4\), for output.b"),
        ({**separate(), "boxes": np.float32(3)}, {}, r"expected boxes of \(1, N, 4\)"),
        ({**separate(), "labels": CLASSES[:1]}, {}, r"expected labels of \(1, N\)"),
        ({**separate(), "count": np.int64([1, 2])}, {}, r"expected a count of \(1,\)"),
        (
            {"boxes": BOXES, "scores": SCORES},
            {"background_last": True},
            r"expected scores of \(1, N, classes\) with background_last",
        ),
        (
            {"0": one_hot()},
            {"layout": "box_score_class"},
            r"expected \(1, N, 6\), for output.boxes.l",
        ),
        ({"0": BOXES}, {"layout": "box_classes"}, r"expected \(1, N, 4 \+ classes\), for output"),
        (
            {"0": one_hot()[:, :5]},
            {"layout": "box_objectness_classes", "transposed": True},
            r"expected \(1, N, 5 \+ classes\), transposed, for",
        ),
        ({"0": np.float32(1)}, {"layout": "box_classes"}, "expected"),
        ({"a": BOXES, "b": BOXES}, {"layout": "box_classes"}, "or one of them called boxes"),
        (
            {**distances(), "distances_16": np.zeros((4, 6), np.float32)},
            {"layout": "distances", "strides": [8, 16]},
            r"scores_16 of \(1, 4, C\) and distances_16 of \(1, 4, 4 \* K\)",
        ),
        (
            {**distances(), "scores_16": np.zeros((4, 2), np.float32)},
            {"layout": "distances", "strides": [8, 16]},
            "expected one C for all strides",
        ),
        (distances(), {"layout": "distances"}, r"scores_32 of \(1, 1, C\)"),
    ],
)
def test_what_is_no_detection_is_refused(
    row: dict[str, Any], boxes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        found(row, boxes=boxes)


@pytest.mark.parametrize(
    ("table", "boxes", "message"),
    [
        (
            one_hot(),
            {},
            r"\(1, 3, 7\) for an image, expected \(1, 3, 6\) for 2 labels from class 0",
        ),
        (
            one_hot().T,
            {"transposed": True},
            r"\(1, 7, 3\) for an image, expected \(1, 6, 3\) for 2",
        ),
        (one_hot(), {"background_last": True}, ""),
    ],
)
def test_labels_must_be_as_many_as_classes(
    table: np.ndarray, boxes: dict[str, Any], message: str
) -> None:
    def look() -> dict[str, Any]:
        return found({"0": table}, boxes={"layout": "box_classes", **boxes}, labels=("cat", "dog"))

    if message:
        with pytest.raises(ModelError, match=message):
            look()
    else:
        assert look()["detection_class_names"] == ["dog", "cat"]


def test_softmax_of_single_scores_is_refused() -> None:
    with pytest.raises(ModelError, match=r"of which softmax can make nothing; set output\.activ"):
        found(separate(), output={"activation": "softmax"})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["scores", "boxes"])
def test_what_is_no_number_fails_the_row(name: str, bad: float) -> None:
    row = {**separate(), name: separate()[name].copy()}
    row[name][1] = bad

    with pytest.raises(ModelError, match=r"^the model returned NaN or infinity for this image$"):
        found(row)


def test_a_box_that_does_not_count_may_be_anything() -> None:
    row = {**separate(), "boxes": BOXES.copy()}
    row["boxes"][1] = np.nan

    assert found(row, boxes={"score_threshold": 0.3})["detection_scores"] == [0.9, 0.5]


def test_another_number_of_classes_later_fails_the_row() -> None:
    head = head_of("detector", output={"boxes": {"layout": "box_classes"}})
    head.check([{"0": one_hot()}])

    with pytest.raises(ModelError, match="returned 2 classes, at first it was 3"):
        head.results([{"0": one_hot()[:, :6]}], [(9, 9)])
