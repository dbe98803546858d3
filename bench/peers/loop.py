"""A plain loop: one row after the other."""

from __future__ import annotations

from work import Sink, Task, load_network, main, preparer, read_cells


def run(task: Task, sink: Sink) -> None:
    """Work on one core, in W2 with torch's own threads on all."""
    prepare = preparer(task.resize)
    predict = load_network(task.network, task.n_cores) if task.work == "w2" else None
    for name, cell in read_cells(task.table):
        planes = prepare(cell)
        sink.take([name], predict([planes]) if predict else [planes])


if __name__ == "__main__":
    main(run)
