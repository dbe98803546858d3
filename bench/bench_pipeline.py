"""The whole pipeline against its peers: rows/s, rows per CPU-second, memory.

    python bench/bench_pipeline.py --work w1 --rounds 5 --json out/bench/pipeline-w1.json

W1: Base64, JPEG, antialiased resize to 224 x 224, normalise, consume; no network, no torch needed.
W2: the same through a TorchScript network of ResNet-18's size on the CPU, results written.

Every contestant runs in processes of its own, on a short and a long table, in turns. `whole` is the
short table over the whole process, from its start to its end; `steady` is what the long table has
more over the time that it takes more, so that no start counts. Memory is sampled in runs of its
own, which are not timed. `bound` is cores over evmp's own CPU time a row, each stage alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import stages
import workload
from cost import CommandFailed, Cost, measure

PEERS = Path(__file__).resolve().parent / "peers"
sys.path.insert(0, str(PEERS))
from task import Task  # noqa: E402

SIZES = {"w1": (2000, 20000), "w2": (200, 1200)}
QUICK_SIZES = {"w1": (200, 1000), "w2": (20, 100)}
ROUNDS = {"w1": 5, "w2": 3}
NETWORKS = {"w3": ("resnet50", "fp16")}
PACKAGES = ["numpy", "opencv-python-headless", "pyarrow", "pybase64", "simplejpeg", "torch"]
PACKAGES += ["daft", "ray", "spdl"]
LIMIT_SECONDS = 900.0
TOLERANCE = 0.01  # of the sum over the pixels that a contestant has looked at, relative


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to do the work; `script` is in bench/peers."""

    name: str
    script: str
    resize: str
    works: tuple[str, ...] = ("w1", "w2")


