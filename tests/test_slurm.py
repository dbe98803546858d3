"""Jobs on a real Slurm of three nodes, by the scripts that `evmp sbatch` makes.

Whatever happens to workers, nodes and elements of arrays, the result is that of one machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml
from jobfolder import JobFolder
from ossserver import KEY_ID, KEY_SECRET, serving_oss
from slurm.cluster import NODES, Cluster, require_slurm, run_cluster, wait_until

N_ROWS = 90
ON_CPUS = ("-Ddevice=cpu", "-DcpuRequired=100")
DYNAMIC = ("-DenableDynamicCluster=true", "-DuseSparseClusterSchema=true", "-Dlease_seconds=2")


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster with those of its nodes up that the test's parameter names; all by default."""
    require_slurm()
    with run_cluster(getattr(request, "param", NODES), grace=10) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def whole(undisturbed_job: Callable[..., Path]) -> Path:
    """The folder of a slow job that one command has done, on this machine."""
    return undisturbed_job(N_ROWS, steps=3000, block_rows=4)


@pytest.fixture(scope="module")
def long_whole(undisturbed_job: Callable[..., Path]) -> Path:
    """The folder of a job that takes a minute of a CPU, which one command has done."""
    return undisturbed_job(N_ROWS, steps=40_000, block_rows=4)


class Submission:
    """The job of `whole`, submitted to a cluster."""

    def __init__(self, cluster: Cluster, whole: Path, job: JobFolder, **keys: str) -> None:
        self._whole, self._job = whole, job
        self._cluster = cluster
        usual = yaml.safe_load((whole / "job.yaml").read_text())
        (job.path / "job.yaml").write_text(yaml.safe_dump({**usual, "queue_size": 8, **keys}))

    def submit(self, *arguments: str) -> tuple[str, str]:
        """Submit workers and a report. Returns their jobs."""
        call = ("sbatch", "--config", "job.yaml", *ON_CPUS, "--submit", *arguments)
        done = self._job._run(*call, cwd=self._job.path, env=self._cluster.environment)
        assert done.returncode == 0, done.stderr
        first, report = re.findall(r"^submitted (\d+)", done.stdout, re.MULTILINE)
        return first, report

    def n_blocks(self, start: int = 0, stop: int = N_ROWS) -> int:
        """Return how many blocks of those rows are committed."""
        blocks = (self._job.path / "out.jsonl.evmp" / "blocks").glob("*.json")
        return sum(start <= int(file.stem) < stop for file in blocks)

    def log(self, job: str) -> str:
        return "".join(it.read_text() for it in self._job.path.glob(f"evmp*-{job}.log"))

    def wait(self, report: str) -> bytes:
        """Wait for the report. Returns the result that there should be."""
        wait_until(lambda: self._cluster.state(report) not in ("PENDING", "RUNNING", "COMPLETING"))
        assert self._cluster.state(report) == "COMPLETED", self.log(report)
        assert f"rows      {N_ROWS} of {N_ROWS} (100.0 %), 1 failed" in self.log(report)
        return (self._whole / "out.jsonl").read_bytes()

    def check(self, report: str) -> None:
        """Wait for the report, and compare the result."""
        expected = self.wait(report)
        assert (self._job.path / "out.jsonl").read_bytes() == expected
        assert self._job.leftovers() == []


def kill(cluster: Cluster, job: str, node: str = "") -> None:
    """Kill the command of a job; its own processes must go by themselves."""
    command = cluster.command(job, node)
    assert command
    command.kill()


def family(cluster: Cluster, job: str) -> list[psutil.Process]:
    """Return the command of a job, and its processes."""
    command = cluster.command(job)
    assert command
    return [command, *command.children(recursive=True)]


@pytest.fixture
def submission(cluster: Cluster, whole: Path, job: JobFolder) -> Submission:
    return Submission(cluster, whole, job)


@pytest.fixture
def long_submission(cluster: Cluster, long_whole: Path, job: JobFolder) -> Submission:
    return Submission(cluster, long_whole, job)


