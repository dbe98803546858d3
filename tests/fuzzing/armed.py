"""A stage that dies between two steps of the ring, or between two lines of Python."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Final

from forked import die_before_line

import evmp
from evmp.stage import Stage
from fuzzing.scenario import Scenario

SOURCES: Final = (str(Path(evmp.__file__).parent),)


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
            die_before_line(_by_chance(chance, self._scenario.lines), SOURCES)
        if self._n_lines is not None:
            die_before_line(iter(range(self._n_lines)), SOURCES)
        self._stage.open()

    def run(self) -> None:
        """Run the stage."""
        self._stage.run()


def _by_chance(chance: random.Random, reciprocal: int) -> Iterator[None]:
    while chance.random() * reciprocal >= 1.0:
        yield
