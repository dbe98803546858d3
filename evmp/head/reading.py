"""Reading: the steps of a model that reads text, as characters.

A step is a class number with a probability. CTC gives many steps a character, and the blank between
those that are alike; a decoder gives one each, up to an end token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evmp.errors import ModelError
from evmp.head.array import Array, activate, check_finite

if TYPE_CHECKING:
    from evmp.model.package import ModelPackage


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model has read in one line."""

    ids: list[int]
    """The classes of the characters, as the model numbers them."""
    text: str
    probability: np.float32
    """The mean of the characters' probabilities; 0 where there is none."""


class TextDecoder:
    """Turns the steps of one model into characters."""

    def __init__(self, package: ModelPackage) -> None:
        self._package, self._spec = package, package.output.text
        self._characters = package.characters
        self._is_character = np.array([it is not None for it in self._characters])
        self._end = self._spec.end % len(self._characters)

    def check(self, steps: Array) -> None:
        """Compare the number of classes with that of the characters.

        Args:
            steps: (..., T, C) scores, or (..., T) integers.

        Raises:
            ModelError: they differ, or these are no steps.
        """
        if is_numbers(steps):
            return
        found, wanted = (steps.shape[-1] if steps.ndim else 0), len(self._characters)
        if found != wanted:
            lacks_space = found == wanted + 1 and not self._spec.space
            raise ModelError(
                f"the model returned {(1, *steps.shape)} for an image, expected "
                f"{(1, *steps.shape[:-1], wanted)} for {wanted} classes: "
                f"{len(self._package.labels)} labels, {'the space, ' * self._spec.space}and what "
                f"is no character; {'set output.text.space: true, or ' * lacks_space}"
                "correct output.labels or output.text"
            )

    def read(self, steps: Array, probabilities: Array | None = None) -> Reading:
        """Decode the steps of one line.

        Args:
            steps: (T, C) scores, to which the package's activation is applied, or (T,) class
                numbers.
            probabilities: those of the numbers, (T,), or one for all.

        Raises:
            ModelError: a number is no class, or a probability is NaN or infinite.
        """
        self.check(steps)
        if probabilities is None:
            scores = activate(steps, self._package.activation)
            numbers = scores.argmax(axis=-1)
            probabilities = scores[np.arange(len(numbers)), numbers]
        else:
            numbers = steps.astype(np.int64)
            probabilities = np.broadcast_to(probabilities, numbers.shape).astype(np.float32)
        return self._decode(numbers, probabilities)

    def _decode(self, numbers: Array, probabilities: Array) -> Reading:
        if self._spec.decoding == "tokens":
            ends = np.flatnonzero((numbers == self._end) | (numbers < 0))  # negative is padding
            n_steps = ends[0] if len(ends) else len(numbers)
            numbers, probabilities = numbers[:n_steps], probabilities[:n_steps]
        n_classes = len(self._characters)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < n_classes:
            raise ModelError(
                f"the model gave classes from {numbers.min()} to {numbers.max()}, expected those "
                f"from 0 to {n_classes - 1}; correct output.labels or output.text"
            )
        kept = self._is_character[numbers]
        if self._spec.decoding == "ctc":
            kept[1:] &= numbers[1:] != numbers[:-1]
        ids: list[int] = numbers[kept].tolist()
        check_finite(probabilities[kept])
        mean = probabilities[kept].mean(dtype=np.float64) if ids else 0
        return Reading(ids, "".join(self._characters[n] or "" for n in ids), np.float32(mean))


def is_numbers(steps: Array) -> bool:
    """Say whether steps are class numbers, and no scores."""
    return bool(np.issubdtype(steps.dtype, np.integer))
