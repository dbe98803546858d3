"""The ledger and the result on OSS: what dies between any two requests is brought to its end."""

from __future__ import annotations

import io
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
import pytest
from forked import fork, wait
from ossserver import KEY_ID, KEY_SECRET, About, Gone, OssServer, serving_oss
from unpublished import (
    BLOCKS,
    FAILED,
    FINGERPRINT,
    KEYS,
    MENDED,
    N_ROWS,
    RECORD,
    SETTINGS,
    run_of,
    stage_block,
    staged,
)

from evmp.errors import ConfigError, SinkError
from evmp.job import Job
from evmp.ledger import Block, Ledger
from evmp.publish import publish
from evmp.target import open_target
from evmp.target.oss import OssTarget

RESULT = "deep/图 +%.jsonl"
OLD = b"an older result"
KINDS = ["new", "fresh", "retry"]
AT_ONCE, JOINED = "sent at once", "joined there"
AT_EVERY_REQUEST = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[OssServer]:
    """An OSS with two buckets, whose credentials are in the environment; files go to `tmp_path`."""
    monkeypatch.setenv("OSS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", KEY_SECRET)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serving_oss() as server:
        server.objects = {"out": {}, "work": {}}
        yield server


@dataclass
class Place:
    """Where the result of a job goes."""

    server: OssServer
    keys: dict[str, Any]

    def __post_init__(self) -> None:
        self.opened: list[OssTarget] = []

    @property
    def job(self) -> Job:
        usual = {"ossHost": self.server.endpoint, "output_oss_file": f"oss://out/{RESULT}"}
        return Job(**{**SETTINGS, **usual, **self.keys})

    @property
    def target(self) -> OssTarget:
        """A new one each time, as each run has its own."""
        target = open_target(self.job, KEYS)
        assert isinstance(target, OssTarget)
        self.opened.append(target)
        return target

    def close(self) -> None:
        for target in self.opened:
            target.close()

    def fill(self, kind: str) -> None:
        """Have all rows committed; see `unpublished.Place`."""
        target = self.target
        target.prepare()
        if kind == "fresh":
            self.server.objects["out"][RESULT] = OLD
            target.start_over()
        target.ledger.open(FINGERPRINT)
        for block in BLOCKS:
            stage_block(self.job, target.ledger, block, range(block.start, block.stop))
        if kind == "retry":
            publish(self.job, KEYS, N_ROWS, target, RECORD)
            target.clean_up()
            self.retry()

    def retry(self) -> None:
        """Have the failed rows committed again, without failures."""
        target = self.target
        target.prepare()
        target.start_over()
        standing = target.standing()
        assert standing is not None
        target.ledger.open({**FINGERPRINT, "retry": standing["result"]})
        stage_block(self.job, target.ledger, Block(0, len(FAILED)), FAILED, is_mended=True)

    def publish(self, kind: str) -> None:
        failed, record = (FAILED, MENDED) if kind == "retry" else (None, RECORD)
        target = self.target
        target.ledger.prepare()
        publish(self.job, KEYS, N_ROWS, target, record, failed)

    def go_on(self, kind: str) -> None:
        """Do what a run does that finds every row committed."""
        target = self.target
        target.prepare()
        with target.ledger.lock():
            target.restore()
            if not target.settle() and not target.finished():
                target.ledger.sweep()
                self.publish(kind)
        target.remove_parts()
        target.clean_up()

    def result(self) -> bytes | None:
        return self.server.objects["out"].get(RESULT)


@pytest.fixture
def place(server: OssServer) -> Iterator[Place]:
    """Where a result goes, with the staging place beside it."""
    place = Place(server, {})
    yield place
    place.close()


