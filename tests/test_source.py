"""Every source hands out each row of its input once, in order, whatever is wrong with it."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evmp.errors import SourceError
from evmp.job import Job
from evmp.key import arrow_field
from evmp.source import Kind, Row, Source, open_source
from evmp.source.lineindex import LineIndex

MAX_ROW_BYTES = 1024
N_ROWS = 150

Cells = list[tuple[Kind, bytes, tuple[object, ...]]]


def source_of(**keys: Any) -> Source:
    settings = {"model_path": "m", "model_type": "classifier", "output_oss_file": "out.jsonl"}
    return open_source(Job(**{**settings, "max_row_bytes": MAX_ROW_BYTES, **keys}))


def rows_of(source: Source, *ranges: tuple[int, int]) -> list[Row]:
    with closing(source):
        ranges = ranges or ((0, source.describe().n_rows),)
        return [row for start, stop in ranges for row in source.read(start, stop)]


def cells_of(rows: list[Row]) -> Cells:
    return [(row.kind, bytes(row.payload), row.keys) for row in rows]


def message_of(row: Row) -> str:
    assert row.kind == Kind.ERROR
    return str(row.payload, "utf-8")


def texts(start: int, stop: int) -> list[str | None]:
    """Cells of all lengths; every seventh is null, every eleventh empty."""
    return [
        None if n % 7 == 3 else "" if n % 11 == 5 else f"{n:04d}" * (n % 50 + 1)
        for n in range(start, stop)
    ]


def expected_cell(text: str | None) -> tuple[Kind, bytes]:
    if not text:
        return Kind.ERROR, f"column 'image' is {'null' if text is None else 'empty'}".encode()
    return Kind.BASE64, text.encode()


def write(path: Path, image: pa.Array[Any], ids: list[int], group: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"unused": [0.5] * len(ids), "image": image, "id": pa.array(ids, pa.int64())})
    pq.write_table(table, path, row_group_size=group, write_batch_size=4, data_page_size=64)


@dataclass(frozen=True)
class Case:
    """A source and what it must give."""

    keys: dict[str, Any]
    expected: Cells
    files: list[Path]

    def open(self) -> Source:
        return source_of(**self.keys)


def table_of(dtype: pa.DataType, *, encode: bool = False, **keys: Any) -> Callable[[Path], Case]:
    def build(folder: Path) -> Case:
        path = folder / "table.parquet"
        image = pa.array(texts(0, N_ROWS), pa.string()).cast(dtype)
        write(path, image.dictionary_encode() if encode else image, list(range(N_ROWS)))
        cells = [(*expected_cell(text), (n,)) for n, text in enumerate(texts(0, N_ROWS))]
        return Case({"input_table": str(path), "reserved_columns": "id"}, cells, [path])

    return build


def partitioned_table(folder: Path) -> Case:
    """Three files in two partitions, one of them without rows, and what must be skipped."""
    root, files, cells = folder / "table", [], []
    places = ["pt=a%2Fb/0.parquet", "pt=a%2Fb/1.parquet", "pt=b/_sub=1/part"]
    for place, (start, stop) in zip(places, [(0, 70), (70, 70), (70, N_ROWS)], strict=True):
        write(root / place, pa.array(texts(start, stop), pa.string()), list(range(start, stop)))
        files.append(root / place)
        cells += [
            (*expected_cell(text), (place[3].replace("a", "a/b"), start + n))
            for n, text in enumerate(texts(start, stop))
        ]
    for name in ("_SUCCESS", ".part.crc", "pt=b/_temporary/x"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("no Parquet")
    return Case({"input_table": str(root), "reserved_columns": "pt,id"}, cells, files)


def url_table(folder: Path) -> Case:
    path = folder / "urls.parquet"
    urls = ["a.jpg", " /b/c.png\n", "https://host/x.jpg", "file:///d/%20.gif", None]
    pq.write_table(pa.table({"url": urls, "id": range(5)}), path)
    cells: Cells = [
        (Kind.PATH, b"a.jpg", ("a.jpg", 0)),
        (Kind.PATH, b"/b/c.png", (" /b/c.png\n", 1)),
        (Kind.URL, b"https://host/x.jpg", ("https://host/x.jpg", 2)),
        (Kind.PATH, b"/d/ .gif", ("file:///d/%20.gif", 3)),
        (Kind.ERROR, b"column 'url' is null", (None, 4)),
    ]
    keys = {"image_col": "url", "image_type": "url", "reserved_columns": "id"}
    return Case({"input_table": str(path), **keys}, cells, [path])


def file_list(folder: Path) -> Case:
    path = folder / "list.txt"
    lines = [f"/images/{n}.jpg" if n % 2 else f"{n}.jpg" for n in range(N_ROWS)]
    path.write_text("\n".join(lines))
    cells: Cells = [(Kind.PATH, line.encode(), (line,)) for line in lines]
    return Case({"input_oss_file": str(path)}, cells, [path])


def mixed_list(folder: Path) -> Case:
    """A byte order mark, CRLF, blank lines, JSON and paths, bad lines, no last line end."""
    path = folder / "mixed.txt"
    long = b"x" * (MAX_ROW_BYTES + 1)
    path.write_bytes(
        b"\xef\xbb\xbf\r\n  \t \r\n a.jpg \r\n\n"
        b'{"image": "b.jpg",\r "n": 1}\r\n\x0c\n{"image": \n' + b"\xe5\xa4\xa7.jpg\n\xff.jpg\n"
        b"https://host/x.jpg\n" + long + b"\n" + b" " * 5000 + b"\n" + b"c\0.jpg\n{}"
    )
    sample = b'{"image": "b.jpg",  "n": 1}'
    cells: Cells = [
        (Kind.PATH, b"a.jpg", ("a.jpg",)),
        (Kind.SAMPLE, sample, (sample,)),
        (Kind.ERROR, NO_JSON, ('{"image":',)),
        (Kind.PATH, "大.jpg".encode(), ("大.jpg",)),
        (Kind.ERROR, b"line is not UTF-8: byte 1 is 0xff", ("\ufffd.jpg",)),
        (Kind.URL, b"https://host/x.jpg", ("https://host/x.jpg",)),
        (Kind.ERROR, TOO_LONG, ("x" * 256 + "...",)),
        (Kind.ERROR, rb"'c\x00.jpg' holds a NUL character, expected a path", ("c\0.jpg",)),
        (Kind.SAMPLE, b"{}", (b"{}",)),
    ]
    return Case({"input_oss_file": str(path)}, cells, [path])


NO_JSON = (
    b"line starts with { but is no JSON object: unexpected end of data: line 1 column 10 (char 9)"
)
TOO_LONG = b"line of 1025 bytes is longer than max_row_bytes, 1024; raise max_row_bytes"

CASES: dict[str, Callable[[Path], Case]] = {
    "string": table_of(pa.string()),
    "large_string": table_of(pa.large_string()),
    "string_view": table_of(pa.string_view()),
    "binary": table_of(pa.binary()),
    "large_binary": table_of(pa.large_binary()),
    "binary_view": table_of(pa.binary_view()),
    "dictionary": table_of(pa.string(), encode=True),
    "partitions": partitioned_table,
    "urls": url_table,
    "list": file_list,
    "mixed_list": mixed_list,
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return CASES[request.param](tmp_path)


def test_every_row_comes_once_and_in_order(case: Case) -> None:
    rows = rows_of(case.open())

    assert [row.index for row in rows] == list(range(len(case.expected)))
    assert cells_of(rows) == case.expected


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_do_not_depend_on_how_they_are_asked_for(case: Case, data: st.DataObject) -> None:
    row = st.integers(0, len(case.expected))
    ranges = data.draw(st.lists(st.tuples(row, row).map(sorted).map(tuple), max_size=6))

    rows = rows_of(case.open(), (0, 0), *ranges)

    assert [row.index for row in rows] == [n for start, stop in ranges for n in range(start, stop)]
    assert cells_of(rows) == [cell for start, stop in ranges for cell in case.expected[start:stop]]


def test_read_goes_on_after_one_that_was_given_up(case: Case) -> None:
    with closing(case.open()) as source:
        next(source.read(0, len(case.expected)))

        rows = list(source.read(1, len(case.expected)))

    assert cells_of(rows) == case.expected[1:]


def test_rows_outlive_the_batch_they_came_in(case: Case) -> None:
    with closing(case.open()) as source:
        rows = list(source.read(0, len(case.expected)))

    assert cells_of(rows) == case.expected


def test_source_that_was_described_can_be_read_after_a_fork(case: Case) -> None:
    source = case.open()
    source.describe()
    receiver, sender = os.pipe()
    if (pid := os.fork()) == 0:
        with open(sender, "wb") as pipe:
            pickle.dump(cells_of(list(source.read(0, len(case.expected)))), pipe)
        os._exit(0)
    os.close(sender)

    with open(receiver, "rb") as pipe:
        cells = pickle.load(pipe)

    os.waitpid(pid, 0)
    assert cells == case.expected


def test_fingerprint_names_the_files_and_changes_with_them(case: Case) -> None:
    info = case.open().describe()
    files = json.loads(json.dumps(info.fingerprint))["files"]
    os.utime(case.files[0], ns=(1, 1))

    assert [file["path"] for file in files] == [str(path) for path in case.files]
    assert sum(file["rows"] for file in files) == info.n_rows == len(case.expected)
    assert [file["size"] for file in files] == [path.stat().st_size for path in case.files]
    assert case.open().describe().fingerprint != info.fingerprint


def test_keys_fit_their_fields(case: Case) -> None:
    fields = pickle.loads(pickle.dumps(case.open().describe().keys))

    for place, field in enumerate(fields):
        values = [keys[place] for _, _, keys in case.expected]
        column = pa.array(values, arrow_field(field).type)
        assert field.is_line or column.to_pylist() == values


def test_rows_outside_the_input_are_an_error(case: Case) -> None:
    end = len(case.expected)

    with pytest.raises(SourceError, match=f"row {end}"):
        rows_of(case.open(), (0, end), (end, end + 1))


def test_source_that_is_gone_is_an_error(case: Case) -> None:
    key = "input_table" if "input_table" in case.keys else "input_oss_file"
    keys = {**case.keys, key: case.keys[key] + "x"}

    with pytest.raises(
        SourceError, match=f"{key}: .*x does not exist; did you mean {case.keys[key]}"
    ):
        source_of(**keys).describe()


# Tables


def table(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def error_of(**keys: Any) -> str:
    with pytest.raises(SourceError) as caught:
        source_of(**keys).describe()
    return str(caught.value)


def test_empty_table_has_no_rows(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", image=pa.array([], pa.string()))

    assert rows_of(source_of(input_table=str(path))) == []


def test_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", images=["a"], id=[1])

    assert error_of(input_table=str(path)) == (
        f"input_table: {path} has no column 'image', it has 'images', 'id'; did you mean 'images'"
    )


def test_image_column_of_numbers_is_an_error(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", image=[1])

    assert "is int64, expected string or binary with Base64 text" in error_of(input_table=str(path))


def test_column_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    doubled = pa.table([["a"], ["b"]], names=["image", "image"])
    pq.write_table(doubled, tmp_path / "t.parquet")

    assert "2 columns 'image'" in error_of(input_table=str(tmp_path / "t.parquet"))


@pytest.mark.parametrize("size", [0, 3, 100, 400])
def test_truncated_file_is_an_error(tmp_path: Path, size: int) -> None:
    path = table(tmp_path / "t.parquet", image=["a" * 100])
    os.truncate(path, size)

    assert f"{path} is not a Parquet file or is damaged" in error_of(input_table=str(path))


def test_empty_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "_SUCCESS").touch()

    assert "has no data files" in error_of(input_table=str(tmp_path))


def test_files_of_other_types_in_one_table_are_an_error(tmp_path: Path) -> None:
    table(tmp_path / "t/a.parquet", image=["a"], id=[1])
    other = table(tmp_path / "t/b.parquet", image=["a"], id=["1"])

    message = error_of(input_table=str(tmp_path / "t"), reserved_columns="id")

    assert f"column 'id' is string in {other}, but int64 in the files before" in message


def test_file_without_values_in_a_column_fits_the_others(tmp_path: Path) -> None:
    nothing = pa.nulls(1)
    table(tmp_path / "t/a.parquet", image=nothing, id=nothing)
    table(tmp_path / "t/b.parquet", image=["a"], id=[1])
    source = source_of(input_table=str(tmp_path / "t"), reserved_columns="id")

    rows = rows_of(source)

    assert [(row.kind, row.keys) for row in rows] == [(Kind.ERROR, (None,)), (Kind.BASE64, (1,))]
    assert arrow_field(source.describe().keys[0]).type == pa.int64()


def test_columns_that_are_not_needed_may_differ(tmp_path: Path) -> None:
    table(tmp_path / "t/a.parquet", image=["a"], other=[1])
    table(tmp_path / "t/b.parquet", other=["1"], image=["b"])

    rows = rows_of(source_of(input_table=str(tmp_path / "t")))

    assert [bytes(row.payload) for row in rows] == [b"a", b"b"]


def test_partition_in_the_tables_own_path_is_a_column(tmp_path: Path) -> None:
    table(tmp_path / "run=1/t/pt=a/hour=__HIVE_DEFAULT_PARTITION__/0.parquet", image=["a"])
    path = str(tmp_path / "run=1/t/pt=a")

    rows = rows_of(source_of(input_table=path, reserved_columns="pt,hour"))

    assert [row.keys for row in rows] == [("a", None)]
    assert "no column 'run'" in error_of(input_table=path, reserved_columns="run")


def test_oversized_cell_is_an_error_row(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", image=["a" * MAX_ROW_BYTES, "a" * (MAX_ROW_BYTES + 1)])

    fits, exceeds = rows_of(source_of(input_table=str(path)))

    assert fits.kind == Kind.BASE64
    assert "holds 1025 bytes, more than max_row_bytes, 1024" in message_of(exceeds)


def test_reserved_image_column_is_a_key(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", image=["a"])

    [row] = rows_of(source_of(input_table=str(path), reserved_columns="image"))

    assert (row.payload, row.keys) == (b"a", ("a",))


@pytest.mark.parametrize(
    ("reserved", "keys"),
    [
        ("", {"image": "u.jpg"}),
        ("id", {"image": "u.jpg", "id": 7}),
        ("url", {"url": "u.jpg"}),
        ("image", {"url": "u.jpg", "image": "thumbnail"}),
    ],
)
def test_url_is_a_key_under_a_free_name(
    tmp_path: Path, reserved: str, keys: dict[str, object]
) -> None:
    path = table(tmp_path / "t.parquet", url=["u.jpg"], image=["thumbnail"], id=[7])
    names = {"image_col": "url", "image_type": "url", "reserved_columns": reserved}

    source = source_of(input_table=str(path), **names)

    [row] = rows_of(source)
    fields = source.describe().keys
    assert dict(zip([field.name for field in fields], row.keys, strict=True)) == keys


def test_cell_that_is_not_utf8_is_an_error_row_of_a_url_table(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", image=[b"\xff"])

    [row] = rows_of(source_of(input_table=str(path), image_type="url"))

    assert message_of(row) == "column 'image' is not UTF-8 at byte 0"
    assert row.keys == ("\ufffd",)


def damaged_groups(path: Path, *numbers: int) -> Path:
    """Write a table of four row groups of ten rows, and overwrite the image data of some."""
    write(path, pa.array([f"{n:04d}" * 50 for n in range(40)]), list(range(40)), group=10)
    with pq.ParquetFile(path) as file:
        columns = [file.metadata.row_group(number).column(1) for number in numbers]
    with open(path, "r+b") as raw:
        for column in columns:
            raw.seek(column.dictionary_page_offset or column.data_page_offset)
            raw.write(b"\xff" * column.total_compressed_size)
    return path


def test_read_in_the_middle_leaves_the_row_groups_before_alone(tmp_path: Path) -> None:
    path = damaged_groups(tmp_path / "t.parquet", 0, 1)

    rows = rows_of(source_of(input_table=str(path)), (25, 40))

    assert [row.index for row in rows] == list(range(25, 40))


def test_damaged_row_group_ends_the_job_and_is_named(tmp_path: Path) -> None:
    path = damaged_groups(tmp_path / "t.parquet", 2)
    source, indices = source_of(input_table=str(path)), []

    with closing(source), pytest.raises(SourceError) as caught:
        indices += [row.index for row in source.read(0, 20)]
        next(source.read(20, 40))

    assert indices == list(range(20))
    assert f"{path}: row group 2, rows 20 to 29 of the table, cannot be read" in str(caught.value)


def test_file_that_changes_between_two_reads_is_an_error(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", image=["a"])
    source = source_of(input_table=str(path))
    source.describe()
    table(path, image=["bb"])

    with pytest.raises(SourceError, match="was changed while the job ran"):
        rows_of(source, (0, 1))


MEMORY_SCRIPT = """
import os, sys, pyarrow as pa, pyarrow.parquet
from evmp.job import Job
from evmp.source import open_source
source = open_source(Job(model_path="m", model_type="classifier", output_oss_file="o",
                         input_table=sys.argv[1]))
