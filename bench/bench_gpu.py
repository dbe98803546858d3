"""From Base64 to a result on a GPU: images/s, how busy the GPU is, and what bounds them.

    python bench/bench_gpu.py --json out/bench/gpu.json

W3: Base64, JPEG, antialiased resize to 224 x 224, a TorchScript network of ResNet-50's size in half
precision in batches of 256, results written.

`whole`: evmp and its peers in processes of their own, in turns, on a short and a long table; steady
is what the long one has more over the time that it takes more. The GPU is busy while any kernel
runs, as nvidia-smi sees it. `model alone`: batches of noise out of shared memory, one after the
other, or begun before the last is through; the first row is what a script does that knows neither
pinned memory nor streams. `bounds`: the cores over the CPU time that evmp's reader, decoders and
writer take a row, and the best of `model alone` at the same precision and batch.

Without a GPU it says so and measures nothing; --device cpu tries the script there.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import harness
import stages
import workload
from bench_pipeline import Contestant, Run, run_once

from evmp import machine

SIZES, ROUNDS, SECONDS = (4000, 20000), 5, 5.0
QUICK_SIZES, QUICK_ROUNDS, QUICK_SECONDS = (200, 1000), 1, 0.5
CPU_SIZES = (10, 30)
CONTESTANTS = (
    Contestant("DataLoader", "gpu_dataloader", "torch"),
    Contestant("threads", "gpu_threads", "torch"),
    Contestant("evmp", "evmp_job", ""),
)
PACKAGES = ["numpy", "pyarrow", "pybase64", "simplejpeg", "torch"]
N_SLOTS = 4  # batches of noise
LOOK_MS = 200


# --- the GPU --------------------------------------------------------------------------------------


def has_gpu() -> bool:
    """Ask torch, in a process of its own."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Watch:
    """How busy the GPU is, in percent, from the beginning of a block to its end."""

    def __enter__(self) -> Watch:
        self.busy: float | None = None
        self._process: subprocess.Popen[str] | None = None
        if shutil.which("nvidia-smi") and (gpus := machine.gpus()):
            command = ["nvidia-smi", f"--id={gpus[0]}", f"--loop-ms={LOOK_MS}"]
            command += ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._process:
            self._process.terminate()
            output, _ = self._process.communicate()
            looks = [float(line) for line in output.split() if line.isdecimal()]
            self.busy = statistics.mean(looks) if looks else None


# --- whole runs -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """A run over the short table and one over the long."""

    runs: tuple[Run, Run]
    busy: tuple[float | None, float | None]

    @property
    def seconds(self) -> float:
        """What the long one takes more."""
        return self.runs[1].cost.wall - self.runs[0].cost.wall

    @property
    def rate(self) -> float:
        """Steady images/s."""
        return (self.runs[1].rows - self.runs[0].rows) / self.seconds

    @property
    def busy_percent(self) -> float | None:
        """How busy the GPU was in that time."""
        short, long = self.busy
        if short is None or long is None:
            return None
        worked = long * self.runs[1].cost.wall - short * self.runs[0].cost.wall
        return min(100.0, max(0.0, worked / self.seconds))


def whole(sizes: tuple[int, int], n_rounds: int, device: str) -> list[dict[str, Any]]:
    """Run everybody in turns; return a row for each."""
    pairs: dict[str, list[Pair]] = {contestant.name: [] for contestant in CONTESTANTS}
    for number in range(n_rounds):
        for contestant in CONTESTANTS:
            print(f"round {number + 1}/{n_rounds}: {contestant.name}", file=sys.stderr, flush=True)
            pairs[contestant.name].append(run_pair(contestant, sizes, device))
    baseline = statistics.median(pair.rate for pair in pairs[CONTESTANTS[0].name])
    return [row_of(name, found, baseline) for name, found in pairs.items()]


def run_pair(contestant: Contestant, sizes: tuple[int, int], device: str) -> Pair:
    """Run a contestant over both tables."""
    runs, busy = [], []
    for n_rows in sizes:
        with Watch() as watch:
            runs.append(run_once(contestant, "w3", n_rows, sample=False, device=device))
        busy.append(watch.busy)
    return Pair((runs[0], runs[1]), (busy[0], busy[1]))


def row_of(name: str, pairs: Sequence[Pair], baseline: float) -> dict[str, Any]:
    """Return the figures of a contestant."""
    rates = [pair.rate for pair in pairs]
    busy = [pair.busy_percent for pair in pairs]
    known = [percent for percent in busy if percent is not None]
    return {
        "case": name,
        "n": len(pairs),
        "images/s": f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})",
        "GPU busy, %": f"{statistics.median(known):.0f}" if known else "unknown",
        "ratio": statistics.median(rates) / baseline,
    }


