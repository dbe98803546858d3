"""Workers of any block: they come and go, die and pause, and no byte of the result shows it."""

from __future__ import annotations

import fcntl
import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml
from jobfolder import SECONDS, JobFolder, kill, wait_for
from ossserver import KEY_ID, KEY_SECRET, serving_oss

from evmp.ledger import HINTS, Ledger

N_ROWS = 96
DYNAMIC = {"enableDynamicCluster": True, "useSparseClusterSchema": True, "lease_seconds": 1}


@pytest.fixture(scope="module")
def whole(undisturbed_job: Callable[..., Path]) -> Path:
    """The folder of a slow job that one command has done, with static shards."""
    return undisturbed_job(N_ROWS, steps=400, block_rows=4)


@pytest.fixture
def open_job(job: JobFolder, whole: Path) -> JobFolder:
    """The job of `whole`, to be done elsewhere by whoever comes."""
    keys = yaml.safe_load((whole / "job.yaml").read_text())
    (job.path / "job.yaml").write_text(yaml.safe_dump({**keys, **DYNAMIC, "queue_size": 8}))
    return job


def staging(job: JobFolder) -> Path:
    return job.path / "out.jsonl.evmp"


def owners(job: JobFolder) -> dict[str, int]:
    """Return which command each worker is of that holds a block."""
    shown = {}
    for file in (staging(job) / "workers").glob("*"):
        with suppress(FileNotFoundError):  # it has just left
            worker = json.loads(file.read_text())
            if worker["held"]:
                shown[file.name] = int(worker["pid"])
    return shown


def committed(job: JobFolder) -> int:
    """Return how many rows are committed."""
    return sum(len(commit) for commit in Ledger(staging(job)).commits())


def start(job: JobFolder, worker: str) -> subprocess.Popen[str]:
    """Start a worker, and wait until it holds a block."""
    process = job.start("--worker", worker)
    wait_for(process, lambda: process.pid in owners(job).values())
    return process


def signal_all(process: subprocess.Popen[str], signum: int) -> None:
    """Signal all processes of a command."""
    family = psutil.Process(process.pid)
    for member in [family, *family.children(recursive=True)]:
        member.send_signal(signum)