threads = len(os.listdir("/proc/self/task"))
n_bytes = sum(len(row.payload) for row in source.read(0, source.describe().n_rows))
print(n_bytes, pa.default_memory_pool().max_memory(), len(os.listdir("/proc/self/task")) - threads)
"""


def test_memory_is_a_few_pages_and_reading_starts_no_thread(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    image = pa.array([f"{n:08d}" * 8192 for n in range(1024)])
    options = {"use_dictionary": False, "write_batch_size": 8, "compression": "none"}
    pq.write_table(pa.table({"image": image}), path, **options)
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(path)]

    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)

    n_bytes, peak_bytes, n_threads = map(int, done.stdout.split())
    assert n_bytes == 1024 * 65536
    assert peak_bytes < 8 << 20
    assert n_threads == 0


# File lists


def list_of(path: Path, content: bytes) -> Source:
    path.write_bytes(content)
    return source_of(input_oss_file=str(path))


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", b" \r\n\t\n", b"\x0b" * 2000])
def test_list_of_blank_lines_has_no_rows(tmp_path: Path, content: bytes) -> None:
    source = list_of(tmp_path / "list", content)

    assert source.describe().n_rows == 0
    assert rows_of(source) == []


def test_directory_is_no_file_list(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is a directory, expected a text file"):
        source_of(input_oss_file=str(tmp_path)).describe()


def test_list_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    source = list_of(tmp_path / "list", b"a\n" * 100_000)
    assert source.describe().n_rows == 100_000
    os.truncate(tmp_path / "list", 2)

    with pytest.raises(SourceError, match="ends before row 1: it was changed"):
        rows_of(source, (0, 2))


def test_line_of_many_megabytes_is_never_held(tmp_path: Path) -> None:
    with open(tmp_path / "list", "wb") as file:
        file.write(b"a.jpg\n{")
        file.seek(64 << 20, os.SEEK_CUR)
        file.write(b"}\nb.jpg\n")

    rows = rows_of(source_of(input_oss_file=str(tmp_path / "list")))

    assert [row.kind for row in rows] == [Kind.PATH, Kind.ERROR, Kind.PATH]
    assert message_of(rows[1]).startswith(f"line of {(64 << 20) + 3} bytes is longer")
    assert len(str(rows[1].keys[0])) < 1000


def naive_offsets(content: bytes) -> Iterator[int]:
    """Yield where the lines that are not blank start; the oracle."""
    offset = 3 if content.startswith(b"\xef\xbb\xbf") else 0
    for line in content[offset:].split(b"\n"):
        if line.strip():
            yield offset
        offset += len(line) + 1


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.sampled_from([b"a", b"\n", b"\r\n", b" ", b"\xef\xbb\xbf", b"{}", b"\0"])),
    chunk_bytes=st.integers(1, 9),
    row=st.integers(0, 9),
)
def test_rows_are_found_whatever_the_chunks(
    tmp_path: Path, pieces: list[bytes], chunk_bytes: int, row: int
) -> None:
    (tmp_path / "list").write_bytes(b"".join(pieces))
    offsets = list(naive_offsets(b"".join(pieces)))
    index = LineIndex(tmp_path / "list", chunk_bytes=chunk_bytes)

    found = index.find(row)

    assert found == ((0, offsets[0]) if offsets else (0, 0))
    assert index.count() == len(offsets)


@pytest.mark.parametrize("row", [0, 1023, 1024, 1025, 2048, 4999])
def test_row_of_a_long_list_is_found_nearby(tmp_path: Path, row: int) -> None:
    lines = [b"%d\n" % n + b"\n" * (n % 3) for n in range(5000)]
    (tmp_path / "list").write_bytes(b"".join(lines))
    index = LineIndex(tmp_path / "list", chunk_bytes=1000)

    near, offset = index.find(row)

    assert near == row // 1024 * 1024
    assert offset == len(b"".join(lines[:near]))
    assert index.count() == 5000
