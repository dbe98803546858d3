"""What the heads share: to pick a model's outputs, to make probabilities of them, to write them.

Probabilities are computed in float64 and given as float32, in the shortest form that reads back as
the same float32. Messages show the shape of one output with the batch's axis, those of several
without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import orjson

from evmp.errors import ModelError

if TYPE_CHECKING:
    from evmp.model.package import ModelPackage

Array: TypeAlias = "np.ndarray[Any, Any]"
Row: TypeAlias = "dict[str, Array]"
Scores: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"

TOLERANCE: Final = 0.01  # of a probability that a model calculates, in half precision say


def pick(row: Row, name: str, meaning: str) -> Array:
    """Return the output called `name`, or the only one, whatever it is called.

    Args:
        meaning: what it is, for the message.

    Raises:
        ModelError: there are several outputs, and none of that name.
    """
    if name in row:
        return row[name]
    if len(row) != 1:
        raise ModelError(
            f"the model returned {len(row)} outputs for an image ({shapes_of(row)}), expected one, "
            f"{meaning}, or one of them called {name}; output.names can name it"
        )
    (array,) = row.values()
    return array


def renamed(row: Row, names: tuple[str, ...] | dict[str, str]) -> Row:
    """Return an image's outputs under the names that `output.names` gives them.

    Raises:
        ModelError: it does not fit them.
    """
    if not names:
        return row
    if isinstance(names, dict):
        is_fit = names.keys() <= row.keys()
        fresh = [names.get(name, name) for name in row]
    else:
        is_fit = len(names) == len(row) and all(name.isdecimal() for name in row)
        fresh = list(names)
    if not is_fit or len(set(fresh)) < len(fresh):
        raise ModelError(
            f"the model returned {shapes_of(row)} for an image, which output.names does not "
            "fit; expected a list of as many names, where the outputs are numbered, or a "
            "mapping of names that are there to new ones"
        )
    return dict(zip(fresh, row.values(), strict=True))


def shapes_of(row: Row) -> str:
    """Write the names and shapes of an image's outputs: `boxes: (9, 4), labels: (9,)`."""
    return ", ".join(f"{name}: {array.shape}" for name, array in row.items())


def scores_of(row: Row) -> Array:
    """Return the (C,) scores that the model gave for an image, one a class.

    Raises:
        ModelError: it gave anything else.
    """
    scores = pick(row, "scores", "the score of each class")
    # A network that is convolutions to its end gives (C, 1, 1).
    if scores.size == 0 or scores.size != max(scores.shape, default=0):
        raise ModelError(
            f"the model returned {(1, *scores.shape)} for an image, expected (1, classes)"
        )
    return scores.reshape(-1)


def class_names(
    package: ModelPackage, shape: tuple[int, ...], axis: int = 0, others: int = 0
) -> tuple[str, ...]:
    """Name the classes of an output.

    Args:
        shape: of the output for one image.
        axis: the axis of `shape` along which the classes are.
        others: how much longer that axis is than there are classes.

    Raises:
        ModelError: there are labels, and not as many as classes.
    """
    n_classes, offset = shape[axis] - others, package.output.label_offset
    wanted = len(package.labels) + offset
    if package.labels and wanted != n_classes:
        expected = (1, *shape[:axis], wanted + others, *shape[axis + 1 :])
        raise ModelError(
            f"the model returned {(1, *shape)} for an image, expected {expected} for "
            f"{len(package.labels)} labels from class {offset} on; "
            f"{_remedy(n_classes - len(package.labels))}"
        )
    return package.class_names(n_classes)


def check_labelled(package: ModelPackage, number: int) -> None:
    """Fail a row with a class behind those that have labels, if there are any.

    Raises:
        ModelError: it is one.
    """
    n_labels = len(package.labels)
    end = package.output.label_offset + n_labels
    if n_labels and number >= end:
        raise ModelError(
            f"the model found class {number}, but the labels end at class {end - 1}; "
            f"{_remedy(number + 1 - n_labels)}"
        )


def check_number(n_classes: int, at_first: int) -> None:
    """Fail a row for which the model returned another number of classes than at the check.

    Raises:
        ModelError: it did.
    """
    if n_classes != at_first:
        raise ModelError(f"the model returned {n_classes} classes, at first it was {at_first}")


def activate(scores: Array, activation: str, axis: int = -1) -> Scores:
    """Turn scores into probabilities.

    Args:
        scores: of any shape and number type.
        activation: `softmax`, `sigmoid`, or `none` where they are probabilities already.
        axis: that of the classes, of which softmax makes 1 in all.

    Returns: float32, of the same shape.

    Raises:
        ModelError: NaN or infinity comes out, or what should be a probability is above 1.
    """
    values: Array = scores.astype(np.float32 if activation == "none" else np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        if activation == "softmax":
            values = np.exp(values - values.max(axis=axis, keepdims=True))
            values /= values.sum(axis=axis, keepdims=True)
        elif activation == "sigmoid":
            values = 1 / (1 + np.exp(-values))
        probabilities = values.astype(np.float32)
    check_finite(probabilities)
    # Nothing is said of what is below 0: detectors mark padding so.
    highest = probabilities.max(initial=0)
    if highest > 1 + TOLERANCE:
        raise ModelError(
            f"the model returned a score of {highest} for this image, expected probabilities; set "
            "output.activation: sigmoid, or softmax"
        )
    return probabilities


def check_finite(array: Array) -> None:
    """Fail a row whose numbers are no prediction.

    Raises:
        ModelError: NaN or infinity is among them.
    """
    if not np.isfinite(array).all():
        raise ModelError("the model returned NaN or infinity for this image")


def dump(value: object) -> bytes:
    """Write JSON; arrays within are written as lists, NaN and infinity as null.

    Args:
        value: what orjson takes; arrays must be C-contiguous.
    """
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def write_object(keys: Sequence[bytes], numbers: Scores) -> bytes:
    """Write a JSON object; for 1,000 classes that takes 55 us, to build and dump a dict 92.

    Args:
        keys: each from `key_of`.
        numbers: (N,) float32, finite, C-contiguous.
    """
    pieces = [b""] * (2 * len(keys))
    pieces[::2] = keys
    pieces[1::2] = dump(numbers)[1:-1].split(b",")
    return b"{%b}" % b"".join(pieces)[1:]


def key_of(name: str) -> bytes:
    """Write a name as `write_object` wants it: `,"coho1":`."""
    return b",%b:" % orjson.dumps(name)


def _remedy(label_offset: int) -> str:
    """Say what would make the labels fit."""
    if label_offset in (0, 1):
        return f"set output.label_offset: {label_offset}, or correct output.labels"
    return "correct output.labels"
