"""Leases: who is dead, who takes over, and that whoever was wrong about it does no harm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cluster.storage import MemoryStorage

from evmp import lease
from evmp.grid import Block, Grid
from evmp.lease import CLOCK_LEASES, DEAD, Leases
from evmp.ledger import Ledger

SECONDS = 10.0
N_ROWS = 603
GRID = Grid(N_ROWS, 2, 10)  # 62 cells in four chunks


class Time:
    """The one time that all clocks here tell, each in its own way."""

    def __init__(self) -> None:
        self.now = 0.0


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "CHUNK_CELLS", 20)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def storage(time: Time) -> MemoryStorage:
    """A storage whose clock is another one."""
    return MemoryStorage(lambda: time.now + 1e9)


@pytest.fixture
def ledger(tmp_path: Path, storage: MemoryStorage) -> Ledger:
    (tmp_path / "tmp").mkdir()
    storage.write("job.json", b"{}")
    return Ledger(tmp_path, storage)  # type: ignore[arg-type]


class Worker:
    """A worker without processes: what it would compute, it commits when it is told to."""

    def __init__(
        self,
        ledger: Ledger,
        name: str,
        time: Time,
        *,
        skew: float = 0,
        seconds: float = SECONDS,
    ) -> None:
        self.ledger, self.name = ledger, name
        self.leases = Leases(ledger, GRID, name, seconds, lambda: time.now + skew)
        self.leases.renew()

    def claim(self) -> Block:
        block = self.leases.claim()
        assert block is not None
        return block

    def commit(self, block: Block, stop: int | None = None) -> bool:
        """Commit a block, or its first rows. Returns whether this worker was first."""
        done = Block(block.start, stop or block.stop)
        stage = self.ledger.stage(self.name, block.start)
        stage.write_text(self.name)
        is_first = self.ledger.commit(stage, done, 0, {})
        self.leases.done(block.start, done.stop if is_first else 0)
        return is_first


Make = Callable[..., Worker]


@pytest.fixture
def make(ledger: Ledger, time: Time) -> Make:
    """`make("a", skew=300)`: a worker whose clock is so many seconds fast."""
    return lambda name, **options: Worker(ledger, name, time, **options)


def pass_seconds(time: Time, seconds: float, *alive: Worker) -> None:
    """Let time pass, in which some workers show that they live."""
    for _ in range(round(seconds * 2)):
        time.now += 0.5
        for worker in alive:
            worker.leases.renew()


def drain(*workers: Worker) -> list[tuple[str, Block]]:
    """Let workers do all that they can claim, in turns. Returns who was first with which block."""
    done: list[tuple[str, Block]] = []
    while not all(worker.leases.is_complete for worker in workers):
        for worker in workers:
            if (block := worker.leases.claim()) and worker.commit(block):
                done.append((worker.name, block))
    return done


def test_workers_do_every_block_once(make: Make, ledger: Ledger) -> None:
    done = drain(make("a"), make("b"), make("c"))

    assert sorted(block.start for _, block in done) == [GRID[i].start for i in range(len(GRID))]
    assert {name for name, _ in done} == {"a", "b", "c"}
    assert sum(len(commit) for commit in ledger.commits()) == N_ROWS


def test_held_blocks_are_nobody_elses_while_their_worker_lives(make: Make, time: Time) -> None:
    slow, other = make("slow"), make("other")
    held = slow.claim()

    done = []
    for _ in range(20):
        while block := other.leases.claim():
            done.append(block)
            other.commit(block)
        pass_seconds(time, 0.5, slow, other)  # in all less than what is worth a race

    assert len(done) == len(GRID) - 1
    assert held not in done
    assert not other.leases.is_complete
    slow.commit(held)
    assert other.leases.claim() is None
    assert other.leases.is_complete


def test_blocks_of_a_dead_worker_go_to_its_neighbour_within_the_time(
    make: Make, time: Time
) -> None:
    dead, other = make("dead"), make("other")
    held = {dead.claim(), dead.claim()}
    died = time.now

    while not other.leases.has_found:
        pass_seconds(time, 0.5, other)

    assert SECONDS / 2 < time.now - died < SECONDS
    # Although there are plenty of blocks that nobody has begun.
    assert {other.claim(), other.claim()} == held


def test_blocks_of_two_that_die_one_after_the_other_are_taken_over_within_the_time(
    make: Make, time: Time
) -> None:
    """The nearest worker that watches one dies before it can see that this one is dead."""
    alive, nearest, dead = make("a"), make("b"), make("c")
    pass_seconds(time, SECONDS, alive, nearest, dead)
    block = dead.claim()
    died = time.now
    pass_seconds(time, SECONDS / 2, alive, nearest)

    while not alive.leases.has_found:
        pass_seconds(time, 0.5, alive)

    assert time.now - died < SECONDS
    assert alive.claim() == block


def test_worker_that_has_lived_long_sees_a_death_as_soon(make: Make, time: Time) -> None:
    """It reads the storage's clock again, and not off what it has shown seconds ago."""
    other, dead = make("a"), make("b")
    pass_seconds(time, CLOCK_LEASES * SECONDS - 3, other, dead)
    dead.claim()
    other.claim()
    died = time.now

    while not other.leases.has_found:
        pass_seconds(time, 0.5, other)

    assert time.now - died <= DEAD * SECONDS + 0.5