@pytest.mark.parametrize(
    "settings",
    [DYNAMIC, pytest.param((), marks=pytest.mark.slow)],
    ids=["blocks for all", "shards"],
)
def test_array_with_a_paused_a_killed_and_a_cancelled_worker_makes_the_same_result(
    cluster: Cluster, submission: Submission, settings: tuple[str, ...]
) -> None:
    array, report = submission.submit("--nodes", "3", *settings)
    elements = [f"{array}_{k}" for k in range(3)]
    wait_until(lambda: all(map(cluster.command, elements)))
    paused = family(cluster, elements[0])
    for process in paused:
        process.suspend()
    wait_until(submission.n_blocks)
    kill(cluster, elements[1])
    cluster.call("scancel", elements[2])
    for process in paused:
        process.resume()

    submission.check(report)

    assert "killed, 137; again" in submission.log(elements[1])
    assert [cluster.state(it) for it in elements] == ["COMPLETED", "COMPLETED", "CANCELLED"]


@pytest.mark.slow
def test_tasks_one_of_which_is_killed_make_the_same_result(
    cluster: Cluster, submission: Submission
) -> None:
    job, report = submission.submit("--nodes", "3", "--kind", "tasks")
    wait_until(lambda: submission.n_blocks(30, 60))
    kill(cluster, job, "n2")

    submission.check(report)

    log = submission.log(job)
    assert "evmp: killed, 137; again" in log
    assert re.search(r"^1: .*resuming: [1-9]", log, re.MULTILINE)
    assert cluster.state(job) == "COMPLETED"


@pytest.mark.slow
def test_tasks_one_of_whose_nodes_dies_make_the_same_result(
    cluster: Cluster, long_submission: Submission
) -> None:
    job, report = long_submission.submit("--nodes", "3", "--kind", "tasks", *DYNAMIC)
    wait_until(lambda: long_submission.n_blocks() and cluster.command(job, "n3"))
    cluster.crash("n3")

    long_submission.check(report)

    assert cluster.restarts(job) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["array", "tasks"])
def test_worker_that_is_asked_to_go_commits_is_requeued_and_goes_on(
    cluster: Cluster, submission: Submission, kind: str
) -> None:
    job, report = submission.submit("--nodes", "2", "--kind", kind)
    wait_until(lambda: submission.n_blocks(45))
    one = f"{job}_1" if kind == "array" else job
    cluster.call("scancel", "--signal=USR1", "--batch", one)
    wait_until(lambda: cluster.restarts(one))
    assert submission.n_blocks(45) < 12

    submission.check(report)

    assert "stopped by SIGTERM" in submission.log(one)
    assert re.search(r"resuming: [1-9]", submission.log(one))


@pytest.mark.slow
def test_job_that_takes_longer_than_its_time_is_requeued_and_ends(
    cluster: Cluster, long_submission: Submission
) -> None:
    times = "--time=1", "--signal=B:USR1@30"  # it comes after some 15 s
    array, report = long_submission.submit("--nodes", "2", "--", *times)

    long_submission.check(report)

    assert sum(cluster.restarts(f"{array}_{k}") for k in range(2)) > 0


@pytest.mark.slow
def test_element_that_is_preempted_is_requeued_and_goes_on(
    cluster: Cluster, long_submission: Submission
) -> None:
    array, report = long_submission.submit("--nodes", "3", "--", "--exclusive")
    wait_until(lambda: all(long_submission.n_blocks(30 * k, 30 * k + 30) for k in range(3)))
    urgent = cluster.submit("sleep 3", "--partition=urgent", "--exclusive", "--nodes=2")
    wait_until(lambda: cluster.state(urgent) == "COMPLETED")

    long_submission.check(report)

    victims = [f"{array}_{k}" for k in range(3) if cluster.restarts(f"{array}_{k}")]
    assert len(victims) == 2
    for victim in victims:
        assert re.search(r"resuming: [1-9]", long_submission.log(victim))


