"""What this machine gives: CPUs, memory and GPUs, as the job's cgroup and affinity allow.

Nothing heavy is imported, so the supervisor may ask.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def cpus() -> list[int]:
    """Return the CPUs that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def cpu_count() -> int:
    """Return how many CPUs' time this process may use, at least 1, as its cgroup's quota allows."""
    n = len(cpus())
    for directory in _cgroups():
        with suppress(OSError, ValueError):
            quota, period = (directory / "cpu.max").read_text().split()
            if quota != "max":
                n = min(n, max(1, int(quota) // int(period)))
    return n


def memory_bytes() -> int:
    """Return how much memory the processes of this job may take from now on."""
    free = _available()
    for directory in _cgroups():
        with suppress(OSError, ValueError):
            limit = int((directory / "memory.max").read_text())
            free = min(free, limit - _charged(directory))
    return max(0, free)


def gpus() -> list[str]:
    """Return the NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    present = sorted(int(path.name[6:]) for path in Path("/dev").glob("nvidia[0-9]*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(len(present))]
    names = [name.strip() for name in visible.split(",") if name.strip()]
    names = names[: names.index("-1")] if "-1" in names else names
    return names[: len(present)]


def _available() -> int:
    """Memory that the system can give without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _charged(directory: Path) -> int:
    """Memory of the cgroup that cannot be taken back: page cache can."""
    used = int((directory / "memory.current").read_text())
    for line in (directory / "memory.stat").read_text().splitlines():
        name, value = line.split()
        if name == "inactive_file":
            used -= int(value)
    return used


def _cgroups() -> list[Path]:
    """The directories of this process's cgroup (version 2) and those above it, innermost first."""
    root = Path("/sys/fs/cgroup")
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                inner = root / line[4:]
                return [inner, *(p for p in inner.parents if p.is_relative_to(root))]
    return []
