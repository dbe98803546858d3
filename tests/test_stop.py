"""Stopping, killing, resuming: a job that ends early goes on later, and no byte shows it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from jobfolder import SECONDS, JobFolder, kill, wait_for

N_ROWS = 160


@pytest.fixture(scope="module")
def whole(undisturbed_job: Callable[..., Path]) -> Path:
    """The folder of a slow job that nobody disturbed."""
    return undisturbed_job(N_ROWS, steps=400, block_rows=8)


@pytest.fixture
def slow_job(job: JobFolder, whole: Path) -> JobFolder:
    """The job of `whole`, to be run again elsewhere."""
    (job.path / "job.yaml").write_bytes((whole / "job.yaml").read_bytes())
    return job


def rewrite(job: JobFolder, **keys: object) -> None:
    """Change keys of job.yaml."""
    file = job.path / "job.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **keys}))


def n_commits(job: JobFolder) -> int:
    return len(list((job.path / "out.jsonl.evmp" / "blocks").glob("*.json")))


def start_and_wait(job: JobFolder, commits: int = 2) -> subprocess.Popen[str]:
    """Start a job, and wait until it has committed some blocks, but not all."""
    process = job.start()
    wait_for(process, lambda: n_commits(job) >= commits)
    return process


def find(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    """Return the processes of a job whose name, as `ps` shows it, is `evmp <name>`."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:  # It may be gone already.
            if Path(f"/proc/{child.pid}/comm").read_text().startswith(f"evmp {name}"):
                found.append(child)
        except OSError:
            continue
    return found


def finish(job: JobFolder, whole: Path) -> str:
    """Run the job to its end, and compare its result. Returns what it said."""
    done = job.run()
    assert done.returncode == 0, done.stderr
    check(job, whole)
    return done.stderr


def check(job: JobFolder, whole: Path) -> None:
    assert (job.path / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()
    assert job.leftovers() == []


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_commits_what_is_in_flight(slow_job: JobFolder, whole: Path, signum: int) -> None:
    process = start_and_wait(slow_job)
    process.send_signal(signum)
    output, errors = process.communicate(timeout=SECONDS)

    assert process.returncode == 128 + signum
    assert output == ""
    assert "stopping: finishing what is in flight; once more stops at once\n" in errors
    last = errors.splitlines()[-1]
    name = signal.Signals(signum).name
    assert last.startswith(f"evmp: stopped by {name}, ")
    done = f" of {N_ROWS} rows are done, 1 of them failed"
    assert last.endswith(f"{done}; run the same command again to go on")
    assert not (slow_job.path / "out.jsonl").exists()
    n_done = int(last.split(", ")[1].split()[0])
    assert 16 <= n_done < N_ROWS

    assert f"resuming: {n_done} of {N_ROWS} rows are done\n" in finish(slow_job, whole)
    record = json.loads((slow_job.path / "out.jsonl.evmp.json").read_bytes())
    assert (record["rows"], record["failed"]) == (N_ROWS, 1)
    assert record["run"]["rows"] == N_ROWS - n_done
    assert [failure["first_row"] for failure in record["failures"]] == [7]


def test_second_signal_stops_at_once(slow_job: JobFolder, whole: Path) -> None:
    process = start_and_wait(slow_job)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)  # Linux merges signals that are still pending.
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=SECONDS)

    assert process.returncode == 130
    assert "once more stops at once" in errors
    assert "evmp: stopped by SIGINT, " in errors
    finish(slow_job, whole)


def test_drain_has_its_time_and_what_is_written_by_then_is_kept(
    slow_job: JobFolder, whole: Path
) -> None:
    rewrite(slow_job, drain_seconds=0, block_rows=100)
    process = slow_job.start()
    wait_for(process, lambda: any((slow_job.path / "out.jsonl.evmp" / "tmp").glob("*.0*")))
    process.send_signal(signal.SIGUSR1)  # as Slurm may announce the end
    _, errors = process.communicate(timeout=SECONDS)

    assert process.returncode == 143, errors
    assert "what is in flight takes longer than drain_seconds: left\n" in errors
    assert errors.splitlines()[-1].startswith("evmp: stopped by SIGTERM, ")
    n_done = int(errors.splitlines()[-1].split(", ")[1].split()[0])
    assert 0 < n_done < 100
    assert f"resuming: {n_done} of {N_ROWS} rows are done\n" in finish(slow_job, whole)


