"""Every sink keeps the order and the number of its rows, wherever its writer is killed."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evmp.errors import SinkError
from evmp.job import Job
from evmp.key import KeyField, key_values, table_field
from evmp.sink import Record, Recovered, Sink, max_result_bytes, open_sink, parquet

LINE = (KeyField("image"),)
COLUMNS = (
    table_field("id", pa.int64()),
    table_field("at", pa.timestamp("ns")),
    table_field("note", pa.string()),
)


def job_of(**settings: Any) -> Job:
    default = {"model_path": "m", "model_type": "classifier"}
    return Job(**{**default, **settings})


def sink_of(keys: Sequence[KeyField], **settings: Any) -> Sink:
    return open_sink(job_of(**settings), keys)


def record(index: int, *keys: object, result: object = None, failed: bool = False) -> Record:
    if failed:
        result = {"error_stage": "decode", "error_msg": f'no "image" {{ {index} }}'}
    return Record(index, keys, orjson.dumps(result), failed)


def table_records() -> list[Record]:
    return [
        record(n, n, n * 10**9 + n, None if n == 2 else 'a "note", \n大', result=[n], failed=n == 3)
        for n in range(5)
    ]


def line_records() -> list[Record]:
    lines = ["a.jpg", b'{"image": "b.jpg", "n": 1e3}', '{"image":', b"{}", "大.jpg"]
    return [record(n, line, result={"class": n}, failed=n == 2) for n, line in enumerate(lines)]


def read_lines(out: Path) -> list[Any]:
    return [json.loads(line) for line in out.read_bytes().splitlines()]


def read_text(out: Path) -> list[Any]:
    return out.read_text().splitlines()


def read_parquet(out: Path) -> list[Any]:
    paths = sorted(out.iterdir()) if out.is_dir() else [out]
    table = pa.concat_tables(pq.read_table(path, partitioning=None) for path in paths)
    columns = [key_values(column.combine_chunks()) for column in table.columns]
    return list(zip(*columns, strict=True))


@dataclass(frozen=True)
class Case:
    """A sink, records for it, and how to read its output."""

    keys: Sequence[KeyField]
    output: dict[str, str]
    records: list[Record]
    rows_in: Callable[[Path], list[Any]]

    def open(self) -> Sink:
        source = {"input_oss_file": "in"} if self.keys is LINE else {"input_table": "in"}
        reserved = [key.name for key in self.keys if not key.is_line]
        return sink_of(self.keys, **source, **self.output, reserved_columns=reserved)


CASES = {
    "jsonl_of_table": Case(COLUMNS, {"output_oss_file": "o.jsonl"}, table_records(), read_lines),
    "jsonl_of_list": Case(LINE, {"output_oss_file": "o.jsonl"}, line_records(), read_lines),
    "text_of_table": Case(COLUMNS, {"output_oss_file": "o.txt"}, table_records(), read_text),
    "text_of_list": Case(LINE, {"output_oss_file": "o.txt"}, line_records(), read_text),
    "parquet_file": Case(COLUMNS, {"output_oss_file": "o.parquet"}, table_records(), read_parquet),
    "parquet_of_list": Case(LINE, {"output_oss_file": "o.parquet"}, line_records(), read_parquet),
    "table": Case(COLUMNS, {"output_table": "o/pt=1"}, table_records(), read_parquet),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def stage(sink: Sink, path: Path, *appends: Sequence[Record]) -> Path:
    for records in appends:
        with open(path, "ab", buffering=0) as file:
            sink.append(file, records)
    return path


def content_of(out: Path) -> list[tuple[str, bytes]]:
    paths = sorted(out.iterdir()) if out.is_dir() else [out]
    return [(path.name if out.is_dir() else "", path.read_bytes()) for path in paths]


def test_rows_are_merged_in_order(case: Case, tmp_path: Path) -> None:
    sink, records = case.open(), case.records
    first = stage(sink, tmp_path / "1", records[:1], records[1:3])
    second = stage(sink, tmp_path / "2", records[3:])

    n_rows = sink.merge(iter([first, second]), tmp_path / "out")

    assert n_rows == len(case.rows_in(tmp_path / "out")) == len(records)
    for at, row in enumerate(case.rows_in(tmp_path / "out")):
        alone = stage(sink, tmp_path / f"row-{at}", [records[at]])
        sink.merge([alone], tmp_path / f"alone-{at}")
        assert case.rows_in(tmp_path / f"alone-{at}") == [row]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_result_does_not_depend_on_blocks_and_batches(
    case: Case, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("stages")
    sink, records = case.open(), case.records * 3
    whole = stage(sink, folder / "whole", records)
    cuts = [*sorted(data.draw(st.sets(st.integers(0, len(records))))), len(records)]
    paths, start = [], 0
    for at, cut in enumerate(cuts):
        middle = data.draw(st.integers(start, cut))
        paths.append(stage(sink, folder / f"{at}", records[start:middle], records[middle:cut]))
        start = cut

    sink.merge([whole], folder / "a")
    sink.merge(paths, folder / "b")

    assert content_of(folder / "a") == content_of(folder / "b")


def test_writer_goes_on_wherever_the_one_before_was_killed(case: Case, tmp_path: Path) -> None:
    sink, records = case.open(), case.records
    whole = stage(sink, tmp_path / "whole", *([record] for record in records)).read_bytes()

    for size in range(len(whole) + 1):
        path = tmp_path / "torn"
        path.write_bytes(whole[:size])
        recovered = sink.recover(path)
        assert recovered.n_failed == sum(record.failed for record in records[: recovered.n_rows])
        stage(sink, path, *([record] for record in records[recovered.n_rows :]))
        assert path.read_bytes() == whole


def test_torn_stage_file_is_never_merged(case: Case, tmp_path: Path) -> None:
    sink, records = case.open(), case.records
    path, ends = tmp_path / "stage", {0}
    for record in records:
        ends.add(stage(sink, path, [record]).stat().st_size)
    whole = path.read_bytes()

    for size in set(range(0, len(whole), 7)) - ends:
        path.write_bytes(whole[:size])
        with pytest.raises(SinkError, match=f"stage file {path} "):
            sink.merge([path], tmp_path / f"out-{size}")


def test_killed_writer_leaves_only_whole_records_to_recover(case: Case, tmp_path: Path) -> None:
    sink, path = case.open(), tmp_path / "stage"
    path.touch()
    if (pid := os.fork()) == 0:
        with open(path, "ab", buffering=0) as file:
            while True:
                sink.append(file, case.records)
    deadline = time.monotonic() + 20
    while path.stat().st_size < 1 << 18 and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

    n_rows, n_failed = sink.recover(path)

    assert n_rows > 100
    assert n_failed == n_rows // 5 + (n_rows % 5 > case.records.index(failed_of(case)))
    assert sink.merge([path], tmp_path / "out") == n_rows


def failed_of(case: Case) -> Record:
    return next(record for record in case.records if record.failed)


def test_recovery_of_a_whole_or_missing_stage_changes_nothing(case: Case, tmp_path: Path) -> None:
    sink = case.open()
    path = stage(sink, tmp_path / "stage", case.records)
    content = path.read_bytes()

    assert sink.recover(path) == Recovered(5, 1)
    assert path.read_bytes() == content
    assert sink.recover(tmp_path / "missing") == Recovered(0, 0)
    assert not (tmp_path / "missing").exists()


def test_no_stage_files_make_an_empty_result(case: Case, tmp_path: Path) -> None:
    assert case.open().merge([], tmp_path / "out") == 0
    assert case.rows_in(tmp_path / "out") == []


def test_merge_overwrites_nothing(case: Case, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    with pytest.raises(SinkError, match="out: File exists"):
        case.open().merge([], tmp_path / "out")


def test_missing_stage_file_is_an_error(case: Case, tmp_path: Path) -> None:
    with pytest.raises(SinkError, match=r"cannot read .*gone: No such file"):
        case.open().merge([tmp_path / "gone"], tmp_path / "out")


def test_full_disk_is_an_error_with_a_remedy(case: Case) -> None:
    message = r"cannot write /dev/full: No space left on device; .* make room"

    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(SinkError, match=message):
        case.open().append(file, case.records)


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_merge_that_finds_no_room_is_an_error(case: Case, tmp_path: Path) -> None:
    sink = case.open()
    path = stage(sink, tmp_path / "stage", case.records)

    with file_size_limit(100), pytest.raises(SinkError, match=r"cannot write .*File too large"):
        sink.merge([path], tmp_path / "out")


class ShortFile(io.BytesIO):
    """Takes at most seven bytes at once, as a pipe or a full disk may."""

    name = "short"

    def write(self, data: Any) -> int:
        return super().write(data[:7])


def test_short_writes_are_carried_on(case: Case, tmp_path: Path) -> None:
    sink, file = case.open(), ShortFile()

    sink.append(file, case.records)

    assert file.getvalue() == stage(sink, tmp_path / "stage", case.records).read_bytes()


# Lines


def lines_of(keys: Sequence[KeyField], records: Sequence[Record], **settings: Any) -> list[bytes]:
    file = ShortFile()
    sink_of(keys, **settings).append(file, records)
    return file.getvalue().splitlines()


def test_json_line_keeps_its_text_and_gains_the_result() -> None:
    samples = [b'{"z":1,"a":1.50,"a":2}', b"{ }", b'{"q":"\\u0041"}']
    records = [record(n, sample, result=n) for n, sample in enumerate(samples)]

    lines = lines_of(LINE, records, input_oss_file="in", output_oss_file="o.jsonl")

    assert lines == [
        b'{"z":1,"a":1.50,"a":2,"prediction_result":0}',
        b'{ "prediction_result":1}',
        b'{"q":"\\u0041","prediction_result":2}',
    ]


@pytest.mark.parametrize("name", ["prediction_result", "\\u0070rediction_result"])
def test_result_replaces_a_member_of_its_name(name: str) -> None:
    sample = f'{{"{name}": [1], "n": 1}}'.encode()

    lines = lines_of(LINE, [record(0, sample)], input_oss_file="in", output_oss_file="o.jsonl")

    assert lines == [b'{"n":1,"prediction_result":null}']


def test_values_that_json_lacks_become_text() -> None:
    types = {"d": pa.decimal128(5, 2), "b": pa.binary(), "f": pa.float64(), "t": pa.timestamp("s")}
    keys = [table_field(name, dtype) for name, dtype in types.items()]
    values = (Decimal("1.50"), b"\xff", float("nan"), 0)
    settings = {"input_table": "in", "output_oss_file": "o.jsonl", "reserved_columns": "d,b,f,t"}

    [line] = lines_of(keys, [record(0, *values)], **settings)

    assert json.loads(line) == {
        "d": "1.50",
        "b": "/w==",
        "f": None,
        "t": "1970-01-01T00:00:00",
        "prediction_result": None,
    }


def test_text_line_begins_with_the_input() -> None:
    records = [record(0, "a, b.jpg"), record(1, b'{"image": "b"}', result={"class": 1})]

    lines = lines_of(LINE, records, input_oss_file="in", output_oss_file="o.txt")

    assert lines == [b"a, b.jpg, null", b'{"image": "b"}, {"class":1}']


@pytest.mark.parametrize("reserved", ["", "id", "url,id", "id,image"])
def test_text_line_of_a_url_table_begins_with_the_url(reserved: str) -> None:
    implied = {"": "image", "id": "image", "url,id": "", "id,image": "url"}[reserved]
    names = [name for name in [implied, *reserved.split(",")] if name]
    keys = [table_field(name, pa.string()) for name in names]
    url = {"id": "7", "image": "u\n" if implied == "image" else "i", "url": "u\n"}
    settings = {"input_table": "in", "image_type": "url", "image_col": "url"}

    lines = lines_of(
        keys,
        [record(0, *(url[name] for name in names))],
        **settings,
        output_oss_file="o.txt",
        reserved_columns=reserved,
    )

    assert lines == [b"u\\n, null"]


def test_text_line_of_base64_has_the_reserved_values_or_the_row_number() -> None:
    settings = {"input_table": "in", "output_oss_file": "o.txt"}

    [named] = lines_of(COLUMNS, [record(9, 1, 0, None)], **settings, reserved_columns="id,at,note")
    [bare] = lines_of((), [record(9)], **settings)

    assert named == b"1,1970-01-01T00:00:00.000000000,null, null"
    assert bare == b"9, null"


def test_error_within_a_result_is_no_failed_row(tmp_path: Path) -> None:
    inner = {"error_stage": "s", "error_msg": "m"}
    for name in ("o.jsonl", "o.txt"):
        sink = sink_of(LINE, input_oss_file="in", output_oss_file=name)
        records = [record(0, "a", result=[inner]), record(1, "b", result={"last": inner})]

        path = stage(sink, tmp_path / name, records)

        assert sink.recover(path) == Recovered(2, 0)


# Tables


def test_table_holds_the_reserved_columns_with_their_types(tmp_path: Path) -> None:
    case = CASES["table"]
    sink = case.open()

    sink.merge([stage(sink, tmp_path / "stage", case.records)], tmp_path / "out")

    table = pq.read_table(tmp_path / "out/part-00000.parquet")
    names = ["id", "at", "note", "prediction_result"]
    types = [pa.int64(), pa.timestamp("ns"), pa.string(), pa.string()]
    assert (table.schema.names, table.schema.types) == (names, types)
    assert json.loads(table["prediction_result"][1].as_py()) == [1]


def test_table_leaves_the_url_out_and_a_file_keeps_it(tmp_path: Path) -> None:
    keys = [table_field("image", pa.string()), table_field("id", pa.int64())]
    settings = {"input_table": "in", "image_type": "url", "image_col": "url"}
    for output, names in (("table", ["id"]), ("oss_file", ["image", "id"])):
        sink = sink_of(keys, **settings, reserved_columns="id", **{f"output_{output}": "o.parquet"})

        sink.merge(
            [stage(sink, tmp_path / output, [record(0, "u", 1)])], tmp_path / f"{output}.out"
        )

        schema = pq.read_schema(tmp_path / f"{output}.out")
        assert schema.names == [*names, "prediction_result"]


def test_row_groups_files_and_frames_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "FRAME_BYTES", 300)
    monkeypatch.setattr(parquet, "GROUP_BYTES", 500)
    monkeypatch.setattr(parquet, "GROUP_ROWS", 4)
    monkeypatch.setattr(parquet, "PART_BYTES", 1000)
    sizes = [1, 1, 1, 1, 1, 100, 100, 100, 100, 100, 2000, 1, 2000, 497, 1, *[0] * 30]
    keys = [table_field("text", pa.string())]
    records = [record(n, "x" * size, result=0) for n, size in enumerate(sizes)]
    sink = sink_of(keys, input_table="in", output_table="o", reserved_columns="text")

    n_rows = sink.merge([stage(sink, tmp_path / "stage", records)], tmp_path / "out")

    assert n_rows == len(read_parquet(tmp_path / "out")) == len(sizes)
    parts = [pq.ParquetFile(path).metadata for path in sorted((tmp_path / "out").iterdir())]
    groups = [part.row_group(n).num_rows for part in parts for n in range(part.num_row_groups)]
    assert len(parts) > 1
    assert groups == [4, 4, 2, 1, 1, 1, 2, *[4] * 7, 2]


def test_stage_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    path = stage(CASES["table"].open(), tmp_path / "stage", CASES["table"].records)
    other = sink_of(COLUMNS, input_table="in", output_table="o", reserved_columns="id,at")

    with pytest.raises(SinkError, match="has other columns"):
        other.recover(path)
    with pytest.raises(SinkError, match="has other columns"):
        other.merge([path], tmp_path / "out")


def test_damaged_stage_file_is_refused(tmp_path: Path) -> None:
    sink = CASES["table"].open()
    path = stage(sink, tmp_path / "stage", CASES["table"].records)
    with open(path, "r+b") as file:
        file.seek(40)
        file.write(b"\xff" * 40)

    with pytest.raises(SinkError, match="is damaged at byte 24"):
        sink.merge([path], tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "settings", "message"),
    [
        (LINE, {"result_column": "image", "input_oss_file": "in"}, "result_column: 'image' is"),
        (COLUMNS, {"output_table": "o/id=1", "reserved_columns": "id"}, "'id' is a partition of"),
        (COLUMNS, {"output_table": "o/p=1", "result_column": "p"}, "'p' is a partition of"),
    ],
)
def test_two_output_columns_of_one_name_are_an_error(
    keys: Sequence[KeyField], settings: dict[str, str], message: str
) -> None:
    default = {} if "input_oss_file" in settings else {"input_table": "in"}

    with pytest.raises(SinkError, match=message):
        sink_of(keys, **{"output_table": "o", **default, **settings})


def test_cell_may_be_as_long_as_memory_bears(tmp_path: Path) -> None:
    sink = sink_of(LINE, input_oss_file="in.txt", output_oss_file="out.parquet")
    long = b'"' + b"x" * parquet.FRAME_BYTES + b'"'

    staged = stage(sink, tmp_path / "0", [Record(0, ("a",), memoryview(long), False)])
    sink.merge([staged], tmp_path / "out.parquet")

    assert sink.recover(staged) == Recovered(1, 0)
    assert read_parquet(tmp_path / "out.parquet") == [("a", long.decode())]


@pytest.mark.parametrize(
    ("output", "n_bytes"),
    [
        ({"output_oss_file": "out.parquet"}, 1 << 30),
        ({"output_table": "out"}, 1 << 30),
        ({"output_table": "odps://shop/tables/out"}, 8 << 20),
        ({"output_oss_file": "out.jsonl"}, sys.maxsize),
    ],
)
def test_results_are_bounded_where_a_cell_must_hold_them(
    output: dict[str, str], n_bytes: int
) -> None:
    assert max_result_bytes(job_of(input_table="in.parquet", **output)) == n_bytes