def check(job: JobFolder, whole: Path) -> None:
    assert (job.path / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()
    assert job.leftovers() == []


def test_one_command_does_all_by_leases(open_job: JobFolder, whole: Path) -> None:
    done = open_job.run("-Dnum_worker=2")

    assert done.returncode == 0, done.stderr
    check(open_job, whole)
    record = json.loads((open_job.path / "out.jsonl.evmp.json").read_bytes())
    assert (record["rows"], record["failed"], record["run"]["rows"]) == (N_ROWS, 1, N_ROWS)
    assert "keeper" not in record["run"]["stages"]
    assert "already done" in open_job.run("--worker", "3/9").stderr


def test_workers_come_and_go_while_the_job_goes_on(
    open_job: JobFolder, whole: Path, run_evmp: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    status = partial(run_evmp, "status", "--config", "job.yaml", cwd=open_job.path)
    assert status().stdout == f"{open_job.path}/out.jsonl: not begun\n"
    killed = start(open_job, "0/3")
    signal_all(killed, signal.SIGSTOP)  # so that it leaves the others something to do
    paused = start(open_job, "1/3")
    signal_all(paused, signal.SIGSTOP)
    kill(killed)
    seen = json.loads(status("--json").stdout)
    leaving = start(open_job, "2/3")
    leaving.send_signal(signal.SIGTERM)
    _, errors = leaving.communicate(timeout=SECONDS)
    refused = open_job.run("-DenableDynamicCluster=false", "--worker", "1/2")
    joined = open_job.start()  # with two workers of its own
    wait_for(joined, lambda: paused.pid not in owners(open_job).values())
    signal_all(paused, signal.SIGCONT)

    assert (seen["state"], seen["total"]) == ("unfinished", N_ROWS)
    assert seen["rows"] < N_ROWS
    assert {paused.pid, killed.pid} >= {worker["pid"] for worker in seen["workers"]}
    assert all(worker["n_blocks"] for worker in seen["workers"])
    assert leaving.returncode == 143, errors
    assert " rows were done here, the others are left to others; run " in errors.splitlines()[-1]
    assert "in other parts than of 2: worker " in refused.stderr
    for process in (joined, paused):
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, errors
    check(open_job, whole)
    done = f"{open_job.path}/out.jsonl: done\nrows      96 of 96 (100.0 %), 1 failed\n"
    assert status("--watch").stdout == done


def test_worker_that_comes_while_another_publishes_finds_the_job_done(
    open_job: JobFolder, whole: Path
) -> None:
    first = start(open_job, "0/2")
    with open(staging(open_job) / "lock.turn", "r+b") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        wait_for(first, lambda: committed(open_job) == N_ROWS)  # and now it wants to publish
        second = open_job.start("--worker", "1/2")
        wait_for(second, lambda: len(list(staging(open_job).glob("lock.any.*"))) == 2)

    for process in (first, second):
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, errors
    check(open_job, whole)


def is_hint(name: str) -> bool:
    return any(f".evmp/{folder}/" in name for folder in HINTS)


@pytest.mark.parametrize("unlisted", [0.0, pytest.param(2.0, marks=pytest.mark.slow)])
def test_machines_share_a_job_on_oss(
    open_job: JobFolder, whole: Path, monkeypatch: pytest.MonkeyPatch, unlisted: float
) -> None:
    """Also where lists are of an earlier moment; then a hint may stay."""
    monkeypatch.setenv("OSS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", KEY_SECRET)
    monkeypatch.setattr("ossserver.TROUBLES", (500, 503, "reset", "lose", "late"))
    machines = [open_job.path / name for name in ("tmp1", "tmp2")]  # they share nothing else
    for machine in machines:
        machine.mkdir()
    with serving_oss() as server:
        server.objects = {"out": {}}
        server.skew, server.trouble = 300.0, (random.Random(1), 0.02)
        server.unlisted = unlisted
        place = f"-DossHost={server.endpoint}", "-Doutput_oss_file=oss://out/result.jsonl"
        place += ("-Dread_timeout_seconds=1",)  # a late answer comes when the lease is over
        working = [open_job.start(*place, env={"TMPDIR": str(machine)}) for machine in machines]
        for process in working:
            _, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors

        assert server.objects["out"]["result.jsonl"] == (whole / "out.jsonl").read_bytes()
        left = {name for name in server.objects["out"] if not (unlisted and is_hint(name))}
        assert left == {"result.jsonl", "result.jsonl.evmp.json"}
        assert not any(upload.parts for upload in server.uploads.values())


@pytest.mark.slow
def test_blocks_of_killed_workers_are_leased_again_soon(
    job: JobFolder,
    make_table: Callable[..., Path],
    photo_file: Callable[..., bytes],
    make_tiny_model: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_table(job.path / "in.parquet", [photo_file("coffee", size=(60, 40))] * 4000)
    keys = {**DYNAMIC, "lease_seconds": 10, "block_rows": 4, "queue_size": 8, "num_worker": 1}
    job.write(model_path=str(make_tiny_model(steps=10_000)), batch_size=1, **keys)
    waits = []
    workers = [start(job, "0/2"), start(job, "1/2")]
    for _ in range(8):
        victim = workers.pop(0)
        workers.append(start(job, "0/2"))
        killed = time.time()
        kill(victim)
        held = [
            (unit[0], unit[2] + 1)
            for file in (staging(job) / "workers").glob("*")
            for unit in json.loads(file.read_text())["held"]
            if json.loads(file.read_text())["pid"] == victim.pid
        ]
        for start_row, generation in held:
            name = f"leases/*/{start_row:012d}.{generation:04d}"
            wait_for(workers[0], lambda name=name: any(staging(job).glob(name)))
            waits += [file.stat().st_mtime - killed for file in staging(job).glob(name)]

    waits.sort()
    with capsys.disabled():
        print(f"\n{len(waits)} blocks: median {waits[len(waits) // 2]:.1f} s, ", end="")
        print(f"worst {waits[-1]:.1f} s")
    assert waits[-1] < keys["lease_seconds"]
