"""A ThreadPoolExecutor: rows in flight, taken in order. The kernels release the GIL."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from work import Array, Sink, Task, load_network, main, preparer, read_cells

IN_FLIGHT = 32


def run(task: Task, sink: Sink) -> None:
    """Work on rows in as many threads as there are cores; the main thread reads and consumes."""
    prepare = preparer(task.resize)
    # Rows side by side, each on one core, are faster than each row on all cores.
    predict = load_network(task.network, 1) if task.work == "w2" else None

    def work(cell: Any) -> Array:
        planes = prepare(cell)
        return predict(planes[None])[0] if predict else planes

    futures: deque[tuple[str, Future[Array]]] = deque()
    with ThreadPoolExecutor(task.n_cores) as pool:
        for name, cell in read_cells(task.table):
            futures.append((name, pool.submit(work, cell)))
            if len(futures) >= IN_FLIGHT:
                name, future = futures.popleft()
                sink.take([name], [future.result()])
        for name, future in futures:
            sink.take([name], [future.result()])


if __name__ == "__main__":
    main(run)
