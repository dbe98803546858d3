"""Rows that go up to a table of MaxCompute, through faults, by the real pyodps."""

from __future__ import annotations

import datetime
import gc
import io
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from typing import Any

import pyarrow as pa
import pytest
from maxcompute.fault import Fault, Harm
from maxcompute.server import MaxCompute
from odps.errors import ODPSError
from odps.tunnel.io.reader import ArrowStreamReader

from evmp.errors import SinkError
from evmp.job import Job
from evmp.maxcompute import OUTAGE, Service, persist
from evmp.target.column import check_columns, kinds_of
from evmp.target.upload import Upload, stream
from evmp.value import table_of

SCHEMA = pa.schema({"id": pa.int64(), "prediction_result": pa.string()})
TABLE = table_of("odps://shop/tables/results")
PART = table_of("odps://shop/tables/results/pt=1")
JOB = Job(
    model_path="m",
    model_type="classifier",
    input_table="odps://shop/tables/photos",
    output_oss_file="out.jsonl",
)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[MaxCompute]:
    with MaxCompute() as service:
        for name, value in service.environment().items():
            monkeypatch.setenv(name, value)
        yield service
        gc.collect()  # pyodps' writers hold themselves, and with them their connections


def rows(start: int, stop: int) -> pa.RecordBatch:
    results = [f'{{"class": {n}}}' for n in range(start, stop)]
    return pa.record_batch([pa.array(range(start, stop), pa.int64()), results], schema=SCHEMA)


def upload(
    schema: pa.Schema, *blocks: list[pa.RecordBatch], table: Any = TABLE, seconds: float = 20
) -> list[str]:
    """Make the table, upload, and return the sessions that this took."""
    client, kinds, sessions = Service(JOB, "shop"), kinds_of(schema), list[str]()
    types = {name: kind.name for name, kind in kinds.items()}
    persist(lambda: client.create(table, types, tuple(table.partition), 7), seconds)
    if table.partition:
        persist(lambda: client.create_partition(table), seconds)
    sources = [partial(iter, block) for block in blocks]
    try:
        Upload(client, table, kinds, sources, seconds).run(sessions.append)
    finally:
        client.close()
    return sessions


BLOCKS = [[rows(0, 40), rows(40, 50)], [rows(50, 51)], [rows(51, 300)]]


def ids(service: MaxCompute, partition: str = "") -> list[int]:
    return service.tables["results"].partitions[partition].rows["id"].to_pylist()  # type: ignore[no-any-return]


def test_rows_of_all_blocks_replace_those_of_a_partition(service: MaxCompute) -> None:
    upload(SCHEMA, [rows(500, 600)], table=PART)

    upload(SCHEMA, *BLOCKS, table=PART)

    table = service.tables["results"]
    assert table.types == {"id": "bigint", "prediction_result": "string"}
    assert (table.keys, table.lifecycle) == (("pt",), 7)
    assert ids(service, "pt=1") == list(range(300))
    assert table.partitions["pt=1"].rows["prediction_result"][299].as_py() == '{"class": 299}'
    assert service.count("upload.commit") == 2


def test_block_without_rows_empties_a_table(service: MaxCompute) -> None:
    upload(SCHEMA, [rows(0, 5)])

    upload(SCHEMA, [rows(0, 0)])

    assert ids(service) == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault("job.create", status=503),
        Fault("job.create", lost=True),
        Fault("job.status", status=500),
        Fault("job.status", lost=True),
        Fault("upload.create", status=429, code="FlowExceeded", times=2),
        Fault("upload.create", lost=True),
        Fault("upload.block", status=500, times=3),
        Fault("upload.block", lost=True, times=2),
        Fault("upload.block", harm=Harm.RESET),
        Fault("upload.block", harm=Harm.FLIP, after=300),
        Fault("upload.block", harm=Harm.CUT, after=300),
        Fault("upload.block", status=400, code="DataChecksumError", times=2),
        Fault("upload.reload", status=502),
        Fault("upload.commit", status=503),
        Fault("upload.commit", lost=True),
        Fault("upload.commit", status=409, code="StatusConflict"),
    ],
    ids=str,
)
def test_what_may_pass_is_sent_again_and_no_row_twice(service: MaxCompute, fault: Fault) -> None:
    service.faults.add(fault)

    upload(SCHEMA, *BLOCKS, table=PART)

    assert ids(service, "pt=1") == list(range(300))
    assert service.faults.left() == 0


