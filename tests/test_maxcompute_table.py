"""Results that become tables of MaxCompute: whole, once, and nobody else's rows in their place."""

from __future__ import annotations

import base64
import gc
import json
import os
import signal
import ssl
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from forked import fork, wait
from httpserver import Answer, serving
from jobfolder import JobFolder
from maxcompute.fault import Fault, Harm
from maxcompute.server import MaxCompute
from maxcompute.store import Table
from ossserver import KEY_ID, KEY_SECRET, OssServer, serving_oss
from test_remote_http import self_signed
from unpublished import BLOCKS, FAILED, FINGERPRINT, KEYS, N_ROWS, RECORD, SETTINGS, stage_block

from evmp.errors import ConfigError, SinkError
from evmp.job import Job
from evmp.key import table_field
from evmp.publish import publish
from evmp.target import Target, open_target

URI = "odps://shop/tables/results"
PART = URI + "/pt=1"
TYPES = {"id": "string", "prediction_result": "string"}
ROWS = [f"row {row}" for row in range(N_ROWS)]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[MaxCompute]:
    monkeypatch.chdir(tmp_path)
    with MaxCompute() as service:
        for name, value in service.environment().items():
            monkeypatch.setenv(name, value)
        yield service
        gc.collect()


def job_of(**keys: Any) -> Job:
    return Job(**{**SETTINGS, "output_table": PART, "stall_timeout_seconds": 20, **keys})


def target_of(**keys: Any) -> Target:
    return open_target(job_of(**keys), KEYS)


def commit_all(job: Job) -> None:
    """Have all rows committed."""
    target = open_target(job, KEYS)
    target.prepare()
    target.ledger.open(FINGERPRINT)
    for block in BLOCKS:
        stage_block(job, target.ledger, block, range(block.start, block.stop))


def go_on(job: Job) -> None:
    """Do what a run does that finds every row committed."""
    target = open_target(job, KEYS)
    target.prepare()
    with target.ledger.lock():
        target.restore()
        if not target.settle() and not target.finished():
            target.ledger.sweep()
            publish(job, KEYS, N_ROWS, target, RECORD)
    target.clean_up()


def ids(service: MaxCompute, partition: str = "pt=1") -> list[str]:
    table = service.tables.get("results")
    if table is None or partition not in table.partitions:
        return []
    return table.partitions[partition].rows["id"].to_pylist()  # type: ignore[no-any-return]


def add_results(service: MaxCompute, *rows: str) -> Table:
    table = service.add("results", TYPES, "pt")
    table.put(pa.table({"id": rows, "prediction_result": rows}, table.schema), "pt=1")
    return table


@pytest.mark.parametrize("uri", [URI, PART])
def test_result_becomes_a_table_with_its_record_beside_the_staging(
    service: MaxCompute, tmp_path: Path, uri: str
) -> None:
    job = job_of(output_table=uri, lifecycle=30)
    assert open_target(job, KEYS).finished() is None
    open_target(job, KEYS).check_writable()
    assert service.tables == {}
    commit_all(job)
    name = "shop.results" + uri.removeprefix(URI).replace("/", ".")
    assert [it.name for it in tmp_path.iterdir()] == [f"{name}.evmp"]
    assert service.tables["results"].partitions.keys() == ({""} if uri == URI else set())

    go_on(job)

    table = service.tables["results"]
    assert (table.types, table.lifecycle) == (TYPES, 30)
    assert ids(service, "pt=1" if uri == PART else "") == ROWS
    assert [it.name for it in tmp_path.iterdir()] == [f"{name}.evmp.json"]
    record = json.loads((tmp_path / f"{name}.evmp.json").read_text())
    assert open_target(job, KEYS).finished() == open_target(job, ()).finished() == record
    assert record["result"]["rows"] == N_ROWS
    assert service.count("upload.commit") == 1


def test_staging_lies_where_the_job_says(service: MaxCompute, tmp_path: Path) -> None:
    job = job_of(staging=str(tmp_path / "a" / "b"))
    commit_all(job)

    go_on(job)

    assert [it.name for it in (tmp_path / "a" / "b").iterdir()] == ["shop.results.pt=1.evmp.json"]


