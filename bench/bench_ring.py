"""Rows from process to process, streaming: evmp's ring, multiprocessing's means, shared memory.

    python bench/bench_ring.py --json out/bench/ring.json

Median and p95 are CPU time a row, user and system, of all processes together; the rate is by the
clock. A row is 64 bytes, or a frame of 500 x 375 pixels that its producer has in memory of its own
and its consumer looks at; its index travels with it. Buffers have 64 places, those of frames 32.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import statistics
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import shared_memory
from typing import Any, Final

import harness

from evmp.ring import Header, Ring, RingDrained

FORK: Final = multiprocessing.get_context("fork")
TOPOLOGIES: Final = {"1 to 1": (1, 1), "1 to 3": (1, 3), "3 to 1": (3, 1)}
SIZES: Final = {"64 B": 64, "frame": 500 * 375 * 3}
ROUND_SECONDS: Final = 0.3
BATCH_ROWS: Final = 16
TRIAL_BYTES: Final = 32 << 20  # of the run that tells how many rows a round can have
MAX_TRIAL_ROWS: Final = 4096
SEAT: Final = 1
INDEX: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Task:
    """What is passed: rows of `size` bytes, from so many producers to so many consumers."""

    n_rows: int
    size: int
    n_producers: int
    n_consumers: int

    @property
    def n_places(self) -> int:
        """How many rows may be under way."""
        return 32 if self.size > 4096 else 64

    def share(self, producer: int) -> range:
        """Return the rows of a producer."""
        return range(producer, self.n_rows, self.n_producers)


@dataclass(frozen=True, slots=True)
class Means:
    """A way to pass rows: the work of producer i, that of consumer i, and two ends.

    Attributes:
        finish: called when all producers have ended.
        close: called when everybody has.
    """

    produce: Callable[[int], None]
    consume: Callable[[int], None]
    finish: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None


def ring(task: Task, n_rows: int = 1) -> Means:
    """evmp's ring, with batches of `n_rows`."""
    hop = Ring("bench", task.n_places // n_rows, n_rows, task.size)
    hop.populate(task.size)
    data = os.urandom(task.size)

    def produce(producer: int) -> None:
        for n in task.share(producer):
            while not (hop.is_open(n) or hop.wait_open(n, 1.0)):
                continue
            hop.put(n, Header(n), data)

    def consume(consumer: int) -> None:
        seat = SEAT + consumer
        while True:
            try:
                seq = hop.claim(seat, 1.0)
            except RingDrained:
                return
            if seq is not None:
                for n in hop.rows(seq):
                    assert hop.header(n).row == n
                    hop.data(n)[0]
                hop.release(seq, seat)

    return Means(produce, consume, lambda: hop.close(task.n_rows))


def ring_of_batches(task: Task) -> Means:
    """evmp's ring, with batches of 16."""
    return ring(task, BATCH_ROWS)


def queue(task: Task) -> Means:
    """multiprocessing.Queue."""
    passage = FORK.Queue(task.n_places)
    data = os.urandom(task.size)

    def produce(producer: int) -> None:
        for n in task.share(producer):
            passage.put((n, data))
        passage.close()
        passage.join_thread()

    def consume(consumer: int) -> None:
        while (row := passage.get()) is not None:
            row[1][0]

    def finish() -> None:
        for _ in range(task.n_consumers):
            passage.put(None)

    def close() -> None:
        passage.close()
        passage.join_thread()

    return Means(produce, consume, finish, close)


def pipe(task: Task) -> Means:
    """multiprocessing.Pipe, with a lock at an end that several processes share."""
    reader, writer = FORK.Pipe(duplex=False)
    data = os.urandom(task.size)
    locks = [_lock(task.n_producers), _lock(task.n_consumers)]

    def produce(producer: int) -> None:
        for n in task.share(producer):
            with locks[0]:
                writer.send_bytes(INDEX.pack(n) + data)

    def consume(consumer: int) -> None:
        while True:
            with locks[1]:
                row = reader.recv_bytes()
            if not row:
                return
            row[8]

    def finish() -> None:
        for _ in range(task.n_consumers):
            writer.send_bytes(b"")

    def close() -> None:
        reader.close()
        writer.close()

    return Means(produce, consume, finish, close)


def semaphores(task: Task) -> Means:
    """A ring in multiprocessing.shared_memory, guarded by semaphores."""
    stride = INDEX.size + task.size
    memory = shared_memory.SharedMemory(create=True, size=16 + task.n_places * stride)
    buffer = memory.buf
    assert buffer is not None
    ends = buffer[:16].cast("Q")  # rows put, rows taken
    places = buffer[16:]
    free, filled = FORK.Semaphore(task.n_places), FORK.Semaphore(0)
    locks = [_lock(task.n_producers), _lock(task.n_consumers)]
    data = os.urandom(task.size)

    def place(end: int) -> memoryview:
        start = ends[end] % task.n_places * stride
        ends[end] += 1
        return places[start : start + stride]

    def put(n: int) -> None:
        free.acquire()
        with locks[0]:
            row = place(0)
            row[8:] = data
            INDEX.pack_into(row, 0, n)
            filled.release()

    def take() -> int:
        filled.acquire()
        with locks[1]:
            row = place(1)
            row[8]
            (n,) = INDEX.unpack_from(row)
            free.release()
        return int(n)

    def produce(producer: int) -> None:
        for n in task.share(producer):
            put(n)

    def consume(consumer: int) -> None:
        while take() < task.n_rows:
            continue

    def finish() -> None:
        for _ in range(task.n_consumers):
            put(task.n_rows)

    def close() -> None:
        nonlocal ends, places
        ends.release()
        places.release()
        memory.close()
        memory.unlink()

    return Means(produce, consume, finish, close)


class _NoLock:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _lock(n_users: int) -> Any:
    return FORK.Lock() if n_users > 1 else _NoLock()


CONTENDERS: Final[dict[str, Callable[[Task], Means]]] = {
    "multiprocessing.Queue": queue,
    "multiprocessing.Pipe": pipe,
    "shared_memory, semaphores": semaphores,
    "evmp": ring,
    "evmp, batches of 16": ring_of_batches,
}


# --- measuring ------------------------------------------------------------------------------------


def stream(means: Means, task: Task) -> tuple[float, float]:
    """Pass all rows. Returns seconds of CPU, of all processes together, and by the clock."""
    shared = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")
    works = [(means.consume, i) for i in range(task.n_consumers)]
    works += [(means.produce, i) for i in range(task.n_producers)]
    pids = [_fork(work, i, shared[k : k + 1]) for k, (work, i) in enumerate(works, 1)]
    started = time.perf_counter()
    shared[0] = 1.0
    _wait(pids[task.n_consumers :])
    means.finish()
    _wait(pids[: task.n_consumers])
    seconds = time.perf_counter() - started
    means.close()
    return sum(shared[1 : 1 + len(pids)]), seconds


def _fork(work: Callable[[int], None], number: int, cpu: memoryview[float]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            before = time.process_time()
            work(number)
            cpu[0] = time.process_time() - before
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def _wait(pids: Sequence[int]) -> None:
    for pid in pids:
        _, status = os.waitpid(pid, 0)
        assert status == 0, f"a process of the benchmark failed with status {status}"


def compare(bench: harness.Bench, topology: str, size: str, n_rounds: int) -> None:
    """Measure all contenders, in turns."""
    tasks = {name: _task(make, topology, size) for name, make in CONTENDERS.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(n_rounds):
        for name, make in CONTENDERS.items():
            cpu, seconds = stream(make(tasks[name]), tasks[name])
            samples[name].append((cpu / tasks[name].n_rows, seconds / tasks[name].n_rows))
    baseline = statistics.median(cpu for cpu, _ in samples[next(iter(CONTENDERS))])
    for name, pairs in samples.items():
        cpus = [cpu for cpu, _ in pairs]
        median = statistics.median(cpus)
        row = harness.Row(
            name,
            f"{topology}, {size}",
            len(cpus),
            median * 1e6,
            statistics.quantiles(cpus, n=20, method="inclusive")[-1] * 1e6,
            1 / statistics.median(seconds for _, seconds in pairs),
            "rows/s",
            baseline / median,
        )
        bench.rows.append(row)
        harness.show(row)


def _task(make: Callable[[Task], Means], topology: str, size: str) -> Task:
    """Return a task that takes about ROUND_SECONDS."""
    n_rows = min(MAX_TRIAL_ROWS, TRIAL_BYTES // SIZES[size] // BATCH_ROWS * BATCH_ROWS)
    trial = Task(n_rows, SIZES[size], *TOPOLOGIES[topology])
    _, seconds = stream(make(trial), trial)
    n_laps = max(1, round(ROUND_SECONDS / seconds))
    return replace(trial, n_rows=n_laps * n_rows)


def main() -> None:
    """Measure every contender in every topology."""
    bench = harness.Bench("ring", __doc__, [])
    for topology in TOPOLOGIES:
        for size in SIZES:
            compare(bench, topology, size, n_rounds=3 if bench.is_quick else 15)
    bench.finish()


if __name__ == "__main__":
    main()
