"""What the peers of W3 share: the network on a GPU as a user would place it, one batch ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from work import MEAN, STD, Sink, Task

BATCH_ROWS = 256
WARM_UP_RUNS = 3


def predict_all(task: Task, sink: Sink, batches: Iterable[tuple[Sequence[str], Tensor]]) -> None:
    """Predict batches of (N, 224, 224, 3) uint8, pinned where there is a GPU; write the results.

    The next batch is begun before the scores of the last are waited for.
    """
    start = load_network(task)
    pending: tuple[Sequence[str], Callable[[], Tensor]] | None = None
    for names, frames in batches:
        begun = names, start(frames)
        if pending:
            sink.take(pending[0], pending[1]().numpy())
        pending = begun
    if pending:
        sink.take(pending[0], pending[1]().numpy())


def load_network(task: Task) -> Callable[[Tensor], Callable[[], Tensor]]:
    """Return a function that begins a batch; what it returns waits for the scores, (N, 1000)."""
    device, is_gpu = torch.device(task.device), task.device == "cuda"
    dtype = torch.float16 if is_gpu else torch.float32
    module = torch.jit.load(task.network, map_location=device).eval()
    module = torch.jit.freeze(module.to(device, dtype).to(memory_format=torch.channels_last))
    scale = torch.from_numpy(1 / (255 * STD)).to(device).view(3, 1, 1)
    bias = torch.from_numpy(-MEAN / STD).to(device).view(3, 1, 1)

    def start(frames: Tensor) -> Callable[[], Tensor]:
        with torch.inference_mode():
            planes = frames.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
            scores = module(planes.mul_(scale).add_(bias).to(dtype)).float()
            if not is_gpu:
                return lambda: scores
            host = torch.empty(scores.shape, pin_memory=True).copy_(scores, non_blocking=True)
            event = torch.cuda.Event()
            event.record()

        def wait() -> Tensor:
            event.synchronize()
            return host

        return wait

    for _ in range(WARM_UP_RUNS if is_gpu else 0):
        start(torch.zeros(BATCH_ROWS, 224, 224, 3, dtype=torch.uint8))()
    return start
