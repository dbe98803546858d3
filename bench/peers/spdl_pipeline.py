"""SPDL: its pipeline of threads around the same functions as the thread pool.

SPDL's own image decoder needs FFmpeg's shared libraries, which its packages do not bring.
"""

from __future__ import annotations

from typing import Any

from spdl.pipeline import PipelineBuilder
from work import BATCH_ROWS, Array, Sink, Task, load_network, main, preparer, read_cells


def run(task: Task, sink: Sink) -> None:
    """Prepare, and in W2 predict, rows in threads; batches of them come out."""
    prepare = preparer(task.resize)
    predict = load_network(task.network, 1) if task.work == "w2" else None

    def work(row: tuple[str, Any]) -> tuple[str, Array]:
        planes = prepare(row[1])
        return row[0], predict(planes[None])[0] if predict else planes

    pipeline = (
        PipelineBuilder()
        .add_source(read_cells(task.table))
        .pipe(work, concurrency=task.n_cores)
        .aggregate(BATCH_ROWS)
        .add_sink(4)
        .build(num_threads=task.n_cores + 1)
    )
    with pipeline.auto_stop():
        for batch in pipeline:
            sink.take([name for name, _ in batch], [array for _, array in batch])


if __name__ == "__main__":
    main(run)
