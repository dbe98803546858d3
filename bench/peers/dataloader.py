"""torch's DataLoader: worker processes over the table's row groups, batches through shared memory.

The workers return uint8, a quarter of the bytes, and the consumer normalises.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from work import (
    BATCH_ROWS,
    Sink,
    Task,
    decode,
    load_network,
    main,
    normalise,
    resizer,
    views,
)


class Rows(IterableDataset):
    """The rows of every n-th row group: (id, (224, 224, 3) uint8)."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        torch.set_num_threads(1)
        worker, resize = get_worker_info(), resizer(self._task.resize)
        with pq.ParquetFile(self._task.table, pre_buffer=False, buffer_size=1 << 20) as file:
            groups = range(worker.id, file.num_row_groups, worker.num_workers)
            for records in file.iter_batches(64, list(groups), columns=["id", "image"]):
                names = records["id"].to_pylist()
                for name, cell in zip(names, views(records["image"]), strict=True):
                    yield name, torch.from_numpy(resize(decode(cell)))


def run(task: Task, sink: Sink) -> None:
    """Decode in the workers; normalise, and in W2 predict, here."""
    # The network takes all but what decoding needs, and that is a thirtieth of it.
    predict = load_network(task.network, task.n_cores) if task.work == "w2" else None
    loader = DataLoader(
        Rows(task),
        batch_size=BATCH_ROWS,
        num_workers=task.n_cores if not predict else 1,
        prefetch_factor=4,
    )
    for names, frames in loader:
        pixels = frames.numpy()
        planes = np.empty((len(pixels), 3, *pixels.shape[1:3]), np.float32)
        for image, into in zip(pixels, planes, strict=True):
            normalise(image, into)
        sink.take(names, predict(planes) if predict else planes)


if __name__ == "__main__":
    main(run)
