"""Tables of MaxCompute: read by the real pyodps from a service of our own that fails on demand."""

from __future__ import annotations

import base64
import gc
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from decimal import Decimal
from random import Random
from typing import Any

import psutil
import pyarrow as pa
import pytest
from httpserver import Answer, serving
from jobfolder import JobFolder
from maxcompute.fault import Fault, Harm
from maxcompute.server import MaxCompute

from evmp.errors import ConfigError, CredentialsError, SourceError
from evmp.job import Job
from evmp.key import arrow_field, key_values
from evmp.source import Kind, Row, Source, maxcompute, open_source

N_ROWS = 300
TYPES = {"id": "bigint", "image": "string", "name": "string"}
INTERVAL = "interval_year_month"
URI = "odps://shop/tables/photos"
JOB: dict[str, Any] = {
    "model_path": "m",
    "model_type": "classifier",
    "output_oss_file": "out.jsonl",
    "input_table": URI,
    "reserved_columns": "id,name",
    "stall_timeout_seconds": 60,
}
SCHEMA = pa.schema({"id": pa.int64(), "image": pa.string(), "name": pa.string()})


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[MaxCompute]:
    with MaxCompute() as service:
        for name, value in service.environment().items():
            monkeypatch.setenv(name, value)
        yield service
        gc.collect()  # pyodps' readers hold themselves, and with them their connections


def rows_of_photos(n_rows: int = N_ROWS) -> pa.Table:
    columns = {
        "id": range(n_rows),
        "image": [f"{n:04d}" * (n % 50 + 100) for n in range(n_rows)],
        "name": [None if n % 7 == 3 else f"photo {n}" for n in range(n_rows)],
    }
    return pa.table(columns, SCHEMA)


def add_photos(service: MaxCompute, n_rows: int = N_ROWS) -> None:
    service.add("photos", TYPES).put(rows_of_photos(n_rows))


def source_of(**keys: Any) -> Source:
    return open_source(Job(**{**JOB, **keys}))


def read(source: Source, *ranges: tuple[int, int]) -> list[Row]:
    with closing(source):
        ranges = ranges or ((0, source.describe().n_rows),)
        return [row for start, stop in ranges for row in source.read(start, stop)]


def plain(rows: list[Row]) -> list[tuple[int, Kind, bytes, tuple[object, ...]]]:
    return [(row.index, row.kind, bytes(row.payload), row.keys) for row in rows]


def expected(*ranges: tuple[int, int]) -> list[tuple[int, Kind, bytes, tuple[object, ...]]]:
    table = rows_of_photos().to_pylist()
    return [
        (n, Kind.BASE64, table[n]["image"].encode(), (n, table[n]["name"]))
        for start, stop in ranges or ((0, N_ROWS),)
        for n in range(start, stop)
    ]


def test_rows_come_with_their_keys(service: MaxCompute) -> None:
    add_photos(service)

    rows = plain(read(source_of()))

    assert rows == expected()
    assert service.calls[-1][1]["columns"] == "image,id,name"


def test_blocks_behind_each_other_share_a_stream(service: MaxCompute) -> None:
    add_photos(service)

    rows = read(source_of(), (0, 100), (100, 200), (250, 260), (20, 30))

    assert plain(rows) == expected((0, 200), (250, 260), (20, 30))
    assert service.count("download.create") == 1
    assert service.count("download.data") == 3


@pytest.mark.parametrize("harm", Harm)
@pytest.mark.parametrize("columns", ["id,name", "id,name,at"])
def test_stream_goes_on_behind_the_last_good_row(
    service: MaxCompute, harm: Harm, columns: str
) -> None:
    table = service.add("photos", {**TYPES, "at": "datetime"})
    at = pa.array(range(N_ROWS), pa.timestamp("ms"))
    table.put(rows_of_photos().append_column("at", at))
    for after in (1, 2, 30_000, 70_000, 100_001):
        service.faults.add(Fault("download.data", harm=harm, after=after))

    rows = read(source_of(reserved_columns=columns))

    assert [row[:3] for row in plain(rows)] == [row[:3] for row in expected()]
    assert [row.keys[:2] for row in rows] == [row[3] for row in expected()]
    assert [row.keys[2:] for row in rows] == [(n,) * columns.count("at") for n in range(N_ROWS)]
    assert service.faults.left() == 0