@pytest.mark.slow
def test_element_whose_node_dies_goes_on_elsewhere(
    cluster: Cluster, long_submission: Submission
) -> None:
    array, report = long_submission.submit("--nodes", "3")
    wait_until(lambda: long_submission.n_blocks(30, 60))
    node = cluster.node_of(f"{array}_1")
    cluster.crash(node)

    long_submission.check(report)

    assert cluster.restarts(f"{array}_1") == 1
    assert cluster.node_of(f"{array}_1") != node


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [("n1", "n2")], ids=["two nodes"], indirect=True)
def test_workers_that_share_all_blocks_outlive_whatever_happens(
    cluster: Cluster, long_submission: Submission
) -> None:
    array, report = long_submission.submit("--nodes", "5", *DYNAMIC)
    running, late = [f"{array}_{k}" for k in range(4)], f"{array}_4"
    wait_until(lambda: all(cluster.state(it) == "RUNNING" for it in running))
    wait_until(lambda: all(map(cluster.command, running)) and long_submission.n_blocks())
    on_n1 = [it for it in running if cluster.node_of(it) == "n1"]
    on_n2 = [it for it in running if cluster.node_of(it) == "n2"]
    stopped = family(cluster, on_n1[0])
    for process in stopped:
        process.suspend()
    cluster.join("n3")
    wait_until(lambda: cluster.command(late))
    kill(cluster, late)
    cluster.crash("n2")
    cluster.call("scancel", on_n1[1])
    wait_until(lambda: [cluster.restarts(it) for it in on_n2] == [1, 1])
    for process in stopped:
        process.resume()
    urgent = cluster.submit("sleep 3", "--partition=urgent", "--exclusive", "--nodelist=n1")
    wait_until(lambda: cluster.state(urgent) == "COMPLETED")

    long_submission.check(report)

    assert cluster.restarts(on_n1[0]) == 1
    assert cluster.state(on_n1[1]) == "CANCELLED"
    assert "killed, 137; again" in long_submission.log(late)


@pytest.mark.slow
def test_node_that_slurm_has_lost_and_its_successor_make_one_result(
    cluster: Cluster, long_submission: Submission
) -> None:
    array, report = long_submission.submit("--nodes", "3", *DYNAMIC)
    element = f"{array}_1"
    wait_until(lambda: cluster.command(element) and long_submission.n_blocks())
    node = cluster.node_of(element)
    cluster.lose(node)
    wait_until(lambda: cluster.restarts(element) == 1 and cluster.state(element) == "RUNNING")
    new = cluster.node_of(element)
    wait_until(lambda: cluster.command(element, new))
    assert cluster.command(element, node)

    long_submission.check(report)

    wait_until(lambda: cluster.command(element, node) is None)
    long_submission.check(report)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [DYNAMIC, ()], ids=["blocks for all", "shards"])
def test_nodes_that_share_nothing_but_a_bucket_make_the_same_result(
    cluster: Cluster,
    whole: Path,
    job: JobFolder,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
) -> None:
    monkeypatch.setenv("OSS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", KEY_SECRET)
    with serving_oss() as server:
        objects = server.objects["bkt"] = {}
        keys = {"ossHost": server.endpoint, "output_oss_file": "oss://bkt/out.jsonl"}
        submission = Submission(cluster, whole, job, **keys)
        array, report = submission.submit("--nodes", "3", *settings, "--", "--exclusive")
        elements = [f"{array}_{k}" for k in range(3)]
        wait_until(lambda: all(map(cluster.command, elements)))
        wait_until(lambda: any("/blocks/" in name for name in list(objects)))
        kill(cluster, elements[1])
        cluster.call("scancel", elements[2])

        assert submission.wait(report) == objects["out.jsonl"]

        assert sorted(objects) == ["out.jsonl", "out.jsonl.evmp.json"]
        assert server.uploads == {}
        assert [cluster.state(it) for it in elements] == ["COMPLETED", "COMPLETED", "CANCELLED"]


@pytest.mark.slow
def test_workers_on_gpus_see_one_each(cluster: Cluster, submission: Submission) -> None:
    array, report = submission.submit("--nodes", "3", "-Ddevice=auto")
    found = []
    for element in (f"{array}_{k}" for k in range(3)):
        wait_until(partial(cluster.command, element))
        command = cluster.command(element)
        assert command
        found.append((cluster.node_of(element), command.environ()["CUDA_VISIBLE_DEVICES"]))

    submission.check(report)

    assert len(set(found)) == 3
    assert {gpu for _, gpu in found} <= {"0", "1"}
