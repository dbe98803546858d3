"""evmp itself: the whole command, as a user runs it, results published.

In W1 a model of this script's stands in for the network: it normalises a row as evmp's networks on
a CPU do, looks at it and says what it saw, without torch. All else is what every job runs, so that
W1 of evmp writes and publishes a result for each row, which none of its peers does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from task import Task, look, parse

import evmp.head
import evmp.model
from evmp import _native, cli

AT_ONCE = 4  # images, as of all contestants; work.py has it, but needs packages that evmp does not
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE = tuple(1 / (255 * std) for std in STD)
BIAS = tuple(-mean / std for mean, std in zip(MEAN, STD, strict=True))


class Consumer:
    """A model, and the head for it."""

    device = "cpu"
    rows_at_once = 1
    is_asynchronous = False

    def warm_up(self) -> list[dict[str, Any]]:
        """Make what `predict` writes into."""
        import numpy as np

        self._planes = np.zeros((3, 224, 224), np.float32)
        return []

    def predict(self, frames: Any, rows: Sequence[int]) -> list[dict[str, Any]]:
        return [self._consume(frames[row]) for row in rows]

    def start(self, frames: Any, rows: Sequence[int]) -> evmp.model.Pending[Any]:
        return evmp.model.Pending(lambda: self.predict(frames, rows))

    def pin(self, memory: memoryview) -> None:
        """Do without."""

    def close(self) -> None:
        """Keep nothing."""

    def _consume(self, frame: Any) -> dict[str, Any]:
        _native.normalize(frame, self._planes, 224, 224, scale=SCALE, bias=BIAS)
        return {"seen": look(self._planes), "at": time.monotonic()}

    def check(self, outputs: list[dict[str, Any]]) -> None:
        """Accept what comes."""

    def results(self, outputs: list[dict[str, Any]], sizes: Sequence[Any]) -> list[bytes]:
        return [json.dumps(output).encode() for output in outputs]


def job_of(task: Task) -> dict[str, Any]:
    """Return the job file: W1 needs decoders most, W2 a predictor a core, W3 decoders for a GPU."""
    job = {
        "model_path": str(Path(task.network).parent),
        "model_type": "classifier",
        "top_k": 5,
        "device": "cpu",
        "input_table": task.table,
        "output_oss_file": task.out,
        "reserved_columns": "id",
        "num_worker": 1,
        "preprocess_thread_num": task.n_cores if task.work == "w1" else 1,
        "predict_thread_num": 1 if task.work == "w1" else task.n_cores,
        "torch_threads": 1,
        "cpu_batch_size": AT_ONCE,
        "batch_size": 16,
        "queue_size": 256,
    }
    if task.work == "w3":
        job |= {
            "device": task.device,
            "preprocess_thread_num": max(1, task.n_cores - 1),
            "predict_thread_num": 3 if task.device == "cuda" else 1,
            "batch_size": 256,
            "queue_size": 2048,
        }
    return job


def prepare(task: Task) -> None:
    """Let the consumer stand in for the network, where there shall be none."""
    if task.work == "w1":
        consumer = Consumer()
        evmp.model.preload = lambda package: None
        evmp.model.open_model = lambda *arguments: consumer
        evmp.head.open_head = lambda *arguments: consumer


def main() -> None:
    """Run the command; the results are the report."""
    task = parse()
    prepare(task)
    config = Path(task.report).with_suffix(".yaml")
    config.write_text(json.dumps(job_of(task)))
    cli.main(["--config", str(config), "--fresh", "--quiet"])


if __name__ == "__main__":
    main()
