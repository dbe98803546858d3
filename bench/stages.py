"""evmp's own CPU time a row, each stage alone: what no arrangement of processes can do without.

    python bench/stages.py w1 500

The stages run one after the other in one process, each over all rows, between rings that hold all
of them and are faulted in before. Cores over the sum of their times is the bound of the pipeline.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import workload

PEERS = Path(__file__).resolve().parent / "peers"
# Of a table that holds no more, so that the rings hold them all.
N_ROWS = {"w1": 496, "w2": 96}
ROUNDS = 3


def bound(work: str) -> dict[str, Any]:
    """Measure in a process of its own; the least of some rounds counts."""
    command = [sys.executable, __file__, work, str(N_ROWS[work])]
    environment = {**os.environ, "PYTHONPATH": str(PEERS)}
    rounds = [
        json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
        for _ in range(ROUNDS)
    ]
    us = {stage: min(times[stage] for times in rounds) for stage in rounds[0]}
    cores = len(os.sched_getaffinity(0))
    return {"us_per_row": us, "rows_per_second": cores / sum(us.values()) * 1e6, "cores": cores}


def measure(work: str, n_rows: int, folder: str) -> dict[str, float]:
    """Run each stage alone; return CPU microseconds a row by the stage's name."""
    import evmp_job
    from task import Task

    from evmp.grid import Block
    from evmp.job import load_job
    from evmp.metrics import Board
    from evmp.pipeline import Worker
    from evmp.plan import make_plan

    network, out = str(workload.network() / "model.pt"), f"{folder}/out.jsonl"
    table = str(workload.table(n_rows))
    task = Task(work, table, network, out, "", 1, f"{folder}/report.json")
    evmp_job.prepare(task)
    Path(folder, "job.yaml").write_text(json.dumps(evmp_job.job_of(task)))
    plan = make_plan(load_job(f"{folder}/job.yaml", []))
    layout = plan.layout.holding(n_rows)
    seats, ledger = Board(layout.roles, 1).workers[0], plan.target.ledger
    ledger.open({})
    worker = Worker(0, plan.job, plan.package, layout, ledger, plan.source, seats, list)
    times = {}
    for name, stage in worker.stages([Block(0, n_rows)]):
        stage.open()
        started = time.process_time()
        stage.run()
        times[name] = (time.process_time() - started) / n_rows * 1e6
    return times


def main(work: str, n_rows: int) -> None:
    """Print the times as JSON."""
    sys.path.insert(0, str(PEERS))
    with tempfile.TemporaryDirectory(dir=workload.CACHE) as folder:
        print(json.dumps(measure(work, n_rows, folder)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