def test_partition_is_read_and_names_a_column(service: MaxCompute) -> None:
    table = service.add("photos", TYPES, "pt", "hour")
    table.put(rows_of_photos(7), "pt=a,hour=1")
    table.put(rows_of_photos(9), "pt=a,hour=2")

    rows = read(source_of(input_table=URI + "/pt=a/hour=1", reserved_columns="hour,id"))

    assert [row.keys for row in rows] == [("1", n) for n in range(7)]


KEY_COLUMNS: dict[str, tuple[str, pa.Array[Any]]] = {
    "tiny": ("tinyint", pa.array([-128, None, 127], pa.int8())),
    "small": ("smallint", pa.array([-(1 << 15), None, 5], pa.int16())),
    "int": ("int", pa.array([-(1 << 31), None, 5], pa.int32())),
    "big": ("bigint", pa.array([-(1 << 63) + 1, None, (1 << 63) - 1], pa.int64())),
    "half": ("float", pa.array([0.1, None, 3e38], pa.float32())),
    "whole": ("double", pa.array([0.1, None, 1e300], pa.float64())),
    "yes": ("boolean", pa.array([True, None, False], pa.bool_())),
    "raw": ("binary", pa.array([b"\xff\0", None, b""], pa.binary())),
    "text": ("string", pa.array(["大", None, ""], pa.string())),
    "short": ("varchar(10)", pa.array(["a", None, "b,\n"], pa.string())),
    "fixed": ("char(2)", pa.array(["ab", None, "c "], pa.string())),
}
OTHER_COLUMNS: dict[str, tuple[str, pa.Array[Any]]] = {
    "price": ("decimal(10,2)", pa.array(["1.50", None, "-7.00"]).cast(pa.decimal128(10, 2))),
    "count": ("decimal(10,0)", pa.array(["15", None, "-7"]).cast(pa.decimal128(10, 0))),
    "counts": (
        "array<decimal(5,0)>",
        pa.array([[Decimal(15)], None, []], pa.list_(pa.decimal128(5, 0))),
    ),
    "day": ("date", pa.array([0, None, -40_000], pa.int32()).cast(pa.date32())),
    "at": ("datetime", pa.array([0, None, -1], pa.timestamp("ms"))),
    "stamp": ("timestamp", pa.array([1, None, -1], pa.timestamp("ns"))),
    "local": ("timestamp_ntz", pa.array([1, None, -1], pa.timestamp("ns"))),
    "list": ("array<bigint>", pa.array([[1, None], None, []], pa.list_(pa.int64()))),
    "map": ("map<string,bigint>", pa.array([[("a", 1)], None, []], pa.map_("string", "int64"))),
    "pair": ("struct<x:bigint>", pa.array([{"x": 1}, None, {}], pa.struct({"x": "int64"}))),
}


@pytest.mark.parametrize("columns", [KEY_COLUMNS, OTHER_COLUMNS], ids=["records", "arrow"])
def test_columns_of_every_type_are_carried(
    service: MaxCompute, columns: dict[str, tuple[str, pa.Array[Any]]]
) -> None:
    table = service.add("photos", {"image": "string"} | {n: c[0] for n, c in columns.items()})
    arrays = {name: array for name, (_, array) in columns.items()}
    table.put(pa.table({"image": ["a", "b", "c"], **arrays}))

    source = source_of(reserved_columns=list(columns))
    rows, fields = read(source), source.describe().keys

    assert list(zip(*(row.keys for row in rows), strict=True)) == [
        tuple(key_values(array)) for array in arrays.values()
    ]
    zoned = {"at": pa.timestamp("ms", "UTC"), "stamp": pa.timestamp("ns", "UTC")}
    expected_types = [zoned.get(name, array.type) for name, array in arrays.items()]
    assert [arrow_field(field).type for field in fields] == expected_types
    assert ("arrow" in service.calls[-1][1]) == (columns is OTHER_COLUMNS)


