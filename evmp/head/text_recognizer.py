"""What one line of text says.

    {"sequence_predict_ids": [12, 5, ...], "sequence_predict_text": "...",
     "sequence_probability": 0.98}

The ids are the model's own classes, those of the characters alone. The probability is the mean of
theirs, 0 where nothing was read. The model gives (N, T, C) scores, for each step one a class; or,
as one that chooses by itself, (N, T) class numbers, called `texts`, and their probabilities, called
`scores`, of each step or of each line. NaN and infinity fail the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evmp.errors import ModelError
from evmp.head.array import Array, Row, dump, pick, shapes_of
from evmp.head.reading import Reading, TextDecoder, is_numbers

if TYPE_CHECKING:
    from evmp.model import Outputs
    from evmp.model.package import ModelPackage


class TextRecognizer:
    """The head of `model_type: text_recognizer`."""

    def __init__(self, package: ModelPackage) -> None:
        self._decoder = TextDecoder(package)

    def check(self, outputs: Outputs) -> None:
        steps, _ = _steps_of(outputs[0])
        self._decoder.check(steps)

    def results(self, outputs: Outputs, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self._result(self.read(row)) for row in outputs]

    def read(self, row: Row) -> Reading:
        """Return what an image's outputs say.

        Raises:
            ModelError: as `results`.
        """
        return self._decoder.read(*_steps_of(row))

    def _result(self, reading: Reading) -> bytes:
        return dump(
            {
                "sequence_predict_ids": reading.ids,
                "sequence_predict_text": reading.text,
                "sequence_probability": reading.probability,
            }
        )


def _steps_of(row: Row) -> tuple[Array, Array | None]:
    """Return (T, C) scores, or (T,) class numbers with their probabilities.

    Raises:
        ModelError: the model gave anything else.
    """
    if "scores" in row and "texts" in row and is_numbers(row["texts"]):
        steps, scores = row["texts"], row["scores"].reshape(-1)
        if steps.ndim == 1 and len(scores) in (1, len(steps)):
            return steps, scores
    else:
        steps = pick(row, "texts", "the score of each class at each step")
        if steps.ndim == 2 and not is_numbers(steps):
            return steps, None
    raise ModelError(
        f"the model returned {shapes_of(row)} for an image, expected (1, steps, classes) scores, "
        "or texts of (1, steps) integers and scores of (1, steps) or (1,)"
    )