@pytest.fixture
def oss(monkeypatch: pytest.MonkeyPatch) -> Iterator[OssServer]:
    """An OSS with a bucket, whose credentials are in the environment."""
    monkeypatch.setenv("OSS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", KEY_SECRET)
    with serving_oss() as oss:
        oss.objects = {"work": {}}
        yield oss


@pytest.mark.parametrize("slash", ["", "/"])
def test_staging_may_lie_on_oss(service: MaxCompute, oss: OssServer, slash: str) -> None:
    job = job_of(staging=f"oss://work/a b{slash}", ossHost=oss.endpoint)
    commit_all(job)
    go_on(job)

    assert ids(service) == ROWS
    assert list(oss.objects["work"]) == ["a b/shop.results.pt=1.evmp.json"]
    assert open_target(job, KEYS).finished() is not None


def test_notes_that_cannot_be_read_make_no_strangers_of_the_rows(
    service: MaxCompute, oss: OssServer
) -> None:
    job = job_of(staging="oss://work/a", ossHost=oss.endpoint)
    commit_all(job)
    go_on(job)
    target = open_target(job, KEYS)

    for name in ("shop.results.pt=1.evmp.json", "shop.results.pt=1.evmp/upload.json"):
        oss.denied = {f"a/{name}"}
        with pytest.raises(SinkError, match=f"{name}, which tells .* read: 403 AccessDenied; give"):
            target.finished()
    with pytest.raises(SinkError, match=r"upload\.json, which tells .* run the same command again"):
        target.settle()
    oss.denied = set()
    assert target.finished() is not None


def test_staging_that_is_kept_vouches_for_nothing(service: MaxCompute) -> None:
    commit_all(job_of())
    target = target_of()
    publish(job_of(), KEYS, N_ROWS, target, RECORD)
    assert target.is_begun() and target.finished() is not None
    table = service.tables["results"]

    table.put(table.data("pt=1").rows, "pt=1")

    assert not target.settle()
    with pytest.raises(SinkError, match="or that were changed"):
        target.finished()


# --- what stands there ----------------------------------------------------------------------------


def test_rows_of_others_are_never_replaced_unasked(service: MaxCompute) -> None:
    add_results(service, "other")

    with pytest.raises(SinkError, match=r"holds 1 rows that no run of this job has .* --fresh"):
        target_of().finished()


def test_rows_that_came_meanwhile_are_not_replaced(service: MaxCompute) -> None:
    commit_all(job_of())
    add_results(service, "other")

    with pytest.raises(SinkError, match="empty it, and run the same command again"):
        publish(job_of(), KEYS, N_ROWS, target_of(), RECORD)

    assert ids(service) == ["other"]


def test_fresh_run_replaces_what_it_has_seen_and_nothing_later(service: MaxCompute) -> None:
    table = add_results(service, "old")
    target = target_of()
    target.prepare()
    target.start_over()
    assert target.is_to_be_replaced() and target.finished() is None
    commit_all(job_of())
    table.put(pa.table({"id": ["new"], "prediction_result": ["x"]}, table.schema), "pt=1")
    with pytest.raises(SinkError, match="empty it"):
        publish(job_of(), KEYS, N_ROWS, target_of(), RECORD)

    target_of().start_over()
    commit_all(job_of())
    go_on(job_of())

    assert ids(service) == ROWS


def test_result_that_was_changed_is_no_result_of_this_job(service: MaxCompute) -> None:
    commit_all(job_of())
    go_on(job_of())
    table = service.tables["results"]
    assert target_of().standing() is not None

    table.put(table.data("pt=1").rows, "pt=1")

    assert target_of().standing() is None
    with pytest.raises(SinkError, match="or that were changed"):
        target_of().finished()


def test_failed_rows_alone_are_refused_to_be_done_again(service: MaxCompute) -> None:
    commit_all(job_of())
    go_on(job_of())

    target = target_of()
    assert target.standing()["failed"] == len(FAILED)  # type: ignore[index]
    with pytest.raises(SinkError, match=r"MaxCompute keeps no order of rows; .* --fresh"):
        target.failures(None)  # type: ignore[arg-type]


