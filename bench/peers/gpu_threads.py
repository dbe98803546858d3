"""A ThreadPoolExecutor before a GPU: threads decode into a batch, the main thread predicts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from gpu import BATCH_ROWS, predict_all
from torch import Tensor
from work import SIDE, Sink, Task, decode, main, read_cells, resizer

BATCHES_AHEAD = 4


def run(task: Task, sink: Sink) -> None:
    """Decode in as many threads as there are cores."""
    predict_all(task, sink, batches(task))


def batches(task: Task) -> Iterator[tuple[Sequence[str], Tensor]]:
    """Yield the batches, with the next ones under way."""
    resize = resizer(task.resize)
    torch.set_num_threads(1)

    def work(cell: Any, place: Tensor) -> None:
        place.copy_(torch.from_numpy(resize(decode(cell))))

    ahead: deque[tuple[Sequence[str], Tensor, list[Future[None]]]] = deque()
    with ThreadPoolExecutor(task.n_cores) as pool:
        rows = read_cells(task.table)
        while True:
            if few := list(islice(rows, BATCH_ROWS)):
                names, cells = zip(*few, strict=True)
                frames = torch.empty(
                    (len(few), SIDE, SIDE, 3), dtype=torch.uint8, pin_memory=task.device == "cuda"
                )
                futures = [pool.submit(work, *pair) for pair in zip(cells, frames, strict=True)]
                ahead.append((names, frames, futures))
            if not ahead:
                return
            if len(ahead) == BATCHES_AHEAD or not few:
                names, frames, futures = ahead.popleft()
                for future in futures:
                    future.result()
                yield names, frames


if __name__ == "__main__":
    main(run)
