"""Which worker a command is: what each engine says, what is said by hand, and what that gives."""

from __future__ import annotations

import pytest

from evmp import machine
from evmp.errors import ConfigError
from evmp.job import Job
from evmp.placement import cpus_of, gpus_of, shortages
from evmp.rank import Rank, find_rank

DYNAMIC = {"enableDynamicCluster": True, "useSparseClusterSchema": True}


def make_job(**keys: object) -> Job:
    paths = {"model_path": "m", "input_table": "in.parquet", "output_table": "out.parquet"}
    return Job.model_validate({"model_type": "classifier", "num_worker": 5, **paths, **keys})


def array(element: int, *elements: int, step: int = 1, **variables: str) -> dict[str, str]:
    """Return what Slurm tells the script of one of the elements of an array; 1 to 4 by default."""
    elements = elements or (1, 2, 3, 4)
    own = {"SLURM_ARRAY_TASK_ID": str(element), "SLURM_ARRAY_TASK_COUNT": str(len(elements))}
    ends = {
        "SLURM_ARRAY_TASK_MIN": str(min(elements)),
        "SLURM_ARRAY_TASK_MAX": str(max(elements)),
        "SLURM_ARRAY_TASK_STEP": str(step),
    }
    script = {"ENVIRONMENT": "BATCH", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    return {**own, **ends, **script, **variables}


def task(number: int, n_tasks: int, **variables: str) -> dict[str, str]:
    """Return what Slurm tells a task of a step."""
    own = {"SLURM_PROCID": str(number), "SLURM_STEP_NUM_TASKS": str(n_tasks)}
    return {**own, "SLURM_NTASKS": "9", "SLURM_STEP_ID": "0", "ENVIRONMENT": "BATCH", **variables}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, None),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, Rank(1, 4, 1, engine="Slurm")),
        (task(0, 1), None),
        (
            task(4, 5, SLURM_LOCALID="1", SLURM_NODEID="2", SLURM_STEP_TASKS_PER_NODE="1,2(x2)"),
            Rank(4, 5, 1, 2, "Slurm"),
        ),
        (array(1), Rank(0, 4, 0, engine="Slurm")),
        (array(4), Rank(3, 4, 3, engine="Slurm")),
        (array(7, 1, 3, 5, 7, step=2), Rank(3, 4, 3, engine="Slurm")),
        (array(3, 1, 3), Rank(1, 2, 1, engine="Slurm")),
        (array(0, 0, 2), Rank(0, 2, engine="Slurm")),
        (array(3, 3), Rank(0, 1, engine="Slurm")),
        # A script is told of the tasks that srun would start; it is none of them.
        (array(2, SLURM_NTASKS="3"), Rank(1, 4, 1, engine="Slurm")),
        ({"ENVIRONMENT": "BATCH", "SLURM_PROCID": "0", "SLURM_NTASKS": "3"}, None),
        (array(2, **task(2, 3, SLURM_LOCALID="2")), Rank(5, 12, 2, 1, "Slurm")),
        ({"JOB_COMPLETION_INDEX": "3"}, Rank(3, 5, 3, engine="Kubernetes")),
        ({"RANK": "3"}, None),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            Rank(3, 4, 1, 2, "torchrun"),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                **array(2),
            },
            Rank(3, 4, 1, 2, "OpenMPI"),
        ),
    ],
)
def test_engine_says_which_worker_it_has_started(
    environ: dict[str, str], expected: Rank | None
) -> None:
    assert find_rank(make_job(), environ=environ) == expected


@pytest.mark.parametrize(
    ("environ", "worker"),
    [
        ({"JOB_COMPLETION_INDEX": "6"}, 6),
        (array(20, 1, 3, 5, 7, 20, step=2), 9),
        (array(4, 0, 1, 4), 4),
    ],
)
def test_worker_of_any_block_may_have_any_number(environ: dict[str, str], worker: int) -> None:
    rank = find_rank(make_job(**DYNAMIC), environ=environ)

    assert rank and (rank.worker, rank.n_workers) == (worker, worker + 1)