def test_what_was_found_outlives_who_has_found_it(make: Make, time: Time) -> None:
    dead, heir, leaving, last = make("a"), make("b"), make("c"), make("d")
    blocks = {dead.claim() for _ in range(5)}
    pass_seconds(time, SECONDS, heir, leaving, last)
    finders = [it for it in (heir, leaving, last) if it.leases.has_found]
    assert len(finders) == 1  # those behind it have seen that it cares
    taken = finders[0].claim()
    others = [it for it in (heir, leaving, last) if it is not finders[0]]

    pass_seconds(time, SECONDS, *others)

    finder = next(it for it in others if it.leases.has_found)
    assert {finder.claim() for _ in range(2)} < blocks
    finder.leases.leave()
    rest = next(it for it in others if it is not finder)
    done = [block for _, block in drain(rest)]
    assert blocks <= {*done} and taken in done
    assert len(done) == len(GRID)


def test_clocks_of_workers_are_not_compared(make: Make, time: Time) -> None:
    fast, slow = make("fast", skew=300), make("slow", skew=-86400)
    mine, yours = fast.claim(), slow.claim()

    pass_seconds(time, 3 * SECONDS, fast, slow)

    assert not fast.leases.has_found and not slow.leases.has_found
    assert fast.commit(mine) and slow.commit(yours)


def test_each_worker_lives_as_long_as_it_says_itself(make: Make, time: Time) -> None:
    calm, hasty = make("calm", seconds=60.0), make("hasty", seconds=2.0)
    mine, yours = calm.claim(), hasty.claim()

    pass_seconds(time, 30.0, hasty)  # in which the calm one would have shown itself once
    assert not hasty.leases.has_found
    assert mine not in iter(hasty.leases.claim, None)

    pass_seconds(time, 8.0, calm)  # it looks for newcomers no sooner
    assert calm.leases.has_found
    assert calm.claim() == yours


@pytest.mark.parametrize("is_late_first", [True, False])
def test_block_of_two_living_workers_counts_once(
    make: Make, ledger: Ledger, time: Time, is_late_first: bool
) -> None:
    late, other = make("late"), make("other")
    block = late.claim()
    pass_seconds(time, SECONDS, other)  # cut off, and back
    assert other.claim() == block
    late.leases.renew()

    order = [late, other] if is_late_first else [other, late]
    won = [worker.commit(block) for worker in order]

    assert won == [True, False]
    drain(late, other)
    (found,) = (commit for commit in ledger.commits() if commit.start == block.start)
    assert ledger.storage.read(f"data/{found.data}").decode() == order[0].name
    assert sum(len(commit) for commit in ledger.commits()) == N_ROWS


def test_rest_of_a_block_that_was_begun_is_open(make: Make, ledger: Ledger) -> None:
    leaving, other = make("leaving"), make("other")
    begun, held = leaving.claim(), leaving.claim()
    leaving.commit(begun, stop=begun.start + 3)
    leaving.leases.leave()

    done = [block for _, block in drain(other)]

    assert Block(begun.start + 3, begun.stop) in done
    assert held in done
    assert sum(len(commit) for commit in ledger.commits()) == N_ROWS


def test_late_worker_that_loses_to_a_part_leaves_the_rest_open(
    make: Make, ledger: Ledger, time: Time
) -> None:
    late, other = make("late"), make("other")
    block = late.claim()
    pass_seconds(time, SECONDS, other)
    assert other.claim() == block
    other.commit(block, stop=block.start + 3)

    assert not late.commit(block)

    assert Block(block.start + 3, block.stop) in [it for _, it in drain(late, other)]
    assert sum(len(commit) for commit in ledger.commits()) == N_ROWS


def test_what_was_committed_before_anybody_leased_is_not_done_again(
    make: Make, ledger: Ledger
) -> None:
    stage = ledger.stage("before", 0)
    for block in (GRID[0], Block(GRID[1].start, GRID[1].start + 2)):
        stage.write_text("before")
        ledger.commit(stage, block, 0, {})

    done = sorted(block.start for _, block in drain(make("a")))

    assert done[0] == GRID[1].start + 2
    assert len(done) == len(GRID) - 1


