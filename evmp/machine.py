"""What this machine gives: CPUs, memory and GPUs, as the job's cgroup and affinity allow.

Nothing heavy is imported, so the supervisor may ask.
"""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Final

# Limit and use, of version 2 and of version 1, which many a cluster still has.
_MEMORY_FILES: Final = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def cpus() -> list[int]:
    """Return the CPUs that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def cpu_count() -> int:
    """Return how many CPUs' time this process may use, at least 1, as its cgroup's quota allows."""
    n = len(cpus())
    for directory in _cgroups():
        with suppress(OSError, ValueError):
            quota, period = _quota(directory)
            n = min(n, max(1, quota // period))
    return n


def memory_bytes() -> int:
    """Return how much memory the processes of this job may take from now on."""
    free = _available()
    for directory in _cgroups():
        for limit, used in _MEMORY_FILES:
            with suppress(OSError, ValueError):
                free = min(free, int((directory / limit).read_text()) - _charged(directory, used))
    return max(0, free)


def gpus() -> list[str]:
    """Return the NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    CUDA is not asked, since a process that has touched it must not fork. A part of a GPU (MIG) has
    a name there, and counts as one; CUDA shows a process no more than one of them.
    """
    n_present = sum(1 for _ in Path("/dev").glob("nvidia[0-9]*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(n_present)]
    names = [name.strip() for name in visible.split(",") if name.strip()]
    # CUDA reads up to the first that is no device.
    known = list(takewhile(lambda name: _is_gpu(name, n_present), names))
    return known if any(name.startswith("MIG-") for name in known) else known[:n_present]


def _is_gpu(name: str, n_present: int) -> bool:
    """Say whether a name in CUDA_VISIBLE_DEVICES may be a device."""
    if name.isdecimal():
        return int(name) < n_present
    return n_present > 0 and name.startswith(("GPU-", "MIG-"))


def _available() -> int:
    """Memory that the system can give without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _quota(directory: Path) -> tuple[int, int]:
    """Microseconds of CPU time that the cgroup has in each period of so many.

    Raises:
        OSError, ValueError: there is no quota.
    """
    if (directory / "cpu.max").exists():
        quota, period = (directory / "cpu.max").read_text().split()
    else:
        quota = (directory / "cpu.cfs_quota_us").read_text().strip().replace("-1", "max")
        period = (directory / "cpu.cfs_period_us").read_text()
    return int(quota), int(period)


def _charged(directory: Path, file: str) -> int:
    """Memory of the cgroup that cannot be taken back: page cache can."""
    used = int((directory / file).read_text())
    for line in (directory / "memory.stat").read_text().splitlines():
        name, value = line.split()
        if name == "inactive_file":
            used -= int(value)
    return used


def _cgroups() -> list[Path]:
    """The directories of this process's cgroups, of either version, and those above them.

    In a container the path is often that of the host; the container's own limits are then those at
    the root of the hierarchy.
    """
    directories = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = Path("/sys/fs/cgroup", controllers.removeprefix("name="))
            inner = root / path.lstrip("/")
            directories += [inner, *(p for p in inner.parents if p.is_relative_to(root))]
    return directories
