"""Lines that one model finds and another reads, put together."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from modelfolder import package_of
from test_head_quad import waves
from test_head_text_detector import map_of
from test_head_text_recognizer import LABELS, steps

from evmp.errors import ModelError
from evmp.head import open_head, open_text_reader
from evmp.head.text_reader import TextReader

SPACE = {"height": 64, "width": 96}
NOTHING = {
    "detection_boxes": [],
    "detection_scores": [],
    "detection_classes": [],
    "detection_class_names": [],
    "detection_keypoints": [],
    "detection_texts_ids": [],
    "detection_texts": [],
    "detection_texts_scores": [],
}


def reader_of(
    find_names: tuple[str, ...] = (), read_names: tuple[str, ...] = (), **text: Any
) -> TextReader:
    find = {"names": find_names, "text": {"unclip_ratio": 0}}
    read = {"names": read_names, "activation": "none"}
    parts = (
        package_of("text_detector", input=SPACE, output=find),
        package_of("text_recognizer", output=read, labels=LABELS),
    )
    return open_text_reader(
        replace(package_of("text_detection_recognition", output={"text": text}), parts=parts)
    )


def test_every_number_of_a_result() -> None:
    images = [waves(64, 96), waves(128, 96), waves(64, 192)]
    maps = [
        map_of((10, 30, 50, 40, 0.9), (12, 5, 40, 15, 0.75)),
        map_of(),
        map_of((20, 8, 29, 58, 1)),
    ]
    reader = reader_of()

    lines = reader.lines([{"0": it} for it in maps], images)
    read = [{"0": steps(1, 2)}, {"0": steps(3, sure=0.8)}, {"0": steps(2, 2)}]
    first, second, third = map(json.loads, reader.results(lines, read, 3))

    assert [line.image for line in lines] == [0, 0, 2]
    assert np.array_equal(lines[0].crop, images[0][5:15, 12:40])
    assert np.array_equal(lines[1].crop, images[0][30:40, 10:50])
    assert np.array_equal(lines[2].crop, np.rot90(images[2][8:58, 40:58]))  # it runs down
    assert first == {
        "detection_boxes": [[5, 12, 15, 40], [30, 10, 40, 50]],
        "detection_scores": [0.75, np.float32(0.9)],
        "detection_classes": [0, 0],
        "detection_class_names": ["text", "text"],
        "detection_keypoints": [
            [[5, 12], [5, 40], [15, 40], [15, 12]],
            [[30, 10], [30, 50], [40, 50], [40, 10]],
        ],
        "detection_texts_ids": [[1, 2], [3]],
        "detection_texts": ["ab", "c"],
        "detection_texts_scores": [np.float32(0.9), np.float32(0.8)],
    }
    assert list(first) == list(NOTHING)
    assert second == NOTHING
    assert third["detection_boxes"] == [[8, 40, 58, 58]] and third["detection_texts"] == ["b"]


def test_lines_that_are_read_with_a_low_score_are_dropped() -> None:
    images = [waves(64, 96)]
    reader = reader_of(text_threshold=0.85)

    lines = reader.lines([{"0": map_of((10, 5, 50, 15, 0.9), (10, 30, 50, 40, 0.9))}], images)
    (result,) = reader.results(lines, [{"0": steps(1, sure=0.8)}, {"0": steps(2)}], 1)

    assert json.loads(result)["detection_texts"] == ["b"]
    assert json.loads(result)["detection_boxes"] == [[30, 10, 40, 50]]


def test_nothing_found_is_empty_lists() -> None:
    reader = reader_of()

    assert reader.lines([{"0": map_of()}], [waves(64, 96)]) == []
    assert [json.loads(it) for it in reader.results([], [], 2)] == [NOTHING] * 2


def test_each_model_has_names_of_its_own_for_its_outputs() -> None:
    reader = reader_of(find_names=("other", "map"), read_names=("texts", "other"))
    map_ = map_of((10, 5, 50, 15, 0.9))

    lines = reader.lines([{"0": map_of(), "1": map_}], [waves(64, 96)])
    (result,) = reader.results(lines, [{"0": steps(1), "1": steps(2)}], 1)

    assert json.loads(result)["detection_texts"] == ["a"]
    with pytest.raises(ModelError, match=r"which output\.names does not fit"):
        reader.lines([{"0": map_}], [waves(64, 96)])


@pytest.mark.parametrize("model_type", ["text_detector", "text_spotter"])
@pytest.mark.parametrize("module", ["cv2", "pyclipper"])
def test_what_is_not_installed_is_said(
    monkeypatch: pytest.MonkeyPatch, model_type: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("quad", "text_detector", "text_spotter"):
        monkeypatch.delitem(sys.modules, f"evmp.head.{name}")

    with pytest.raises(ModelError, match=rf"needs opencv.* \(.*{module}.*\); install evmp\[text\]"):
        open_head(package_of(model_type, labels=LABELS), None)
