"""How long evmp takes to start: to the first row, by stage, and where torch is best imported.

    python bench/bench_start.py --json out/bench/start.json

`first row`: from the start of the `evmp` process to the first row in the predictor, without torch
(a stand-in for the network, as in W1) and with it (to the first result written). `stages`: what
each process still has to do when it has been forked: CPU time, wall time, memory that it does not
share. `torch`: n predictors that import torch themselves, or after one import before the fork.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import workload
from cost import pss

PEERS = Path(__file__).resolve().parent / "peers"
sys.path.insert(0, str(PEERS))

from task import Task  # noqa: E402

Figures = dict[str, float]
N_PREDICTORS = (1, 2, 4)


def first_row(n_runs: int) -> list[dict[str, Any]]:
    """Measure whole runs of a short table."""
    from bench_pipeline import CONTESTANTS, run_once

    rows = []
    for work in ("w1", "w2"):
        runs = [run_once(CONTESTANTS[0], work, 20, sample=False) for _ in range(n_runs)]
        seconds = [run.first_row or run.cost.wall for run in runs]
        what = "first row in the predictor" if work == "w1" else "whole job of 20 rows, torch"
        rows.append({"what": what, "n": n_runs, **spread(seconds)})
    return rows


def spread(seconds: list[float]) -> Figures:
    """Return median, least and greatest, in milliseconds."""
    values = statistics.median(seconds), min(seconds), max(seconds)
    return dict(zip(("median_ms", "min_ms", "max_ms"), (1e3 * v for v in values), strict=True))


def stages() -> list[dict[str, Any]]:
    """Open each stage in a fork of a process that has what a worker has."""
    import evmp_job

    from evmp.grid import Block
    from evmp.job import load_job
    from evmp.metrics import Board
    from evmp.pipeline import Worker
    from evmp.plan import make_plan

    with tempfile.TemporaryDirectory(dir=workload.CACHE) as folder:
        network, table = str(workload.network() / "model.pt"), str(workload.table(20))
        task = Task("w2", table, network, f"{folder}/out.jsonl", "", 1, f"{folder}/report.json")
        Path(folder, "job.yaml").write_text(json.dumps(evmp_job.job_of(task)))
        plan = make_plan(load_job(f"{folder}/job.yaml", []))
        seats = Board(plan.layout.roles, 1).workers[0]
        ledger = plan.target.ledger
        ledger.open({})
        worker = Worker(0, plan.job, plan.package, plan.layout, ledger, plan.source, seats, list)
        return [
            {"stage": name, **alone(stage.open)} for name, stage in worker.stages([Block(0, 20)])
        ]


def alone(work: Callable[[], object]) -> Figures:
    """Do something in a fork; return what it took there."""

    def measured() -> Figures:
        modules, cpu, wall = len(sys.modules), time.process_time(), time.perf_counter()
        work()
        return {
            "cpu_ms": 1e3 * (time.process_time() - cpu),
            "wall_ms": 1e3 * (time.perf_counter() - wall),
            "own_mb": private_bytes() / 1e6,
            "modules": len(sys.modules) - modules,
        }

    return forked(measured)()


def private_bytes() -> int:
    """Memory of this process that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private"))


def forked(work: Callable[[], Any]) -> Callable[[], Any]:
    """Start something in a fork; the function that this returns waits for its answer."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            answer = json.dumps(work()).encode()
            os.write(write_end, answer)
            code = 0
        finally:
            os._exit(code)
    os.close(write_end)

    def answer() -> Any:
        with open(read_end, "rb") as pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
        return json.loads(text)

    return answer


def torch_figures(n_predictors: int, *, before: bool) -> dict[str, Any]:
    """Let n predictors load the network; torch imported here before, or by each of them."""

    def all_of_them() -> Figures:
        started, cpu = time.perf_counter(), os.times()
        if before:
            import torch  # noqa: F401

            gc.freeze()
        ready, done = os.pipe(), os.pipe()
        waits = [forked(lambda: one_predictor(ready[1], done)) for _ in range(n_predictors)]
        for _ in waits:
            os.read(ready[0], 1)
        wall = time.perf_counter() - started
        memory = pss(os.getpid()) + sum(pss(pid) for pid in children())
        os.close(done[1])
        for wait in waits:
            wait()
        used = sum(os.times()[:4]) - sum(cpu[:4])
        return {"wall_ms": 1e3 * wall, "cpu_ms": 1e3 * used, "pss_mb": memory / 1e6}

    where = "before the fork" if before else "in each predictor"
    return {"predictors": n_predictors, "torch": where, **forked(all_of_them)()}


def one_predictor(ready: int, done: tuple[int, int]) -> None:
    """Load the network, run it once, say so, and wait until the other end is closed."""
    os.close(done[1])
    import numpy as np
    from work import load_network

    load_network(str(workload.network() / "model.pt"), 1)(np.zeros((1, 3, 224, 224), np.float32))
    os.write(ready, b"+")
    os.read(done[0], 1)


def children() -> list[int]:
    """Return the processes that this one has forked."""
    pid = os.getpid()
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def main() -> None:
    """Measure and print everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few runs, only to see it run")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    # What needs torch comes last, and in forks: this process must not have it.
    tables = {"first row": first_row(2 if options.quick else 15), "stages": forked(stages)()}
    tables["torch"] = [
        torch_figures(n, before=before)
        for n in N_PREDICTORS[: 1 if options.quick else None]
        for before in (False, True)
    ]
    harness.tell(options.json, "start", ["numpy", "pyarrow", "pydantic", "torch"], tables)


if __name__ == "__main__":
    main()
