"""How the kernel benchmarks measure: contenders take turns, every row knows its baseline.

A bench gives `Bench.compare` the ways to do one piece of work; the first is the baseline. They run
in turns, a few milliseconds each, so that a slow second of a shared machine hits all of them; the
time is CPU time of the calling thread, which is all that works, so that others do not count. The
columns are always the same:

    case, size, n, median, p95, rate (MB/s or frames/s), ratio (times as fast as the baseline)
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.002  # calls are timed together until a sample takes so long
WARM_UP_SECONDS = 0.02
MIN_SAMPLES = 5

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Row:
    """One contender at one size; times in microseconds of CPU a call."""

    case: str
    size: str
    n: int
    median_us: float
    p95_us: float
    rate: float
    unit: str
    ratio: float


class Bench:
    """The rows of one script, and its command line: --json, --quick.

    Args:
        name: what the script measures, as --json names it.
        doc: the script's docstring; its first line is the help.
        packages: the peers whose versions belong to the result.
    """

    def __init__(self, name: str, doc: str | None, packages: Sequence[str]) -> None:
        parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
        parser.add_argument("--json", type=Path, help="where to write the rows")
        parser.add_argument("--quick", action="store_true", help="few samples, only to see it run")
        options = parser.parse_args()
        self._json: Path | None = options.json
        self.is_quick: bool = options.quick
        self._seconds = 0.02 if options.quick else 1.0
        self._name = name
        self._packages = packages
        self.rows: list[Row] = []
        self.tables: dict[str, list[dict[str, Any]]] = {}
        """What else the script has found, by title; the rows of a table have the same keys."""
        print(
            f"{'case':28s} {'size':20s} {'n':>5s} {'median':>11s} {'p95':>11s} {'rate':>18s} ratio"
        )

    def compare(self, size: str, contenders: Mapping[str, Work], amount: float, unit: str) -> None:
        """Measure contenders against the first of them.

        Args:
            size: what is worked on, as the table names it.
            contenders: the work of each by its name.
            amount: how much one call does, in the unit without its "/s".
            unit: "MB/s" or "frames/s".
        """
        times = measure(contenders, self._seconds)
        baseline = statistics.median(next(iter(times.values())))
        for case, samples in times.items():
            median = statistics.median(samples)
            p95 = statistics.quantiles(samples, n=20)[-1]
            row = Row(
                case,
                size,
                len(samples),
                median * 1e6,
                p95 * 1e6,
                amount / median,
                unit,
                baseline / median,
            )
            self.rows.append(row)
            show(row)

    def finish(self) -> None:
        """Write the rows, the machine and the versions, if asked to."""
        rows = [asdict(row) for row in self.rows]
        write(self._json, self._name, self._packages, rows=rows, tables=self.tables)


def show(row: Row) -> None:
    """Print a row of the table."""
    print(
        f"{row.case:28s} {row.size:20s} {row.n:5d} {row.median_us:8.1f} us {row.p95_us:8.1f} us "
        f"{row.rate:9.0f} {row.unit:8s} {row.ratio:5.2f}",
        flush=True,
    )


def tell(
    path: Path | None, bench: str, packages: Sequence[str], tables: dict[str, list[dict[str, Any]]]
) -> None:
    """Print what a script has found that has tables of its own, and write it, if there is a path.

    Args:
        tables: by title; the rows of a table have the same keys.
    """
    for name, rows in tables.items():
        print(f"\n{name}")
        for row in rows:
            cells = (
                f"{key} {v:.2f}" if isinstance(v, float) else f"{key} {v}" for key, v in row.items()
            )
            print("  " + ", ".join(cells), flush=True)
    write(path, bench, packages, tables=tables)


def write(path: Path | None, bench: str, packages: Sequence[str], **content: Any) -> None:
    """Write what a script has found, with the machine and the versions, if there is a path."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"bench": bench, "machine": machine(), "versions": versions(packages)}
        path.write_text(json.dumps({**about, **content}, indent=1))


def spread(values: Sequence[float]) -> str:
    """Return median, least and greatest, in words."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def measure(contenders: Mapping[str, Work], seconds: float) -> dict[str, list[float]]:
    """Return samples for each contender, in seconds a call.

    Args:
        contenders: the work of each by its name.
        seconds: how long to go on for each contender.
    """
    counts = {name: calls_per_sample(work) for name, work in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    deadline = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < deadline or len(times[next(iter(times))]) < MIN_SAMPLES:
        for name, work in contenders.items():
            times[name].append(sample(work, counts[name]))
    return times


def calls_per_sample(work: Work) -> int:
    """Warm up, and find how many calls take SAMPLE_SECONDS."""
    deadline = time.perf_counter() + WARM_UP_SECONDS
    fastest = sample(work, 1)
    while time.perf_counter() < deadline:
        fastest = min(fastest, sample(work, 1))
    return max(1, round(SAMPLE_SECONDS / max(fastest, 1e-7)))


def sample(work: Work, n_calls: int) -> float:
    """Return the CPU seconds a call takes, over some calls."""
    start = time.thread_time()
    for _ in range(n_calls):
        work()
    return (time.thread_time() - start) / n_calls


def peer(module: str) -> Any:
    """Import a peer; None, and a line that says so, where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        print(f"{module} is skipped: {error}")
        return None


def machine() -> dict[str, object]:
    """Describe the machine: processor, cores, system, Python."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """Return the processor's name as Linux knows it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
