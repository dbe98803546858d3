"""A process and a predictor of the user's, for a worker whose rows are samples."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from evmp import PredictorInterfaceV2, Process
from evmp.stage import error_result
from fuzzing import world

LINKS: Final = ({"user_process_cls": "fuzzing.custom.Step", "num_threads": 2, "batch_size": 2},)
PREDICTOR: Final = "fuzzing.custom.Answer"


class Step(Process):
    """Hands each sample on with ballast; one row in some is dropped, one fails."""

    def process(self, input_data: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
        return [self._step(*sample["image"]) for sample in input_data]

    def _step(self, frame: bytes, size: tuple[int, int]) -> dict[str, Any] | None:
        row = world.row_of(size)
        if row % 47 == 7:
            fail(row)
        return None if row % 37 == 9 else {"frame": frame, "size": size, "ballast": ballast(row)}


class Answer(PredictorInterfaceV2):
    """Answers like the model and the head of `world`."""

    def __init__(self, model_path: str, model_config: str | None = None) -> None:
        """Load nothing."""

    def predict(self, input_data: list[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
        return [self._answer(**sample) for sample in input_data]

    def _answer(self, frame: bytes, size: tuple[int, int], ballast: np.ndarray) -> dict[str, Any]:
        row = world.row_of(size)
        assert (ballast == row % 251).all()
        return world.answer_of(row, frame, size)


def ballast(row: int) -> np.ndarray:
    """Return what makes some samples longer than what a place keeps."""
    return np.full(world.LARGE if row % 29 == 3 else 10, row % 251, np.uint8)


def fail(row: int) -> None:
    """Raise the error of a row."""
    raise ValueError(f"no sample for {row}")


def result(row: int) -> bytes:
    """Return the result of a row."""
    if row % 41 == 3 or row % 43 == 5:
        return world.result(row)
    if row % 47 == 7:
        place = f"custom.py:{fail.__code__.co_firstlineno + 2}"
        return error_result("process", f"ValueError: no sample for {row} ({place})")
    if row % 37 == 9:
        return b"null"
    return world.answer(row, world.pixels(world.raw(row)), world.size(row))