# --- death and faults -----------------------------------------------------------------------------


class Deaths:
    """Kills a process at the n-th step of what it asks a service."""

    def __init__(self, service: MaxCompute, n_steps: int) -> None:
        self._left, self.pid, self.steps = n_steps, 0, list[str]()
        service.on_step = self._on_step

    def watch(self, pid: int) -> int:
        """Return the exit code of a process, once it has ended."""
        self.pid = pid
        return wait(pid)

    def _on_step(self, step: str) -> None:
        self.steps.append(step)
        if len(self.steps) == self._left:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "stride",
    [
        pytest.param(11, id="at some steps"),
        pytest.param(1, id="at every step", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("is_fresh", [False, True])
def test_publish_that_is_killed_is_done_by_the_next_run(
    service: MaxCompute, is_fresh: bool, stride: int
) -> None:
    job = job_of()
    for n_steps in count(1, stride):
        service.tables.clear()
        Path("shop.results.pt=1.evmp.json").unlink(missing_ok=True)
        if is_fresh:
            add_results(service, "old")
            target = target_of()
            target.prepare()
            target.start_over()
        commit_all(job)

        deaths = Deaths(service, n_steps)
        code = deaths.watch(fork(partial(go_on, job)))
        service.on_step = lambda step: None
        assert ids(service) in ([], ["old"] if is_fresh else [], ROWS)
        assert code in (0, -signal.SIGKILL)
        if code:
            go_on(job)

        assert ids(service) == ROWS
        record = target_of().finished()
        assert record is not None and record["rows"] == N_ROWS
        assert [it.name for it in Path().iterdir()] == ["shop.results.pt=1.evmp.json"]
        if code == 0:
            break
    assert n_steps > 20


def test_upload_whose_session_is_forgotten_is_not_done_over_changed_rows(
    service: MaxCompute,
) -> None:
    commit_all(job_of())
    deaths = Deaths(service, 1 << 30)
    assert deaths.watch(fork(partial(go_on, job_of()))) == 0
    at_commit = deaths.steps.index("upload.commit done") + 1
    service.tables.clear()
    Path("shop.results.pt=1.evmp.json").unlink()
    commit_all(job_of())
    assert Deaths(service, at_commit).watch(fork(partial(go_on, job_of()))) == -signal.SIGKILL
    service.on_step = lambda step: None
    service.uploads.clear()

    with pytest.raises(SinkError, match="no run of this job has put there"):
        go_on(job_of())

    assert ids(service) == ROWS


@pytest.mark.parametrize(
    "fault",
    [
        Fault("table", status=503),
        Fault("upload.commit", lost=True),
        Fault("download.create", lost=True),
    ],
    ids=str,
)
def test_what_may_pass_is_asked_again(service: MaxCompute, fault: Fault) -> None:
    service.faults.add(fault)
    commit_all(job_of())

    go_on(job_of())

    assert ids(service) == ROWS
    assert service.faults.left() == 0


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"output_table": "odps://other/tables/results"}, "NoSuchProject: The project other"),
        ({"output_table": URI}, "names the partition columns none, expected pt"),
        ({"output_table": URI + "/day=1"}, "names the partition columns day, expected pt"),
        ({"output_table": URI + "/pt=1/hour=2"}, "columns pt, hour, expected pt"),
        ({"result_column": "result"}, r"with the columns .* expected id string, result string"),
        ({"result_column": "ID"}, "'ID' is there twice, in other cases"),
        ({"output_table": "odps://shop/tables/view/pt=1"}, "not supported on a view"),
        ({"output_table": PART, "reserved_columns": ["pt"]}, "is a partition of .* and a column"),
    ],
    ids=str,
)
def test_table_that_does_not_fit_is_refused_before_any_work(
    service: MaxCompute, keys: dict[str, Any], message: str
) -> None:
    add_results(service)
    service.add("view", TYPES, "pt", is_view=True)
    fields = tuple(table_field(name, pa.string()) for name in keys.get("reserved_columns", ["id"]))

    with pytest.raises(SinkError, match=message):
        open_target(job_of(**keys), fields).prepare()

    assert ids(service) == []


