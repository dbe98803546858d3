"""One class an image: `{"class": 3, "class_name": "coho4", "class_probs": {"coho1": 4e-10, ...}}`.

`class` counts from 0, as the model does. `class_probs` holds all classes in the model's order, or
the `top_k` best, the best first; of two equally probable classes the lower number comes first.
Probabilities are computed in float64 and given as float32, in the shortest form that reads back as
the same float32. NaN and infinity are no prediction: they fail the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import orjson

from evmp.errors import ModelError

if TYPE_CHECKING:
    from evmp.model import Outputs
    from evmp.model.package import ModelPackage

Scores: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"


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
        try:
            scores = scores_of(outputs[0])
        except ModelError as error:
            raise ModelError(f"{self._package.weights}: {error}") from None
        n_labels, offset = len(self._package.labels), self._package.output.label_offset
        if n_labels and n_labels + offset != len(scores):
            raise ModelError(
                f"{self._package.weights}: the model returned (1, {len(scores)}) for an image, "
                f"expected (1, {n_labels + offset}) for {n_labels} labels from class {offset} on"
                f"; {_remedy(len(scores) - n_labels)}"
            )
        self._names = [orjson.dumps(name) for name in self._package.class_names(len(scores))]
        self._keys = [b",%b:" % name for name in self._names]

    def results(self, outputs: Outputs, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self._result(scores_of(row)) for row in outputs]

    def _result(self, scores: Scores) -> bytes:
        if len(scores) != len(self._names):
            raise ModelError(
                f"the model returned {len(scores)} classes, at first it was {len(self._names)}"
            )
        probabilities = activate(scores, self._package.output.activation)
        best = int(probabilities.argmax())
        keys = self._keys
        if self._top_k:
            order = np.argsort(-probabilities, kind="stable")[: self._top_k]
            keys, probabilities = [keys[index] for index in order], probabilities[order]
        probs = write_object(keys, probabilities)
        return b'{"class":%d,"class_name":%b,"class_probs":%b}' % (best, self._names[best], probs)


def scores_of(outputs: dict[str, np.ndarray[Any, Any]]) -> Scores:
    """Return the (C,) scores that the model gave for an image.

    Raises:
        ModelError: it gave anything else.
    """
    shapes = ", ".join(f"{name}: {array.shape}" for name, array in outputs.items())
    if len(outputs) != 1:
        raise ModelError(
            f"the model returned {len(outputs)} outputs for an image ({shapes}), expected one, "
            "the score of each class"
        )
    (scores,) = outputs.values()
    # A network that is convolutions to its end gives (C, 1, 1).
    if scores.size == 0 or scores.size != max(scores.shape, default=0):
        raise ModelError(
            f"the model returned {(1, *scores.shape)} for an image, expected (1, classes)"
        )
    return scores.reshape(-1)


def activate(scores: Scores, activation: str) -> Scores:
    """Turn scores into probabilities.

    Args:
        scores: (C,) of any number type.
        activation: `softmax`, `sigmoid`, or `none` where they are probabilities already.

    Returns: (C,) float32.

    Raises:
        ModelError: NaN or infinity comes out.
    """
    values = scores.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        if activation == "softmax":
            values = np.exp(values - values.max())
            values /= values.sum()
        elif activation == "sigmoid":
            values = 1 / (1 + np.exp(-values))
        probabilities = values.astype(np.float32)
    if not np.isfinite(probabilities).all():
        raise ModelError("the model returned NaN or infinity for this image")
    return probabilities


def write_object(keys: Sequence[bytes], numbers: Scores) -> bytes:
    """Write a JSON object; for 1,000 classes that takes 55 us, to build and dump a dict 92.

    Args:
        keys: each a JSON string with a comma before and a colon after it.
        numbers: (N,) float32, finite, C-contiguous.
    """
    pieces = [b""] * (2 * len(keys))
    pieces[::2] = keys
    pieces[1::2] = orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")
    return b"{%b}" % b"".join(pieces)[1:]


def _remedy(label_offset: int) -> str:
    """Say what would make the labels fit."""
    if label_offset in (0, 1):
        return f"set output.label_offset: {label_offset}, or correct output.labels"
    return "correct output.labels"