@pytest.mark.parametrize("columns", ["id,doc", "doc,at"], ids=["records", "arrow"])
def test_json_is_carried_as_its_text(service: MaxCompute, columns: str) -> None:
    types = {**TYPES, "doc": "json", "at": "datetime", "age": "interval_year_month"}
    rows = rows_of_photos(3).append_column("doc", pa.array(['{"a": 1.0}', None, "[1,2]"]))
    rows = rows.append_column("at", pa.array(range(3), pa.timestamp("ms")))
    service.add("photos", types).put(rows.append_column("age", rows["id"]))

    source = source_of(reserved_columns=columns)

    place = columns.split(",").index("doc")
    assert [row.keys[place] for row in read(source)] == ['{"a": 1.0}', None, "[1,2]"]


@pytest.mark.parametrize("others", ["id", "id,at"], ids=["records", "arrow"])
def test_intervals_of_months_are_carried_as_numbers(service: MaxCompute, others: str) -> None:
    types = {**TYPES, "at": "datetime", "old": INTERVAL, "age": INTERVAL}
    rows = rows_of_photos(300).append_column("at", pa.array(range(300), pa.timestamp("ms")))
    months = [None if n % 7 == 0 else n - 150 for n in range(300)]
    for name in ("old", "age"):
        rows = rows.append_column(name, pa.array(months if name == "age" else range(300), "int64"))
    service.add("photos", types).put(rows)
    service.faults.add(Fault("download.data", harm=Harm.CUT, after=100_000, times=2))

    source = source_of(reserved_columns=f"age,{others},old")

    found = [(row.keys[0], row.keys[1], row.keys[-1]) for row in read(source)]
    assert found == list(zip(months, rows["id"].to_pylist(), range(300), strict=True))
    assert arrow_field(source.describe().keys[0]).type == pa.int64()
    assert service.faults.left() == 0


