"""Any number of labels an image, each with a probability of its own.

    {"class_probs": {"day": 0.2, "night": 0.9}, "classes": [1], "class_names": ["night"],
     "predictions": [false, true], "probs": [0.2, 0.9]}

`classes` holds the numbers of the labels whose probability, as the result shows it, is at least
`multilabel_threshold`, in the model's order. NaN and infinity fail the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from evmp.head.array import (
    Scores,
    activate,
    check_number,
    class_names,
    dump,
    key_of,
    scores_of,
    write_object,
)

if TYPE_CHECKING:
    from evmp.model import Outputs
    from evmp.model.package import ModelPackage


class MultilabelClassifier:
    """The head of `model_type: multilabel_classifier`."""

    def __init__(self, package: ModelPackage, *, threshold: float) -> None:
        """Make the head of a package.

        Args:
            threshold: the probability from which on a label counts as present.
        """
        self._package = package
        # As float32, so that a probability shown as 0.7 is not below a threshold of 0.7.
        self._threshold = np.float32(threshold)
        self._names: tuple[str, ...] = ()
        self._keys: list[bytes] = []

    def check(self, outputs: Outputs) -> None:
        self._names = class_names(self._package, scores_of(outputs[0]).shape)
        self._keys = [key_of(name) for name in self._names]

    def results(self, outputs: Outputs, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self._result(activate(scores_of(row), self._package.activation)) for row in outputs]

    def _result(self, probabilities: Scores) -> bytes:
        check_number(len(probabilities), len(self._names))
        predictions = probabilities >= self._threshold
        classes = np.flatnonzero(predictions)
        rest = {
            "classes": classes,
            "class_names": [self._names[number] for number in classes],
            "predictions": predictions,
            "probs": probabilities,
        }
        probs = write_object(self._keys, probabilities)
        return b'{"class_probs":%b,%b' % (probs, dump(rest)[1:])
