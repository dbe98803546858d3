"""Ray Data on one machine: read_parquet, map_batches, and the rows back in the driver.

What is idiomatic costs least here, too: pixels stay in the workers. W1 consumes in a task and
brings counts back; W2 decodes and predicts in actors, which bring scores back.
"""

from __future__ import annotations

import os

os.environ["RAY_DEDUP_LOGS"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext
from work import BATCH_ROWS, Array, Sink, Task, load_network, look, main, preparer

STORE_BYTES = 256 << 20
Columns = dict[str, Array]


def run(task: Task, sink: Sink) -> None:
    """Start a local cluster of n_cores, and take what comes."""
    ray.init(
        # In W2 the actors hold a core each, and a task that reads needs another to count on.
        num_cpus=task.n_cores + (task.work == "w2"),
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    DataContext.get_current().enable_progress_bars = False
    rows = ray.data.read_parquet(task.table, columns=["id", "image"])
    consume = predicting(rows, task) if task.work == "w2" else consuming(rows, task)
    for batch in consume.iter_batches(batch_size=None, prefetch_batches=1):
        if task.work == "w2":
            sink.take(list(batch["id"]), batch["scores"])
        else:
            sink.count(int(batch["rows"].sum()), float(batch["total"].sum()))
    ray.shutdown()


def consuming(rows: ray.data.Dataset, task: Task) -> ray.data.Dataset:
    """Prepare and consume in tasks."""

    def work(batch: Columns) -> Columns:
        prepare = preparer(task.resize)
        total = sum(look(prepare(cell)) for cell in batch["image"])
        return {"rows": np.array([len(batch["id"])]), "total": np.array([total])}

    return rows.map_batches(work, batch_size=64)


class Predict:
    """An actor that prepares and predicts."""

    def __init__(self, task: Task) -> None:
        self._prepare = preparer(task.resize)
        self._predict = load_network(task.network, 1)

    def __call__(self, batch: Columns) -> Columns:
        scores = self._predict([self._prepare(cell) for cell in batch["image"]])
        return {"id": batch["id"], "scores": scores}


def predicting(rows: ray.data.Dataset, task: Task) -> ray.data.Dataset:
    """Prepare and predict in an actor a core."""
    return rows.map_batches(
        Predict,
        fn_constructor_args=(task,),
        batch_size=BATCH_ROWS,
        num_cpus=1,
        compute=ActorPoolStrategy(size=task.n_cores),
    )


if __name__ == "__main__":
    main(run)
