"""The command as people meet it: what it prints, where, and the code that it exits with."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import COMMAND, ROOT
from jobfolder import JobFolder

from evmp import __version__

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def table_job(
    job: JobFolder, make_table: Callable[..., Path], photo_file: Callable[..., bytes]
) -> JobFolder:
    """A small job; one row in ten is bad."""
    images: list[bytes | str] = [photo_file("coffee", size=(60, 40))] * 40
    images[::10] = ["no Base64"] * 4
    make_table(job.path / "in.parquet", images)
    job.write()
    return job


def test_help_has_examples_and_exit_codes(run_evmp: Run) -> None:
    done = run_evmp("--help")

    assert done.returncode == 0
    assert done.stderr == ""
    assert "Usage: evmp [OPTIONS]" in done.stdout
    for part in ("--check", "--fresh", "--quiet", "-D KEY=VALUE", "--version"):
        assert part in done.stdout
    assert "evmp --config job.yaml -Dbatch_size=32" in done.stdout
    assert "2 bad job file or arguments    130, 143 stopped by a signal" in done.stdout


def test_version_is_one_line(run_evmp: Run) -> None:
    done = run_evmp("--version")

    assert (done.returncode, done.stdout, done.stderr) == (0, f"evmp {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing option '--config'"),
        (("--config", "job.yaml", "--chek"), "No such option"),
        (("--config", "job.yaml", "more"), "No such command 'more'"),
        (("--config", "job.yaml", "export", "a.onnx", "b"), "--config does not go with export"),
    ],
)
def test_wrong_arguments_are_2(run_evmp: Run, arguments: tuple[str, ...], message: str) -> None:
    done = run_evmp(*arguments)

    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr


def test_summary_ends_with_what_happened(table_job: JobFolder) -> None:
    done = table_job.run()

    assert done.returncode == 0
    assert done.stdout == ""
    lines = done.stderr.splitlines()[-7:]
    assert lines[0].split() == ["stage", "n", "rows", "failed", "MB", "busy", "waited", "restarts"]
    assert [line.split()[0] for line in lines[1:5]] == ["reader", "decoder", "predictor", "writer"]
    assert lines[5].startswith("evmp: failed: 4 x not Base64: ")
    assert lines[5].endswith(" (first in row 0; decode)")
    last = r"evmp: done: 40 rows, 4 failed, \d+\.\d s, \d+\.\d rows/s; result in out\.jsonl"
    assert re.fullmatch(last, lines[6])


def test_quiet_job_with_overrides_says_nothing_when_all_went_well(table_job: JobFolder) -> None:
    overrides = "-Dtop_k=3", "-Dtop_k=1", "-Doutput_oss_file=a b.jsonl", "-Dreserved_columns=image"

    done = table_job.run(*overrides, "--quiet")

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    rows = table_job.rows("a b.jsonl")
    assert len(rows) == 40
    assert list(rows[1]) == ["image", "prediction_result"]
    assert len(rows[1]["prediction_result"]["class_probs"]) == 1  # The last override wins.
    again = table_job.run(*overrides)
    assert again.stderr.endswith(
        "evmp --config job.yaml -Dtop_k=3 -Dtop_k=1 '-Doutput_oss_file=a b.jsonl' "
        "-Dreserved_columns=image --fresh does it again\n"
    )


def test_check_prints_the_plan_and_writes_nothing(table_job: JobFolder) -> None:
    before = sorted(table_job.path.iterdir())

    done = table_job.run("--check", "-Dnum_worker=2", "-Dblock_rows=7")

    assert (done.returncode, done.stderr) == (0, "")
    plan = {line.split()[0]: line.partition(" ")[2].strip() for line in done.stdout.splitlines()}
    assert plan["input"] == "in.parquet: 40 rows"
    assert "model.onnx: classifier, 32 x 32, stretch, bilinear" in plan["model"]
    assert plan["output"] == str(table_job.path / "out.jsonl")
    assert plan["blocks"] == "6 of up to 7 rows"
    assert plan["workers"].startswith("2, each 1 reader, 2 decoders, 1 predictors (CPU")
    assert plan["first"].startswith('row    FAILED: {"error_stage":"decode"')
    assert sorted(table_job.path.iterdir()) == before


def test_check_finds_what_a_run_would_find(table_job: JobFolder) -> None:
    done = table_job.run("--check", "-Dmodel_path=in.parquet")

    assert done.returncode == 3
    assert done.stdout == ""
    assert "expected a directory or a *.pt, *.pt2 or *.onnx file" in done.stderr


def test_bug_is_70_and_says_that_it_is_one(table_job: JobFolder) -> None:
    code = (
        "import evmp.cli, evmp.plan\n"
        "evmp.plan.make_plan = lambda *_: 1 // 0\n"
        "evmp.cli.main(['--config', 'job.yaml'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=table_job.path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 70
    assert "ZeroDivisionError" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"evmp: evmp {__version__} has a bug; ")


# --- progress -------------------------------------------------------------------------------------


@pytest.fixture
def long_job(
    job: JobFolder,
    make_table: Callable[..., Path],
    photo_file: Callable[..., bytes],
    make_tiny_model: Callable[..., Path],
) -> JobFolder:
    """A job of some seconds."""
    make_table(job.path / "in.parquet", [photo_file("coffee", size=(60, 40))] * 300)
    job.write(model_path=str(make_tiny_model(steps=1000)), block_rows=20)
    return job


def test_plain_lines_come_where_there_is_no_terminal(long_job: JobFolder) -> None:
    done = long_job.run()

    assert done.returncode == 0
    line = re.compile(
        r"\d+/300 rows \(\d+\.\d %\), \d+\.\d rows/s, ETA (--:--|\d\d:\d\d), 0 failed, "
        r"queues payloads \d+ % pixels \d+ % results \d+ %, (bottleneck|starting): .*\n"
    )
    assert line.match(done.stderr)
    assert "\x1b" not in done.stderr


class Terminal:
    """evmp on a terminal of its own, 100 columns wide."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        command = [*COMMAND, *arguments]
        variables = {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            try:
                os.chdir(cwd)
                os.execvpe(command[0], command, {**os.environ, **variables})
            finally:
                os._exit(127)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def read_until(self, text: str | None) -> None:
        """Read until the screen has shown `text`, or to the end."""
        deadline = time.monotonic() + 60.0
        while text is None or text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            try:
                self.shown += os.read(self._fd, 1 << 16).decode()
            except OSError:  # EIO: the last process has closed the terminal.
                assert text is None, self.shown
                return

    def end(self) -> int:
        """Read to the end. Returns the exit code."""
        self.read_until(None)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def open_terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: str, cwd: Path) -> Terminal:
        opened.append(Terminal(*arguments, cwd=cwd))
        return opened[-1]

    yield open_terminal
    for terminal in opened:
        terminal.close()