@pytest.mark.parametrize(
    "fault",
    [
        Fault("tunnel", status=503),
        Fault("table", status=500),
        Fault("table", lost=True),
        Fault("download.create", status=502, times=3),
        Fault("download.create", lost=True),
        Fault("download.data", status=429, code="FlowExceeded", times=3),
        Fault("download.data", status=500),
        Fault("download.data", lost=True),
        Fault("download.data", fewer=40, times=2),
        Fault("download.data", seconds=0.2),
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again(service: MaxCompute, fault: Fault) -> None:
    add_photos(service)
    service.faults.add(fault)

    assert plain(read(source_of())) == expected()
    assert service.faults.left() == 0


def test_rows_are_exact_under_faults_of_every_kind(service: MaxCompute) -> None:
    add_photos(service)
    random = Random(7)
    kinds: list[dict[str, Any]] = [
        {"harm": Harm.CUT}, {"harm": Harm.RESET}, {"harm": Harm.FLIP}, {"lost": True},
        {"status": 500}, {"fewer": 1},
    ]  # fmt: skip
    for n in range(20):
        after = random.randrange(9_000)
        service.faults.add(Fault("download.data", skip=2 * n, after=after, **random.choice(kinds)))

    rows = [row for n in range(0, N_ROWS, 5) for row in read(source_of(), (n, n + 5))]

    assert plain(rows) == expected()
    assert service.faults.left() == 0


def test_expired_session_is_renewed_in_mid_range(service: MaxCompute) -> None:
    add_photos(service)
    service.faults.add(Fault("download.data", harm=Harm.CUT, after=50_000))
    with closing(source_of()) as source:
        stream = source.read(0, N_ROWS)
        rows = [next(stream) for _ in range(20)]
        for session in service.downloads.values():
            session.is_expired = True

        rows += stream

    assert plain(rows) == expected()
    assert service.count("download.create") == 2


def test_table_that_changes_while_it_is_read_ends_the_job(service: MaxCompute) -> None:
    add_photos(service)
    service.faults.add(Fault("download.data", harm=Harm.CUT, after=50_000))
    with closing(source_of()) as source:
        stream = source.read(0, N_ROWS)
        next(stream)
        service.tables["photos"].put(rows_of_photos())

        with pytest.raises(SourceError, match="was changed while the job ran"):
            list(stream)


def test_table_that_has_changed_since_the_plan_is_refused(service: MaxCompute) -> None:
    add_photos(service)
    planned = source_of().describe()
    job = Job(**JOB)

    assert plain(read(open_source(job, planned), (0, 5))) == expected((0, 5))
    service.tables["photos"].put(rows_of_photos())
    assert source_of().describe().fingerprint != planned.fingerprint
    with pytest.raises(SourceError, match="was changed while the job ran"):
        read(open_source(job, planned), (0, 5))


def test_patience_ends_with_the_row_that_could_not_be_read(service: MaxCompute) -> None:
    add_photos(service)
    service.faults.add(Fault("download.data", harm=Harm.CUT, after=100, times=10_000))

    with pytest.raises(SourceError, match=r"cannot be read at row 0: .*same command again"):
        read(source_of(stall_timeout_seconds=0.4, max_row_bytes=1024), (0, 2))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"input_table": "odps://other/tables/photos"}, "NoSuchProject: The project other"),
        ({"input_table": "odps://shop/tables/photo"}, "NoSuchTable: The specified table photo"),
        ({"input_table": "odps://shop/tables/photos/pt=1"}, "InvalidPartitionSpec"),
        ({"input_table": "odps://shop/tables/parts/pt=2"}, "NoSuchPartition"),
        ({"input_table": "odps://shop/tables/parts"}, "InvalidPartitionSpec"),
        ({"input_table": "odps://shop/tables/view"}, "not supported on a view"),
        ({"image_col": "images"}, "no column 'images', it has .*; did you mean 'image'"),
        ({"image_col": "id"}, "image_col 'id' of .* is int64, expected string"),
        ({"input_table": "odps://shop/tables/parts/pt=1", "image_col": "pt"}, "is a partition"),
        ({"reserved_columns": "ages"}, "column 'ages' of .* is ARRAY<.*>, which cannot be"),
    ],
    ids=str,
)
def test_bad_table_is_told_at_once(service: MaxCompute, keys: dict[str, Any], message: str) -> None:
    types = {**TYPES, "ages": "array<interval_year_month>"}
    rows = rows_of_photos(3)
    service.add("photos", types).put(rows.append_column("ages", rows["id"]))
    service.add("parts", TYPES, "pt").put(rows, "pt=1")
    service.add("view", TYPES, is_view=True)

    with pytest.raises(SourceError, match=message):
        source_of(**keys).describe()


def test_empty_table_has_no_rows(service: MaxCompute) -> None:
    add_photos(service, 0)

    assert read(source_of()) == []


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("127.0.0.1:1", " cannot be looked at: 127.0.0.1:1: .*refused"),
        ("no-such-host.invalid", ": Unreachable: no-such-host.invalid: there is no such host"),
    ],
)
def test_endpoint_where_nobody_is_is_told(
    service: MaxCompute, monkeypatch: pytest.MonkeyPatch, host: str, message: str
) -> None:
    monkeypatch.setattr(maxcompute, "START_SECONDS", 0.3)
    add_photos(service)

    with pytest.raises(SourceError, match=f"photos{message}"):
        source_of(odps_endpoint=f"http://{host}/api").describe()


