"""The ledger: what is committed stays, once, whole, and everything else is done again."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from forked import fork, wait
from unpublished import staged

from evmp.errors import ConfigError, SinkError
from evmp.grid import Block
from evmp.ledger import Ledger
from evmp.storage.local import LocalStorage

FINGERPRINT: dict[str, object] = {"input": {"rows": 10}, "job": {"top_k": 0}}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "out.evmp")
    ledger.open(FINGERPRINT)
    return ledger


def stage(ledger: Ledger, start: int, data: bytes, run: str = "run") -> Path:
    file = ledger.stage(run, start)
    file.write_bytes(data)
    return file


def commit(ledger: Ledger, start: int, stop: int, data: bytes = b"rows", run: str = "run") -> bool:
    return ledger.commit(stage(ledger, start, data, run), Block(start, stop), 0, {})


def test_committed_block_is_listed_with_all_that_was_said_of_it(ledger: Ledger) -> None:
    reasons = {"decode: not an image": [1, 4, "not an image"]}

    assert ledger.commit(stage(ledger, 3, b"three"), Block(3, 6), 1, reasons)

    (found,) = ledger.commits()
    assert (found.start, found.stop, found.failed, found.bytes) == (3, 6, 1, 5)
    assert (found.reasons, found.attempt) == (reasons, "run")
    assert staged(ledger, found) == b"three"
    assert ledger.stop_of(3) == 6
    assert ledger.stop_of(4) is None


def test_commits_come_in_input_order(ledger: Ledger) -> None:
    for start in (900, 20, 1000, 3):
        commit(ledger, start, start + 1)

    assert [found.start for found in ledger.commits()] == [3, 20, 900, 1000]


def test_first_to_commit_a_block_wins(ledger: Ledger) -> None:
    assert commit(ledger, 0, 4, b"first")

    assert not commit(ledger, 0, 2, b"second", run="other")

    (found,) = ledger.commits()
    assert (found.stop, staged(ledger, found)) == (4, b"first")
    assert len(list((ledger.root / "data").iterdir())) == 1
    assert list((ledger.root / "tmp").iterdir()) == []


def test_only_one_of_many_processes_commits_a_block(ledger: Ledger) -> None:
    children = [
        fork(lambda number=number: commit(ledger, 0, 4, b"%d" % number, run=str(number)))
        for number in range(8)
    ]

    codes = [wait(pid) for pid in children]

    assert sorted(codes) == [0] * 7 + [1]
    (found,) = ledger.commits()
    assert staged(ledger, found) == b"%d" % codes.index(1)


@pytest.mark.parametrize("step", ["adopt", "create", "unlink"])
def test_death_within_a_commit_leaves_the_rows(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    file = stage(ledger, 0, b"rows")
    owner = "evmp.ledger.os" if step == "unlink" else "evmp.storage.local.LocalStorage"
    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(f"{owner}.{step}", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        ledger.commit(file, Block(0, 4), 0, {})
    assert wait(pid) == -signal.SIGKILL

    if ledger.stop_of(0) is None:
        assert file.read_bytes() == b"rows"
        assert ledger.commit(file, Block(0, 4), 0, {})

    (found,) = ledger.commits()
    assert staged(ledger, found) == b"rows"


def test_sweep_keeps_what_is_committed_and_nothing_else(ledger: Ledger) -> None:
    commit(ledger, 0, 4)
    stage(ledger, 4, b"half a block")
    (ledger.root / "data" / "000000000004.gone").write_bytes(b"renamed, never recorded")

    ledger.sweep()

    (found,) = ledger.commits()
    assert staged(ledger, found) == b"rows"
    assert [it.name for it in (ledger.root / "data").iterdir()] == [found.data]
    assert list((ledger.root / "tmp").iterdir()) == []


def test_changed_stage_file_is_told(ledger: Ledger) -> None:
    commit(ledger, 0, 4, b"rows")
    (found,) = ledger.commits()
    (ledger.root / "data" / found.data).write_bytes(b"r0ws")

    with pytest.raises(SinkError, match=r"has changed since its commit: 4 bytes.* delete .*\.json"):
        staged(ledger, found)


def test_missing_stage_file_is_told(ledger: Ledger) -> None:
    commit(ledger, 0, 4)
    (found,) = ledger.commits()
    (ledger.root / "data" / found.data).unlink()

    with pytest.raises(SinkError, match="of rows 0 to 4 is missing; delete"):
        staged(ledger, found)


def test_damaged_record_is_told(ledger: Ledger) -> None:
    commit(ledger, 0, 4)
    (ledger.root / "blocks" / "000000000000.json").write_bytes(b'{"start": 0')

    with pytest.raises(SinkError, match=r"000000000000\.json is damaged.*delete it to do its rows"):
        ledger.commits()


def test_record_that_was_changed_is_told(ledger: Ledger) -> None:
    commit(ledger, 0, 4)
    record = ledger.root / "blocks" / "000000000000.json"
    record.write_text(record.read_text().replace('"stop": 4', '"stop": 3'))

    with pytest.raises(SinkError, match=r"is damaged: its checksum does not fit; delete it"):
        ledger.commits()


@pytest.mark.parametrize("text", [b"[" * 200_000, b"[]", b'{"start": 0}'])
def test_record_of_something_else_is_told(ledger: Ledger, text: bytes) -> None:
    commit(ledger, 0, 4)
    (ledger.root / "blocks" / "000000000000.json").write_bytes(text)

    with pytest.raises(SinkError, match=r"is damaged: .*; delete it"):
        ledger.commits()


def test_records_go_first_and_the_name_of_the_job_last(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(ledger, 0, 4)
    (ledger.root / "lock").touch()
    deleted = []

    def note(storage: object, name: str) -> None:
        assert (ledger.root / "lock").exists()
        deleted.append(name)

    monkeypatch.setattr(LocalStorage, "clear", note)
    monkeypatch.setattr(LocalStorage, "delete", note)
    ledger.remove()

    assert (deleted[:2], deleted[-1]) == (["blocks", "data"], "job.json")
    assert not (ledger.root / "lock").exists()


def test_blocks_of_nobody_knows_which_job_are_refused(ledger: Ledger) -> None:
    commit(ledger, 0, 4)
    (ledger.root / "job.json").unlink()

    for _ in range(2):
        with pytest.raises(SinkError, match=r"has lost its job\.json.* start over with --fresh"):
            ledger.open(FINGERPRINT)


def test_same_job_goes_on(ledger: Ledger) -> None:
    commit(ledger, 0, 4)

    Ledger(ledger.root).open(dict(reversed(FINGERPRINT.items())))

    assert [found.start for found in ledger.commits()] == [0]


def test_other_job_is_refused_with_what_differs(ledger: Ledger) -> None:
    commit(ledger, 0, 4)

    with pytest.raises(ConfigError) as caught:
        ledger.open({"input": {"rows": 11}, "job": {"top_k": 5}})

    assert "job.top_k: 0 then, 5 now" in str(caught.value)
    assert "input.rows: 10 then, 11 now" in str(caught.value)
    assert "--fresh" in str(caught.value)


def test_job_that_committed_nothing_makes_way_for_another(ledger: Ledger) -> None:
    other: dict[str, object] = {"input": {"rows": 11}}

    ledger.open(other)

    commit(ledger, 0, 4)
    ledger.open(other)


def test_second_run_is_refused_and_told_who_works(ledger: Ledger) -> None:
    with (
        ledger.lock(),
        pytest.raises(SinkError, match=f"another run works .* process {os.getpid()}, since"),
        ledger.lock(),
    ):
        pass


def test_lock_of_a_killed_run_is_free(ledger: Ledger) -> None:
    read_end, write_end = os.pipe()

    def work() -> None:
        with ledger.lock():
            os.write(write_end, b"!")
            signal.pause()

    pid = fork(work)
    os.read(read_end, 1)
    os.close(read_end)
    os.close(write_end)
    os.kill(pid, signal.SIGKILL)
    wait(pid)

    with ledger.lock():
        pass


def test_lock_waits_for_the_processes_of_a_killed_run(ledger: Ledger) -> None:
    def run() -> None:
        with ledger.lock():
            fork(lambda: time.sleep(0.3))
            os.kill(os.getpid(), signal.SIGKILL)

    assert wait(fork(run)) == -signal.SIGKILL

    with ledger.lock():
        pass


def test_clear_forgets_all_but_the_lock(ledger: Ledger) -> None:
    with ledger.lock():
        commit(ledger, 0, 4)
        ledger.clear()

        assert [path.name for path in ledger.root.iterdir()] == ["lock"]
        assert ledger.begun() == {}


def test_staging_place_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(SinkError, match=r"staging place .* cannot be used: .*Not a directory"):
        Ledger(tmp_path / "file" / "out.evmp").open(FINGERPRINT)


def test_job_that_has_made_way_for_another_commits_nothing(ledger: Ledger) -> None:
    other = Ledger(ledger.root)
    commit(ledger, 0, 2, b"rows")
    ledger.clear()
    other.open({"input": "another"})

    with pytest.raises(SinkError, match="is not this job's any more"):
        commit(ledger, 2, 4, b"rows")

    assert other.commits() == []
    assert other.storage.names("data") == []
    commit(other, 2, 4, b"rows")
    assert [(it.start, it.stop) for it in other.commits()] == [(2, 4)]
