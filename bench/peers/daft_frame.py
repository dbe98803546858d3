"""Daft: a data frame over the table, with a class of ours on its image column.

Its own expressions (decode, decode_image, resize) are not used: they take several times as long as
these functions do. The class runs in a process a core, because threads would share one GIL.
"""

from __future__ import annotations

from typing import Any

import daft
import numpy as np
import pyarrow as pa
from daft import DataType
from work import BATCH_ROWS, Sink, Task, load_network, look, main, preparer

SCORES = DataType.fixed_size_list(DataType.float32(), 1000)


class Consume:
    """Prepares and consumes."""

    def __init__(self, task: Task) -> None:
        self._prepare = preparer(task.resize)

    @daft.method.batch(return_dtype=DataType.float64(), batch_size=BATCH_ROWS)
    def work(self, images: daft.Series) -> list[float]:
        return [look(self._prepare(cell)) for cell in cells(images)]


class Predict:
    """Prepares and predicts."""

    def __init__(self, task: Task) -> None:
        self._prepare = preparer(task.resize)
        self._predict = load_network(task.network, 1)

    @daft.method.batch(return_dtype=SCORES, batch_size=BATCH_ROWS)
    def work(self, images: daft.Series) -> list[Any]:
        return list(self._predict([self._prepare(cell) for cell in cells(images)]))


def run(task: Task, sink: Sink) -> None:
    """Consume or predict within the class; sums or scores come here."""
    daft.set_runner_native()
    frame = daft.read_parquet(task.table)
    options = daft.cls(max_concurrency=task.n_cores, use_process=True)
    work = options(Predict if task.work == "w2" else Consume)(task).work
    for batch in frame.select(frame["id"], work(frame["image"]).alias("out")).to_arrow_iter():
        names, out = batch.column("id").to_pylist(), batch.column("out")
        if task.work == "w2":
            sink.take(names, out.flatten().to_numpy().reshape(len(names), -1))
        else:
            sink.count(len(names), float(np.sum(out.to_numpy())))


def cells(images: daft.Series) -> list[memoryview]:
    """Return views of the cells."""
    return [memoryview(cell.as_buffer()) for cell in images.to_arrow().cast(pa.large_binary())]


if __name__ == "__main__":
    main(run)
