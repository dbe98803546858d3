"""A worker's own process; what its stages do together is in test_run and test_stop."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, cast

import pytest
from forked import fork, wait

from evmp import machine
from evmp.job import Job
from evmp.ledger import Ledger
from evmp.metrics import Board
from evmp.model.package import load_package
from evmp.pipeline import Worker, plan_layout


def test_worker_whose_job_died_while_it_was_forked_does_not_begin(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    nothing = cast(Any, None)
    ledger = Ledger(tmp_path)

    def job() -> None:
        pid = os.getpid()
        seats = Board(["worker"], 1).workers[0]
        worker = Worker(0, nothing, nothing, nothing, ledger, (), seats, list)
        if os.fork() == 0:
            while os.getppid() == pid:
                time.sleep(0.001)
            os.write(write_end, b"%d" % worker.run())
            os._exit(0)

    assert wait(fork(job)) == 0
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        assert pipe.read() == b"1"


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
    assert layout.n_pixel_batches == n_batches
