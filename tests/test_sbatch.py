"""`evmp sbatch`: the scripts, what may be said, and how their loop treats a worker.

What Slurm makes of them is in test_slurm.py; here they are run by bash alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT

from evmp.errors import ConfigError, EvmpError
from evmp.job import Job
from evmp.sbatch import Kind, script

Run = Callable[..., subprocess.CompletedProcess[str]]
SHIPPED = sorted((ROOT / "config" / "slurm").glob("*.sbatch"))
# Draws up a list of its starts, and does at its n-th what the n-th argument says.
WORKER = """
import os, signal, sys, time
from pathlib import Path
starts = Path("starts")
n = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (n + 1))
does = sys.argv[1:][n]
if does == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    Path("ready").touch()
    time.sleep(60)
if does.startswith("-"):
    os.kill(os.getpid(), -int(does))
sys.exit(int(does))
"""


def make_script(kind: Kind = "array", *options: str, n_nodes: int = 4, **keys: object) -> str:
    job = Job.model_validate(
        {
            "model_path": "model",
            "model_type": "classifier",
            "input_table": "in.parquet",
            "output_oss_file": "out.jsonl",
            **keys,
        }
    )
    return script(job, kind, n_nodes, settings=["--config", "my job.yaml"], options=options)


def options_of(text: str) -> list[str]:
    return [it.removeprefix("#SBATCH ") for it in text.splitlines() if it.startswith("#SBATCH ")]


def test_array_has_an_element_for_each_node() -> None:
    options = options_of(make_script("array", cpuRequired=250, gpuRequired=150))

    for option in ("--array=0-3", "--nodes=1", "--cpus-per-task=2", "--gpus-per-node=2"):
        assert option in options
    assert "--requeue" in options
    assert "--signal=B:USR1@120" in options


def test_tasks_are_one_on_each_node() -> None:
    text = make_script("tasks", n_nodes=3)

    for option in ("--nodes=3", "--ntasks-per-node=1", "--no-kill", "--gpus-per-task=1"):
        assert option in options_of(text)
    assert 'worker=(srun --cpus-per-task="$SLURM_CPUS_PER_TASK" ' in text


def test_report_does_what_is_left_and_says_how_it_went() -> None:
    text = make_script("report")

    assert "array" not in text
    assert "worker=(evmp --config 'my job.yaml' -Dnum_worker=1)" in text
    assert text.endswith("""fi\nevmp status --config 'my job.yaml'\nexit "$code"\n""")


@pytest.mark.parametrize("keys", [{"device": "cpu"}, {"gpuRequired": 0}])
def test_worker_on_cpus_asks_for_no_gpu(keys: dict[str, object]) -> None:
    assert "gpu" not in " ".join(options_of(make_script(**keys)))


def test_options_of_sbatch_come_last_and_are_quoted() -> None:
    text = make_script("array", "--time", "4:00:00", "--comment=it's # 1")

    assert options_of(text)[-2:] == ["--time 4:00:00", """'--comment=it'"'"'s # 1'"""]
    assert "worker=(evmp --config 'my job.yaml')" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("4:00:00",), "4:00:00: expected an option, such as --time=4:00:00"),
        (("--comment=a\nrm -r .",), "not printable"),
        (("--array=0-9",), "--array=0-9: say it with --nodes"),
        (("--arr", "0-9"), "--arr: say it with --nodes"),
        (("--array=0-9%2",), "--array=0-3%2 would let two run at once"),
        (("--array=0-3%0",), "say it with --nodes"),
        (("-a", "0-9"), "-a: say it with --nodes"),
        (("-a0-9",), "-a0-9: say it with --nodes"),
        (("-Ha0-9",), "-Ha0-9: say it with --nodes"),
    ],
)
def test_option_that_cannot_stand_in_a_script_is_refused(
    options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_script("array", *options)


@pytest.mark.parametrize("option", [("--array=0-3%2",), ("--ar", "0-3%2"), ("-a0-3%2",)])
def test_throttle_is_the_arrays_and_not_the_reports(option: tuple[str, ...]) -> None:
    options = (*option, "--account=a", "-Jarray")

    assert options_of(make_script("array", *options))[-3] == " ".join(option)
    assert options_of(make_script("report", *options))[-3:] == [
        "--signal=B:USR1@120",
        "--account=a",
        "-Jarray",
    ]


@pytest.mark.parametrize("kind", ["array", "tasks", "report"])
def test_one_node_has_one_worker(kind: Kind) -> None:
    text = make_script(kind, n_nodes=1, num_worker=3)

    assert "evmp --config 'my job.yaml' -Dnum_worker=1)" in text


def test_command_prints_the_shipped_scripts(run_evmp: Run) -> None:
    assert len(SHIPPED) == 4
    for file in SHIPPED:
        call = file.read_text().splitlines()[2].removeprefix("#   evmp ").split()
        done = run_evmp(*call, cwd=ROOT)

        own = f"{sys.executable} -m evmp"
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.replace(own, "evmp") == file.read_text()
        subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


def test_bad_job_is_told_before_anything_is_submitted(run_evmp: Run, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("batch_sise: 3")

    done = run_evmp("sbatch", "--config", "job.yaml", "--submit", cwd=tmp_path)

    assert done.returncode == 2
    assert "did you mean batch_size?" in done.stderr


def test_machine_without_sbatch_is_told(run_evmp: Run, tmp_path: Path) -> None:
    call = ("sbatch", "--config", ROOT / "config/demo.yaml", "--submit")

    done = run_evmp(*call, cwd=tmp_path, env={"PATH": str(tmp_path)})

    assert done.returncode == 2
    assert "sbatch cannot be started: No such file or directory; submit from a" in done.stderr


class Loop:
    """A script in a folder, whose worker does what it is told; `scontrol` writes down its call."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "worker.py").write_text(WORKER)
        (folder / "scontrol").write_text('#!/bin/sh\necho "$*" >> calls\n')
        (folder / "scontrol").chmod(0o755)

    def start(self, *does: str, **variables: str) -> subprocess.Popen[str]:
        lines = make_script().splitlines()
        (place,) = (n for n, line in enumerate(lines) if line.startswith("worker=("))
        lines[place] = f"worker=({sys.executable} worker.py {' '.join(does)})"
        path = f"{self._folder}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", "-c", "\n".join(lines)],
            cwd=self._folder,
            env={**os.environ, "PATH": path, "SLURM_JOB_ID": "7", **variables},
            stderr=subprocess.PIPE,
            text=True,
        )

    def told(self, signum: int, *does: str, **variables: str) -> int:
        """Send the script a signal once the worker runs. Returns its exit code."""
        process = self.start(*does, **variables)
        while not (self._folder / "ready").exists():
            assert process.poll() is None
        process.send_signal(signum)
        if signum == signal.SIGTERM:  # Slurm tells all processes of a job
            for child in psutil.Process(process.pid).children():
                child.terminate()
        process.communicate(timeout=60)
        return process.returncode

    @property
    def n_starts(self) -> int:
        return len((self._folder / "starts").read_text())

    @property
    def calls(self) -> str:
        """What scontrol was called with."""
        file = self._folder / "calls"
        return file.read_text() if file.exists() else ""


