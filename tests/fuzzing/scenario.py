"""What the crash fuzz is asked, and what it answers."""

from __future__ import annotations

import signal
from collections import Counter as Tally
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzzing.world import World


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is run, and how it is disturbed.

    Attributes:
        kill_seconds: mean time between two signals from outside; 0 is never.
        signal: SIGKILL, or SIGSTOP, which nobody follows with a SIGCONT.
        max_kills: how many of those there are at most.
        worker_share: of those, the part that hits the worker with all its stages.
        steps: chance of 1 in this to die at each step of the ring's protocol; 0 never dies.
        lines: the same for each line of Python.
        sweep: the role whose n-th process dies at its line first_line + n * stride.
        stop_rows: after each so many rows the job stops, by turns drained and at once, and a new
            run goes on; 0 never stops.
        max_attempts: in the place of evmp.ring.MAX_ATTEMPTS.
        patience_seconds: without a row for so long, rows are lost.
        n_payloads: rows in the first ring.
        n_batches: batches in the second, and two more in the third.
        is_custom: whether rows are samples, which pass through a process and a predictor of the
            user's.
        patches: what replaces what, by the full name of the latter.
        native: a file to load as evmp._native for the rings.
    """

    n_rows: int
    seed: int = 1
    kill_seconds: float = 0.0
    max_kills: int = 1 << 60
    signal: int = signal.SIGKILL
    worker_share: float = 0.0
    steps: int = 0
    lines: int = 0
    sweep: str = ""
    first_line: int = 0
    stride: int = 1
    stop_rows: int = 0
    max_attempts: int = 100
    stall_seconds: float = 60.0
    patience_seconds: float = 6.0
    n_decoders: int = 3
    n_predictors: int = 2
    n_payloads: int = 8
    n_batches: int = 4
    batch_rows: int = 4
    block_rows: int = 256
    world: World = field(default_factory=World)
    is_custom: bool = False
    patches: Mapping[str, Any] = field(default_factory=dict)
    native: Path | None = None


@dataclass(slots=True)
class Verdict:
    """What came out of a scenario.

    Attributes:
        rows: how many different rows came out.
        seconds: how long it took.
        deaths: by role.
        crashes: deaths that nobody had caused: a stage failed by itself.
        requeued: batches that were given to another process after a death.
        stops: how often the job was stopped and went on.
        given_up: rows that ended as the error row of a row that kills, with their messages.
        lost, doubled, wrong, moved: rows that are missing, there more than once, of other bytes
            than expected, or not behind their predecessor.
        error: why the run did not end, or how the ledger does not add up.
        log: the last lines that the processes printed.
    """

    rows: int = 0
    seconds: float = 0.0
    deaths: Tally[str] = field(default_factory=Tally)
    crashes: int = 0
    requeued: int = 0
    stops: int = 0
    given_up: dict[int, str] = field(default_factory=dict)
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    moved: int = 0
    error: str = ""
    log: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether every row came out once, bit by bit, in its place, and nobody failed."""
        bad = self.lost or self.doubled or self.wrong or self.moved
        return not (self.error or self.crashes or bad)

    def __str__(self) -> str:
        deaths = ", ".join(f"{n} {role}" for role, n in sorted(self.deaths.items()) if n)
        text = (
            f"{self.rows} rows, {self.deaths.total()} deaths ({deaths}), {self.requeued} requeued, "
            f"{len(self.given_up)} given up, {self.stops} stops; {self.lost} lost, "
            f"{self.doubled} doubled, {self.wrong} wrong, {self.moved} moved, "
            f"{self.crashes} crashes; {self.seconds:.1f} s"
        )
        return text if self.is_clean else "\n".join([text, self.error, *self.log])