def test_signal_to_every_process_is_as_good(slow_job: JobFolder) -> None:
    process = start_and_wait(slow_job)
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a helper that has done its work
            child.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=SECONDS)

    assert process.returncode == 143, errors
    assert f" of {N_ROWS} rows are done" in errors


def test_signal_before_the_first_row_leaves_nothing(slow_job: JobFolder) -> None:
    process = slow_job.start()
    wait_for(process, lambda: find(process, "zygote"))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=SECONDS)

    assert process.returncode == 130
    assert f"stopped by SIGINT, 0 of {N_ROWS} rows are done" in errors
    assert sorted(path.name for path in slow_job.path.iterdir()) == ["job.yaml"]


def test_signal_while_the_job_is_planned_is_no_bug(slow_job: JobFolder) -> None:
    process = slow_job.start()
    wait_for(process, lambda: psutil.Process(process.pid).children())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=SECONDS)

    assert process.returncode == 143, errors
    assert "Traceback" not in errors


def test_signal_to_one_worker_costs_nothing(slow_job: JobFolder, whole: Path) -> None:
    process = start_and_wait(slow_job)
    find(process, "worker")[0].send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=SECONDS)

    assert process.returncode == 0, errors
    check(slow_job, whole)


# --- kill -9 --------------------------------------------------------------------------------------


def test_killed_processes_are_replaced(
    slow_job: JobFolder, whole: Path, make_tiny_model: Callable[..., Path]
) -> None:
    rewrite(slow_job, model_path=str(make_tiny_model(steps=2000)))
    process = start_and_wait(slow_job)
    for name in ("reader", "decoder", "writer", "predict", "zygote"):
        (victim, *_) = find(process, name)
        victim.kill()
        wait_for(process, lambda name=name, it=victim: {*find(process, name)} - {it})
    _, errors = process.communicate(timeout=SECONDS)

    assert process.returncode == 0, errors
    for name in ("reader[0]", "decoder[0]", "writer[0]", "predictor[0]", "zygote[0]"):
        assert f"{name} died (SIGKILL, out of memory?) and is started again\n" in errors
    check(slow_job, whole)


def test_killed_worker_is_replaced_with_all_its_processes(slow_job: JobFolder, whole: Path) -> None:
    process = start_and_wait(slow_job)
    (worker,) = find(process, "worker")
    stages = worker.children(recursive=True)
    worker.kill()
    _, errors = process.communicate(timeout=SECONDS)

    assert process.returncode == 0, errors
    assert "warning: worker[0] died (SIGKILL, out of memory?) and is started again\n" in errors
    assert "worker[0] goes on from its last commit\n" in errors
    assert [stage for stage in stages if stage.is_running()] == []
    check(slow_job, whole)


def test_killed_job_takes_its_processes_along_and_resumes(slow_job: JobFolder, whole: Path) -> None:
    process = start_and_wait(slow_job)
    assert len(find(process, "")) == 7

    assert kill(process) == []

    assert not (slow_job.path / "out.jsonl").exists()
    assert "resuming: " in finish(slow_job, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_job_killed_here_and_there_ends_with_the_same_bytes(
    slow_job: JobFolder, whole: Path, seed: int
) -> None:
    chance = random.Random(seed)
    rewrite(slow_job, num_worker=1 + seed % 3)
    for _ in range(6):
        process = slow_job.start()
        deadline = time.monotonic() + chance.uniform(1.0, 6.0)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(chance.uniform(0.05, 0.8))
            for victim in find(process, "")[chance.randrange(8) :][:1]:
                victim.kill()
        if process.poll() is None:
            kill(process)

    done = slow_job.run()
    assert done.returncode == 0, done.stderr
    check(slow_job, whole)


@pytest.mark.slow
def test_row_that_hangs_every_predictor_costs_only_itself(
    job: JobFolder,
    make_table: Callable[..., Path],
    photo_file: Callable[..., bytes],
    trouble_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32), "white").save(tmp_path / "white.png")
    good = photo_file("coffee", size=(60, 40))
    make_table(tmp_path / "in.parquet", [good] * 5 + [(tmp_path / "white.png").read_bytes(), good])
    rows = job.do(model_path=str(trouble_model("Endless")), batch_size=4, stall_timeout_seconds=8)

    results = [row["prediction_result"] for row in rows]
    assert results[5]["error_msg"] == "the predictor died of this row: hung"
    assert all("class" in result for result in results[:5] + results[6:])


