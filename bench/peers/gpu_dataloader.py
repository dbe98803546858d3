"""torch's DataLoader before a GPU: worker processes decode, and batches arrive pinned."""

from __future__ import annotations

from dataloader import Rows
from gpu import BATCH_ROWS, predict_all
from torch.utils.data import DataLoader
from work import Sink, Task, main


def run(task: Task, sink: Sink) -> None:
    """Decode in the workers, predict here."""
    loader = DataLoader(
        Rows(task),
        batch_size=BATCH_ROWS,
        num_workers=max(1, task.n_cores - 1),
        prefetch_factor=4,
        pin_memory=task.device == "cuda",
    )
    predict_all(task, sink, loader)


if __name__ == "__main__":
    main(run)
