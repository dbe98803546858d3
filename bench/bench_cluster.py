"""What it costs to be many: workers on one machine, the leases of the dead, ten thousand workers.

    python bench/bench_cluster.py --json out/bench/bench_cluster.json

`workers`: whole jobs over one table, steady, as in bench_pipeline.py: W2's network by one worker
that has one core, and by two that have one each, with shards and with blocks for all.

`failover`: two commands of a dynamic job with leases of ten seconds; one after the other is killed
with all its processes, and another follows. Of each block that was held, the time from the kill to
its next lease.

`simulated`: clusters whose workers die after 2,000 s on average and come again after 60 s, and
whose blocks take 20 s; the leases and their requests are the real ones, each of which takes 10 ms.
The largest takes half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import psutil
import workload
from cost import measure

sys.path.append(str(workload.ROOT / "tests"))

from cluster.simulation import Scenario, Simulation

ROUNDS = 3
ROWS, QUICK_ROWS = (100, 500), (20, 60)
KILLS, QUICK_KILLS = 10, 2
CLUSTERS = ((30, 3000), (1000, 100_000), (10_000, 1_000_000))
QUICK_CLUSTERS = ((30, 1000),)
LIMIT_SECONDS = 600.0
DYNAMIC = {"enableDynamicCluster": True, "useSparseClusterSchema": True}


def job(folder: Path, n_rows: int, **keys: Any) -> list[str]:
    """Write a job of W2 into a folder, and return its command."""
    model = str(workload.network().resolve())
    job = {
        "model_path": model,
        "model_type": "classifier",
        "device": "cpu",
        "input_table": str(workload.table(n_rows)),
        "output_oss_file": "out.jsonl",
        "reserved_columns": "id",
        "preprocess_thread_num": 1,
        "predict_thread_num": 1,
        "torch_threads": 1,
        "batch_size": 4,
        "queue_size": 32,
        **keys,
    }
    (folder / "job.yaml").write_text(json.dumps(job))
    return [sys.executable, "-m", "evmp", "--config", str(folder / "job.yaml")]


# --- workers --------------------------------------------------------------------------------------


def seconds_of(n_workers: int, n_rows: int, **keys: Any) -> float:
    """Return how long so many workers take, who have one core each."""
    with tempfile.TemporaryDirectory(dir=workload.CACHE) as folder:
        command = job(Path(folder), n_rows, num_worker=n_workers, block_rows=10, **keys)
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:n_workers]))
        pinned = ["taskset", "-c", cores, "env", "-C", folder, *command, "--quiet"]
        cost = measure(pinned, dict(os.environ), sample=False, limit=LIMIT_SECONDS)
        assert Path(folder, "out.jsonl").read_text().count("\n") == n_rows
    return cost.wall


def workers(sizes: tuple[int, int], n_rounds: int) -> list[dict[str, Any]]:
    """Run one worker and two, in turns; return a row for each kind of job."""
    few, many = sizes
    rows = []
    for name, keys in (("shards", {}), ("blocks for all", DYNAMIC)):
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(n_rounds):
            for n, found in rates.items():
                short, long = (seconds_of(n, n_rows, **keys) for n_rows in (few, many))
                found.append((many - few) / (long - short))
        ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
        rows.append(
            {
                "work": name,
                "n": n_rounds,
                "1 worker, rows/s": harness.spread(rates[1]),
                "2 workers, rows/s": harness.spread(rates[2]),
                "ratio": harness.spread(ratios),
            }
        )
    return rows


# --- failover -------------------------------------------------------------------------------------


class Killed:
    """A dynamic job whose workers are killed one after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._staging = folder, folder / "out.jsonl.evmp"
        self._command = job(folder, 2000, block_rows=2, lease_seconds=10, **DYNAMIC)
        self._workers = [self._start(), self._start()]

    def failover(self) -> list[float]:
        """Kill a worker, and start another. Returns the seconds until its blocks are leased."""
        victim = self._workers.pop(0)
        self._workers.append(self._start())
        killed = time.time()
        held = [
            f"leases/*/{start:012d}.{generation + 1:04d}"
            for pid, units in self._held()
            for start, _, generation in units
            if pid == victim.pid
        ]
        kill(victim)
        waits = []
        for name in held:
            while not (leases := list(self._staging.glob(name))):
                time.sleep(0.05)
            waits.append(leases[0].stat().st_mtime - killed)
        return waits

    def end(self) -> None:
        """Kill them all."""
        for worker in self._workers:
            kill(worker)

    def _start(self) -> subprocess.Popen[bytes]:
        """Start a worker, and wait until it holds a block."""
        command = [*self._command, "--quiet", "--worker", "0/2"]
        process = subprocess.Popen(command, cwd=self._folder)
        while process.pid not in [pid for pid, units in self._held() if units]:
            assert process.poll() is None
            time.sleep(0.05)
        return process

    def _held(self) -> list[tuple[int, list[list[int]]]]:
        texts = [file.read_text() for file in (self._staging / "workers").glob("*")]
        return [(about["pid"], about["held"]) for about in map(json.loads, texts)]


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a command with all its processes."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family)


def failover(n_kills: int) -> list[dict[str, Any]]:
    """Kill so many workers."""
    with tempfile.TemporaryDirectory(dir=workload.CACHE) as folder:
        killed = Killed(Path(folder))
        try:
            waits = [wait for _ in range(n_kills) for wait in killed.failover()]
        finally:
            killed.end()
    return [{"kills": n_kills, "blocks": len(waits), "seconds": harness.spread(waits)}]


# --- simulated ------------------------------------------------------------------------------------


def simulated(n_workers: int, n_blocks: int) -> dict[str, Any]:
    """Simulate a cluster."""
    outcome = Simulation(scenario := Scenario(n_workers, n_blocks)).run()
    waits = sorted(outcome.failover)
    n_requests = sum(outcome.requests.values())
    busy = n_blocks * scenario.block_seconds / outcome.lived_seconds
    return {
        "workers": n_workers,
        "blocks": n_blocks,
        "deaths": outcome.n_deaths,
        "requests a block": n_requests / n_blocks,
        "requests a second and worker": n_requests / outcome.lived_seconds,
        "time for what counts, %": 100 * busy,
        "computed twice": outcome.n_doubled,
        "failover, s": harness.spread(waits),
        "oldest lease, s": outcome.oldest,
    }


def main() -> None:
    """Measure and print everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rows, one round")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    n_rounds = 1 if options.quick else ROUNDS
    workload.CACHE.mkdir(parents=True, exist_ok=True)
    clusters = QUICK_CLUSTERS if options.quick else CLUSTERS
    found = {
        "workers": workers(QUICK_ROWS if options.quick else ROWS, n_rounds),
        "failover": failover(QUICK_KILLS if options.quick else KILLS),
        "simulated": [simulated(*cluster) for cluster in clusters],
    }
    harness.tell(options.json, "cluster", ["torch"], found)


if __name__ == "__main__":
    main()