@pytest.mark.slow
def test_model_that_kills_every_predictor_ends_the_job(
    job: JobFolder,
    make_table: Callable[..., Path],
    photo_file: Callable[..., bytes],
    trouble_model: Callable[..., Path],
) -> None:
    make_table(job.path / "in.parquet", [photo_file("coffee", size=(60, 40))])
    job.write(model_path=str(trouble_model("Stillborn")))

    done = job.run(timeout=200)

    assert done.returncode == 4
    assert "evmp: gave up: predictor[0] died 10 times without progress" in done.stderr


# --- again ----------------------------------------------------------------------------------------


def test_finished_job_is_not_done_again(slow_job: JobFolder, whole: Path) -> None:
    rewrite(slow_job, output_oss_file=str(whole / "out.jsonl"))
    before = (whole / "out.jsonl").stat()

    done = slow_job.run()
    quiet = slow_job.run("--quiet")

    assert done.returncode == quiet.returncode == 0
    assert done.stderr == (
        f"evmp: already done: {N_ROWS} rows, 1 failed, in {whole / 'out.jsonl'}; "
        "evmp --config job.yaml --fresh does it again\n"
    )
    assert quiet.stderr == quiet.stdout == ""
    assert (whole / "out.jsonl").stat() == before


def test_finished_job_that_keeps_its_staging_place_is_not_done_again(
    slow_job: JobFolder, whole: Path
) -> None:
    rewrite(slow_job, keep_staging=True)
    assert slow_job.run().returncode == 0

    again = slow_job.run()

    assert again.returncode == 0
    assert "already done" in again.stderr
    assert n_commits(slow_job) == N_ROWS // 8


def test_fresh_forgets_what_was_done_and_replaces_a_result_in_one_step(
    slow_job: JobFolder, whole: Path
) -> None:
    process = start_and_wait(slow_job)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=SECONDS)
    old = slow_job.path / "out.jsonl"
    old.write_text("old\n")

    process = slow_job.start("--fresh")
    wait_for(process, lambda: n_commits(slow_job) == 0)
    wait_for(process, lambda: n_commits(slow_job) >= 2)
    assert old.read_text() == "old\n"
    _, errors = process.communicate(timeout=SECONDS)

    assert process.returncode == 0
    assert "resuming" not in errors
    check(slow_job, whole)


def test_other_job_may_not_go_on_with_it(slow_job: JobFolder, whole: Path) -> None:
    table = slow_job.path / "in.parquet"
    table.write_bytes((whole / "in.parquet").read_bytes())
    rewrite(slow_job, input_table="in.parquet")
    process = start_and_wait(slow_job)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=SECONDS)
    done_before, modified = n_commits(slow_job), table.stat().st_mtime_ns

    other_job = slow_job.run("-Dtop_k=2")
    os.utime(table, (0, 0))
    other_input = slow_job.run()
    os.utime(table, ns=(modified, modified))

    assert other_job.returncode == other_input.returncode == 2
    assert other_job.stderr.startswith("evmp: bad job: ")
    assert "job.top_k: 0 then, 2 now" in other_job.stderr
    assert "--fresh" in other_job.stderr
    assert "input.files[0].mtime_ns: " in other_input.stderr
    assert n_commits(slow_job) == done_before
    # What changes no result may change.
    speed = "-Dnum_worker=3", "-Dbatch_size=5", "-Dblock_rows=10"
    assert slow_job.run(*speed).returncode == 0
    check(slow_job, whole)


def test_second_run_at_the_same_time_is_refused(slow_job: JobFolder, whole: Path) -> None:
    first = start_and_wait(slow_job, commits=1)
    first.send_signal(signal.SIGSTOP)  # so that it cannot have finished before the second is there

    second = slow_job.run()

    first.send_signal(signal.SIGCONT)
    assert second.returncode == 3
    assert "another run works on this output: " in second.stderr
    assert f"process {first.pid}, since" in second.stderr
    first.communicate(timeout=SECONDS)
    assert first.returncode == 0
    check(slow_job, whole)
