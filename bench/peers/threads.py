"""A ThreadPoolExecutor: rows in flight, taken in order. The kernels release the GIL."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from work import AT_ONCE, Array, Sink, Task, load_network, main, preparer, read_cells

IN_FLIGHT = 32


def run(task: Task, sink: Sink) -> None:
    """Work on rows in as many threads as there are cores; the main thread reads and consumes."""
    prepare = preparer(task.resize)
    # Rows side by side, each on one core, are faster than each row on all cores.
    predict = load_network(task.network, 1) if task.work == "w2" else None
    step = AT_ONCE if predict else 1

    def work(cells: Sequence[Any]) -> Sequence[Array]:
        planes = [prepare(cell) for cell in cells]
        return predict(planes) if predict else planes

    futures: deque[tuple[Sequence[str], Future[Sequence[Array]]]] = deque()
    with ThreadPoolExecutor(task.n_cores) as pool:
        rows = read_cells(task.table)
        while few := list(islice(rows, step)):
            names, cells = zip(*few, strict=True)
            futures.append((names, pool.submit(work, cells)))
            if len(futures) >= IN_FLIGHT // step:
                names, future = futures.popleft()
                sink.take(names, future.result())
        for names, future in futures:
            sink.take(names, future.result())


if __name__ == "__main__":
    main(run)