@pytest.fixture(params=[AT_ONCE, JOINED])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a small result of small blocks comes together."""
    if request.param == JOINED:
        monkeypatch.setattr("evmp.storage.upload.MIN_PART_BYTES", 100)
        monkeypatch.setattr("ossserver.MIN_PART_BYTES", 100)
    way: str = request.param
    return way


def snapshot(server: OssServer) -> tuple[dict[str, dict[str, bytes]], dict[Any, About]]:
    return {name: dict(it) for name, it in server.objects.items()}, dict(server.about)


def deaths(server: OssServer, start: Callable[[], object], stride: int) -> Iterator[int]:
    """Do some work again and again, in a child that dies `stride` requests later each time.

    It dies before a request has an effect, or when it has, and the answer has not come. Only
    requests count that change something.

    Yields: how many there were, after each death, and after the work that was done to its end.
    """
    before = snapshot(server)
    for n_moments in count(0, stride):
        server.objects, server.about = {n: dict(it) for n, it in before[0].items()}, dict(before[1])
        server.uploads = {}
        left, victims = [n_moments], list[int]()

        def kill(moment: str, left: list[int] = left, victims: list[int] = victims) -> None:
            if left[0] == 0:
                while not victims:
                    time.sleep(0.001)
                os.kill(victims[0], signal.SIGKILL)
                if moment == "before":
                    left[0] = -1
                    raise Gone
            left[0] -= 1
            if left[0] < 0:
                raise Gone  # what its threads have asked for meanwhile

        server.hook = kill
        victims.append(fork(start))
        code = wait(victims[0])
        server.hook = lambda moment: None
        assert code in (0, -signal.SIGKILL)
        yield n_moments
        if code == 0:
            return


every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize(
    ("way", "kind", "stride"),
    [
        (JOINED, "new", 13),
        (JOINED, "fresh", 17),
        (AT_ONCE, "retry", 7),
        *(
            pytest.param(way, kind, 1, marks=AT_EVERY_REQUEST)
            for way, kind in product((JOINED, AT_ONCE), KINDS)
        ),
    ],
    indirect=["way"],
)
def test_publish_that_dies_is_done_again(
    server: OssServer, place: Place, kind: str, stride: int, way: str
) -> None:
    place.fill(kind)
    old = place.result()
    found: set[bytes | None] = set()
    for _ in deaths(server, lambda: place.publish(kind), stride):
        found.add(place.result())

        place.go_on(kind)

        found.add(new := place.result())
        assert new is not None and new.count(b"\n") == N_ROWS
        assert new.count(b"error_stage") == (0 if kind == "retry" else len(FAILED))
        assert sorted(server.objects["out"]) == [RESULT, f"{RESULT}.evmp.json"]
        assert not any(upload.parts for upload in server.uploads.values())
        record = place.target.finished()
        assert record is not None and record["rows"] == N_ROWS
    assert found == {old, new}
    assert kind == "retry" or (server.calls["copy_part"] > 0) == (way == JOINED)


@every_kind
@pytest.mark.parametrize("stride", [41, pytest.param(1, marks=AT_EVERY_REQUEST)])
def test_job_that_dies_at_its_end_is_brought_there(
    server: OssServer, place: Place, kind: str, stride: int
) -> None:
    def run() -> None:
        run_of(place.job, place.target, is_retry=kind == "retry")()

    place.fill(kind)
    old = place.result()
    for _ in deaths(server, run, stride):
        assert place.result() in (old, None) or place.target.standing() or place.target.is_begun()

        assert wait(fork(run)) == 0

        new = place.result()
        assert new is not None and new.count(b"\n") == N_ROWS
        assert sorted(server.objects["out"]) == [RESULT, f"{RESULT}.evmp.json"]
        record = place.target.finished()
        assert record is not None and record["failed"] == new.count(b"error_stage")


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=AT_EVERY_REQUEST)])
def test_start_over_that_dies_keeps_the_result_and_can_be_done_again(
    server: OssServer, place: Place, stride: int
) -> None:
    place.fill("new")
    place.publish("new")
    old = place.result()

    def start_over() -> None:
        target = place.target
        target.ledger.prepare()
        target.start_over()

    for _ in deaths(server, start_over, stride):
        assert place.result() == old

        place.fill("fresh")
        place.go_on("fresh")

        assert place.result() == old


def test_commit_that_dies_is_done_by_who_takes_over(server: OssServer, place: Place) -> None:
    target = place.target
    target.prepare()
    target.ledger.open(FINGERPRINT)
    stage = target.ledger.stage("run", 0)

    def commit() -> bool:
        stage.write_bytes(b"rows")
        return not place.target.ledger.commit(stage, Block(0, 4), 0, {})

    for _ in deaths(server, commit, 1):
        ledger = place.target.ledger
        if ledger.stop_of(0) is None:
            assert stage.read_bytes() == b"rows"
            assert ledger.commit(stage, Block(0, 4), 0, {})
        ledger.sweep()

        (found,) = ledger.commits()
        assert staged(ledger, found) == b"rows"


# --- the ledger -----------------------------------------------------------------------------------


@pytest.fixture
def ledger(place: Place) -> Ledger:
    target = place.target
    target.prepare()
    target.ledger.open(FINGERPRINT)
    return target.ledger


def commit(ledger: Ledger, start: int, stop: int, data: bytes = b"rows", run: str = "run") -> bool:
    file = ledger.stage(run, start)
    file.write_bytes(data)
    return ledger.commit(file, Block(start, stop), 0, {})


def test_only_one_of_many_processes_commits_a_block(server: OssServer, ledger: Ledger) -> None:
    server.trouble = Random(3), 0.1
    children = [
        fork(lambda number=number: commit(ledger, 0, 4, b"%d" % number, run=str(number)))
        for number in range(6)
    ]

    codes = [wait(pid) for pid in children]

    assert sorted(codes) == [0] * 5 + [1]
    (found,) = ledger.commits()
    assert staged(ledger, found) == b"%d" % codes.index(1)
    assert ledger.storage.names("data") == [f"data/{found.data}"]


def test_ledger_says_what_is_wrong_and_where(server: OssServer, ledger: Ledger) -> None:
    commit(ledger, 0, 4)
    (found,) = ledger.commits()
    objects, folder = server.objects["out"], f"{RESULT}.evmp"
    data = objects.pop(f"{folder}/data/{found.data}")

    with pytest.raises(SinkError, match=r"of rows 0 to 4 is missing; delete oss://out/deep/"):
        staged(ledger, found)
    objects[f"{folder}/data/{found.data}"] = data.upper()
    with pytest.raises(SinkError, match=r"has changed since its commit: 4 bytes.* delete oss://"):
        staged(ledger, found)
    objects[f"{folder}/blocks/000000000000.json"] = b"{"
    with pytest.raises(SinkError, match=r"oss://.*/000000000000\.json is damaged.*delete it"):
        ledger.commits()
    server.denied.add(f"{folder}/blocks/000000000000.json")
    with pytest.raises(SinkError, match="403 AccessDenied"):
        ledger.commits()


def test_rows_of_two_jobs_are_never_mixed(server: OssServer, ledger: Ledger, place: Place) -> None:
    objects = server.objects["out"]
    commit(ledger, 0, 4)
    record = objects.pop(f"{RESULT}.evmp/blocks/000000000000.json")
    other = place.target.ledger  # on another machine, where no lock keeps it out
    other.open({"input": "another"})  # nothing was committed, so the first makes way

    with pytest.raises(SinkError, match=r"is not this job's any more.*run the same command again"):
        commit(ledger, 0, 4)
    objects[f"{RESULT}.evmp/blocks/000000000000.json"] = record  # it had slept even longer

    for ask in (other.commits, lambda: other.stop_of(0), lambda: commit(other, 0, 4, run="other")):
        with pytest.raises(SinkError, match="is of another job, which works on this output from"):
            ask()
    assert ledger.stop_of(0) == 4


def test_sweep_leaves_what_others_may_be_about_to_record(ledger: Ledger, place: Place) -> None:
    file = ledger.stage("run", 0)
    file.write_bytes(b"rows")
    ledger.storage.adopt(file, f"data/{0:012d}.{'0' * 32}")

    place.target.ledger.sweep()

    assert len(ledger.storage.names("data")) == 1


def test_names_of_files_belong_to_the_first_row_that_asks(ledger: Ledger) -> None:
    assert ledger.owner_of("a/图.jpg") is None
    assert ledger.reserve("a/图.jpg", 7) == 7
    assert ledger.reserve("a/图.jpg", 8) == 7
    assert ledger.owner_of("a/图.jpg") == 7


# --- the result -----------------------------------------------------------------------------------


def test_result_is_finished_until_somebody_changes_it(server: OssServer, place: Place) -> None:
    place.fill("new")
    place.go_on("new")
    record = place.target.finished()
    assert record is not None and record["rows"] == N_ROWS

    server.objects["out"][RESULT] += b"by hand"

    with pytest.raises(SinkError, match="was not made by a run of this job"):
        place.target.finished()
    del server.objects["out"][RESULT]
    assert place.target.finished() is None


def test_result_stands_though_the_staging_place_cannot_be_removed(
    server: OssServer, place: Place
) -> None:
    place.fill("new")
    place.publish("new")
    server.denied.add(f"{RESULT}.evmp/job.json")

    place.target.clean_up()

    assert place.target.finished() is not None
    server.denied.clear()
    place.target.clean_up()
    assert sorted(server.objects["out"]) == [RESULT, f"{RESULT}.evmp.json"]


@pytest.mark.parametrize("is_versioned", [False, True])
def test_object_that_appeared_meanwhile_is_not_overwritten(
    server: OssServer, place: Place, way: str, is_versioned: bool
) -> None:
    place.fill("new")
    server.versioned = {"out"} if is_versioned else set()
    server.objects["out"][RESULT] = b"somebody's"

    with pytest.raises(SinkError, match="move it away and run the same command again"):
        place.publish("new")

    assert place.result() == b"somebody's"
    assert server.uploads == {}
    assert place.target.ledger.storage.names("", "record-") == []


def test_fresh_does_not_replace_what_came_later(server: OssServer, place: Place) -> None:
    place.fill("fresh")
    server.objects["out"][RESULT] = b"somebody's"

    with pytest.raises(SinkError, match="move it away"):
        place.publish("fresh")

    assert place.result() == b"somebody's"


def test_fresh_does_not_replace_what_came_between_two_attempts(
    server: OssServer, place: Place, way: str
) -> None:
    place.fill("fresh")
    call, nth = ("complete", 1) if way == JOINED else ("put", 2)  # the first is the record's
    server.calls.clear()

    def come(moment: str) -> None:
        if moment == "before" and server.calls[call] == nth and place.result() == OLD:
            server.objects["out"][RESULT] = b"somebody's"
            raise Gone

    server.hook = come
    with pytest.raises(SinkError, match="move it away"):
        place.publish("fresh")

    assert place.result() == b"somebody's"


def test_one_of_two_publishers_at_once_puts_its_result_and_record_in_place(
    server: OssServer, place: Place, way: str
) -> None:
    place.fill("new")

    def work() -> int:
        try:
            place.publish("new")
        except SinkError as error:
            return error.exit_code
        return 0

    codes = [wait(pid) for pid in [fork(work), fork(work)]]

    assert sorted(codes) == [0, SinkError.exit_code]
    assert place.target.finished() is not None
    assert server.uploads == {}


def test_publish_that_oss_fails_in_its_midst_leaves_no_parts_behind_for_good(
    server: OssServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evmp.storage.upload.PART_BYTES", 100)
    monkeypatch.setattr("ossserver.MIN_PART_BYTES", 100)
    place = Place(server, {"staging": str(tmp_path / "staging"), "storage_timeout_seconds": 1})
    place.fill("new")

    def fall_ill(moment: str) -> None:
        if any(it.parts for it in server.uploads.values()):
            server.faults[RESULT] = [503] * 10_000

    server.hook = fall_ill
    with pytest.raises(SinkError, match=r"cannot be made: 503 SlowDown; no time .*: mend that"):
        place.publish("new")
    server.hook = lambda moment: None
    server.faults.clear()
    assert len(server.uploads) == 1

    place.go_on("new")

    assert server.uploads == {}
    assert place.target.finished() is not None
    place.close()


@pytest.mark.parametrize("staging", ["oss://work/deep", "local"])
def test_staging_place_may_lie_elsewhere(
    server: OssServer, tmp_path: Path, staging: str, way: str
) -> None:
    uri = str(tmp_path / "staging") if staging == "local" else staging
    server.versioned = {"out"}
    place = Place(server, {"staging": uri})
    place.fill("new")
    assert server.objects["out"] == {}

    place.publish("new")
    place.target.clean_up()

    assert sorted(server.objects["out"]) == [RESULT, f"{RESULT}.evmp.json"]
    assert server.objects["work"] == {}
    result = place.result()
    assert result is not None and result.count(b"\n") == N_ROWS
    place.close()


def test_parquet_file_is_merged_here_and_sent(server: OssServer, way: str) -> None:
    place = Place(server, {"output_oss_file": "oss://out/r.parquet"})
    place.fill("retry")

    place.publish("retry")
    place.target.clean_up()

    table = pq.read_table(io.BytesIO(server.objects["out"]["r.parquet"]))
    assert table["id"].to_pylist() == [f"row {row}" for row in range(N_ROWS)]
    assert not any("error_stage" in it for it in table["prediction_result"].to_pylist())
    assert sorted(server.objects["out"]) == ["r.parquet", "r.parquet.evmp.json"]
    place.close()


def test_parts_of_workers_are_joined_there_and_removed(
    server: OssServer, place: Place, way: str
) -> None:
    place.fill("new")
    server.objects["out"][f"{RESULT}.part-of-mine"] = b"somebody's"
    target = place.target
    commits = target.ledger.commits()

    target.write_part(0, 2, commits[:2])
    target.write_part(1, 2, commits[2:])

    parts = [server.objects["out"][f"{RESULT}.part-0000{n}-of-00002"] for n in range(2)]
    assert [part.count(b"\n") for part in parts] == [30, 10]
    place.publish("new")
    assert place.result() == b"".join(parts)
    target.remove_parts()
    kept = [key for key in server.objects["out"] if ".part-" in key]
    assert kept == [f"{RESULT}.part-of-mine"]


def test_local_result_may_have_its_staging_place_on_oss(server: OssServer, tmp_path: Path) -> None:
    file = tmp_path / "out" / "r.jsonl"
    keys = {"output_oss_file": str(file), "staging": "oss://work/jobs", "ossHost": server.endpoint}
    job = Job(**{**SETTINGS, **keys})
    target = open_target(job, KEYS)
    target.prepare()
    with target.ledger.lock():
        target.ledger.open(FINGERPRINT)
        for block in BLOCKS:
            stage_block(job, target.ledger, block, range(block.start, block.stop))
        assert len(server.objects["work"]) > 2 * len(BLOCKS)
        publish(job, KEYS, N_ROWS, target, RECORD)
        target.clean_up()

    assert file.read_bytes().count(b"\n") == N_ROWS
    assert sorted(it.name for it in file.parent.iterdir()) == [file.name, f"{file.name}.evmp.json"]
    assert server.objects["work"] == {}
    target.ledger.storage.close()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("OSS_ACCESS_KEY_SECRET", "wrong", "403 SignatureDoesNotMatch"),
        ("OSS_ACCESS_KEY_ID", "wrong", "403 InvalidAccessKeyId"),
        ("OSS_SESSION_TOKEN", "expired", "403 InvalidSecurityToken"),
        ("skew", "1800", "403 RequestTimeTooSkewed"),
        ("ossHost", "http://127.0.0.1:1", "connection refused"),
        ("ossHost", "http://oss.invalid", "oss.invalid"),
        ("output_oss_file", "oss://none/r.jsonl", "404 NoSuchBucket"),
    ],
)
def test_output_that_cannot_be_had_is_told_at_start(
    server: OssServer, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    keys: dict[str, Any] = {"storage_timeout_seconds": 1.0}
    if variable == "skew":
        server.skew = float(value)
    elif variable.isupper():
        monkeypatch.setenv(variable, value)
    else:
        keys[variable] = value
    place = Place(server, keys)

    for look in (place.target.check_writable, place.target.prepare):
        with pytest.raises(SinkError, match=f"cannot be written: .*{message}"):
            look()
    place.close()


def test_what_cannot_be_written_is_told_at_start(server: OssServer, place: Place) -> None:
    server.denied.add(RESULT)
    with pytest.raises(SinkError, match="cannot be written: 403 AccessDenied: oss://out/deep/"):
        place.target.prepare()
    none = Place(server, {"output_oss_file": "oss://none/x.jsonl"})
    with pytest.raises(SinkError, match="404 NoSuchBucket"):
        none.target.check_writable()
    none.close()


@pytest.mark.parametrize("output", [f"oss://out/{RESULT}", "oss://work/r.jsonl", "r.jsonl"])
def test_staging_place_whose_objects_are_made_twice_is_refused(
    server: OssServer, tmp_path: Path, output: str
) -> None:
    server.versioned = {"out"}
    keys = {"ossHost": server.endpoint, "staging": "oss://out/staging"}
    keys["output_oss_file"] = output if ":" in output else str(tmp_path / output)
    target = open_target(Job(**{**SETTINGS, **keys}), KEYS)

    with pytest.raises(
        SinkError, match=r"a bucket that keeps versions .*staging may name a folder"
    ):
        target.prepare()

    assert server.objects == {"out": {}, "work": {}}
    target.ledger.storage.close()
    if isinstance(target, OssTarget):
        target.close()


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("output_oss_file", "oss://out/folder/"),
        ("input_oss_file", f"oss://out/{RESULT}"),
        ("model_path", "oss://out/deep/"),
        ("model_path", "oss://out/deep"),
    ],
)
def test_output_must_be_apart_from_what_the_job_reads(place: Place, key: str, other: str) -> None:
    job = place.job.model_copy(update={key: other})

    with pytest.raises(ConfigError, match=f"is not apart from {key}|is a folder, expected"):
        open_target(job, KEYS)
