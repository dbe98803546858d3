"""A worker's own process; what its stages do together is in test_run and test_stop."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any, cast

import pytest
from forked import fork, wait
from hypothesis import given, settings
from hypothesis import strategies as st

from evmp import machine
from evmp.job import Job
from evmp.layout import plan_layout
from evmp.ledger import Ledger
from evmp.metrics import Board
from evmp.model.package import load_package
from evmp.pipeline import Worker


def test_worker_whose_job_died_while_it_was_forked_does_not_begin(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    nothing = cast(Any, None)
    ledger = Ledger(tmp_path)

    def job() -> None:
        pid = os.getpid()
        seats = Board(["worker"], 1).workers[0]
        worker = Worker(0, nothing, nothing, nothing, ledger, nothing, seats, list)
        if os.fork() == 0:
            while os.getppid() == pid:
                time.sleep(0.001)
            os.write(write_end, b"%d" % worker.run())
            os._exit(0)

    assert wait(fork(job)) == 0
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        assert pipe.read() == b"1"


@given(
    batch=st.integers(1, 12),
    chain=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 12)), max_size=3),
    n_decoders=st.integers(1, 4),
    spare=st.integers(0, 30),
)
@settings(max_examples=300)
def test_batches_of_several_sizes_never_wait_for_each_other(
    batch: int, chain: list[tuple[int, int]], n_decoders: int, spare: int
) -> None:
    together = math.lcm(batch, *(rows for _, rows in chain))
    links = [
        {"user_process_cls": "m.P", "num_threads": copies, "batch_size": rows}
        for copies, rows in chain
    ]
    job = custom_job(
        batch_size=batch,
        queue_size=together + spare,
        preprocess_thread_num=n_decoders,
        predict_thread_num=1,
        user_process_config=links,
    )

    rings = [(hop.n_batches, hop.batch_rows) for hop in plan_layout(job, None).hops]

    assert flows(rings, 3 * together)


def flows(rings: list[tuple[int, int]], n_rows: int) -> bool:
    """Tell whether rows get through rings of (batches, rows of a batch) to the last one.

    The reader publishes a row when its place is free in all; a ring's consumer hands on, and
    releases, whole batches.
    """
    published, passed = 0, [0] * len(rings)  # rows that each ring's consumer has released
    while passed[-1] < n_rows:
        before = published, *passed
        while published < n_rows and all(
            published // size < done // size + count
            for (count, size), done in zip(rings, passed, strict=True)
        ):
            published += 1
        for place, (_, size) in enumerate(rings):
            arrived = passed[place - 1] if place else published
            passed[place] = arrived // size * size
        if before == (published, *passed):
            return False
    return True


def custom_job(**keys: Any) -> Job:
    paths = {"model_path": "m", "input_table": "in.parquet", "output_table": "out.parquet"}
    custom = {"model_type": "self_define", "user_predictor_cls": "m.P"}
    return Job.model_validate({**paths, **custom, **keys})


@pytest.mark.parametrize(
    ("n_gpus", "share", "n_predictors", "n_batches"),
    [(0, 100, 3, 9), (1, 50, 1, 7), (2, 200, 2, 11)],
)
def test_gpu_has_one_process_and_a_place_for_each_batch_in_flight(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    n_gpus: int,
    share: int,
    n_predictors: int,
    n_batches: int,
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [str(index) for index in range(n_gpus)])
    paths = {"model_path": "m", "input_table": "in.parquet", "output_table": "out.parquet"}
    sizes = {"batch_size": 64, "queue_size": 4096, "predict_thread_num": 3, "gpuRequired": share}
    job = Job.model_validate({"model_type": "classifier", **paths, **sizes})

    layout = plan_layout(job, load_package(tiny_model))

    assert layout.n_predictors == n_predictors
    assert layout.hops[1].n_batches == n_batches