def test_hand_counts_more_than_the_engine() -> None:
    assert find_rank(make_job(), "2/3", array(1)) == Rank(2, 3, 2)
    assert find_rank(make_job(), "0/1", array(1)) is None


@pytest.mark.parametrize(
    ("by_hand", "environ", "message"),
    [
        ("3/3", {}, "--worker: got worker 3 of 3, expected one of 0 to 2"),
        ("1", {}, "--worker: got 1, expected k/n"),
        ("1/0", {}, "--worker: got 1/0, expected k/n"),
        ("-1/2", {}, "--worker: got -1/2, expected k/n"),
        ("5/1", {}, "--worker: got worker 5 of 1, expected one of 0 to 0"),
        ("", array(9), "Slurm: got worker 8 of 4"),
        ("", array(4, 0, 1, 4), "an array of 3 elements from 0 to 4, in which there are gaps"),
        ("", array(7, 1, 3, 5, 7, 20, step=2), "take --array=0-4, or enableDynamicCluster"),
        (
            "",
            {"JOB_COMPLETION_INDEX": "5"},
            "Kubernetes: got worker 5 of 5, expected one of 0 to 4; num_worker must be how many",
        ),
        ("", {"RANK": "x", "WORLD_SIZE": "2"}, "RANK: got 'x', expected a number"),
        ("", {"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE: got '', expected a number"),
    ],
)
def test_what_is_no_worker_is_told(by_hand: str, environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_rank(make_job(), by_hand, environ)

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rank", "visible", "environ", "n_workers", "share"),
    [
        (Rank(1, 4), "0,1", {}, 1, 100),
        (Rank(1, 4, engine="Slurm"), "0,1", {}, 1, 200),
        (Rank(1, 4, 1, 2, "Slurm"), "0,1", {}, 2, 100),
        (Rank(1, 4, 1, 2, "Slurm"), "0", {}, 2, 50),
        (Rank(1, 4, 1, 2, "Slurm"), "0,1", {"SLURM_GPUS_PER_TASK": "2"}, 2, 200),
        (Rank(1, 4, 1, 2, "torchrun"), None, {}, 2, 100),
    ],
)
def test_gpus_are_those_that_the_engine_gave(
    monkeypatch: pytest.MonkeyPatch,
    rank: Rank,
    visible: str | None,
    environ: dict[str, str],
    n_workers: int,
    share: int,
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: (visible or "0,1").split(","))
    given = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}

    here = rank.fit(make_job(), {**environ, **given})

    assert (here.num_worker, here.gpuRequired) == (n_workers, share)
    assert rank.fit(make_job(gpuRequired=0), {**environ, **given}).gpuRequired == 0


@pytest.mark.parametrize("n_cpus", [2, 3, 8])
@pytest.mark.parametrize("engine", ["", "Kubernetes"])
def test_workers_with_a_command_each_share_all_cpus_that_they_were_given(
    monkeypatch: pytest.MonkeyPatch, n_cpus: int, engine: str
) -> None:
    monkeypatch.setattr(machine, "cpus", lambda: list(range(n_cpus)))
    job = make_job(cpuRequired=100)

    for rank in (Rank(0, 2, engine=engine), Rank(1, 2, 1, engine=engine), Rank(1, 4, 1, 2, engine)):
        here = rank.fit(job, {})
        assert cpus_of(here, rank.place) == list(range(n_cpus))
        assert shortages(here) == []


def test_workers_of_whom_nobody_says_where_they_are_lie_on_different_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: ["0", "1"])

    for share, expected in ((100, "0101"), (50, "0011"), (200, ["01"] * 4)):
        ranks = [find_rank(make_job(), f"{worker}/4") for worker in range(4)]
        gpus = [gpus_of(rank.fit(make_job(gpuRequired=share), {}), rank.place) for rank in ranks]
        assert ["".join(it) for it in gpus] == list(expected)
