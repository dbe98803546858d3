"""What a test could leave behind: processes, shared memory, open files.

A test takes a `Footprint` before and asks `left_behind` after. Processes count as ours when they
are children of this process, when they carry the mark that this module puts into the environment
(it survives exec and the death of the parent), or when they were forked from this process and never
exec'ed, so that their command line and session are its own.
"""

from __future__ import annotations

import gc
import os
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MARK = f"EVMP_TEST_RUN={uuid.uuid4().hex}"
os.environ.update([MARK.split("=")])

STRAGGLER_SECONDS = 5.0
"""How long the dying may take; an idle machine needs a few milliseconds."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What existed at one moment, on this machine or in this process."""

    pids: frozenset[int] = field(default_factory=lambda: frozenset(psutil.pids()))
    shm: frozenset[str] = field(default_factory=lambda: frozenset(os.listdir("/dev/shm")))
    files: Counter[str] = field(default_factory=lambda: open_files())


def open_files() -> Counter[str]:
    """Count the targets of this process's file descriptors, devices left out.

    Libraries open devices once and keep them: /dev/urandom, /dev/null, /dev/nvidia0. Wheels that
    config/demo.py imports a network from are opened by whoever looks for that network's source.
    """
    targets: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # The descriptor of the listing itself.
            continue
        if not target.startswith("/dev/") and not target.endswith(".whl"):
            targets[target] += 1
    return targets


def is_ours(pid: int) -> bool:
    """Tell whether this test run started the process, directly or not."""
    try:
        process = psutil.Process(pid)
        if process.ppid() == os.getpid():
            return True
        if process.cmdline() == psutil.Process().cmdline():
            return os.getsid(pid) == os.getsid(0)
        return MARK.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (psutil.Error, OSError):
        return False


def our_processes(before: Footprint) -> list[psutil.Process]:
    """Find the processes of this test run that are younger than `before`."""
    pids = set(psutil.pids()) - before.pids
    return [psutil.Process(pid) for pid in sorted(pids) if is_ours(pid)]


def additions(before: Footprint, *, files: bool) -> list[str]:
    """Name everything that is there now and was not before."""
    found = [f"process {process}" for process in our_processes(before)]
    found += [f"/dev/shm/{name}" for name in sorted(set(os.listdir("/dev/shm")) - before.shm)]
    if files:
        found += [f"open file {target}" for target in (open_files() - before.files).elements()]
    return found


def left_behind(
    before: Footprint, *, files: bool = True, seconds: float = STRAGGLER_SECONDS
) -> list[str]:
    """Name what is left, once everything that was only dying has died or the time is over."""
    deadline = time.monotonic() + seconds
    while found := additions(before, files=files):
        if time.monotonic() > deadline:
            break
        gc.collect()
        time.sleep(0.02)
    return found


def kill_left(before: Footprint) -> None:
    """Kill every process of this test run that is younger than `before`, and reap our children."""
    processes = our_processes(before)
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=STRAGGLER_SECONDS)