# All but the first two resize by torch, which is faster than cv2 where both antialias.
CONTESTANTS = (
    Contestant("evmp", "evmp_job", ""),
    Contestant("threads (cv2)", "threads", "cv2", ("w1",)),
    Contestant("threads", "threads", "torch"),
    Contestant("loop", "loop", "torch"),
    Contestant("DataLoader", "dataloader", "torch"),
    Contestant("SPDL", "spdl_pipeline", "torch"),
    Contestant("Daft", "daft_frame", "torch"),
    Contestant("Ray Data", "ray_data", "torch"),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One run: what it cost, and what it has seen."""

    cost: Cost
    rows: int
    total: float
    first_row: float
    """Seconds from the start of the process to the first row consumed; 0 where unknown."""


def run_once(
    contestant: Contestant, work: str, n_rows: int, *, sample: bool, device: str = "cpu"
) -> Run:
    """Run a contestant once.

    Args:
        sample: see cost.measure.
        device: where the network of W3 runs.

    Raises:
        CommandFailed: it failed, or has not done every row.
    """
    with tempfile.TemporaryDirectory(dir=workload.CACHE) as folder:
        task = Task(
            work=work,
            table=str(workload.table(n_rows)),
            network=str(workload.network(*NETWORKS.get(work, ())) / "model.pt"),
            out=f"{folder}/out.jsonl",
            resize=contestant.resize,
            n_cores=len(os.sched_getaffinity(0)),
            report=f"{folder}/report.json",
            device=device,
        )
        command = [sys.executable, str(PEERS / f"{contestant.script}.py"), json.dumps(asdict(task))]
        environment = {**os.environ, "PYTHONPATH": str(PEERS)}
        # Everybody may keep compiled modules, evmp's own are new.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        cost = measure(command, environment, sample=sample, limit=LIMIT_SECONDS)
        rows, total, first = read_report(task)
    if rows != n_rows:
        raise CommandFailed(f"{rows} of {n_rows} rows came out")
    return Run(cost, rows, total, max(0.0, first - cost.started) if first else 0.0)


def read_report(task: Task) -> tuple[int, float, float]:
    """Return rows, total and the time of the first row; evmp's report are its results."""
    if Path(task.report).exists():
        report = json.loads(Path(task.report).read_text())
        return report["rows"], report["total"], report["first"]
    with open(task.out) as file:
        results = [json.loads(line)["prediction_result"] for line in file]
    times = [result["at"] for result in results if "at" in result]
    return len(results), sum(r.get("seen", 0.0) for r in results), min(times, default=0.0)


class Contest:
    """All runs of one workload."""

    def __init__(
        self, work: str, sizes: tuple[int, int], contestants: Sequence[Contestant]
    ) -> None:
        self.work, self.sizes = work, sizes
        self.contestants = list(contestants)
        self.runs: dict[str, list[tuple[Run, Run]]] = {c.name: [] for c in contestants}
        self.memory: dict[str, tuple[Run, Run]] = {}
        self.failures: dict[str, str] = {}

    def play(self, n_rounds: int) -> None:
        """Run everybody in turns, then everybody once more with a look at the memory."""
        for number in range(n_rounds):
            for contestant in self._standing():
                self._note(contestant, f"round {number + 1}/{n_rounds}")
                if pair := self._pair(contestant, sample=False):
                    self.runs[contestant.name].append(pair)
        for contestant in self._standing():
            self._note(contestant, "memory")
            if pair := self._pair(contestant, sample=True):
                self.memory[contestant.name] = pair
        self._check_totals()

    def _standing(self) -> list[Contestant]:
        return [c for c in self.contestants if c.name not in self.failures]

    def _pair(self, contestant: Contestant, *, sample: bool) -> tuple[Run, Run] | None:
        try:
            short, long = (
                run_once(contestant, self.work, n_rows, sample=sample) for n_rows in self.sizes
            )
        except CommandFailed as error:
            self.failures[contestant.name] = str(error)
            print(f"{contestant.name}: {error}", file=sys.stderr)
            return None
        return short, long

    def _note(self, contestant: Contestant, what: str) -> None:
        print(f"{self.work} {what}: {contestant.name}", file=sys.stderr, flush=True)

    def _check_totals(self) -> None:
        """Compare what everybody has seen: the same rows give the same sum, nearly."""
        totals = {name: pairs[0][1].total for name, pairs in self.runs.items() if pairs}
        expected = statistics.median(totals.values())
        for name, total in totals.items():
            if abs(total - expected) > TOLERANCE * abs(expected):
                self.failures[name] = f"saw {total:.6g}, the others {expected:.6g}"

    def figures(self) -> list[dict[str, Any]]:
        """Return the table: one row for each contestant."""
        return [self._figures(c.name) for c in self.contestants]

    def _figures(self, name: str) -> dict[str, Any]:
        row: dict[str, Any] = {"name": name, "failure": self.failures.get(name, "")}
        if pairs := self.runs[name]:
            n = self.sizes[1] - self.sizes[0]
            row["whole"] = summary([s.rows / s.cost.wall for s, _ in pairs])
            row["steady"] = summary([n / (b.cost.wall - s.cost.wall) for s, b in pairs])
            row["per_cpu"] = summary([n / (b.cost.cpu - s.cost.cpu) for s, b in pairs])
            row["first_row"] = summary([s.first_row for s, _ in pairs])
        if name in self.memory:
            small, large = self.memory[name]
            row["peak_mb"] = [run.cost.peak_bytes / 1e6 for run in (small, large)]
            row["n_processes"] = large.cost.n_processes
        return row


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return the median of some values, and their spread."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(work: str, rows: list[dict[str, Any]], bound: dict[str, Any] | None) -> None:
    """Print a table."""
    print(f"\n{work}        whole rows/s        steady rows/s       rows/CPU-s  first row  peak MB")
    for row in rows:
        print(f"{row['name']:14s}{_cells(row)}")
    if bound:
        parts = ", ".join(f"{stage} {us:.0f}" for stage, us in bound["us_per_row"].items())
        print(f"evmp's own CPU time, us a row, each stage alone: {parts}")
        print(f"bound: {bound['rows_per_second']:.0f} rows/s")


def _cells(row: dict[str, Any]) -> str:
    if "steady" not in row:
        return f"  failed: {row['failure'][-300:]}"
    rates = [
        f"{row[key]['median']:7.1f} ({row[key]['min']:6.1f} to {row[key]['max']:6.1f})"
        for key in ("whole", "steady")
    ]
    peaks = " / ".join(f"{size:.0f}" for size in row.get("peak_mb", []))
    cpu, first = row["per_cpu"]["median"], row["first_row"]["median"]
    return f"{'  '.join(rates)}  {cpu:8.1f}  {first:6.2f} s  {peaks}  {row['failure']}"


def main() -> None:
    """Run the contest and print what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", default="w1,w2", help="which workloads, default both")
    parser.add_argument("--only", default="", help="contestants, by the start of their names: a,b")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument(
        "--rows", default="", help="rows of the short and the long table: 2000,20000"
    )
    parser.add_argument("--quick", action="store_true", help="small tables, one round")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    works: dict[str, Any] = {}
    for work in options.work.split(","):
        sizes = (QUICK_SIZES if options.quick else SIZES)[work]
        if options.rows:
            sizes = tuple(int(number) for number in options.rows.split(","))
        chosen = [c for c in CONTESTANTS if work in c.works and _is_chosen(c.name, options.only)]
        contest = Contest(work, sizes, chosen)
        n_rounds = options.rounds or (1 if options.quick else ROUNDS[work])
        contest.play(n_rounds)
        bound = stages.bound(work)
        rows = contest.figures()
        show(work, rows, bound)
        works[work] = {"sizes": sizes, "rounds": n_rounds, "bound": bound, "rows": rows}
    harness.write(options.json, "pipeline", PACKAGES, works=works)


def _is_chosen(name: str, only: str) -> bool:
    return not only or any(name.lower().startswith(part.lower()) for part in only.split(","))


if __name__ == "__main__":
    main()
