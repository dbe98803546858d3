"""The output's place: nothing is overwritten unseen, and a result appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evmp import _native
from evmp.errors import ConfigError, SinkError
from evmp.job import Job
from evmp.target import open_target
from evmp.target.local import LocalTarget

RECORD: dict[str, Any] = {"rows": 3}


@pytest.fixture
def target(tmp_path: Path) -> LocalTarget:
    target = LocalTarget(tmp_path / "out.jsonl")
    target.prepare()
    return target


def merged(target: LocalTarget, text: str = "result") -> Path:
    """A merged file in the staging place."""
    file = target.staging / "merged.jsonl"
    file.write_text(text)
    return file


def merged_table(target: LocalTarget, text: str = "rows") -> Path:
    """A merged table, likewise."""
    folder = target.staging / "merged"
    folder.mkdir()
    (folder / "part-00000.parquet").write_text(text)
    return folder


def test_result_of_a_file_has_its_neighbours_beside_it(tmp_path: Path) -> None:
    target = LocalTarget(tmp_path / "out.jsonl")

    assert target.staging == tmp_path / "out.jsonl.evmp"
    assert target.record == tmp_path / "out.jsonl.evmp.json"


def test_neighbours_of_a_partition_stand_beside_the_table(tmp_path: Path) -> None:
    target = LocalTarget(tmp_path / "table" / "date=1" / "hour=2", is_table=True)

    assert target.staging == tmp_path / "table.date=1.hour=2.evmp"
    assert target.record == tmp_path / "table.date=1.hour=2.evmp.json"


def test_nothing_there_is_nothing_finished(target: LocalTarget) -> None:
    assert target.finished() is None


def test_published_result_is_finished_and_tells_its_record(target: LocalTarget) -> None:
    target.put(merged(target), RECORD)
    target.ledger.remove()

    assert target.path.read_text() == "result"
    record = target.finished()
    assert record is not None and record["rows"] == 3
    assert json.loads(target.record.read_bytes()) == record


def test_result_without_a_record_is_refused(target: LocalTarget) -> None:
    target.path.write_text("somebody's")

    with pytest.raises(SinkError, match=r"out\.jsonl exists and was not made .* --fresh"):
        target.finished()


def test_result_that_was_changed_is_not_ours_any_more(target: LocalTarget) -> None:
    target.put(merged(target), RECORD)
    target.path.write_text("edited by hand")

    with pytest.raises(SinkError, match="was not made by a run"):
        target.finished()


def test_result_that_was_moved_away_is_to_be_done_again(target: LocalTarget) -> None:
    target.put(merged(target), RECORD)
    target.path.rename(target.path.with_name("elsewhere.jsonl"))

    assert target.finished() is None


def test_broken_link_at_the_output_is_refused(target: LocalTarget) -> None:
    target.path.symlink_to("nowhere")

    with pytest.raises(SinkError, match="exists"):
        target.finished()


def test_empty_directory_is_no_result(tmp_path: Path) -> None:
    target = LocalTarget(tmp_path / "table", is_table=True)
    target.prepare()
    target.path.mkdir()

    assert target.finished() is None
    target.put(merged_table(target), RECORD)

    assert [file.name for file in target.path.iterdir()] == ["part-00000.parquet"]


def test_file_that_appeared_meanwhile_is_not_overwritten(target: LocalTarget) -> None:
    file = merged(target)
    target.path.write_text("somebody's")

    with pytest.raises(SinkError, match="move it away and run the same command again"):
        target.put(file, RECORD)

    assert target.path.read_text() == "somebody's"
    assert file.read_text() == "result"


def test_table_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = LocalTarget(tmp_path / "table")
    target.prepare()
    folder = merged_table(target)
    target.path.mkdir()
    (target.path / "somebody's").touch()

    with pytest.raises(SinkError, match="run the same command again"):
        target.put(folder, RECORD)

    assert [file.name for file in target.path.iterdir()] == ["somebody's"]


def test_fresh_replaces_what_it_has_seen(target: LocalTarget) -> None:
    target.path.write_text("old")
    target.start_over()
    assert target.path.read_text() == "old"

    target.put(merged(target, "new"), RECORD)

    assert target.path.read_text() == "new"


def test_fresh_does_not_replace_what_came_later(target: LocalTarget) -> None:
    target.path.write_text("old")
    target.start_over()
    target.path.unlink()
    target.path.write_text("somebody's, written since")

    with pytest.raises(SinkError, match="exists"):
        target.put(merged(target, "new"), RECORD)

    assert target.path.read_text() == "somebody's, written since"


def cannot_exchange(one: object, other: object) -> None:
    """What renameat2 answers on NFS, for one."""
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@pytest.mark.parametrize("exchange", [_native.exchange, cannot_exchange])
@pytest.mark.parametrize("old", ["file", "table"])
@pytest.mark.parametrize("new", ["file", "table"])
def test_fresh_replaces_a_file_and_a_table(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exchange: Callable[..., None],
    old: str,
    new: str,
) -> None:
    monkeypatch.setattr(_native, "exchange", exchange)
    target = LocalTarget(tmp_path / "out")
    target.prepare()
    if old == "file":
        target.path.write_text("old")
    else:
        target.path.mkdir()
        (target.path / "old.parquet").touch()
    target.start_over()

    target.put(merged(target) if new == "file" else merged_table(target), RECORD)

    assert target.path.is_file() == (new == "file")
    assert not (target.path / "old.parquet").exists()


def test_exchange_swaps_whatever_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("f")
    (tmp_path / "folder").mkdir()

    _native.exchange(tmp_path / "file", str(tmp_path / "folder"))

    assert (tmp_path / "file").is_dir()
    assert (tmp_path / "folder").read_text() == "f"
    with pytest.raises(FileNotFoundError):
        _native.exchange(tmp_path / "file", tmp_path / "missing")
    assert (tmp_path / "file").is_dir()


def test_start_over_keeps_the_result_and_forgets_the_work(target: LocalTarget) -> None:
    target.put(merged(target), RECORD)
    target.ledger.open({})

    target.start_over()

    assert target.path.read_text() == "result"
    assert target.ledger.begun() == {}


def test_death_between_result_and_record_is_settled(
    target: LocalTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.ledger.open({})
    monkeypatch.setattr(target, "settle", lambda: None)
    target.put(merged(target), RECORD)
    assert not target.record.exists()

    again = LocalTarget(target.path)

    assert again.finished() is None
    assert again.settle()
    assert json.loads(again.record.read_bytes())["rows"] == 3


def test_nothing_to_settle_before_the_result_is_in_place(target: LocalTarget) -> None:
    merged(target)

    assert not target.settle()


def test_output_below_a_file_is_told_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(SinkError, match=r"file/out\.jsonl cannot be written: Not a directory"):
        LocalTarget(tmp_path / "file" / "out.jsonl").prepare()


def test_output_where_nothing_may_be_created_is_told_at_start() -> None:
    with pytest.raises(SinkError, match=r"/proc/out\.jsonl cannot be written: No such file"):
        LocalTarget(Path("/proc/out.jsonl")).prepare()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_without_permission_is_told_at_start(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)

    with pytest.raises(SinkError, match="cannot be written: Permission denied"):
        LocalTarget(tmp_path / "out.jsonl").prepare()


def test_equals_sign_in_the_name_of_a_file_is_no_partition(tmp_path: Path) -> None:
    target = LocalTarget(tmp_path / "a=1.jsonl")

    assert target.staging == tmp_path / "a=1.jsonl.evmp"


def test_result_is_finished_whatever_is_left_of_its_staging_place(target: LocalTarget) -> None:
    target.ledger.open({})
    target.put(merged(target), RECORD)

    assert target.finished() is not None


def test_something_that_appeared_beside_unfinished_work_is_told_at_start(
    target: LocalTarget,
) -> None:
    target.ledger.open({})
    target.path.write_text("somebody's")

    with pytest.raises(SinkError, match="was not made by a run"):
        target.finished()


def test_fresh_result_waits_for_its_successor(target: LocalTarget) -> None:
    target.put(merged(target), RECORD)

    target.start_over()

    assert target.finished() is None


@pytest.mark.parametrize("content", ["notes.txt", "folder/"])
def test_fresh_does_not_replace_a_directory_of_other_things(tmp_path: Path, content: str) -> None:
    target = LocalTarget(tmp_path / "table", is_table=True)
    target.path.mkdir()
    place = target.path / content
    place.mkdir() if content.endswith("/") else place.touch()

    with pytest.raises(SinkError, match=r"table holds (notes\.txt|folder)"):
        target.check_replaceable()


def test_file_is_not_put_in_the_place_of_a_directory(tmp_path: Path) -> None:
    target = LocalTarget(tmp_path / "out.jsonl")
    target.path.mkdir()

    with pytest.raises(SinkError, match="is a directory, expected the name of a file"):
        target.prepare()


@pytest.mark.parametrize(
    ("key", "output"),
    [
        ("output_oss_file", "in/data.parquet"),
        ("output_oss_file", "link"),
        ("output_oss_file", "in/out.jsonl"),
        ("output_table", "."),
        ("output_oss_file", "model.pt"),
    ],
)
def test_output_must_be_apart_from_what_the_job_reads(
    tmp_path: Path, key: str, output: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "data.parquet").touch()
    (tmp_path / "link").symlink_to("in/data.parquet")
    read = "in/data.parquet" if output in ("in/data.parquet", "link") else "in"
    job = Job(
        model_path=str(tmp_path / "model.pt"),
        model_type="classifier",
        input_table=str(tmp_path / read),
        **{key: str(tmp_path / output)},
    )

    with pytest.raises(ConfigError, match="is not apart from"):
        open_target(job, ())


def test_start_that_has_led_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    target = LocalTarget(tmp_path / "new" / "deep" / "out.jsonl")
    target.prepare()
    target.ledger.open({})

    target.retreat()

    assert list(tmp_path.iterdir()) == []


def test_staging_place_may_lie_elsewhere(tmp_path: Path) -> None:
    job = Job(
        model_path="none",
        model_type="classifier",
        input_oss_file=str(tmp_path / "in.txt"),
        output_oss_file=str(tmp_path / "out" / "out.jsonl"),
        staging=str(tmp_path / "fast"),
    )
    target = LocalTarget.of(job)
    assert target.ledger.root == tmp_path / "fast" / "out.jsonl.evmp"
    target.prepare()
    target.start_over()
    target.ledger.open({})
    target.put(merged(target), RECORD)
    assert target.is_begun()

    target.clean_up()

    assert not target.is_begun()
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert sorted(names) == ["out.jsonl", "out.jsonl.evmp.json"]
    assert list((tmp_path / "fast").iterdir()) == []
