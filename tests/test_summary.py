"""What is said of all frames of a video together, by the type of the model."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from evmp.job import Job
from evmp.video.summary import summary_of


def summary(model_type: str, *results: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """Return what is said of frames that are a second apart."""
    job = Job(
        model_path="m",
        model_type=model_type,
        input_oss_file="list.txt",
        output_oss_file="out.jsonl",
        is_input_video=True,
        **keys,
    )
    found = summary_of(job)
    for second, result in enumerate(results):
        found.add({"frame_id": second, "pts_seconds": float(second)}, result)
    said: dict[str, Any] = orjson.loads(found.result())
    assert said.pop("n_frames") == len(results)
    return said


def test_classifier_has_the_mean_and_its_best_class() -> None:
    frames = [{"class_probs": {"a": p, "b": 1 - p}} for p in (0.9, 0.4, 0.1)]

    said = summary("classifier", *frames)

    assert said["class_probs"] == pytest.approx({"a": 1.4 / 3, "b": 1.6 / 3})
    assert said["class_name"] == "b"


def test_label_that_every_frame_has_the_video_has() -> None:
    for threshold in (0.1, 0.3, 0.6, 0.7):
        for n_frames in (3, 7, 10):
            frames = [{"class_probs": {"a": threshold, "b": threshold / 2}}] * n_frames
            said = summary("multilabel_classifier", *frames, multilabel_threshold=threshold)
            assert said["class_names"] == ["a"]
            assert said["class_probs"] == pytest.approx({"a": threshold, "b": threshold / 2})


def test_feature_extractor_has_the_mean_vector() -> None:
    frames = [{"feature": [1.0, 2.0]}, {"feature": [3.0, -2.0]}]

    said = summary("feature_extractor", *frames, feature_name="pooled")

    assert said == {"feature": [2.0, 0.0]}


def test_detector_has_the_best_of_each_class_and_in_how_many_frames_it_is() -> None:
    said = summary(
        "detector",
        {"detection_scores": [0.5, 0.9, 0.7], "detection_class_names": ["cat", "cat", "dog"]},
        {"detection_scores": [], "detection_class_names": []},
        {"detection_scores": [0.6], "detection_class_names": ["cat"]},
    )

    assert said["classes"] == {
        "cat": {"n_frames": 2, "best_score": 0.9},
        "dog": {"n_frames": 1, "best_score": 0.7},
    }
    found = summary("text_detector", {"detection_scores": [0.5, 0.8]})
    assert found["classes"] == {"text": {"n_frames": 1, "best_score": 0.8}}


def test_text_has_each_distinct_one_and_when_it_is_seen() -> None:
    expected = [
        {"text": "stop", "first_seconds": 0.0, "last_seconds": 2.0},
        {"text": "go", "first_seconds": 1.0, "last_seconds": 1.0},
    ]
    lists = [["stop"], ["go", "", "go"], ["stop"]]
    for model_type in ("text_detection_recognition", "text_spotter"):
        said = summary(model_type, *({"detection_texts": texts} for texts in lists))
        assert said["texts"] == expected
    texts = ["stop", "go", "stop", ""]
    said = summary("text_recognizer", *({"sequence_predict_text": text} for text in texts))
    assert said["texts"] == expected


def test_segmentor_has_the_mean_share_of_each_class() -> None:
    preds = [{"preds": [[0, 1], [2, 2]]}, {"preds": [[2, 2], [2, 2]]}]
    expected = {"0": 0.125, "1": 0.125, "2": 0.75}
    assert summary("segmentor", *preds)["areas"] == expected

    probs = [{"probs": [[[0.1, 0.2, 0.7] if it == 2 else [it == 0, it == 1, 0] for it in row]
                        for row in frame["preds"]]} for frame in preds]  # fmt: skip
    assert summary("segmentor", *probs, segmentation_output="probs")["areas"] == expected

    single = {"probs": [[[0.2], [0.5], [0.9], [0.4]]]}
    said = summary("segmentor", single, segmentation_output="probs")
    assert said["areas"] == {"0": 0.5, "1": 0.5}


def test_areas_of_pictures_are_not_known() -> None:
    keys = {"segmentation_output": "png", "output_dir": "out"}
    assert summary("segmentor", {"preds": "a.png"}, **keys)["areas"] == {}
