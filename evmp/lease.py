"""Who works on which block, where any worker may take any: leases in the ledger's storage.

    workers/<worker>                        what a worker does; renewed while it lives
    leases/<chunk>/<start>.<generation>     a worker's claim to the block that begins at row `start`
    leases/<chunk>/<start>-<stop>           says that these rows are committed
    chunks/<chunk>                          says that all rows of a chunk are

A lease lives as long as its worker, which has shown itself within the last seconds by the storage's
own clock: clocks of machines are never compared. Within how many, each worker says itself. The
lease of a dead worker is left as it is; the next generation of it goes to whoever creates that
first. None of this decides what counts, which the records of the ledger do. A worker that was taken
for dead, and is not, loses some time.

Nobody lists everything. The blocks lie in chunks of a few hundred; a worker looks into one chunk
after the other, in an order of its own, and takes blocks of it at random. It watches the two that
follow it by name: one of them could die unnoticed with the worker that watches it. What a dead one
held it takes over, and says so before it leases it again.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from evmp.grid import Block, Grid
from evmp.ledger import Ledger

DIGITS: Final = 12  # of a row's number in a name
CHUNK_CELLS: Final = 500  # of the grid; a storage lists their leases in one answer
RENEWALS: Final = 3  # in the time of a lease
DEAD: Final = 0.7  # of that time without a sign; the rest is for finding out
PRECEDENCE: Final = 0.1  # of that time, of a worker that is nearer to one that may be dead
NEWCOMERS: Final = 0.6  # of that time, after which a worker looks who else is there
WATCHED: Final = 2  # living workers
NEARBY: Final = 8  # workers at least, that it lists for that
VAIN_LOOKS: Final = 8  # that find no block free, before a worker asks which chunks are done
MISSES: Final = 3  # blocks that others were faster to take, before a chunk is looked at again
JUDGED: Final = 8  # leases that one look asks for their worker
MIN_PAUSE_SECONDS: Final = 0.05  # of a worker that finds nothing; it doubles each time
CROWD: Final = 100  # workers; where there are more, each looks less often when it is idle
CLOCK_LEASES: Final = 10  # the storage's clock is read once in the time of so many
_LEASE_OR_STOP: Final = re.compile(rf"/(\d{{{DIGITS}}})([.-])(\d+)$", re.ASCII | re.MULTILINE)


class Unit(NamedTuple):
    """Rows [start, stop) that are not committed, and how often they were leased."""

    start: int
    stop: int
    generation: int = 0


@dataclass(slots=True)
class _View:
    """What a look into a chunk has shown, in random order."""

    chunk: int
    free: list[Unit] = field(default_factory=list)
    leased: list[Unit] = field(default_factory=list)
    n_misses: int = 0


class Leases:
    """The leases of one worker. Used by one process.

    Args:
        ledger, grid: of the job.
        worker: a name that no other worker has, nor a predecessor: random hexadecimal digits.
        seconds: when this worker does not show itself for so long it is dead.
        clock: seconds since any time.
        about: told to whoever asks what the workers do.
    """

    def __init__(
        self,
        ledger: Ledger,
        grid: Grid,
        worker: str,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._ledger, self._storage, self._grid = ledger, ledger.storage, grid
        self._worker, self._seconds, self._clock = worker, seconds, clock
        self._about = dict(about or {})
        self._chance = random.Random(worker)
        self._held: dict[int, tuple[Unit, float]] = {}
        self._found: deque[Unit] = deque()
        self._n_workers, self._n_alike = 1, 0
        self._view: _View | None = None
        self._chunks: list[int] = []
        self._done_chunks: set[int] = set()
        self._n_vain_looks = 0
        self._n_chunks = -(-len(grid) // CHUNK_CELLS)
        self._shown: dict[str, float] = {}
        self._seconds_of: dict[str, float] = {}
        self._watched: list[str] = []
        self._offset, self._due, self._read_clock, self._look_again = 0.0, 0.0, 0.0, 0.0
        self._idle_since: float | None = None
        self._n_rests = 0
        self._longest = seconds
        self.is_complete = False
        """Whether every row is committed."""

    # --- being alive --------------------------------------------------------------------------

    @property
    def has_found(self) -> bool:
        """Whether blocks of a dead worker wait to be claimed."""
        return bool(self._found)

    @property
    def pause_seconds(self) -> float:
        """How long to wait after a claim that has found nothing."""
        pause: float = MIN_PAUSE_SECONDS * 2 ** min(self._n_rests, 20)
        longest = self._seconds / 10 * max(1, self._n_workers / CROWD)
        return min(pause, longest) * self._chance.uniform(0.5, 1)

    def renew(self, **about: Any) -> None:
        """Show that the worker lives, if it is time, and look whether those that it watches do.

        Args:
            about: what has changed of what it does.

        Raises:
            FileNotFoundError: when the job is over, and its staging place gone.
            OSError: when the storage refuses.
        """
        self._about.update(about)
        is_clock_due = self._clock() >= self._read_clock
        if is_clock_due or self._clock() >= self._due:
            self._show()
        if is_clock_due:
            with suppress(FileNotFoundError):  # others take this worker for dead just now
                # What comes after the answer is not counted: others seem younger than they are.
                shown = self._storage.stat(f"workers/{self._worker}").modified
                self._offset = shown - self._clock()
                self._read_clock = self._clock() + CLOCK_LEASES * self._seconds
        self._watch()

    def resume(self, held: Collection[int]) -> None:
        """Go on for a process of the same worker that has died.

        Args:
            held: where the blocks begin that the worker has been given and has not done with.
        """
        shown = self._read(f"workers/{self._worker}").get("held", ())
        for unit in (Unit(*map(int, it)) for it in shown):
            if unit.start in held:
                self._held[unit.start] = unit, self._clock()
            else:
                self._found.append(unit)

    def leave(self) -> None:
        """Hand back what is held, or was found, and show no more."""
        for unit in [*(unit for unit, _ in self._held.values()), *self._found]:
            self._storage.delete(self._lease(unit.start, unit.generation))
        self._held.clear()
        self._found.clear()
        self._storage.delete(f"workers/{self._worker}")

    def _show(self) -> None:
        held = [*(unit for unit, _ in self._held.values()), *map(_next, self._found)]
        about = {**self._about, "lease_seconds": self._seconds, "held": held}
        shown = json.dumps(about).encode()
        self._storage.write(f"workers/{self._worker}", shown)
        self._due = self._clock() + self._seconds / RENEWALS

    def _now(self) -> float:
        """Return the time by the storage's clock, or a little less."""
        return self._clock() + self._offset

    def _is_dead(self, worker: str, n_nearer: int = 0) -> bool:
        """Return whether a worker has not shown itself for long. Asks again only when it may.

        Args:
            n_nearer: living workers that should see it first.
        """
        if worker == self._worker:  # a lease of its own that it does not know of
            return True
        patience = DEAD + PRECEDENCE * n_nearer
        if worker in self._shown and self._is_recent(worker, patience):
            return False
        try:
            self._shown[worker] = self._storage.stat(f"workers/{worker}").modified
        except FileNotFoundError:
            return True
        return not self._is_recent(worker, patience)

    def _is_recent(self, worker: str, patience: float) -> bool:
        return self._shown[worker] + patience * self._lifetime(worker) > self._now()

    def _lifetime(self, worker: str) -> float:
        """Return the time of another worker's leases, which it is asked for once."""
        if worker not in self._seconds_of:
            self._note_lifetime(worker, self._read(f"workers/{worker}"))
        return self._seconds_of.get(worker, self._seconds)

    def _note_lifetime(self, worker: str, told: Mapping[str, Any]) -> None:
        if isinstance(seconds := told.get("lease_seconds"), (int, float)):
            self._seconds_of[worker] = seconds

    def _watch(self) -> None:
        """Take over what the dead held of those that follow, up to the last that is watched."""
        late = self._clock() - self._look_again
        if self._found or (late < 0 and not any(map(self._is_dead, self._watched, range(WATCHED)))):
            return
        before, self._watched = self._watched, []
        for follower in _after(self._nearby(), self._worker):
            if self._is_dead(follower, len(self._watched)):
                self._inherit(follower)
            else:
                self._watched.append(follower)
            if len(self._watched) == WATCHED:
                break
        if late > self._seconds or not self._watched or not set(before) <= set(self._watched):
            self._storage.stat("job.json")  # which is gone when all others are, as the job is over
        self._look_again = self._clock() + NEWCOMERS * self._seconds

    def _nearby(self) -> list[str]:
        """Return the workers whose names begin alike; all of them, where there are few."""
        start = self._worker[: self._n_alike]
        names = [name.partition("/")[2] for name in self._storage.names("workers", start)]
        self._n_workers = len(names) * 16**self._n_alike
        if len(names) > 16 * NEARBY:
            self._n_alike += 1
        elif len(names) < NEARBY and self._n_alike:
            self._n_alike -= 1
        return names

    def _inherit(self, worker: str) -> None:
        """Line up what a dead worker held. Whoever inherits this one's finds it here, too."""
        with suppress(ValueError, TypeError):
            held = self._read(f"workers/{worker}").get("held", ())
            self._found.extend([Unit(*map(int, it)) for it in held])
        if self._found:
            self._show()
        self._storage.delete(f"workers/{worker}")

    # --- blocks -------------------------------------------------------------------------------

    def claim(self) -> Block | None:
        """Take a block that nobody works on. Returns None where there is none just now.

        Raises:
            FileNotFoundError: when the job is over, and its staging place gone.
            OSError: when the storage refuses.
        """
        block = self._claim()
        if block is not None:
            self._n_rests, self._idle_since = 0, None
            return block
        self._n_rests += 1
        if self._idle_since is None:
            self._idle_since = self._clock()
        return None

    def done(self, start: int, stop: int) -> None:
        """Note that what was claimed from row `start` on is committed up to row `stop`."""
        _, since = self._held.pop(start, (None, self._clock()))
        self._longest = max(self._longest, 2 * (self._clock() - since))
        if stop <= start:  # another was first: how far did it come?
            stop = self._ledger.stop_of(start) or start
        if stop > start:
            self._mark(start, stop)

    def _claim(self) -> Block | None:
        while self._found:
            if block := self._claim_found():
                return block
        view = self._view or self._look()
        if view is None:
            return None
        while view.free and view.n_misses < MISSES:
            if block := self._take(view.free.pop()):
                return block
            view.n_misses += 1
        self._view = None
        if view.free:
            self._chunks.append(view.chunk)  # to be looked at again
            return None
        for unit in view.leased[:JUDGED]:
            lease = self._read(self._lease(unit.start, unit.generation))
            worker = str(lease.get("worker"))
            self._note_lifetime(worker, lease)
            if self._is_dead(worker):
                return self._take(unit)
            if self._is_worth_a_race(lease):
                return self._take(unit, again=True)
        return None

    def _claim_found(self) -> Block | None:
        if self._clock() >= self._due:
            self._show()
        block = self._leased(self._found[0])
        self._found.popleft()
        if not self._found:  # who else has taken some of it, is shown no more soon
            self._due = self._clock()
        return block

    def _take(self, unit: Unit, *, again: bool = False) -> Block | None:
        """Lease a unit, and show it. Returns its rows, unless another was faster."""
        block = self._leased(unit, again=again)
        if block is not None:
            try:
                self._show()
            except OSError:  # the caller gets no block: its lease is one that nobody knows of
                del self._held[unit.start]
                raise
        return block

    def _leased(self, unit: Unit, *, again: bool = False) -> Block | None:
        """Create the next lease of a unit. Returns its rows, unless another was faster."""
        following = _next(unit)
        lease = {
            "worker": self._worker,
            "lease_seconds": self._seconds,
            "since": self._now(),
            "again": again,
        }
        name = self._lease(unit.start, following.generation)
        if unit.start in self._held or not self._storage.create(name, json.dumps(lease).encode()):
            return None
        if (stop := self._ledger.stop_of(unit.start)) is not None:
            self._mark(unit.start, stop)
            return None
        self._held[unit.start] = following, self._clock()
        return Block(unit.start, unit.stop)

    def _is_worth_a_race(self, lease: Mapping[str, Any]) -> bool:
        """Return whether a block takes its worker so long that an idle one may try it, too."""
        idle = 0.0 if self._idle_since is None else self._clock() - self._idle_since
        age = self._now() - float(lease.get("since", self._now()))
        return idle > self._seconds and age > self._longest and not lease.get("again")

    def _read(self, name: str) -> dict[str, Any]:
        try:
            lease = json.loads(self._storage.read(name))
        except (FileNotFoundError, ValueError):
            return {}
        return lease if isinstance(lease, dict) else {}

    # --- chunks -------------------------------------------------------------------------------

    def _look(self) -> _View | None:
        """Look into the next chunk that is not done. Returns None when all are."""
        self._storage.stat("job.json")
        if not self._chunks:
            self._forget_done_chunks()
        while self._chunks:
            if self._n_vain_looks >= VAIN_LOOKS:
                self._forget_done_chunks()
                continue
            chunk = self._chunks.pop()
            if chunk not in self._done_chunks:
                view = self._seen(chunk)
                if chunk not in self._done_chunks:
                    self._view = view
                    return view
        self.is_complete = len(self._done_chunks) == self._n_chunks
        return None

    def _forget_done_chunks(self) -> None:
        names = self._storage.names("chunks")
        self._done_chunks.update(int(name.partition("/")[2]) for name in names)
        chunks = self._chunks or self._chance.sample(range(self._n_chunks), self._n_chunks)
        self._chunks = [chunk for chunk in chunks if chunk not in self._done_chunks]
        self._n_vain_looks = 0

    def _seen(self, chunk: int) -> _View:
        view = _View(chunk)
        for unit in self._units(chunk):
            (view.leased if unit.generation else view.free).append(unit)
        if not view.free and not view.leased:
            self._storage.create(f"chunks/{chunk:06d}", b"")
            self._done_chunks.add(chunk)
        self._n_vain_looks += not view.free
        view.leased = [unit for unit in view.leased if unit.start not in self._held]
        self._chance.shuffle(view.free)
        self._chance.shuffle(view.leased)
        return view

    def _units(self, chunk: int) -> Iterator[Unit]:
        """Yield what is not known to be committed of each cell of a chunk."""
        leased, done = dict[int, int](), dict[int, int]()
        of_mark = {".": leased, "-": done}
        names = "\n".join(self._storage.names(_folder(chunk)))
        for start, mark, number in _LEASE_OR_STOP.findall(names):
            of_mark[mark][int(start)] = int(number)  # sorted: of each start, the last counts
        last = min(len(self._grid), (chunk + 1) * CHUNK_CELLS)
        for cell in self._grid.cells(chunk * CHUNK_CELLS, last):
            at = cell.start
            while at < cell.stop and at in done:
                at = done[at]
            if at < cell.stop:
                yield Unit(at, cell.stop, leased.get(at, 0))

    def _mark(self, start: int, stop: int) -> None:
        self._storage.create(f"{self._folder_of(start)}/{start:012d}-{stop:012d}", b"")

    def _lease(self, start: int, generation: int) -> str:
        return f"{self._folder_of(start)}/{start:012d}.{generation:04d}"

    def _folder_of(self, start: int) -> str:
        return _folder(self._grid.cell_of(start) // CHUNK_CELLS)


def _next(unit: Unit) -> Unit:
    return unit._replace(generation=unit.generation + 1)


def _folder(chunk: int) -> str:
    return f"leases/{chunk:06d}"


def _after(names: list[str], own: str) -> list[str]:
    """Return the names behind one's own, in a circle."""
    others = sorted(name for name in names if name != own)
    return [*(name for name in others if name > own), *(name for name in others if name < own)]