@pytest.fixture
def loop(tmp_path: Path) -> Loop:
    return Loop(tmp_path)


@pytest.mark.parametrize("code", [0, 1, 3])
def test_worker_that_ends_by_itself_is_not_started_again(loop: Loop, code: int) -> None:
    process = loop.start(str(code))
    process.communicate(timeout=60)

    assert (process.returncode, loop.n_starts, loop.calls) == (code, 1, "")


def test_killed_worker_is_started_again(loop: Loop) -> None:
    process = loop.start("-9", "-11", "0")
    errors = process.communicate(timeout=60)[1]

    assert (process.returncode, loop.n_starts, loop.calls) == (0, 3, "")
    assert "evmp: killed, 137; again\n" in errors
    assert "evmp: killed, 139; again\n" in errors


def test_worker_whose_time_is_over_is_asked_to_end_and_requeued(loop: Loop) -> None:
    assert loop.told(signal.SIGUSR1, "wait") == 143
    assert (loop.n_starts, loop.calls) == (1, "requeue 7\n")


def test_worker_that_is_requeued_forever_is_given_up(loop: Loop) -> None:
    assert loop.told(signal.SIGUSR1, "wait", SLURM_RESTART_COUNT="1000") == 143
    assert (loop.n_starts, loop.calls) == (1, "")


def test_worker_that_slurm_ends_is_neither_started_nor_requeued(loop: Loop) -> None:
    assert loop.told(signal.SIGTERM, "wait") == 143
    assert (loop.n_starts, loop.calls) == (1, "")


def test_kubernetes_job_of_the_docs_starts_as_many_workers_as_the_job_has() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text("utf-8")
    spec = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    workers = f"-Dnum_worker={spec['completions']}"

    assert container["command"] == ["evmp", "--config", "job.yaml", workers]
    codes = {error.exit_code for error in (EvmpError, *EvmpError.__subclasses__())}
    assert set(spec["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]) == codes