def test_terminal_shows_a_live_display(
    long_job: JobFolder, open_terminal: Callable[..., Terminal]
) -> None:
    terminal = open_terminal("--config", "job.yaml", cwd=long_job.path)

    assert terminal.end() == 0
    assert terminal.shown.count("\x1b[2K") > 10  # redrawn in place
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.shown)
    assert "of 300 rows" in text
    assert "bottleneck: predictor" in text
    assert re.search(r"decoder \d+ % *→[█·]+→ *predictor \d+ %", text)
    assert "evmp: done: 300 rows" in text


def test_ctrl_c_on_a_terminal_drains_and_twice_stops(
    long_job: JobFolder, open_terminal: Callable[..., Terminal]
) -> None:
    for number, text in enumerate(["\x03", "\x03"]):
        terminal = open_terminal("--config", "job.yaml", cwd=long_job.path)
        terminal.read_until("bottleneck: predictor")
        terminal.type(text)
        terminal.read_until("once more stops at once")
        if number:
            terminal.type(text)

        assert terminal.end() == 128 + signal.SIGINT
        assert re.search(r"evmp: stopped by SIGINT, \d+ of 300 rows are done", terminal.shown)
    assert "resuming: " in terminal.shown


def test_interrupt_while_the_command_starts_ends_it_quietly(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    done = subprocess.run([*COMMAND, "--version"], env=environment, capture_output=True, text=True)

    assert done.returncode == -signal.SIGINT
    assert (done.stdout, done.stderr) == ("", "")
