"""Jobs on a real Slurm of three nodes, by the scripts that `evmp sbatch` makes.

Whatever happens to workers, nodes and elements of arrays, the result is that of one machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobfolder import JobFolder
from slurm.cluster import Cluster, require_slurm, run_cluster, wait_until

N_ROWS = 90
ON_CPUS = ("-Ddevice=cpu", "-DcpuRequired=100")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    require_slurm()
    with run_cluster(grace=10) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def whole(undisturbed_job: Callable[..., Path]) -> Path:
    """The folder of a slow job that one command has done, on this machine."""
    return undisturbed_job(N_ROWS, steps=3000, block_rows=4)


class Submission:
    """The job of `whole`, submitted to a cluster."""

    def __init__(self, cluster: Cluster, whole: Path, job: JobFolder) -> None:
        self._whole, self._job = whole, job
        self._cluster = cluster
        (job.path / "job.yaml").write_bytes((whole / "job.yaml").read_bytes())

    def submit(self, *arguments: str) -> tuple[str, str]:
        """Submit workers and a report. Returns their jobs."""
        call = ("sbatch", "--config", "job.yaml", *ON_CPUS, "--submit", *arguments)
        done = self._job._run(*call, cwd=self._job.path, env=self._cluster.environment)
        assert done.returncode == 0, done.stderr
        first, report = re.findall(r"^submitted (\d+)", done.stdout, re.MULTILINE)
        return first, report

    def rows_done(self, start: int = 0, stop: int = N_ROWS) -> int:
        """Return how many blocks of those rows are committed."""
        blocks = (self._job.path / "out.jsonl.evmp" / "blocks").glob("*.json")
        return sum(start <= int(file.stem) < stop for file in blocks)

    def log(self, job: str) -> str:
        return "".join(it.read_text() for it in self._job.path.glob(f"evmp*-{job}.log"))

    def check(self, report: str) -> None:
        """Wait for the report, and compare the result."""
        wait_until(lambda: self._cluster.state(report) not in ("PENDING", "RUNNING", "COMPLETING"))
        assert self._cluster.state(report) == "COMPLETED", self.log(report)
        result, expected = (it / "out.jsonl" for it in (self._job.path, self._whole))
        assert result.read_bytes() == expected.read_bytes()
        assert self._job.leftovers() == []


@pytest.fixture
def submission(cluster: Cluster, whole: Path, job: JobFolder) -> Submission:
    return Submission(cluster, whole, job)


def test_array_with_a_killed_worker_and_a_cancelled_element_makes_the_same_result(
    cluster: Cluster, submission: Submission
) -> None:
    array, report = submission.submit("--nodes", "3")
    wait_until(lambda: submission.rows_done(30, 60))
    cluster.worker(f"{array}_1").kill()
    wait_until(lambda: submission.rows_done(60))
    cluster.call("scancel", f"{array}_2")

    submission.check(report)

    assert "killed, 137; again" in submission.log(f"{array}_1")
    assert cluster.state(f"{array}_1") == "COMPLETED"
    assert cluster.state(f"{array}_2") == "CANCELLED"
    assert "stopped by SIGTERM" in submission.log(f"{array}_2")
