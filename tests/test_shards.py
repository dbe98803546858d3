"""Workers that have a command each, in one staging place: static shards, and who publishes."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from jobfolder import SECONDS, JobFolder, kill, wait_for

N_ROWS = 96


@pytest.fixture(scope="module")
def whole(undisturbed_job: Callable[..., Path]) -> Path:
    """The folder of a slow job that one command has done."""
    return undisturbed_job(N_ROWS, steps=400, block_rows=8)


@pytest.fixture
def shared_job(job: JobFolder, whole: Path) -> JobFolder:
    """The job of `whole`, to be done by several commands elsewhere."""
    (job.path / "job.yaml").write_bytes((whole / "job.yaml").read_bytes())
    return job


def starts(job: JobFolder) -> list[int]:
    """Return where the committed blocks begin."""
    return [int(file.stem) for file in (job.path / "out.jsonl.evmp" / "blocks").glob("*.json")]


def stop(process: subprocess.Popen[str]) -> None:
    """Stop all processes of a command."""
    family = psutil.Process(process.pid)
    for member in [family, *family.children(recursive=True)]:
        member.send_signal(signal.SIGSTOP)


def check(job: JobFolder, whole: Path) -> None:
    assert (job.path / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()
    assert job.leftovers() == []


def last_line(process: subprocess.Popen[str]) -> str:
    return str(process.communicate(timeout=SECONDS)[1].splitlines()[-1])


def test_workers_with_a_command_each_make_the_same_result(
    shared_job: JobFolder, whole: Path
) -> None:
    first, second, third = (shared_job.start("--worker", f"{k}/3") for k in range(3))
    wait_for(second, lambda: any(32 <= start < 64 for start in starts(shared_job)))
    stop(second)
    same = shared_job.run("--worker", "1/3")
    whole_job = shared_job.run()
    other_size = shared_job.run("--worker", "1/4")
    kill(second)

    assert same.returncode == whole_job.returncode == other_size.returncode == 3
    for refused in (same, whole_job):
        assert "another run works on this output: worker " in refused.stderr
        assert "worker 1 of 3, " in refused.stderr
        assert f"process {second.pid}, since " in refused.stderr
    assert "in other parts than of 4: worker " in other_size.stderr
    for process, k in ((first, 0), (third, 2)):
        line = last_line(process)
        assert process.returncode == 0
        assert line.startswith(f"evmp: worker {k} of 3 is done: 32 rows, ")
        assert line.endswith("; the last worker to finish makes the result")
    assert not (shared_job.path / "out.jsonl").exists()
    n_kept = sum(32 <= start < 64 for start in starts(shared_job))

    again = shared_job.run("--worker", "1/3")

    assert again.returncode == 0
    assert f"resuming: {8 * n_kept} of 32 rows are done" in again.stderr
    assert again.stderr.splitlines()[-1].startswith(f"evmp: done: {N_ROWS} rows, 1 failed, ")
    check(shared_job, whole)
    record = json.loads((shared_job.path / "out.jsonl.evmp.json").read_bytes())
    assert (record["rows"], record["failed"]) == (N_ROWS, 1)
    assert record["run"]["rows"] == 32 - 8 * n_kept
    assert "already done" in shared_job.run("--worker", "0/3").stderr


def test_slurm_starts_workers_and_one_command_may_finish_for_all(
    shared_job: JobFolder, whole: Path
) -> None:
    element = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}
    stopped = shared_job.start(env={**element, "SLURM_ARRAY_TASK_ID": "3"})
    wait_for(stopped, lambda: starts(shared_job))
    stopped.send_signal(signal.SIGTERM)
    assert last_line(stopped).startswith("evmp: stopped by SIGTERM, ")
    assert stopped.returncode == 143
    assert min(starts(shared_job)) >= 64

    done = shared_job.run()

    assert done.returncode == 0
    assert "resuming: " in done.stderr
    check(shared_job, whole)


@pytest.mark.parametrize("option", ["--fresh", "--retry-failed"])
def test_what_is_of_the_whole_job_is_refused_to_one_worker(
    shared_job: JobFolder, option: str
) -> None:
    refused = shared_job.run(option, "--worker", "0/2")

    assert refused.returncode == 2
    assert "are for the whole job, and this is worker 0 of 2; add --worker 0/1" in refused.stderr
    assert shared_job.leftovers() == []