def test_endpoint_where_nobody_answers_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALIBABA_CLOUD_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "secret")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(self_signed(tmp_path))
    with serving(context) as web:
        for endpoint, reason in (
            (web.url, "127.0.0.1: the certificate is not valid: self-signed certificate"),
            ("http://none.invalid", "none.invalid: there is no such host"),
        ):
            with pytest.raises(SinkError, match=rf"output_table: .*: Unreachable: {reason}$"):
                target_of(odps_endpoint=f"{endpoint}/api").check_writable()
        assert web.n_connections < 5


def test_session_that_nobody_may_ask_for_is_not_forgotten(service: MaxCompute) -> None:
    commit_all(job_of())
    publish(job_of(), KEYS, N_ROWS, target_of(), RECORD)
    Path("shop.results.pt=1.evmp.json").rename("shop.results.pt=1.evmp/tmp/record")
    note = {"session": next(iter(service.uploads)), "record": RECORD}
    Path("shop.results.pt=1.evmp/upload.json").write_text(json.dumps(note))
    service.faults.add(Fault("upload.reload", status=403, code="NoPermission"))

    with pytest.raises(SinkError, match="NoPermission"):
        target_of().finished()

    assert target_of().settle()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("odps://shop/tables/a b", "expected letters, digits and underscores"),
        ("odps://shop/tables/t` (x) --", "expected letters"),
        ("odps://shop/tables/t/pt=a'b", "expected a value without quotes"),
        ("odps://shop/tables/t/pt=a%2C%20b", "expected a value without quotes"),
        ("odps://SHOP/tables/photos/pt=1/", "the same as input_table"),
    ],
)
def test_names_that_are_none_there_are_refused(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        target_of(output_table=uri, input_table="odps://shop/tables/photos/pt=1")


@pytest.mark.parametrize(
    ("call", "code"), [("table", "NoPermission"), ("upload.create", "AccessDenied")]
)
def test_who_may_not_write_is_told_before_any_work(
    service: MaxCompute, call: str, code: str
) -> None:
    service.faults.add(Fault(call, status=403, code=code, times=9))

    with pytest.raises(SinkError, match=f"output_table: {PART}: {code}"):
        target_of().prepare()


# --- whole jobs -----------------------------------------------------------------------------------


def add_photos(service: MaxCompute, image: str, n_rows: int) -> None:
    table = service.add(
        "photos",
        {"id": "bigint", "image": "string", "at": "datetime", "tags": "array<string>"},
        "pt",
    )
    rows = {
        "id": range(n_rows),
        "image": ["broken" if n == 3 else image for n in range(n_rows)],
        "at": [None if n % 5 == 1 else n for n in range(n_rows)],
        "tags": [[f"t{n}", None] for n in range(n_rows)],
    }
    table.put(pa.table(rows, table.schema), "pt=1")


def test_job_goes_from_table_to_table_through_faults_and_a_kill(
    job: JobFolder, photo_file: Callable[..., bytes]
) -> None:
    image = base64.b64encode(photo_file("coffee", size=(60, 40))).decode()
    with MaxCompute() as service:
        add_photos(service, image, 90)
        service.faults.add(Fault("download.data", harm=Harm.CUT, after=40_000))
        service.faults.add(Fault("upload.block", harm=Harm.FLIP, after=500))
        service.faults.add(Fault("upload.commit", lost=True))
        job.write(
            input_table="odps://shop/tables/photos/pt=1",
            output_oss_file=None,
            output_table=PART,
            reserved_columns="id,at,tags",
            num_worker=2,
        )
        process = job.start(env=service.environment())
        killed = [False]

        def kill_at_upload(step: str) -> None:
            if step == "upload.block" and not killed[0]:
                killed[0] = True
                process.kill()

        service.on_step = kill_at_upload
        process.communicate()
        first, again = (job.run(env=service.environment()) for _ in range(2))

    assert killed == [True] and process.returncode == -signal.SIGKILL
    assert first.returncode == 0, first.stderr
    assert again.returncode == 0 and "already done: 90 rows, 1 failed" in again.stderr
    rows = service.tables["results"].partitions["pt=1"].rows.to_pylist()
    photos = service.tables["photos"].partitions["pt=1"].rows.to_pylist()
    assert [(r["id"], r["at"], r["tags"]) for r in rows] == [
        (r["id"], r["at"], r["tags"]) for r in photos
    ]
    results = [json.loads(row["prediction_result"]) for row in rows]
    assert [n for n, it in enumerate(results) if "class" not in it] == [3]
    assert service.tables["results"].lifecycle == 10
    assert service.faults.left() == 0
    assert sorted(it.name for it in job.path.glob("*evmp*")) == ["shop.results.pt=1.evmp.json"]


@pytest.mark.slow
@pytest.mark.parametrize("is_dynamic", [False, True])
def test_commands_that_share_a_job_publish_its_table_once(
    job: JobFolder, photo_file: Callable[..., bytes], is_dynamic: bool
) -> None:
    image = base64.b64encode(photo_file("coffee", size=(60, 40))).decode()
    with MaxCompute() as service:
        add_photos(service, image, 200)
        job.write(
            input_table="odps://shop/tables/photos/pt=1",
            output_oss_file=None,
            output_table=PART,
            num_worker=2,
            enableDynamicCluster=is_dynamic,
            useSparseClusterSchema=is_dynamic,
        )
        workers = [job.start("--worker", f"{k}/2", env=service.environment()) for k in range(2)]
        told = [worker.communicate() for worker in workers]
        again = job.run("--worker", "1/2", env=service.environment())

    assert [worker.returncode for worker in workers] == [0, 0], told
    assert "already done: 200 rows, 1 failed" in again.stderr
    rows = service.tables["results"].partitions["pt=1"].rows
    assert rows["id"].to_pylist() == list(range(200))
    assert service.count("upload.commit") == 1


@pytest.mark.slow
@pytest.mark.parametrize("image_type", ["base64", "url"])
def test_table_to_table_is_exact_under_steady_faults_and_kills(
    job: JobFolder, photo_file: Callable[..., bytes], image_type: str
) -> None:
    photos = [photo_file("coffee", size=(60 + n, 40)) for n in range(40)]
    names = [f"photo {n}" for n in range(2000)]
    with MaxCompute() as service, serving() as web:
        busy, torn = (
            Answer(status=503, headers={"Retry-After": "0"}),
            Answer(b"?", length=99, reset=True),
        )
        texts = [base64.b64encode(it).decode() for it in photos]
        if image_type == "url":
            answers = [(busy, torn, Answer(it))[2 * (n % 9 > 0) :] for n, it in enumerate(photos)]
            texts = [web.put(f"/{n}.jpg", *it) for n, it in enumerate(answers)]
        table = service.add("photos", {"image": "string", "name": "string"}, "pt")
        images = [texts[n % 40] for n in range(len(names))]
        table.put(pa.table({"image": images, "name": names}), "pt=1")
        service.faults.rain(0.02, seed=1)
        job.write(
            input_table="odps://shop/tables/photos/pt=1",
            image_type=image_type,
            allow_private_hosts=True,
            output_oss_file=None,
            output_table=URI,
            reserved_columns="name,pt",
            num_worker=2,
            block_rows=100,
        )
        codes = []
        for n_steps in (9, 12, 15, 18, 21, 24, 27, 30, 1 << 30):
            deaths = Deaths(service, n_steps)
            process = job.start(env=service.environment())
            deaths.pid = process.pid
            errors = process.communicate()[1]
            codes.append(process.returncode)
            if process.returncode != -signal.SIGKILL:
                break

    assert codes[-1] == 0 and len(codes) > 3, errors
    rows = service.tables["results"].partitions[""].rows
    assert rows["name"].to_pylist() == names and set(rows["pt"].to_pylist()) == {"1"}
    results = [json.loads(text) for text in rows["prediction_result"].to_pylist()]
    assert all("class" in result for result in results)
    assert all(result == results[n % 40] for n, result in enumerate(results))
    assert service.faults.n_drawn > 0
