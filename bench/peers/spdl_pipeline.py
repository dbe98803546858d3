"""SPDL: its pipeline of threads around the same functions as the thread pool.

SPDL's own image decoder needs FFmpeg's shared libraries, which its packages do not bring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spdl.pipeline import PipelineBuilder
from work import (
    AT_ONCE,
    BATCH_ROWS,
    Array,
    Sink,
    Task,
    load_network,
    main,
    preparer,
    read_cells,
)


def run(task: Task, sink: Sink) -> None:
    """Prepare, and in W2 predict, rows in threads; batches of them come out."""
    prepare = preparer(task.resize)
    predict = load_network(task.network, 1) if task.work == "w2" else None

    def prepared(row: tuple[str, Any]) -> tuple[str, Array]:
        return row[0], prepare(row[1])

    def predicted(rows: list[tuple[str, Any]]) -> tuple[list[str], Sequence[Array]]:
        names, cells = zip(*rows, strict=True)
        return list(names), predict([prepare(cell) for cell in cells]) if predict else []

    def unzipped(rows: list[tuple[str, Array]]) -> tuple[list[str], list[Array]]:
        return [name for name, _ in rows], [array for _, array in rows]

    builder = PipelineBuilder().add_source(read_cells(task.table))
    if predict:
        builder = builder.aggregate(AT_ONCE).pipe(predicted, concurrency=task.n_cores)
    else:
        builder = builder.pipe(prepared, concurrency=task.n_cores).aggregate(BATCH_ROWS)
        builder = builder.pipe(unzipped)
    pipeline = builder.add_sink(4).build(num_threads=task.n_cores + 1)
    with pipeline.auto_stop():
        for names, arrays in pipeline:
            sink.take(names, arrays)


if __name__ == "__main__":
    main(run)
