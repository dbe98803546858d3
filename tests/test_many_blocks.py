"""The ledger with very many blocks: the next one costs what the first has cost.

Costs are calls that are counted, never seconds.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from evmp.grid import Block, Grid
from evmp.ledger import Ledger
from evmp.plan import MAX_BLOCK_ROWS, MIN_BLOCK_ROWS
from evmp.publish import check_cover
from evmp.storage import Storage
from evmp.storage.local import LocalStorage


class CountingOs:
    """The module os, with its calls counted; fsync does nothing else."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if not callable(function):
            return function

        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls[name] += 1
            if name == "fsync":
                return None
            found = function(*arguments, **options)
            if name == "listdir":
                self.calls["names"] += len(found)
            return found

        return counted


class MemoryStorage:
    """Objects in memory, for more of them than a disk likes; counts what it is asked for."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.calls: Counter[str] = Counter()

    def create(self, name: str, data: bytes) -> bool:
        self.calls["create"] += 1
        return self.objects.setdefault(name, data) is data

    def adopt(self, file: Path, name: str) -> None:
        self.calls["adopt"] += 1
        self.objects[name] = b""

    def read(self, name: str) -> bytes:
        self.calls["read"] += 1
        if name not in self.objects:
            raise FileNotFoundError(name)
        return self.objects[name]

    def read_all(self, names: Sequence[str]) -> Iterator[bytes]:
        return map(self.read, names)

    def uri(self, name: str = "") -> str:
        return f"memory:{name}"

    def names(self, folder: str) -> list[str]:
        found = sorted(name for name in self.objects if name.startswith(f"{folder}/"))
        self.calls["names"] += len(found)
        return found

    def delete(self, name: str) -> None:
        self.calls["delete"] += 1
        self.objects.pop(name, None)


class Simulation:
    """A job whose workers commit blocks without rows, die in between, and start again.

    Args:
        root: of the ledger.
        storage: of the ledger.
        calls: what the storage counts in.
    """

    N_WORKERS = 3

    def __init__(self, root: Path, storage: Storage, calls: Counter[str]) -> None:
        self.ledger, self._storage, self._calls = Ledger(root, storage), storage, calls
        self.ledger.open({})
        self.costs: Counter[tuple[tuple[str, int], ...]] = Counter()
        """How many blocks have cost which calls."""

    def run(self, n_rows: int, block_rows: int, n_starts: int) -> int:
        """Do all rows. Returns how many blocks that were."""
        chance = Random(1)
        n_blocks = -(-n_rows // block_rows) + self.N_WORKERS
        for start in range(n_starts):
            self.ledger.sweep()
            todo = [*self._todo(n_rows, block_rows)]
            n_done = len(todo) if start == n_starts - 1 else n_blocks // n_starts
            chance.shuffle(todo)
            for block in todo[:n_done]:
                self._commit(block)
            for block in todo[n_done : n_done + self.N_WORKERS]:
                self._die(block)
        return self.costs.total()

    def _todo(self, n_rows: int, block_rows: int) -> Iterator[Block]:
        before = self._calls.copy()
        commits = self.ledger.commits()
        assert (self._calls - before)["names"] == len(commits)
        grid = Grid(n_rows, self.N_WORKERS, block_rows)
        for worker in range(self.N_WORKERS):
            looks = Counting(commits)
            yield from grid.cut(looks, grid.shard(worker, self.N_WORKERS))
            assert looks.n == len(commits)

    def _commit(self, block: Block) -> None:
        stage = self.ledger.stage("run", block.start)
        stage.touch()
        before = self._calls.copy()
        assert self.ledger.stop_of(block.start) is None
        assert self.ledger.commit(stage, block, 0, {})
        self.costs[tuple(sorted((self._calls - before).items()))] += 1

    def _die(self, block: Block) -> None:
        """Leave a commit between its stage file and its record."""
        stage = self.ledger.stage("dead", block.start)
        stage.touch()
        self._storage.adopt(stage, f"data/{block.start:012d}.0123456789abcdef0123456789abcdef")


class Counting(Sequence[Any]):
    """A sequence that counts how many of its items have been looked at."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items, self.n = items, 0

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, place: Any) -> Any:
        return self._items[place]

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self.n += 1
            yield item


def check_simulation(simulation: Simulation, n_rows: int, n_blocks: int) -> None:
    """Look whether every row is there once, and every block has cost the same as the first."""
    commits = simulation.ledger.commits()
    check_cover(commits, n_rows)
    assert len(commits) == n_blocks
    ((cost, n_equal),) = simulation.costs.items()
    assert n_equal == n_blocks
    assert dict(cost).get("names", 0) == dict(cost).get("listdir", 0) == 0


def test_block_costs_the_same_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting, n_rows = CountingOs(), 10_000_000
    monkeypatch.setattr("evmp.ledger.os", counting)
    monkeypatch.setattr("evmp.storage.local.os", counting)
    root = tmp_path / "out.evmp"
    simulation = Simulation(root, LocalStorage(root, root / "tmp"), counting.calls)
    for folder in ("data", "blocks"):  # which the first block in them would cost
        (root / folder).mkdir()

    n_blocks = simulation.run(n_rows, MAX_BLOCK_ROWS, n_starts=4)

    assert n_blocks > 2400
    check_simulation(simulation, n_rows, n_blocks)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("n_rows", [80_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_small_block_costs_the_same_however_many_there_are(n_rows: int) -> None:
    storage = MemoryStorage()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        simulation = Simulation(Path(folder, "out.evmp"), storage, storage.calls)

        n_blocks = simulation.run(n_rows, MIN_BLOCK_ROWS, n_starts=3)

        assert n_blocks >= n_rows // MIN_BLOCK_ROWS
        check_simulation(simulation, n_rows, n_blocks)
