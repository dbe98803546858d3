"""What is said of all frames of a video together, kept up as their results come.

classifier, multilabel       mean probabilities, and what they make of the video
feature                      the mean vector
detectors                    per class in how many frames it is, and its best score
text                         the distinct texts, when each is first and last seen
segmentor                    per class its mean share of the area
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from evmp.head.segmentor import FOREGROUND
from evmp.result import to_json

if TYPE_CHECKING:
    from evmp.job import Job

MAX_TEXTS = 10_000


class Summary(Protocol):
    """Sums results up, in memory that does not grow with their number."""

    def add(self, members: dict[str, Any], result: Any) -> None:
        """Take the result of a frame, and what stands beside it."""

    def result(self) -> bytes:
        """Return what is to be said, as JSON."""


def summary_of(job: Job) -> Summary:
    """Return what sums up the results of a job."""
    if job.user_process_config:
        return Nothing()  # a frame may have become none, or several
    match job.model_type:
        case "classifier":
            return MeanProbabilities()
        case "multilabel_classifier":
            return MeanProbabilities(job.multilabel_threshold)
        case "feature_extractor":
            return MeanFeature()
        case "detector":
            return BestScores()
        case "text_recognizer":
            return Texts("sequence_predict_text")
        case "text_detection_recognition" | "text_spotter":
            return Texts("detection_texts")
        case "text_detector":
            return BestScores()
        case "segmentor":
            return MeanAreas()
        case _:
            return Nothing()


class Nothing:
    """Of results whose meaning is not known."""

    def __init__(self) -> None:
        self._n = 0

    def add(self, members: dict[str, Any], result: Any) -> None:
        self._n += 1

    def result(self) -> bytes:
        return to_json({"n_frames": self._n})


class MeanProbabilities:
    """Of classifiers.

    Args:
        threshold: from which on a label counts as present; None takes the best class.
    """

    def __init__(self, threshold: float | None = None) -> None:
        self._threshold = threshold
        self._n = 0
        self._sums: dict[str, float] = {}

    def add(self, members: dict[str, Any], result: Any) -> None:
        self._n += 1
        for name, probability in result["class_probs"].items():
            self._sums[name] = self._sums.get(name, 0.0) + (probability or 0.0)

    def result(self) -> bytes:
        means = {name: it / max(1, self._n) for name, it in self._sums.items()}
        said: dict[str, Any] = {"n_frames": self._n, "class_probs": means}
        if self._threshold is not None:
            limit = np.float32(self._threshold)  # as of a frame
            said["class_names"] = [name for name, it in means.items() if np.float32(it) >= limit]
        elif means:
            said["class_name"] = max(means, key=means.__getitem__)
        return to_json(said)


class MeanFeature:
    """Of feature extractors."""

    def __init__(self) -> None:
        self._n = 0
        self._sum: Any = 0.0

    def add(self, members: dict[str, Any], result: Any) -> None:
        self._n += 1
        self._sum = self._sum + np.array(result["feature"], np.float64)

    def result(self) -> bytes:
        mean = np.asarray(self._sum / max(1, self._n), np.float32)
        return to_json({"n_frames": self._n, "feature": mean})


class BestScores:
    """Of detectors."""

    def __init__(self) -> None:
        self._n = 0
        self._found: dict[str, list[float]] = {}

    def add(self, members: dict[str, Any], result: Any) -> None:
        self._n += 1
        scores = result["detection_scores"]
        names = result.get("detection_class_names") or ["text"] * len(scores)  # of text_detector
        best: dict[str, float] = {}
        for name, score in zip(names, scores, strict=False):
            best[name] = max(score or 0.0, best.get(name, 0.0))
        for name, score in best.items():
            found = self._found.setdefault(name, [0, 0.0])
            found[0] += 1
            found[1] = max(found[1], score)

    def result(self) -> bytes:
        classes = {name: {"n_frames": n, "best_score": it} for name, (n, it) in self._found.items()}
        return to_json({"n_frames": self._n, "classes": classes})


class Texts:
    """Of what reads.

    Args:
        key: of a result: a text, or a list of them.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._n = 0
        self._seen: dict[str, list[float]] = {}

    def add(self, members: dict[str, Any], result: Any) -> None:
        self._n += 1
        found, now = result[self._key], members["pts_seconds"]
        for text in [found] if isinstance(found, str) else found:
            if text in self._seen:
                self._seen[text][1] = now
            elif text and len(self._seen) < MAX_TEXTS:
                self._seen[text] = [now, now]

    def result(self) -> bytes:
        texts = [
            {"text": text, "first_seconds": first, "last_seconds": last}
            for text, (first, last) in self._seen.items()
        ]
        return to_json({"n_frames": self._n, "texts": texts})


class MeanAreas:
    """Of segmentors, as far as their results say which class a pixel is."""

    def __init__(self) -> None:
        self._n = 0
        self._sums: dict[int, float] = {}

    def add(self, members: dict[str, Any], result: Any) -> None:
        self._n += 1
        classes = result.get("preds")
        if classes is None:
            probs = np.array(result["probs"])
            is_single = probs.shape[-1] == 1
            classes = probs[..., 0] >= FOREGROUND if is_single else np.argmax(probs, axis=-1)
        if isinstance(classes, str):
            return  # the path of a picture
        values, counts = np.unique(np.array(classes, np.int64), return_counts=True)
        for value, count in zip(values.tolist(), (counts / counts.sum()).tolist(), strict=True):
            self._sums[value] = self._sums.get(value, 0.0) + count

    def result(self) -> bytes:
        areas = {str(it): self._sums[it] / max(1, self._n) for it in sorted(self._sums)}
        return to_json({"n_frames": self._n, "areas": areas})
