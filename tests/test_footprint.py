"""The check that every test is under finds what it should find."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from footprint import Footprint, kill_left, left_behind

SLEEP = "import time; time.sleep(60)"
ORPHAN = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}])"


def test_nothing_left_is_an_empty_list() -> None:
    assert left_behind(Footprint()) == []


def test_forked_child_is_named_and_killed() -> None:
    before = Footprint()
    pid = os.fork()
    if pid == 0:
        signal.pause()

    left = left_behind(before, seconds=0)
    kill_left(before)

    assert len(left) == 1 and f"pid={pid}" in left[0]
    assert left_behind(before) == []


def test_orphan_of_a_dead_parent_is_found() -> None:
    before = Footprint()
    subprocess.run([sys.executable, "-c", ORPHAN], check=True)

    left = left_behind(before, seconds=0)
    kill_left(before)

    assert len(left) == 1
    assert left_behind(before) == []


def test_open_file_and_shared_memory_are_named(tmp_path: Path) -> None:
    before = Footprint()
    shared = Path("/dev/shm") / f"evmp-test-{os.getpid()}"
    shared.touch()
    with open(tmp_path / "open.txt", "w"):
        left = left_behind(before, seconds=0)
    shared.unlink()

    assert left == [str(shared), f"open file {tmp_path / 'open.txt'}"]
    assert left_behind(before) == []
