"""What it costs that every block of rows is committed, durably: W1 with the ledger, and without.

    python bench/bench_ledger.py --json out/bench/bench_ledger.json

`runs`: evmp as in bench_pipeline.py, steady: what a long table has more over what it takes more,
both in blocks of as many rows as a long job's default. With the ledger off nothing is synced to the
disk or checked, and no record is written before a worker's end; all else is the same. The cases run
in turns, and `cost` compares each run with the run without a ledger of its own round.

`commit`: one block's, alone, by the process that does it; the wall time is mostly the disk's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness
import workload
from cost import Cost, measure

PEERS = Path(__file__).resolve().parent / "peers"
sys.path.insert(0, str(PEERS))

from task import Task  # noqa: E402

if TYPE_CHECKING:
    from evmp.grid import Block
    from evmp.ledger import Commit, Ledger
    from evmp.writer import Writer

SIZES, ROUNDS = (2000, 20000), 7
QUICK_SIZES, QUICK_ROUNDS = (200, 1000), 1
DEFAULT_ROWS = 2500  # of a block of the long table; long jobs have up to 4096
SMALL_ROWS = 16  # the fewest that evmp chooses by itself
ROW_BYTES = 80  # of a result in W1
LIMIT_SECONDS = 300.0
COMMITS = 300


@dataclass(frozen=True, slots=True)
class Case:
    """One way to run W1."""

    name: str
    has_ledger: bool
    block_rows: int


CASES = (
    Case("ledger off", False, DEFAULT_ROWS),
    Case("ledger", True, DEFAULT_ROWS),
    Case("ledger, small blocks", True, SMALL_ROWS),
)


# --- a run ----------------------------------------------------------------------------------------


def run_once(case: Case, n_rows: int) -> Cost:
    """Run W1 in processes of its own."""
    with tempfile.TemporaryDirectory(dir=workload.CACHE) as folder:
        task = Task(
            work="w1",
            table=str(workload.table(n_rows)),
            network=str(workload.network() / "model.pt"),
            out=f"{folder}/out.jsonl",
            resize="",
            n_cores=len(os.sched_getaffinity(0)),
            report=f"{folder}/report.json",
        )
        command = [sys.executable, __file__, "--run", json.dumps([asdict(task), asdict(case)])]
        environment = {**os.environ, "PYTHONPATH": str(PEERS)}
        cost = measure(command, environment, sample=False, limit=LIMIT_SECONDS)
        with open(task.out, "rb") as file:
            assert sum(1 for _ in file) == n_rows, f"{case.name} has lost rows"
    return cost


def run_here(task: Task, case: Case) -> None:
    """Be the evmp command of a run."""
    import evmp_job

    from evmp import cli

    evmp_job.prepare(task)
    if not case.has_ledger:
        switch_off()
    config = Path(task.report).with_suffix(".yaml")
    config.write_text(json.dumps({**evmp_job.job_of(task), "block_rows": case.block_rows}))
    cli.main(["--config", str(config), "--fresh", "--quiet"])


def switch_off() -> None:
    """Let blocks be files that a worker tells of at its end, and let nothing wait for a disk.

    Processes are forked from this one, so they do as it does.
    """
    from evmp.ledger import Commit, Ledger
    from evmp.writer import Writer

    done: list[Commit] = []  # of the process that writes
    run = Writer.run

    def commit(
        ledger: Ledger, stage: Path, block: Block, failed: int, reasons: dict[str, Any]
    ) -> bool:
        name = f"{block.start:012d}.{'0' * 32}"
        done.append(Commit(block.start, block.stop, failed, name, 0, 0, reasons))
        os.rename(stage, ledger.data(done[-1]))
        return True

    def run_and_tell(writer: Writer) -> None:
        run(writer)
        for it in done:
            record = writer._ledger.root / "blocks" / f"{it.start:012d}.json"
            record.write_text(json.dumps(asdict(it)))

    os.fsync = lambda fd: None
    Ledger.commit = commit
    Ledger.verify = lambda ledger, commit: None
    Writer.run = run_and_tell


def runs(sizes: tuple[int, int], n_rounds: int) -> list[dict[str, Any]]:
    """Run all cases in turns; return a row for each."""
    pairs: dict[str, list[tuple[Cost, Cost]]] = {case.name: [] for case in CASES}
    for number in range(n_rounds):
        # The order changes, lest one case always comes after the same other.
        for case in [*CASES[number % len(CASES) :], *CASES[: number % len(CASES)]]:
            print(f"round {number + 1}/{n_rounds}: {case.name}", file=sys.stderr, flush=True)
            pairs[case.name].append((run_once(case, sizes[0]), run_once(case, sizes[1])))
    n_rows = sizes[1] - sizes[0]
    return [row_of(case, pairs[case.name], pairs[CASES[0].name], n_rows) for case in CASES]


def row_of(
    case: Case,
    pairs: Sequence[tuple[Cost, Cost]],
    baseline: Sequence[tuple[Cost, Cost]],
    n_rows: int,
) -> dict[str, Any]:
    """Return the figures of a case."""
    wall, cpu = ([n_rows / more for more in of(pairs)] for of in (wall_of, cpu_of))
    costs = [
        harness.spread(
            [100 * (mine / off - 1) for mine, off in zip(of(pairs), of(baseline), strict=True)]
        )
        for of in (wall_of, cpu_of)
    ]
    return {
        "case": case.name,
        "rows a block": case.block_rows,
        "n": len(pairs),
        "steady, rows/s": harness.spread(wall),
        "rows/CPU-s": harness.spread(cpu),
        "cost, % of the time": costs[0],
        "cost, % of the CPU time": costs[1],
    }


def wall_of(pairs: Sequence[tuple[Cost, Cost]]) -> list[float]:
    """Return the seconds that the long table takes more than the short one."""
    return [long.wall - short.wall for short, long in pairs]


def cpu_of(pairs: Sequence[tuple[Cost, Cost]]) -> list[float]:
    """Return the CPU seconds, likewise."""
    return [long.cpu - short.cpu for short, long in pairs]


# --- a commit -------------------------------------------------------------------------------------


def commits(n_commits: int) -> list[dict[str, Any]]:
    """Commit blocks of some sizes, in turns; return a row for each size."""
    from evmp.grid import Block
    from evmp.ledger import Ledger

    sizes = (SMALL_ROWS, DEFAULT_ROWS, 4096)
    times: dict[int, list[tuple[float, float]]] = {rows: [] for rows in sizes}
    with tempfile.TemporaryDirectory(dir=workload.CACHE) as folder:
        ledger = Ledger(Path(folder, "out.evmp"))
        ledger.open({})
        for start in range(n_commits):
            for place, rows in enumerate(sizes):
                stage = ledger.stage("run", start)
                stage.write_bytes(bytes(rows * ROW_BYTES))
                row = (start * len(sizes) + place) * max(sizes)
                block = Block(row, row + rows)
                times[rows].append(timed(partial(ledger.commit, stage, block, 0, {})))
    return [
        {
            "rows a block": rows,
            "KB": rows * ROW_BYTES / 1e3,
            "n": n_commits,
            "CPU, us": statistics.median(cpu for _, cpu in found) * 1e6,
            "wall, ms": statistics.median(wall for wall, _ in found) * 1e3,
            "CPU, us a row": statistics.median(cpu for _, cpu in found) / rows * 1e6,
        }
        for rows, found in times.items()
    ]


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Measure and print everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small tables, one round")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        task, case = json.loads(options.run)
        run_here(Task(**task), Case(**case))
    n_rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    tables = {
        "runs": runs(QUICK_SIZES if options.quick else SIZES, n_rounds),
        "commit": commits(20 if options.quick else COMMITS),
    }
    harness.tell(options.json, "ledger", ["numpy", "pyarrow"], tables)


if __name__ == "__main__":
    main()
