"""What is said of a job from outside, in every state that it may be in."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from evmp import status
from evmp.errors import SinkError
from evmp.grid import Block, Grid
from evmp.job import Job
from evmp.ledger import Ledger
from evmp.lock import Member
from evmp.status import Observer
from evmp.turn import turn


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(
        model_path="m",
        model_type="classifier",
        input_oss_file=str(tmp_path / "list"),
        output_oss_file=str(tmp_path / "out.jsonl"),
    )


@pytest.fixture(autouse=True)
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "PAUSE_SECONDS", 0.0)


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


def show(
    ledger: Ledger, name: str, held: list[list[int]], seen_seconds: float, **keys: object
) -> None:
    """Let a worker have shown itself so many seconds ago."""
    about = {"host": "node1", "pid": 7, "number": 1, "rows": 30, "failed": 2}
    worker = {**about, "held": held, **keys}
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


def test_worker_is_judged_by_its_own_lease_seconds(job: Job, ledger: Ledger) -> None:
    for name, seconds in (("a", 60), ("b", 1)):
        show(ledger, name, [], seen_seconds=20, lease_seconds=seconds)

    assert [worker.is_dead for worker in Observer(job).look().workers] == [False, True]


@pytest.mark.parametrize("skew", [-300.0, 300.0])
def test_clock_of_the_staging_place_may_be_another(job: Job, ledger: Ledger, skew: float) -> None:
    observer = Observer(job)
    for age in (9.0, 6.0, 3.0, 0.0):
        show(ledger, "alive", [], seen_seconds=age - skew)
        show(ledger, "dead", [], seen_seconds=60.0 - skew)
        seen = observer.look()

    assert [worker.is_dead for worker in seen.workers] == [False, True]
    assert not seen.is_deserted


def test_nothing_is_written_to_look(job: Job, ledger: Ledger, tmp_path: Path) -> None:
    show(ledger, "a", [], seen_seconds=2)
    with ledger.lock(Member("any", "a")):
        ledger.tmp.rmdir()
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

        assert Observer(job).look().state == "unfinished"

        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("step", ["begun", "commit_of", "holders"])
def test_job_that_ends_while_it_is_looked_at_is_done(
    job: Job, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def publish(self: Ledger, *arguments: object) -> object:
        found = was(self, *arguments)
        result = Path(job.output_oss_file)
        if not result.exists():
            result.write_text("rows")
            it = result.stat()
            identity = {"size": it.st_size, "mtime_ns": it.st_mtime_ns, "inode": it.st_ino}
            told = {"rows": 100, "failed": 3, "result": identity}
            result.with_name("out.jsonl.evmp.json").write_text(json.dumps(told))
            ledger.remove()
        return found

    was = getattr(Ledger, step)
    monkeypatch.setattr(Ledger, step, publish)

    seen = Observer(job).look()

    assert (seen.state, seen.rows, seen.failed) == ("done", 100, 3)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("grid.json", "[1]", "its grid.json is damaged: "),
        ("grid.json", '{"n_rows": 100, "n_shards": 0, "block_rows": 10}', "its numbers are"),
        ("grid.json", None, "its grid.json is damaged: it is missing"),
        ("job.json", "{", "its job.json is damaged: it is no JSON object"),
        ("job.json", None, "its job.json is damaged: it is missing"),
        ("blocks/000000000050.json", "{", "delete it to do its rows again"),
    ],
)
def test_damage_is_told_in_a_sentence(
    job: Job, ledger: Ledger, name: str, text: str | None, message: str
) -> None:
    file = ledger.root / name
    file.unlink() if text is None else file.write_text(text)

    with pytest.raises(SinkError, match=message):
        Observer(job).look()


@pytest.mark.parametrize("text", ["[]", "{", '{"number": 1, "host": "h", "pid": 1, "held": 3}'])
def test_worker_that_cannot_be_understood_hides_no_other(
    job: Job, ledger: Ledger, text: str
) -> None:
    show(ledger, "a", [], seen_seconds=2)
    (ledger.root / "workers" / "b").write_text(text)

    seen = Observer(job).look()

    assert len(seen.workers) == 1
    assert f"damaged   {ledger.root}/workers/b, " in seen.in_words()


def test_rows_of_two_records_count_once(job: Job, ledger: Ledger) -> None:
    stage = ledger.stage("run", 5)
    stage.write_bytes(b"rows")
    ledger.commit(stage, Block(5, 15), 10, {})

    seen = Observer(job).look()

    assert (seen.rows, seen.failed) == (25, 8)


def test_job_without_a_grid_has_just_begun(job: Job, ledger: Ledger) -> None:
    ledger.clear()
    ledger.open({"input": {}})

    assert (Observer(job).look().state, Observer(job).look().total) == ("unfinished", 0)


def test_other_job_is_told_from_the_one_that_was_asked_for(job: Job, ledger: Ledger) -> None:
    told = {"state": "running", "job": {**job.describe(), "model_path": "other"}}
    ledger.storage.write("run.json", json.dumps(told).encode())
    lines = Observer(job).look().in_words().splitlines()

    assert lines[1] == "another   job than this one, it seems. What differs:"
    assert lines[2] == '  model_path: "other" then, "m" now'

    ledger.clear()
    ledger.open({"job": [1]})
    assert Observer(job).look().others == ()

    changed = job.model_copy(update={"top_k": 3})
    ledger.clear()
    ledger.open({"job": job.fingerprint()})
    assert Observer(job).look().others == ()
    assert Observer(changed).look().others == ("top_k: 0 then, 3 now",)


def test_shards_tell_how_far_each_worker_is(job: Job, ledger: Ledger) -> None:
    (ledger.root / "grid.json").unlink()
    ledger.grid(Grid(100, 2, 10))

    seen = Observer(job).look()

    assert [(it.worker, it.rows, it.total) for it in seen.shards] == [(0, 10, 50), (1, 10, 50)]
    assert "shard     of worker 1: 10 of 50 rows" in seen.in_words()


def test_job_on_which_nobody_works_says_so_and_how_it_failed(
    job: Job, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = Observer(job)
    with ledger.lock():
        assert not observer.look().is_deserted
    for name, state in (("run.b.json", "running"), ("run.a.json", "failed")):
        record = {"state": state, "error": "all rows failed\n  again"}
        ledger.storage.write(name, json.dumps(record).encode())
    os.utime(ledger.root / "run.b.json", (0, 0))

    seen = observer.look()

    assert (seen.state, seen.is_deserted, seen.error) == ("failed", True, "all rows failed")
    assert "nobody    no worker lives; 8 blocks left" in seen.in_words()
    assert not seen.is_given_up
    monkeypatch.setattr(status, "QUIET_LEASES", 0)
    assert observer.look().is_given_up
    with ledger.lock():
        assert observer.look().state == "unfinished"


def test_who_has_the_turn_works_on_the_job(job: Job, ledger: Ledger) -> None:
    ledger.storage.write("turns/000000000001", b"x" * 32)
    assert Observer(job).look().is_deserted

    with turn(ledger.storage):
        assert not Observer(job).look().is_deserted


def test_storage_that_cannot_be_reached_is_asked_once(
    job: Job, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def commit_of(self: Ledger, name: str) -> object:
        asked.append(name)
        raise TimeoutError(110, "Connection timed out")

    monkeypatch.setattr(Ledger, "commit_of", commit_of)

    with pytest.raises(SinkError, match="cannot be read: Connection timed out"):
        Observer(job).look()
    assert len(asked) == 1


def test_all_rows_that_are_not_the_result_yet_are_being_published(job: Job, ledger: Ledger) -> None:
    for block in ledger.grid(Grid(100, 1, 10)).cut(ledger.commits(), Block(0, 100)):
        stage = ledger.stage("run", block.start)
        stage.write_bytes(b"rows")
        ledger.commit(stage, block, 0, {})

    with ledger.lock():
        assert Observer(job).look().state == "publishing"


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
