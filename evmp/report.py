"""What a run has done: a table for people, a record for programs.

The record, `<output>.evmp.json`, stands beside the result. Its keys are stable; new ones may come.
"""

from __future__ import annotations

import platform
import re
import time
from collections import Counter as Tally
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

import orjson

from evmp import __version__, machine
from evmp.metrics import SUPERVISORS, Reading

MAX_REASONS: Final = 20  # kept in each block's record
SHOWN_REASONS: Final = 3
_VARIABLE = re.compile(r"'[^']*'|\b(?:0x[0-9a-f]+|\d+)\b")


class Reasons:
    """Why rows failed: each reason with how often, and the row that had it first."""

    def __init__(self) -> None:
        self._found: dict[str, list[Any]] = {}

    def add(self, row: int, result: bytes) -> None:
        """Count a failed row by its result."""
        fields = orjson.loads(result)
        message = str(fields.get("error_msg", ""))
        # Rows that failed alike differ in names and numbers.
        reason = f"{fields.get('error_stage')}: {_VARIABLE.sub('…', message)}"[:160]
        if reason in self._found:
            self._found[reason][0] += 1
        elif len(self._found) < MAX_REASONS:
            self._found[reason] = [1, row, message]

    def add_unknown(self, row: int, count: int) -> None:
        """Count rows that a writer had written before it was killed, from row `row` on."""
        if count:
            self._found["unknown: "] = [count, row, "see the result"]

    def merge(self, others: Iterable[dict[str, list[Any]]]) -> None:
        """Add what blocks have counted."""
        for other in others:
            for reason, (count, row, message) in other.items():
                mine = self._found.setdefault(reason, [0, row, message])
                mine[0] += count

    def as_dict(self) -> dict[str, list[Any]]:
        """Return reason -> [count, first row, its message], the commonest first."""
        return dict(sorted(self._found.items(), key=lambda item: -item[1][0]))

    def in_words(self) -> list[str]:
        """Return the commonest reasons, one a line."""
        return [
            f"{count} x {message} (first in row {row}; {reason.split(':')[0]})"
            for reason, (count, row, message) in list(self.as_dict().items())[:SHOWN_REASONS]
        ]


@dataclass(frozen=True, slots=True)
class Report:
    """One run of a job, at its end.

    Attributes:
        rows, failed: of the whole job, those of earlier runs included.
        kept: rows of the result that a retry of failed rows leaves as they are; not among `rows`.
        new_rows: of this run.
        seconds: from the start to the end of this run.
        reasons: see Reasons.as_dict.
        readings: the counters of every seat, at the end.
        is_published: whether there is a result; where several share the job, the last one makes it.
    """

    rows: int
    failed: int
    new_rows: int
    seconds: float
    reasons: dict[str, list[Any]]
    readings: list[Reading]
    kept: int = 0
    is_published: bool = True

    def stages(self) -> dict[str, dict[str, float]]:
        """Return the counters summed by role."""
        roles: dict[str, dict[str, float]] = {}
        for reading in self.readings:
            if reading.role in SUPERVISORS:
                continue
            stage = roles.setdefault(reading.role, Tally())  # type: ignore[arg-type]
            stage["processes"] += 1
            for name in ("rows", "failed", "bytes", "restarts", "busy", "wait_in", "wait_out"):
                stage[name] += getattr(reading, name)
        return {role: dict(stage) for role, stage in roles.items()}

    def record(self, job: dict[str, Any], fingerprint: dict[str, Any]) -> dict[str, Any]:
        """Return the machine-readable record of the run."""
        return {
            "evmp": __version__,
            "state": "done",
            "started": _clock(time.time() - self.seconds),
            "finished": _clock(time.time()),
            "machine": {
                "host": platform.node(),
                "platform": platform.platform(),
                "cpus": machine.cpu_count(),
                "memory_bytes": machine.memory_bytes(),
                "gpus": len(machine.gpus()),
            },
            "versions": {"python": platform.python_version(), **_versions()},
            "rows": self.rows + self.kept,
            "failed": self.failed,
            "failures": [
                {"reason": reason, "count": count, "first_row": row, "example": message}
                for reason, (count, row, message) in self.reasons.items()
            ],
            "run": {
                "rows": self.new_rows,
                "seconds": round(self.seconds, 3),
                "rows_per_second": round(self.new_rows / max(self.seconds, 1e-9), 3),
                "restarts": sum(reading.restarts for reading in self.readings),
                "stages": self.stages(),
            },
            "job": job,
            "fingerprint": fingerprint,
        }

    def table(self) -> object:
        """Return the summary by stage as a rich table."""
        from rich.table import Table

        table = Table(title=None, box=None, padding=(0, 2), pad_edge=False)
        table.add_column("stage", no_wrap=True)
        for column in ("n", "rows", "failed", "MB", "busy", "waited", "restarts"):
            table.add_column(column, justify="right", no_wrap=True)
        for role, stage in self.stages().items():
            waited = stage["wait_in"] + stage["wait_out"]
            whole = stage["busy"] + waited
            table.add_row(
                role,
                f"{stage['processes']:.0f}",
                f"{stage['rows']:.0f}",
                f"{stage['failed']:.0f}",
                f"{stage['bytes'] / 1e6:.1f}",
                f"{100 * stage['busy'] / whole if whole else 0:.0f} %",
                f"{100 * waited / whole if whole else 0:.0f} %",
                f"{stage['restarts']:.0f}",
            )
        return table


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


def _versions() -> dict[str, str]:
    """Return the versions of the packages that results come from, without importing them."""
    found = {}
    for name in ("numpy", "simplejpeg", "torch", "torchvision"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