def test_temporary_keys_and_regions_are_signed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with MaxCompute(token="for a while") as service:
        for name, value in service.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("ODPS_REGION_NAME", "cn-hangzhou")

        upload(SCHEMA, *BLOCKS, table=PART)

        assert ids(service, "pt=1") == list(range(300))
        gc.collect()


@pytest.mark.parametrize("call", ["upload.block", "upload.commit"])
def test_session_that_has_expired_is_renewed(service: MaxCompute, call: str) -> None:
    service.expires.append(call)

    sessions = upload(SCHEMA, *BLOCKS)

    assert ids(service) == list(range(300))
    assert len(sessions) == 2
    assert [session.status for session in service.uploads.values()] == ["EXPIRED", "CLOSED"]


def test_refusal_that_stays_is_told_and_nothing_is_to_be_seen(service: MaxCompute) -> None:
    upload(SCHEMA, [rows(500, 600)])
    service.faults.add(Fault("upload.block", status=403, code="NoPermission", times=100))

    with pytest.raises(ODPSError, match="This was asked for"):
        upload(SCHEMA, *BLOCKS)

    assert ids(service) == list(range(500, 600))


def test_outage_that_stays_is_told_and_nothing_is_to_be_seen(service: MaxCompute) -> None:
    upload(SCHEMA, [rows(500, 600)])
    service.faults.add(Fault("upload.commit", status=503, times=10_000))

    with pytest.raises(OUTAGE, match="status 503"):
        upload(SCHEMA, *BLOCKS, seconds=0.3)

    assert ids(service) == list(range(500, 600))


@pytest.mark.parametrize("n_rows", [0, 1, 5_000, 20_000])
def test_stream_of_a_block_is_what_pyodps_reads(n_rows: int) -> None:
    batches = [rows(start, min(start + 7_000, n_rows)) for start in range(0, n_rows, 7_000)]

    body = b"".join(stream(batches))

    with pa.ipc.open_stream(ArrowStreamReader(io.BytesIO(body), SCHEMA)) as reader:
        assert reader.read_all() == pa.Table.from_batches(batches, SCHEMA)


COLUMNS: dict[str, tuple[pa.Array[Any], str, list[Any]]] = {
    "none": (pa.nulls(2), "string", [None, None]),
    "yes": (pa.array([True, None]), "boolean", [True, None]),
    "tiny": (pa.array([-128, None], pa.int8()), "tinyint", [-128, None]),
    "byte": (pa.array([255, None], pa.uint8()), "smallint", [255, None]),
    "word": (pa.array([65535, None], pa.uint16()), "int", [65535, None]),
    "dword": (pa.array([2**32 - 1, None], pa.uint32()), "bigint", [2**32 - 1, None]),
    "qword": (pa.array([2**64 - 1, None], pa.uint64()), "decimal(20,0)", [2**64 - 1, None]),
    "half": (pa.array([0.5, None], pa.float16()), "float", [0.5, None]),
    "whole": (pa.array([0.1, None], pa.float64()), "double", [0.1, None]),
    "text": (pa.array(["大", None], pa.large_string()), "string", ["大", None]),
    "raw": (pa.array([b"\xff\0", None], pa.binary(2)), "binary", [b"\xff\0", None]),
    "price": (
        pa.array([Decimal("-1.50"), None], pa.decimal128(10, 2)),
        "decimal(10,2)",
        [Decimal("-1.50"), None],
    ),
    "day": (pa.array([1, None], pa.date32()), "date", [datetime.date(1970, 1, 2), None]),
    "at": (
        pa.array([1500, None], pa.timestamp("ms", "UTC")),
        "datetime",
        [datetime.datetime(1970, 1, 1, 0, 0, 1, 500_000), None],
    ),
    "list": (pa.array([[1, None], None]), "array<bigint>", [[1, None], None]),
    "map": (
        pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int8())),
        "map<string,tinyint>",
        [[("a", 1)], None],
    ),
    "Pair": (
        pa.array([{"X": 1, "y": ["a"]}, None]),
        "struct<`x`:bigint,`y`:array<string>>",
        [{"x": 1, "y": ["a"]}, None],
    ),
}