def test_endpoint_of_a_web_server_is_told(
    service: MaxCompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maxcompute, "START_SECONDS", 0.3)
    add_photos(service)
    with serving() as web:
        for text in (b"<html><p class=x>Welcome</html>", b"{}", b"[]", b""):
            web.otherwise = Answer(text)
            for key in ("odps_endpoint", "odps_tunnel_endpoint"):
                with pytest.raises(SourceError, match=r"none of MaxCompute's|Unreachable"):
                    source_of(**{key: web.url}).describe()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "wrong", "SignatureNotMatch"),
        ("ALIBABA_CLOUD_ACCESS_KEY_ID", "wrong", "InvalidAccessKeyId"),
        ("ALIBABA_CLOUD_SECURITY_TOKEN", "old", "NoPermission"),
        ("ALIBABA_CLOUD_ACCESS_KEY_ID", "", "ALIBABA_CLOUD_ACCESS_KEY_ID is not; set both"),
        ("ODPS_ENDPOINT", "", "odps_endpoint: required"),
    ],
)
def test_who_may_not_is_told_so_at_once(
    service: MaxCompute, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    add_photos(service)
    monkeypatch.setenv(variable, value)

    with pytest.raises((SourceError, ConfigError, CredentialsError), match=message) as caught:
        source_of().describe()
    assert service.secret not in str(caught.value)


def test_clock_that_is_wrong_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with MaxCompute(skew=3600) as service:
        for name, value in service.environment().items():
            monkeypatch.setenv(name, value)
        add_photos(service)

        with pytest.raises(SourceError, match="RequestTimeTooSkewed"):
            source_of().describe()
        gc.collect()


def test_temporary_keys_and_regions_are_signed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with MaxCompute(token="for a while") as service:
        for name, value in service.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("ODPS_REGION_NAME", "cn-hangzhou")
        add_photos(service)

        rows = read(source_of(odps_tunnel_endpoint=service.tunnel_endpoint))

        assert plain(rows) == expected()
        assert service.count("tunnel") == 0
        gc.collect()


def test_table_from_elsewhere_names_local_files_only_if_it_may(service: MaxCompute) -> None:
    rows = pa.table({"id": [0], "image": ["/etc/passwd"], "name": ["x"]}, SCHEMA)
    service.add("photos", TYPES).put(rows)

    (refused,) = read(source_of(image_type="url"))
    (allowed,) = read(source_of(image_type="url", allow_local_paths=True))

    assert refused.kind == Kind.ERROR and b"allow_local_paths" in bytes(refused.payload)
    assert (allowed.kind, bytes(allowed.payload)) == (Kind.PATH, b"/etc/passwd")


def titles_until_the_end(process: subprocess.Popen[str]) -> set[str]:
    """Return what lists of processes show of a job and its children."""
    titles, root = set(), psutil.Process(process.pid)
    while process.poll() is None:
        with suppress(psutil.Error):
            for child in (root, *root.children(recursive=True)):
                titles.add(" ".join((child.name(), *child.cmdline())))
        time.sleep(0.01)
    return titles


def test_job_reads_a_table_through_faults_and_tells_no_key(
    job: JobFolder, photo_file: Callable[..., bytes]
) -> None:
    image = base64.b64encode(photo_file("coffee", size=(60, 40))).decode()
    rows = pa.table({"id": range(90), "image": [image] * 90, "name": ["x"] * 90}, SCHEMA)
    with MaxCompute() as service:
        service.add("photos", TYPES, "pt").put(rows, "pt=1")
        for harm in Harm:
            service.faults.add(Fault("download.data", harm=harm, after=40_000))
        job.write(input_table=URI + "/pt=1", reserved_columns="id,pt", num_worker=2)

        process = job.start(env=service.environment())
        titles = titles_until_the_end(process)
        told = [*process.communicate(), *titles]
        service.tables["photos"].put(rows, "pt=1")
        changed = job.run(env=service.environment())

    assert process.returncode == 0, told
    assert [(row["id"], row["pt"]) for row in job.rows()] == [(n, "1") for n in range(90)]
    assert all("class" in row["prediction_result"] for row in job.rows())
    assert changed.returncode == 2 and "input.modified" in changed.stderr
    assert any("reader" in title for title in titles)
    told += [changed.stderr, *(file.read_text() for file in job.path.rglob("*.json*"))]
    assert not any(key in text for text in told for key in (service.key_id, service.secret))
