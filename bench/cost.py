"""What a command costs with all processes that it starts: time, CPU, memory.

The calling process becomes the parent of every descendant whose own parent dies (PR_SET_CHILD_
SUBREAPER), so that the CPU time of daemons is counted, too, and nothing is left behind.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36
SAMPLE_SECONDS = 0.05
LOOK_SECONDS = 0.5  # between two looks at the processes' CPU time
ORPHAN_SECONDS = 10.0  # for what a command leaves behind to end by itself
TAIL_CHARS = 2000


class CommandFailed(Exception):
    """A command ended with another exit code than 0; the message holds its last words."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a command has cost.

    Attributes:
        started: monotonic time in seconds.
        wall: seconds to its end.
        cpu: seconds of user and system time, of all processes.
        peak_bytes: highest sum of the PSS of all processes; 0 where it was not sampled.
        n_processes: how many there were then.
    """

    started: float
    wall: float
    cpu: float
    peak_bytes: int
    n_processes: int


def measure(
    command: Sequence[str], environment: Mapping[str, str], *, sample: bool, limit: float
) -> Cost:
    """Run a command to its end.

    Args:
        sample: look at the memory of all its processes 20 times a second. That takes CPU time, so
            the other figures of such a run are not to be used.
        limit: seconds, after which it is killed.

    Raises:
        CommandFailed: it did not end with 0, or not in time.
    """
    _adopt_orphans()
    before = _children_cpu()
    with tempfile.TemporaryFile() as output:
        started = time.monotonic()
        child = subprocess.Popen(
            command, stdout=output, stderr=output, env=dict(environment), start_new_session=True
        )
        seen: dict[int, float] = {}
        peak = _watch(child, started + limit, sample, seen)
        wall = time.monotonic() - started
        _reap_orphans()
        if child.returncode != 0:
            raise CommandFailed(f"exit code {child.returncode}: {_tail(output)}")
    # Ray's processes are reaped by one that leaves their times to nobody: what was seen of them in
    # time counts instead.
    cpu = max(_children_cpu() - before, sum(seen.values()))
    return Cost(started, wall, cpu, *peak)


def _watch(
    child: subprocess.Popen[bytes], deadline: float, sample: bool, seen: dict[int, float]
) -> tuple[int, int]:
    """Wait for the end; return the highest memory, and of how many processes.

    Args:
        seen: gets the CPU seconds of each process.
    """
    peak = (0, 0)
    ended = os.pidfd_open(child.pid)
    try:
        while not select.select([ended], [], [], SAMPLE_SECONDS if sample else LOOK_SECONDS)[0]:
            processes = psutil.Process().children(recursive=True)
            seen.update({process.pid: _cpu(process) for process in processes})
            if sample:
                peak = max(peak, (sum(pss(process.pid) for process in processes), len(processes)))
            if time.monotonic() > deadline:
                _kill_descendants()
        child.wait()
    finally:
        os.close(ended)
    return peak


def _cpu(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
        return times.user + times.system
    except psutil.NoSuchProcess:
        return 0.0


def pss(pid: int) -> int:
    """Return the proportional memory of a process, 0 where it has ended."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass  # it has just ended
    return 0


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _adopt_orphans() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap_orphans() -> None:
    """Wait for what the command has left running, and kill what does not end."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while psutil.Process().children(recursive=True):
        if time.monotonic() > deadline:
            _kill_descendants()
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.02)
        except ChildProcessError:
            break


def _kill_descendants() -> None:
    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _tail(output: tempfile._TemporaryFileWrapper[bytes]) -> str:
    output.seek(0)
    return output.read().decode("utf-8", "replace")[-TAIL_CHARS:].strip()