def test_columns_of_every_type_get_theirs(service: MaxCompute) -> None:
    batch = pa.record_batch({name: array for name, (array, _, _) in COLUMNS.items()})

    upload(batch.schema, [batch])

    table = service.tables["results"]
    assert table.types == {name.lower(): kind for name, (_, kind, _) in COLUMNS.items()}
    found = table.partitions[""].rows.to_pydict()
    assert found == {name.lower(): values for name, (_, _, values) in COLUMNS.items()}


def test_times_keep_their_zone_and_their_nanoseconds(service: MaxCompute) -> None:
    batch = pa.record_batch(
        {
            "stamp": pa.array([1], pa.timestamp("ns", "Asia/Shanghai")),
            "local": pa.array([1], pa.timestamp("ns")),
        }
    )

    upload(batch.schema, [batch])

    table = service.tables["results"]
    assert table.types == {"stamp": "timestamp", "local": "timestamp_ntz"}
    rows_there = table.partitions[""].rows
    assert [column.cast(pa.int64()).to_pylist() for column in rows_there.columns] == [[1], [1]]


def test_value_that_has_no_place_is_told_with_its_column(service: MaxCompute) -> None:
    batch = pa.record_batch({"at": pa.array([2**62], pa.timestamp("us", "UTC"))})

    with pytest.raises(SinkError, match="a value of column 'at' cannot be one of MaxCompute's"):
        upload(batch.schema, [batch])


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"a b": pa.int64()}, "'a b' is no name of a column"),
        ({"a` bigint": pa.int64()}, "is no name of a column"),
        ({"a": pa.int64(), "A": pa.int64()}, "'A' is there twice, in other cases"),
        ({"a": pa.time32("s")}, "column 'a' is time32.*has no type for"),
        ({"a": pa.duration("s")}, "has no type for"),
        ({"a": pa.decimal256(50, 2)}, "has no type for"),
        ({"a": pa.list_(pa.struct({"x y": pa.int8()}))}, "has no type for"),
    ],
    ids=str,
)
def test_column_that_cannot_be_one_there_is_refused(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(SinkError, match=message):
        kinds_of(pa.schema(schema))


def test_table_that_is_there_must_have_the_columns(service: MaxCompute) -> None:
    kinds = kinds_of(SCHEMA)
    service.add("fits", {"prediction_result": "varchar(900)", "id": "bigint"}, "pt")
    service.add("differs", {"id": "string", "prediction_result": "string"})
    client = Service(JOB, "shop")

    fits = client.columns(table_of("odps://shop/tables/fits"))
    differs = client.columns(table_of("odps://shop/tables/differs"))

    assert fits is not None and fits.partition == ("pt",)
    check_columns(kinds, fits.kinds, "fits")
    assert differs is not None
    with pytest.raises(SinkError, match=r"columns id string, .*, expected id bigint, prediction"):
        check_columns(kinds, differs.kinds, "differs")
    assert client.columns(TABLE) is None
    client.close()


def test_records_are_taken_up_as_well_as_arrow(service: MaxCompute) -> None:
    client = Service(JOB, "shop")
    client.create(TABLE, {"id": "bigint", "name": "string", "score": "double"}, (), 7)
    session = client.upload(TABLE)
    with session.open_record_writer(3) as writer:
        for n in range(5):
            writer.write(session.new_record([n, None if n == 2 else f"n {n}", n / 3]))
    session.commit([3])
    client.close()

    assert service.tables["results"].partitions[""].rows.to_pylist() == [
        {"id": n, "name": None if n == 2 else f"n {n}", "score": n / 3} for n in range(5)
    ]