def test_successor_of_a_keeper_goes_on_with_what_it_held(
    make: Make, time: Time, storage: MemoryStorage
) -> None:
    first = make("a")
    given, lost = first.claim(), first.claim()
    pass_seconds(time, 1.0)

    second = Worker(first.ledger, "a", time)
    second.leases.resume({given.start})
    second.leases.renew()

    assert second.commit(given)
    assert lost in [block for _, block in drain(second)]


def test_idle_worker_races_a_slow_one_once(make: Make, time: Time) -> None:
    slow, idle, third = make("slow"), make("idle"), make("third")
    block = slow.claim()
    everyone = (slow, idle, third)
    raced: list[tuple[str, Block]] = []
    while time.now < 4 * SECONDS:
        for worker in (idle, third):
            while found := worker.leases.claim():
                if found == block:
                    raced.append((worker.name, found))
                else:
                    worker.commit(found)
        pass_seconds(time, 0.5, *everyone)

    assert len(raced) == 1
    racer = idle if raced[0][0] == "idle" else third
    assert racer.commit(block)
    assert not slow.commit(block)
    assert drain(idle, slow) == []


@pytest.mark.parametrize("names", ["a", "ab"])
def test_lost_answers_cost_time_and_no_rows(
    make: Make, ledger: Ledger, storage: MemoryStorage, time: Time, names: str
) -> None:
    """Which leave a lease that its own worker does not know of."""
    workers = [make(name) for name in names]
    n_done = 0
    for number in range(10_000):
        if all(worker.leases.is_complete for worker in workers):
            break
        for worker in workers:
            storage.n_lost = number % 3 == 0
            try:
                worker.leases.renew()
                block = worker.leases.claim()
            except OSError:
                continue
            finally:
                storage.n_lost = 0
            if block:
                n_done += worker.commit(block)
        time.now += 0.5

    assert n_done == len(GRID)
    assert sum(len(commit) for commit in ledger.commits()) == N_ROWS


def test_block_is_not_lost_to_a_worker_that_could_not_show_it(
    make: Make, ledger: Ledger, storage: MemoryStorage
) -> None:
    alone = make("a")
    storage.n_answered = storage.n_lost = 1
    with pytest.raises(OSError, match="answer was lost"):
        alone.claim()

    drain(alone)

    assert sum(len(commit) for commit in ledger.commits()) == N_ROWS


def test_stale_lists_cost_time_and_no_rows(
    make: Make, ledger: Ledger, storage: MemoryStorage, time: Time
) -> None:
    a, b = make("a"), make("b")
    storage.is_stale = True
    done = []
    for _ in range(10):
        for worker in (a, b):
            if block := worker.leases.claim():
                done.append(block)
                worker.commit(block)
    pass_seconds(time, 1.0, a, b)
    storage.is_stale = False

    done += [block for _, block in drain(a, b)]

    assert len(done) == len(set(done)) == len(GRID)
    assert sum(len(commit) for commit in ledger.commits()) == N_ROWS


def test_unreachable_storage_kills_nobody_who_is_back_in_time(
    make: Make, storage: MemoryStorage, time: Time
) -> None:
    a, b = make("a"), make("b")
    block = a.claim()
    storage.is_reachable = False
    for worker in (a, b):
        with pytest.raises(OSError, match="cannot be reached"):
            pass_seconds(time, 6.0, worker)
    storage.is_reachable = True
    pass_seconds(time, 1.0, a, b)

    assert not b.leases.has_found
    assert a.commit(block)


def test_worker_does_not_begin_a_job_anew_that_others_have_finished(
    make: Make, storage: MemoryStorage, time: Time
) -> None:
    late, idle = make("late"), make("idle")
    late.claim()
    for folder in ("", "leases", "chunks", "workers"):
        storage.clear(folder)

    with pytest.raises(FileNotFoundError):
        idle.leases.claim()
    with pytest.raises(FileNotFoundError):
        pass_seconds(time, SECONDS, late)


def test_job_of_no_rows_is_complete_at_once(ledger: Ledger, time: Time) -> None:
    leases = Leases(ledger, Grid(0, 1, 5), "a", SECONDS, lambda: time.now)
    leases.renew()

    assert leases.claim() is None
    assert leases.is_complete


def test_complete_chunks_are_not_looked_into_again(make: Make, storage: MemoryStorage) -> None:
    drain(make("a"))
    before = storage.requests.copy()

    late = make("late")
    assert late.leases.claim() is None

    assert late.leases.is_complete
    assert (storage.requests - before)["names"] <= 3


def test_worker_that_finds_no_block_free_asks_which_chunks_are_done(
    make: Make, storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "VAIN_LOOKS", 1)
    slow, fast = make("slow"), make("fast")
    slow.commit(slow.claim())  # it knows of three more chunks, and of blocks in this one
    drain(fast)
    before = storage.requests.copy()

    for _ in range(10):
        if not slow.leases.is_complete:
            assert slow.leases.claim() is None

    assert slow.leases.is_complete
    assert (storage.requests - before)["names"] <= 3
