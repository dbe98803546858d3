"""What is said of a job from outside, in every state that it may be in."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from evmp.grid import Block, Grid
from evmp.job import Job
from evmp.ledger import Ledger, Member
from evmp.status import Observer


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(
        model_path="m",
        model_type="classifier",
        input_oss_file=str(tmp_path / "list"),
        output_oss_file=str(tmp_path / "out.jsonl"),
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """The ledger of a job of 100 rows, 20 of which are done, 3 of them failed."""
    ledger = Ledger(tmp_path / "out.jsonl.evmp")
    ledger.open({"input": {}})
    ledger.grid(Grid(100, 1, 10))
    for start, failed in ((0, 0), (50, 3)):
        stage = ledger.stage("run", start)
        stage.write_bytes(b"rows")
        ledger.commit(stage, Block(start, start + 10), failed, {})
    return ledger


def show(ledger: Ledger, name: str, held: list[list[int]], seen_seconds: float) -> None:
    """Let a worker have shown itself so many seconds ago."""
    worker = {"host": "node1", "pid": 7, "number": 1, "rows": 30, "failed": 2, "held": held}
    ledger.storage.write(f"workers/{name}", json.dumps(worker).encode())
    then = time.time() - seen_seconds
    os.utime(ledger.root / "workers" / name, (then, then))


def test_job_that_has_not_begun(job: Job) -> None:
    assert Observer(job).look().in_words() == f"{job.output_oss_file}: not begun"


def test_unfinished_job_tells_rows_blocks_workers_and_who_is_dead(job: Job, ledger: Ledger) -> None:
    show(ledger, "a", [[10, 20, 1], [20, 30, 1]], seen_seconds=2)
    show(ledger, "b", [[30, 40, 2]], seen_seconds=100)
    os.utime(ledger.root / "job.json", (time.time() - 10, time.time() - 10))

    with ledger.lock(Member("any", "a")):
        seen = Observer(job).look()

    assert (seen.state, seen.rows, seen.failed, seen.total) == ("unfinished", 20, 3, 100)
    lines = seen.in_words().splitlines()
    assert lines[1] == "rows      20 of 100 (20.0 %), 3 failed"
    assert lines[2].startswith(("rate      2.0 rows/s, ETA", "rate      1.9 rows/s, ETA"))
    assert lines[3] == "blocks    2 done, 2 leased, 1 leased by the dead"
    assert f"process {os.getpid()}, since" in lines[4]
    assert lines[5].startswith("worker    node1, process 7, worker 1: 2 blocks leased, 30 rows, 2 ")
    assert lines[5].endswith("failed, seen 2 s ago")
    assert lines[6].endswith("DEAD, seen 100 s ago")
    assert len(lines) == 7
    assert json.loads(seen.as_json())["workers"][1]["is_dead"] is True


def test_who_looks_again_reads_no_record_twice(
    job: Job, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = Observer(job)
    first = observer.look()
    read: list[str] = []
    commit_of = Ledger.commit_of
    monkeypatch.setattr(
        Ledger, "commit_of", lambda self, name: read.append(name) or commit_of(self, name)
    )
    stage = ledger.stage("run", 60)
    stage.write_bytes(b"rows")
    ledger.commit(stage, Block(60, 70), 0, {})
    read.clear()

    second = observer.look()

    assert read == ["blocks/000000000060.json"]
    assert (first.rows, second.rows) == (20, 30)
    assert second.rate > first.rate
