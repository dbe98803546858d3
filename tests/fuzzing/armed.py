"""A stage that dies between two steps of the ring, or between two lines of Python."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from types import FrameType
from typing import Any, Final, cast

import evmp
from evmp.stage import Stage
from fuzzing.scenario import Scenario

SOURCES: Final = str(Path(evmp.__file__).parent)


class Armed:
    """A stage that may die at any step or line.

    Args:
        stage: the production one.
        scenario: what to die of.
        n_lines: after how many lines to die; None dies only by chance, if at all.
    """

    def __init__(self, stage: Stage, scenario: Scenario, n_lines: int | None) -> None:
        self._stage, self._scenario, self._n_lines = stage, scenario, n_lines

    def open(self) -> None:
        """Arm, and open the stage."""
        chance = random.Random(f"{self._scenario.seed} {os.getpid()}")
        if self._scenario.steps:
            set_fault = resolve_name("evmp.ring._native.set_fault")
            set_fault(self._scenario.steps, chance.getrandbits(62))
        if self._scenario.lines:
            _die_at_end_of(_by_chance(chance, self._scenario.lines))
        if self._n_lines is not None:
            _die_at_end_of(iter(range(self._n_lines)))
        self._stage.open()

    def run(self) -> None:
        """Run the stage."""
        self._stage.run()


def _by_chance(chance: random.Random, reciprocal: int) -> Iterator[None]:
    while chance.random() * reciprocal >= 1.0:
        yield


def _die_at_end_of(lines: Iterator[object]) -> None:
    """Die before a line of evmp for which `lines` has no item left."""
    end = object()

    def on_line(frame: FrameType, event: str, argument: object) -> object:
        if event == "line" and next(lines, end) is end:
            os.kill(os.getpid(), signal.SIGKILL)
        return on_line

    def on_call(frame: FrameType, event: str, argument: object) -> object:
        return on_line if frame.f_code.co_filename.startswith(SOURCES) else None

    sys.settrace(cast(Any, on_call))
