"""One class an image: `{"class": 3, "class_name": "coho4", "class_probs": {"coho1": 4e-10, ...}}`.

`class` counts from 0, as the model does. `class_probs` holds all classes in the model's order, or
the `top_k` best, the best first; of two equally probable classes the lower number comes first. NaN
and infinity are no prediction: they fail the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import orjson

from evmp.head.array import (
    Scores,
    activate,
    check_number,
    class_names,
    key_of,
    scores_of,
    write_object,
)

if TYPE_CHECKING:
    from evmp.model import Outputs
    from evmp.model.package import ModelPackage


class Classifier:
    """The head of `model_type: classifier`."""

    def __init__(self, package: ModelPackage, *, top_k: int) -> None:
        """Make the head of a package; `check` comes first, then `results`.

        Args:
            top_k: how many classes `class_probs` keeps; 0 keeps all.
        """
        self._package = package
        self._top_k = top_k
        self._names: list[bytes] = []  # "coho1", as JSON
        self._keys: list[bytes] = []  # ,"coho1":

    def check(self, outputs: Outputs) -> None:
        names = class_names(self._package, scores_of(outputs[0]).shape)
        self._names = [orjson.dumps(name) for name in names]
        self._keys = [key_of(name) for name in names]

    def results(self, outputs: Outputs, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self._result(activate(scores_of(row), self._package.activation)) for row in outputs]

    def _result(self, probabilities: Scores) -> bytes:
        check_number(len(probabilities), len(self._names))
        best = int(probabilities.argmax())
        keys = self._keys
        if self._top_k:
            order = np.argsort(-probabilities, kind="stable")[: self._top_k]
            keys, probabilities = [keys[index] for index in order], probabilities[order]
        probs = write_object(keys, probabilities)
        return b'{"class":%d,"class_name":%b,"class_probs":%b}' % (best, self._names[best], probs)