# --- the model alone ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """One way to run the model alone."""

    name: str
    precision: str
    batch_size: int
    in_flight: int = 3
    is_pinned: bool = True


def cases(device: str) -> list[Case]:
    """Return what to try; the first is the baseline."""
    if device == "cpu":
        return [Case("one at a time", "fp32", 4, 1, False), Case("evmp", "fp32", 4)]
    return [
        Case("one at a time, pageable", "fp16", 256, 1, False),
        Case("one at a time, pinned", "fp16", 256, 1),
        Case("two in flight", "fp16", 256, 2),
        Case("three in flight", "fp16", 256, 3),
        *(Case("three in flight", "fp16", size) for size in (16, 64, 512)),
        *(Case("three in flight", precision, 256) for precision in ("bf16", "fp32")),
    ]


def model_alone(device: str, seconds: float) -> list[dict[str, Any]]:
    """Measure each case in a process of its own; return a row for each."""
    rows: list[dict[str, Any]] = []
    for case in cases(device):
        print(f"model alone: {case}", file=sys.stderr, flush=True)
        task = json.dumps([asdict(case), device, seconds])
        command = [sys.executable, __file__, "--case", task]
        times: list[float] = json.loads(subprocess.check_output(command))
        rate = case.batch_size / statistics.median(times)
        rows.append(
            {
                "case": case.name,
                "size": f"{case.precision}, {case.batch_size}",
                "n": len(times),
                "median, ms": 1e3 * statistics.median(times),
                "p95, ms": 1e3 * statistics.quantiles(times, n=20)[-1],
                "images/s": rate,
                "ratio": rate / rows[0]["images/s"] if rows else 1.0,
            }
        )
    return rows


def run_case(case: Case, device: str, seconds: float) -> list[float]:
    """Return the seconds from result to result."""
    import numpy as np

    from evmp.model import open_model
    from evmp.model.package import load_package

    package = load_package(workload.network("resnet50", case.precision))
    shape = (N_SLOTS, case.batch_size, package.input.height, package.input.width, 3)
    memory = mmap.mmap(-1, int(np.prod(shape)))
    frames = np.frombuffer(memory, np.uint8).reshape(shape)
    frames[:] = np.random.default_rng(workload.SEED).integers(0, 256, shape[1:], np.uint8)
    model = open_model(package, device, case.batch_size, 1)
    if case.is_pinned:
        model.pin(memoryview(memory))
    model.warm_up()
    pending: deque[Any] = deque()
    times: list[float] = []
    number, deadline = 0, time.perf_counter() + seconds
    last = time.perf_counter()
    while last < deadline or len(times) < harness.MIN_SAMPLES:
        pending.append(model.start(frames[number % N_SLOTS], range(case.batch_size)))
        number += 1
        if len(pending) >= case.in_flight:
            pending.popleft().result()
            now = time.perf_counter()
            times.append(now - last)
            last = now
    while pending:
        pending.popleft().result()
    model.close()
    return times


def bounds(alone: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what decoding and the model allow, each by itself."""
    us = stages.bound("w1")["us_per_row"]
    cores = len(os.sched_getaffinity(0))
    decode = cores / (us["reader"] + us["decoder"] + us["writer"]) * 1e6
    size = alone[0]["size"]
    model = max(row["images/s"] for row in alone if row["size"] == size)
    mine = float(next(row for row in runs if row["case"] == "evmp")["images/s"].split()[0])
    return [
        {
            "bound": f"decode, {cores} cores",
            "images/s": decode,
            "evmp reaches, %": 100 * mine / decode,
        },
        {"bound": f"model, {size}", "images/s": model, "evmp reaches, %": 100 * mine / model},
    ]


def main() -> None:
    """Measure and print everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small tables, one round")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case, device, seconds = json.loads(options.case)
        print(json.dumps(run_case(Case(**case), device, seconds)))
        return
    if options.device == "cuda" and not has_gpu():
        print("torch finds no GPU: nothing is measured")
        return
    is_quick = options.quick or options.device == "cpu"
    alone = model_alone(options.device, QUICK_SECONDS if is_quick else SECONDS)
    sizes = CPU_SIZES if options.device == "cpu" else QUICK_SIZES if is_quick else SIZES
    runs = whole(sizes, QUICK_ROUNDS if is_quick else ROUNDS, options.device)
    tables = {"whole": runs, "model alone": alone, "bounds": bounds(alone, runs)}
    harness.tell(options.json, "gpu", PACKAGES, tables)


if __name__ == "__main__":
    main()
