"""Which GPUs belong to which worker, for every share, and what is said where there are too few."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from evmp import machine
from evmp.job import Job
from evmp.placement import gpus_of, has_room, shortages, spread, uses_gpu

SHARES = [1, 10, 25, 30, 33, 34, 50, 51, 60, 99, 100, 101, 133, 150, 200, 250, 300, 400, 1000]
EVERY = list(product(SHARES, range(1, 9), range(1, 13)))  # share, GPUs, workers


def all_of(share: int, n_gpus: int, n_workers: int) -> list[list[str]]:
    names = [str(index) for index in range(n_gpus)]
    return [spread(names, share, n_workers, worker) for worker in range(n_workers)]


def make_job(**keys: object) -> Job:
    paths = {"model_path": "m", "input_table": "in.parquet", "output_table": "out.parquet"}
    return Job.model_validate({"model_type": "classifier", **paths, **keys})


@pytest.mark.parametrize(
    ("share", "n_gpus", "n_workers", "expected"),
    [
        (100, 4, 2, [["0"], ["1"]]),
        (100, 2, 4, [["0"], ["1"], ["0"], ["1"]]),
        (50, 2, 4, [["0"], ["0"], ["1"], ["1"]]),
        (50, 4, 2, [["0"], ["0"]]),
        (50, 2, 6, [["0"], ["0"], ["0"], ["1"], ["1"], ["1"]]),
        (30, 2, 4, [["0"], ["0"], ["0"], ["1"]]),
        (60, 2, 2, [["0"], ["1"]]),
        (60, 2, 3, [["0"], ["0"], ["1"]]),
        (200, 4, 2, [["0", "1"], ["2", "3"]]),
        (200, 3, 2, [["0", "1"], ["2", "0"]]),
        (150, 3, 2, [["0", "1"], ["1", "2"]]),
        (150, 3, 4, [["0", "1"], ["2", "0"], ["1", "2"], ["0", "1"]]),
        (800, 2, 1, [["0", "1"]]),
        (100, 1, 3, [["0"], ["0"], ["0"]]),
    ],
)
def test_workers_lie_on_the_gpus_one_after_the_other(
    share: int, n_gpus: int, n_workers: int, expected: list[list[str]]
) -> None:
    assert all_of(share, n_gpus, n_workers) == expected


def test_all_workers_have_equally_many_gpus_and_none_twice() -> None:
    for share, n_gpus, n_workers in EVERY:
        placed = all_of(share, n_gpus, n_workers)
        assert {len(gpus) for gpus in placed} == {min(-(-share // 100), n_gpus)}
        assert all(len(set(gpus)) == len(gpus) for gpus in placed)


def test_no_gpu_is_given_away_twice_while_there_is_room() -> None:
    for share, n_gpus, n_workers in EVERY:
        placed = all_of(share, n_gpus, n_workers)
        load = Counter(gpu for gpus in placed for gpu in gpus)
        if has_room(n_gpus, share, n_workers) and share <= 100:
            assert max(load.values()) * share <= 100
        elif has_room(n_gpus, share, n_workers):
            # One worker's last and the next one's first may be the same, in parts.
            assert max(load.values()) <= (1 if share % 100 == 0 else 2)


def test_too_few_gpus_are_shared_evenly() -> None:
    for share, n_gpus, n_workers in EVERY:
        if not has_room(n_gpus, share, n_workers):
            placed = all_of(share, n_gpus, n_workers)
            load = Counter(gpu for gpus in placed for gpu in gpus)
            assert max(load.values()) <= -(-load.total() // n_gpus)


def test_no_gpus_are_for_nobody() -> None:
    assert spread([], 100, 2, 1) == []


@pytest.mark.parametrize(
    ("keys", "n_gpus", "uses"),
    [
        ({}, 0, False),
        ({}, 1, True),
        ({"device": "cpu"}, 1, False),
        ({"gpuRequired": 0}, 1, False),
        ({"device": "cuda"}, 0, True),
        ({"device": "cuda", "gpuRequired": 0}, 1, False),
    ],
)
def test_gpus_are_used_where_they_are_and_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, object], n_gpus: int, uses: bool
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [str(index) for index in range(n_gpus)])
    job = make_job(**keys)

    assert uses_gpu(job) == uses
    assert gpus_of(job, 0) == (["0"] if uses and n_gpus else [])


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        ({}, []),
        ({"gpuRequired": 50, "num_worker": 4}, []),
        (
            {"gpuRequired": 60, "num_worker": 3},
            ["gpuRequired: 3 workers ask for 0.6 GPUs each, there are 2; they share them"],
        ),
        (
            {"gpuRequired": 150, "num_worker": 2},
            ["gpuRequired: 2 workers ask for 1.5 GPUs each, there are 2; they share them"],
        ),
        (
            {"cpuRequired": 400, "num_worker": 2},
            ["cpuRequired: 2 workers ask for 4 CPUs each, there are 4; they share them"],
        ),
    ],
)
def test_what_is_asked_for_and_not_there_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, object], lines: list[str]
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: ["0", "1"])
    monkeypatch.setattr(machine, "cpus", lambda: [0, 1, 2, 3])

    assert shortages(make_job(**keys)) == lines
