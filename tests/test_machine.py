"""What the machine gives, as a cgroup, an affinity and an environment variable narrow it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from forked import fork, wait

from evmp import machine

GIB = 1 << 30


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of this process's cgroup, in a file system of the test's own."""
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    monkeypatch.setattr(machine, "_cgroups", lambda: [inner, tmp_path / "job", tmp_path])
    return inner


def limit_memory(directory: Path, limit: str, used: int, cache: int) -> None:
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon {used - cache}\ninactive_file {cache}\n")


def test_cpus_are_those_of_the_affinity() -> None:
    def work() -> int:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return machine.cpu_count()

    assert wait(fork(work)) == 1


@pytest.mark.parametrize(
    ("quota", "count"), [("max 100000", None), ("150000 100000", 1), ("5000 100000", 1)]
)
def test_cpus_are_those_of_the_quota(cgroup: Path, quota: str, count: int | None) -> None:
    (cgroup / "cpu.max").write_text(quota + "\n")

    assert machine.cpu_count() == (count or len(os.sched_getaffinity(0)))


def test_quota_of_an_outer_cgroup_counts(cgroup: Path) -> None:
    (cgroup / "cpu.max").write_text("max 100000\n")
    (cgroup.parent / "cpu.max").write_text("100000 100000\n")

    assert machine.cpu_count() == 1


def test_memory_without_a_limit_is_what_is_available(cgroup: Path) -> None:
    limit_memory(cgroup, "max", used=GIB, cache=0)

    assert machine.memory_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_memory_of_a_limit_is_what_it_leaves_and_the_cache(cgroup: Path) -> None:
    limit_memory(cgroup, str(GIB), used=3 * GIB // 4, cache=GIB // 4)

    assert machine.memory_bytes() == GIB // 2


def test_memory_that_is_overdrawn_is_none(cgroup: Path) -> None:
    limit_memory(cgroup, str(GIB), used=2 * GIB, cache=0)

    assert machine.memory_bytes() == 0


def test_limits_of_version_1_count_too(cgroup: Path) -> None:
    (cgroup / "memory.limit_in_bytes").write_text(f"{GIB}\n")
    (cgroup / "memory.usage_in_bytes").write_text(f"{GIB // 2}\n")
    (cgroup / "memory.stat").write_text("inactive_file 0\n")
    (cgroup / "cpu.cfs_quota_us").write_text("100000\n")
    (cgroup / "cpu.cfs_period_us").write_text("100000\n")

    assert machine.memory_bytes() == GIB // 2
    assert machine.cpu_count() == 1


def test_no_quota_of_version_1_is_none(cgroup: Path) -> None:
    (cgroup / "cpu.cfs_quota_us").write_text("-1\n")
    (cgroup / "cpu.cfs_period_us").write_text("100000\n")

    assert machine.cpu_count() == len(os.sched_getaffinity(0))


@pytest.fixture
def real_cgroup() -> Iterator[Path]:
    """An empty cgroup below our own that limits memory."""
    directory = next((d for d in machine._cgroups() if list(d.glob("memory.*max*"))), None)
    if directory is None or not os.access(directory, os.W_OK):
        pytest.skip("this machine lets us make no cgroup")
    inner = directory / f"evmp-test-{os.getpid()}"
    inner.mkdir()
    yield inner
    inner.rmdir()


def test_limit_of_a_real_cgroup_is_seen(real_cgroup: Path) -> None:
    files = [real_cgroup / "memory.max", real_cgroup / "memory.limit_in_bytes"]
    limit = next((file for file in files if file.exists()), None)
    if limit is None:
        pytest.skip("the memory controller is not handed on to new cgroups")
    limit.write_text(f"{GIB}\n")

    def work() -> int:
        (real_cgroup / "cgroup.procs").write_text(str(os.getpid()))
        return not GIB // 2 < machine.memory_bytes() <= GIB

    assert wait(fork(work)) == 0


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["0", "1"]),
        ("", []),
        ("-1", []),
        ("1", ["1"]),
        ("0, GPU-8f3a", ["0", "GPU-8f3a"]),
        ("0,-1,1", ["0"]),  # as CUDA reads it
        ("0,1,2", ["0", "1"]),
        ("7,0", []),
        ("first", []),
        ("GPU-8f3a,GPU-90ab,GPU-1234", ["GPU-8f3a", "GPU-90ab"]),
        ("MIG-1f,MIG-2e,MIG-GPU-8f3a/1/0", ["MIG-1f", "MIG-2e", "MIG-GPU-8f3a/1/0"]),
    ],
)
def test_gpus_are_those_that_may_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]
) -> None:
    for name in ("nvidia3", "nvidia7", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert machine.gpus() == names


@pytest.mark.parametrize("visible", ["0", "GPU-8f3a", "MIG-1f"])
def test_no_gpu_is_seen_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert machine.gpus() == []
