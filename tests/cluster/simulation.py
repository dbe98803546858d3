"""Thousands of workers and a million blocks, in simulated time.

    PYTHONPATH=tests python -m cluster.simulation --workers 10000 --blocks 1000000

The workers' leases are the real ones, and so are the requests that they make; only what takes time
is played: a block's computation, and each request's way to the storage and back.
"""

from __future__ import annotations

import argparse
import heapq
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from cluster.storage import MemoryStorage
from evmp.grid import Block, Grid
from evmp.lease import RENEWALS, Leases

ROWS_OF_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Scenario:
    """What the cluster is like.

    Attributes:
        n_workers: at the start; each that dies is followed by another.
        n_blocks: of the job.
        block_seconds: what a block takes on average; each takes half to one and a half of it.
        life_seconds: of a worker, on average.
        pause_seconds: until the one that follows a dead worker is there.
        request_seconds: what a worker waits for each request.
        lease_seconds: as the job's key.
        step_seconds: between two looks of a worker at the time; a real one looks all the time.
        late_share: of the workers that come only when half of the job should be over.
    """

    n_workers: int
    n_blocks: int
    block_seconds: float = 20.0
    life_seconds: float = 2000.0
    pause_seconds: float = 60.0
    request_seconds: float = 0.01
    lease_seconds: float = 10.0
    step_seconds: float = 10.0
    late_share: float = 0.1
    seed: int = 1


@dataclass(slots=True)
class Outcome:
    """What came of it.

    Attributes:
        seconds: until all rows were committed.
        ideal_seconds: what the work alone would have taken workers that never die or wait.
        lived_seconds: of all workers together, until then.
        requests: by kind.
        n_deaths, n_joins: of workers.
        n_doubled: blocks that were computed and came second.
        failover: of each block that a dead worker held, the seconds until its next lease.
        oldest: the longest that a block was leased, or free after it had been, before its commit.
    """

    seconds: float = 0.0
    ideal_seconds: float = 0.0
    lived_seconds: float = 0.0
    requests: dict[str, int] = field(default_factory=dict)
    n_deaths: int = 0
    n_joins: int = 0
    n_doubled: int = 0
    failover: list[float] = field(default_factory=list)
    oldest: float = 0.0

    def in_words(self, scenario: Scenario) -> str:
        """Return it as text."""
        total = sum(self.requests.values())
        busy = scenario.n_blocks * scenario.block_seconds
        kinds = ", ".join(
            f"{count / scenario.n_blocks:.2f} {kind}" for kind, count in self.requests.items()
        )
        waits = sorted(self.failover) or [0.0]
        return (
            f"{scenario.n_workers} workers, {scenario.n_blocks} blocks: {self.seconds:.0f} s, "
            f"ideal {self.ideal_seconds:.0f} s; workers were busy with what counts for "
            f"{100 * busy / self.lived_seconds:.1f} % of their time\n"
            f"{self.n_deaths} deaths, {self.n_joins} joins, {self.n_doubled} blocks came second\n"
            f"{total / scenario.n_blocks:.2f} requests a block ({kinds}), "
            f"{total / self.seconds:.0f} a second in all\n"
            f"new lease after a death: median {waits[len(waits) // 2]:.1f} s, "
            f"worst {waits[-1]:.1f} s; oldest lease {self.oldest:.0f} s"
        )


class Records:
    """The ledger, as far as leases ask it."""

    def __init__(self, storage: MemoryStorage) -> None:
        self.storage = storage
        self._stops: dict[int, int] = {}

    def stop_of(self, start: int) -> int | None:
        """Return where the committed block that begins at a row stops."""
        self.storage.requests["read"] += 1
        return self._stops.get(start)

    def commit(self, block: Block) -> bool:
        """Commit a block: its data, its record. Returns whether it came first."""
        self.storage.requests["write"] += 1
        self.storage.requests["create"] += 1
        if block.start in self._stops:
            return False
        self._stops[block.start] = block.stop
        return True

    @property
    def n_rows(self) -> int:
        """How many rows are committed."""
        return sum(stop - start for start, stop in self._stops.items())


class RememberedGrid(Grid):
    """A grid that thousands of workers ask for the same cells."""

    def cells(self, start: int, stop: int) -> Iterator[Block]:
        """Yield the cells [start, stop)."""
        return iter(_cells(self, start, stop))


@cache
def _cells(grid: Grid, start: int, stop: int) -> list[Block]:
    return list(Grid.cells(grid, start, stop))


