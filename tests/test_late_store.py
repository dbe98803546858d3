"""Workers whose storage answers late: what they asked for has been done long before they hear."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from ossserver import KEY_ID, KEY_SECRET, OssServer, serving_oss
from unpublished import SETTINGS

from evmp.grid import Block, Grid
from evmp.job import Job
from evmp.lease import Leases
from evmp.ledger import Ledger
from evmp.storage.oss import OssStorage

GRID = Grid(40, 4, 10)
SECONDS = 1.0  # of a lease
DEADLINE_SECONDS = 30.0


class Worker:
    """A worker without processes, on a machine of its own."""

    def __init__(
        self, server: OssServer, name: str, folder: Path, patience: float, seconds: float
    ) -> None:
        keys = {"output_oss_file": "oss://bkt/r", "ossHost": server.endpoint}
        job = Job(**{**SETTINGS, **keys, "read_timeout_seconds": patience})
        self.name, self.storage = name, OssStorage("oss://bkt/job", job, folder)
        self.ledger = Ledger(folder, self.storage)
        self.ledger.prepare()
        self.leases = Leases(self.ledger, GRID, name, seconds)

    def claim(self) -> Block:
        self.leases.renew()
        block = self.leases.claim()
        assert block is not None
        return block

    def commit(self, block: Block) -> bool:
        stage = self.ledger.stage(self.name, block.start)
        stage.write_text(self.name)
        is_first = self.ledger.commit(stage, block, 0, {})
        self.leases.done(block.start, block.stop if is_first else 0)
        return is_first

    def find(self) -> None:
        """Go on until another worker is seen to be dead."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not self.leases.has_found:
            assert time.monotonic() < deadline
            self.leases.renew()
            time.sleep(0.01)


Make = Callable[..., Worker]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OssServer]:
    monkeypatch.setenv("OSS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", KEY_SECRET)
    with serving_oss() as server:
        server.objects = {"bkt": {"job/job.json": b"{}"}}
        yield server


@pytest.fixture
def make(server: OssServer, tmp_path: Path) -> Iterator[Make]:
    """`make("a", patience=0.2)`: a worker that waits so long for an answer."""
    with ExitStack() as made:

        def make(name: str, patience: float = DEADLINE_SECONDS, seconds: float = SECONDS) -> Worker:
            (tmp_path / name).mkdir()
            worker = Worker(server, name, tmp_path / name, patience, seconds)
            made.callback(worker.storage.close)
            return worker

        yield make


def committed_by(ledger: Ledger) -> dict[int, str]:
    """Return of each block whose rows count."""
    reads = ledger.storage.read
    return {it.start: reads(f"data/{it.data}").decode() for it in ledger.commits()}


def test_sign_of_life_whose_answer_nobody_waits_for_is_given_again(
    server: OssServer, make: Make
) -> None:
    hasty, other = make("hasty", 0.2, seconds=60.0), make("other")
    server.fail("job/workers/", "late", "late", "delay")

    hasty.claim()

    assert server.requests["job/workers/hasty"] > 3
    other.leases.renew()
    assert not other.leases.has_found


def test_worker_that_waits_for_a_late_answer_loses_what_it_holds_and_goes_on(
    server: OssServer, make: Make
) -> None:
    late, other = make("late"), make("other")
    block = late.claim()
    server.fail("job/workers/late", "late", "late")

    with ThreadPoolExecutor(1) as thread:
        claimed = thread.submit(late.claim)
        other.find()
        assert other.claim() == block
        second = claimed.result()

    assert other.commit(block)
    assert not late.commit(block)
    assert late.claim() not in (block, second)


@pytest.mark.parametrize("folder", ["blocks", "data"])
def test_commit_that_is_answered_after_its_lease_was_lost_counts_once(
    server: OssServer, make: Make, folder: str
) -> None:
    """If what is late is the record's answer, it is first; if its data's, the other's record is."""
    late, other = make("late"), make("other")
    block = late.claim()
    server.fail(f"job/{folder}/", "late")
    with ThreadPoolExecutor(1) as thread:
        won = thread.submit(late.commit, block)
        other.find()
        found = other.leases.claim()
        if folder == "data":
            assert found == block
            assert other.commit(block)
        else:
            assert found != block
        assert won.result() == (folder == "blocks")

    winner = "late" if folder == "blocks" else "other"
    assert committed_by(other.ledger) == {block.start: winner}
    assert len(other.storage.names("data")) == 1


def test_commit_whose_answer_nobody_waits_for_counts_once(server: OssServer, make: Make) -> None:
    hasty = make("hasty", patience=0.2)
    block = hasty.claim()
    server.fail("job/blocks/", "late", "late")

    assert hasty.commit(block)

    assert committed_by(hasty.ledger) == {block.start: "hasty"}
    assert len(hasty.storage.names("data")) == 1
