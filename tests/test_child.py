"""A call in a process of its own: its value, its error, its death, and nothing else come back."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from evmp.child import call_in_child
from evmp.errors import ConfigError, Interrupted, Problem, SourceError, WorkerDied


def test_value_comes_back() -> None:
    value = call_in_child(lambda: {"pid": os.getpid(), "blob": bytes(1 << 20)})

    assert value["pid"] != os.getpid()
    assert value["blob"] == bytes(1 << 20)


def test_what_it_imports_does_not_stay() -> None:
    def work() -> bool:
        import turtledemo  # noqa: F401

        return "turtledemo" in sys.modules

    assert call_in_child(work)
    assert "turtledemo" not in sys.modules


def test_error_comes_back_as_what_it_is() -> None:
    def work() -> None:
        raise SourceError("in.parquet does not exist")

    with pytest.raises(SourceError, match=r"^in\.parquet does not exist$"):
        call_in_child(work)


def test_problems_of_a_job_come_back_each() -> None:
    def work() -> None:
        raise ConfigError(Problem("got 0", "batch_size", "job.yaml", 3), "another")

    with pytest.raises(ConfigError) as caught:
        call_in_child(work)

    assert str(caught.value) == "job.yaml:3: batch_size: got 0\nanother"
    assert len(caught.value.problems) == 2


def test_signal_comes_back_as_what_it_is() -> None:
    def work() -> None:
        raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM") as caught:
        call_in_child(work)

    assert caught.value.exit_code == 143


def test_bug_in_it_is_told_with_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerDied, match="exit code 70"):
        call_in_child(lambda: 1 // 0)

    assert "ZeroDivisionError" in capfd.readouterr().err


def test_death_is_told() -> None:
    with pytest.raises(WorkerDied, match="SIGKILL"):
        call_in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_interrupted_parent_leaves_no_child(tmp_path: Path) -> None:
    flag = tmp_path / "forked"

    def interrupt(signum: int, frame: object) -> None:
        raise Interrupted(signum)

    def work() -> None:
        # Python drops what a handler raises while the hooks of a fork still run.
        while not flag.exists():
            time.sleep(0.001)
        os.kill(os.getppid(), signal.SIGUSR1)
        signal.pause()

    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(Interrupted):
            call_in_child(work, flag.touch)
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_parent_works_meanwhile(tmp_path: Path) -> None:
    flag = tmp_path / "flag"

    def wait_for_flag() -> str:
        while not flag.exists():
            time.sleep(0.001)
        return "seen"

    assert call_in_child(wait_for_flag, flag.touch) == "seen"


def test_failure_meanwhile_ends_the_child() -> None:
    with pytest.raises(ZeroDivisionError):
        call_in_child(lambda: time.sleep(600), lambda: 1 // 0)


def test_death_in_the_middle_of_its_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def send(pipe: int, answer: bytes) -> None:
        os.write(pipe, answer[:-1])
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("evmp.child._send", send)

    with pytest.raises(WorkerDied, match="SIGKILL"):
        call_in_child(lambda: "a value")


def test_signal_to_the_child_is_its_parents_to_answer() -> None:
    def work() -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return "done"

    assert call_in_child(work) == "done"


def test_parent_hears_signals_as_before() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])

    call_in_child(lambda: None)

    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_child_that_somebody_has_stopped_is_killed() -> None:
    with pytest.raises(WorkerDied, match="a helper process died: SIGKILL"):
        call_in_child(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def test_signal_that_comes_with_the_fork_ends_the_parent_alone() -> None:
    parent, fork = os.getpid(), os.fork

    def interrupt(signum: int, frame: object) -> None:
        raise Interrupted(signum)

    def fork_and_signal() -> int:
        pid = fork()
        # To this thread: what other tests have imported may have started some that block nothing.
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        return pid

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr("evmp.child.os.fork", fork_and_signal)
            call_in_child(signal.pause)
    finally:
        if os.getpid() != parent:
            os._exit(1)
        signal.signal(signal.SIGTERM, previous)