class Simulation:
    """Runs a scenario to its end."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._chance = random.Random(scenario.seed)
        self._now = 1e9
        self._storage = MemoryStorage(lambda: self._now)
        self._records = Records(self._storage)
        self._storage.write("job.json", b"{}")
        self._grid = RememberedGrid(scenario.n_blocks * ROWS_OF_BLOCK, 1, ROWS_OF_BLOCK)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._n_events = 0
        self._orphans: dict[int, float] = {}
        self._born: dict[int, float] = {}
        self._left = scenario.n_blocks
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Let all of it happen."""
        scenario, outcome, began = self._scenario, self.outcome, self._now
        n_late = int(scenario.n_workers * scenario.late_share)
        work = scenario.n_blocks * scenario.block_seconds
        outcome.ideal_seconds = work / scenario.n_workers
        for number in range(scenario.n_workers):
            late = outcome.ideal_seconds / 2 if number < n_late else 0.0
            self.at(late + self._chance.uniform(0, 5), self._join)
        while self._events and self._left:
            self._now, _, event = heapq.heappop(self._events)
            event()
        outcome.seconds = self._now - began
        outcome.lived_seconds += sum(self._now - born for born in self._born.values())
        outcome.requests = dict(self._storage.requests.most_common())
        assert self._records.n_rows == self._grid.n_rows
        return outcome

    def at(self, delay: float, event: Callable[[], None]) -> None:
        """Let something happen after so many seconds."""
        self._n_events += 1
        heapq.heappush(self._events, (self._now + delay, self._n_events, event))

    def _join(self) -> None:
        self.outcome.n_joins += 1
        self._born[self.outcome.n_joins] = self._now
        _Worker(self, self.outcome.n_joins)

    # --- what workers ask for -----------------------------------------------------------------

    def leases(self, number: int, clock: Callable[[], float]) -> Leases:
        """Return the leases of a worker."""
        name = f"{self._chance.getrandbits(64):016x}"
        seconds = self._scenario.lease_seconds
        records: Any = self._records
        return Leases(records, self._grid, name, seconds, clock)

    def cost(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """Return what a call returns, and the seconds that its requests take."""
        before = self._storage.requests.total()
        result = call()
        n_requests = self._storage.requests.total() - before
        return result, n_requests * self._scenario.request_seconds

    def now(self) -> float:
        """Return the time."""
        return self._now

    def lifetime(self) -> float:
        """Return how long a worker lives."""
        return self._chance.expovariate(1 / self._scenario.life_seconds)

    def duration(self) -> float:
        """Return how long a block takes."""
        return self._scenario.block_seconds * self._chance.uniform(0.5, 1.5)

    def claimed(self, block: Block) -> None:
        """Note that a block was leased."""
        if (orphaned := self._orphans.pop(block.start, None)) is not None:
            self.outcome.failover.append(self._now - orphaned)

    def commit(self, block: Block, since: float) -> bool:
        """Commit a block. Returns whether it came first."""
        if not self._records.commit(block):
            self.outcome.n_doubled += 1
            return False
        self._left -= 1
        self.outcome.oldest = max(self.outcome.oldest, self._now - since)
        return True

    def die(self, number: int, held: list[Block]) -> None:
        """Note a death, and let another worker come."""
        self.outcome.n_deaths += 1
        self.outcome.lived_seconds += self._now - self._born.pop(number)
        for block in held:
            if self._records.stop_of(block.start) is None:
                self._orphans[block.start] = self._now
        self.at(self._scenario.pause_seconds, self._join)

    @property
    def renewal_seconds(self) -> float:
        """How often a worker looks whether it is time to show itself."""
        return min(self._scenario.step_seconds, self._scenario.lease_seconds / RENEWALS)


class _Worker:
    """A worker's keeper: it claims, computes and commits one block after the other."""

    def __init__(self, simulation: Simulation, number: int) -> None:
        self._simulation, self._number = simulation, number
        self._leases = simulation.leases(number, simulation.now)
        self._held: deque[tuple[Block, float]] = deque()
        self._is_dead = False
        simulation.at(simulation.lifetime(), self._die)
        self._renew()
        self._work()

    def _renew(self) -> None:
        if not self._is_dead:
            self._leases.renew()
            while self._leases.has_found:
                self._claim()
            self._simulation.at(self._simulation.renewal_seconds, self._renew)

    def _claim(self) -> bool:
        block = self._leases.claim()
        if block:
            self._simulation.claimed(block)
            self._held.append((block, self._simulation.now()))
        return block is not None

    def _work(self) -> None:
        if self._is_dead or self._leases.is_complete:
            return
        is_there, cost = True, 0.0
        if not self._held:
            is_there, cost = self._simulation.cost(self._claim)
        if is_there:
            self._simulation.at(cost + self._simulation.duration(), self._finish)
        else:
            self._simulation.at(cost + self._leases.pause_seconds, self._work)

    def _finish(self) -> None:
        if self._is_dead:
            return
        block, since = self._held.popleft()
        is_first = self._simulation.commit(block, since)
        stop = block.stop if is_first else 0
        _, cost = self._simulation.cost(lambda: self._leases.done(block.start, stop))
        self._simulation.at(cost, self._work)

    def _die(self) -> None:
        self._is_dead = True
        self._simulation.die(self._number, [block for block, _ in self._held])


def main() -> None:
    """Run one scenario and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--block-seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    scenario = Scenario(arguments.workers, arguments.blocks, arguments.block_seconds)
    started = time.monotonic()
    print(Simulation(scenario).run().in_words(scenario))
    print(f"simulated in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
