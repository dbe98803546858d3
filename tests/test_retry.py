"""`--retry-failed`: the failed rows of a finished job again, and nothing else, in its place."""

from __future__ import annotations

import base64
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobfolder import JobFolder, kill, wait_for

from evmp.errors import SinkError
from evmp.job import load_job
from evmp.key import KeyField
from evmp.sink import Record, open_sink
from evmp.source import Kind, Row, read_rows
from evmp.target.local import LocalTarget

N_ROWS = 60
MISSING = (3, 4, 5, 31, 59)


@pytest.fixture
def photos(job: JobFolder, photo_file: Callable[..., bytes]) -> Path:
    """A list of photographs in the job's folder, of which some are missing."""
    folder = job.path / "photos"
    folder.mkdir()
    lines = []
    for row in range(N_ROWS):
        file = folder / f"{row}.jpg"
        lines.append(f"{file}\n")
        if row not in MISSING:
            file.write_bytes(photo_file("coffee", size=(40 + row, 90 - row)))
    (job.path / "list.txt").write_text("".join(lines))
    return folder


def restore(photos: Path, photo_file: Callable[..., bytes], *rows: int) -> None:
    """Bring the photographs of some rows back."""
    for row in rows:
        photos.joinpath(f"{row}.jpg").write_bytes(photo_file("coffee", size=(40 + row, 90 - row)))


def write(job: JobFolder, **keys: object) -> None:
    """Write a job over the list."""
    usual = {"block_rows": 16, "batch_size": 4, "input_table": None, "reserved_columns": None}
    job.write(input_oss_file=str(job.path / "list.txt"), **{**usual, **keys})


def whole(job: JobFolder, output: str) -> bytes:
    """Return the bytes of a result that is made in one run."""
    done = job.run(f"-Doutput_oss_file={output}")
    assert done.returncode == 0, done.stderr
    return (job.path / output).read_bytes()


@pytest.mark.parametrize("name", ["out.jsonl", "out.txt", "out.parquet"])
def test_failed_rows_are_replaced(
    job: JobFolder, photos: Path, photo_file: Callable[..., bytes], name: str
) -> None:
    write(job, output_oss_file=str(job.path / name))
    first = job.run()
    restore(photos, photo_file, 3, 4, 31, 59)
    again = job.run("--retry-failed")

    assert first.returncode == again.returncode == 0, again.stderr
    assert "doing 5 failed rows again\n" in again.stderr
    assert f"done: {N_ROWS} rows, 5 of them again, 1 failed" in again.stderr
    assert "no such file or directory (first in row 5; read)" in again.stderr
    record = json.loads((job.path / f"{name}.evmp.json").read_bytes())
    assert (record["rows"], record["failed"], record["run"]["rows"]) == (N_ROWS, 1, 5)
    assert [failure["first_row"] for failure in record["failures"]] == [5]
    assert (job.path / name).read_bytes() == whole(job, f"whole{Path(name).suffix}")
    assert job.leftovers() == []


def test_failed_rows_of_a_table_are_replaced(
    job: JobFolder, make_table: Callable[..., Path], photo_file: Callable[..., bytes]
) -> None:
    images: list[bytes | str] = [photo_file("chelsea", size=(50, 40 + row)) for row in range(20)]
    images[6] = images[6].hex() if isinstance(images[6], bytes) else ""
    good = images[13]
    assert isinstance(good, bytes)
    text = base64.b64encode(good).decode()
    images[13] = text[:76] + "\n" + text[76:]
    make_table(job.path / "in.parquet", images)
    job.write(
        input_table=str(job.path / "in.parquet"),
        output_table=str(job.path / "table"),
        output_oss_file=None,
        reserved_columns="id",
    )
    assert job.run().returncode == 0
    before = pq.read_table(job.path / "table")

    # The message of row 13 has named the remedy, which is another job but for the failed rows.
    done = job.run("--retry-failed", "-Dbase64_whitespace=true")

    assert done.returncode == 0, done.stderr
    after = pq.read_table(job.path / "table")
    assert after.schema == before.schema
    assert after.column_names == ["id", "prediction_result"]
    differing = [n for n in range(20) if after.slice(n, 1) != before.slice(n, 1)]
    assert differing == [13]
    assert "class" in json.loads(after["prediction_result"][13].as_py())
    assert after["id"] == before["id"]
    again = job.run("-Dbase64_whitespace=true")
    assert again.returncode == 0 and "already done: 20 rows, 1 failed" in again.stderr


def test_nothing_failed_is_nothing_to_do(
    job: JobFolder, photos: Path, photo_file: Callable[..., bytes]
) -> None:
    restore(photos, photo_file, *MISSING)
    write(job)
    assert job.run().returncode == 0
    before = (job.path / "out.jsonl").stat()

    done = job.run("--retry-failed")

    assert done.returncode == 0
    assert f"already done: {N_ROWS} rows, 0 failed" in done.stderr
    assert (job.path / "out.jsonl").stat() == before
    assert job.leftovers() == []


def test_job_that_is_not_finished_has_no_failed_rows_yet(job: JobFolder, photos: Path) -> None:
    write(job)

    done = job.run("--retry-failed")

    assert done.returncode == 2
    assert "run the job without --retry-failed first" in done.stderr
    assert not (job.path / "out.jsonl.evmp").exists()


@pytest.mark.parametrize("other", ["--fresh", "--check"])
def test_retry_does_not_go_with(job: JobFolder, photos: Path, other: str) -> None:
    write(job)

    done = job.run("--retry-failed", other)

    assert done.returncode == 2
    assert "--retry-failed does not go with --fresh or --check" in done.stderr


def test_other_job_is_refused(job: JobFolder, photos: Path) -> None:
    write(job)
    assert job.run().returncode == 0

    done = job.run("--retry-failed", "-Dtop_k=2")

    assert done.returncode == 2
    assert "job.top_k: " in done.stderr


def test_retry_that_fails_again_leaves_the_same_bytes(job: JobFolder, photos: Path) -> None:
    write(job)
    assert job.run().returncode == 0
    before = (job.path / "out.jsonl").read_bytes()

    done = job.run("--retry-failed")

    assert done.returncode == 0, done.stderr
    assert f"{N_ROWS} rows, 5 of them again, 5 failed" in done.stderr
    assert (job.path / "out.jsonl").read_bytes() == before


def test_killed_retry_goes_on(
    job: JobFolder,
    photos: Path,
    photo_file: Callable[..., bytes],
    make_tiny_model: Callable[..., Path],
) -> None:
    shutil.rmtree(photos)
    photos.mkdir()
    restore(photos, photo_file, 0, 1)
    write(job, model_path=str(make_tiny_model(steps=300)), max_error_fraction=1, block_rows=4)
    assert job.run().returncode == 0
    restore(photos, photo_file, *range(N_ROWS))

    process = job.start("--retry-failed")
    blocks = job.path / "out.jsonl.evmp" / "blocks"
    wait_for(process, lambda: len(list(blocks.glob("*.json"))) >= 3)
    assert kill(process) == []

    stopped = json.loads((job.path / "out.jsonl.evmp.json").read_bytes())
    assert stopped["failed"] == N_ROWS - 2
    plain = job.run()
    assert plain.returncode == 2
    assert "go on with --retry-failed, or start over with --fresh" in plain.stderr
    again = job.run("--retry-failed")
    assert again.returncode == 0, again.stderr
    assert f"of {N_ROWS - 2} rows are done" in again.stderr
    assert (job.path / "out.jsonl").read_bytes() == whole(job, "whole.jsonl")
    assert job.leftovers() == []


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize("rows", [[1], [1, 2, 3], [1, 7]])
def test_blocks_that_do_not_fit_amend_nothing(job: JobFolder, name: str, rows: list[int]) -> None:
    job.write(
        input_table=None, input_oss_file="list.txt", reserved_columns=None, output_oss_file=name
    )
    sink = open_sink(load_job(job.path / "job.yaml"), (KeyField("image"),))
    records = [Record(row, (f"{row}.jpg",), b'{"class":1}', False) for row in range(6)]
    for file, some in (("whole", records), ("stage", records[1:3])):
        with open(job.path / file, "wb", buffering=0) as stage:
            sink.append(stage, some)
    result, stages = job.path / f"result{Path(name).suffix}", [job.path / "stage"]
    assert sink.merge([job.path / "whole"], result) == 6

    with pytest.raises(SinkError, match="hold other rows than those that are to be replaced"):
        sink.amend(result, array("q", rows), stages, job.path / f"new{result.suffix}")


def test_retry_leaves_an_unfinished_fresh_run_alone(
    job: JobFolder, photos: Path, make_tiny_model: Callable[..., Path]
) -> None:
    write(job, model_path=str(make_tiny_model(steps=300)), block_rows=4)
    assert job.run().returncode == 0
    process = job.start("--fresh")
    blocks = job.path / "out.jsonl.evmp" / "blocks"
    wait_for(process, lambda: len(list(blocks.glob("*.json"))) >= 2)
    assert kill(process) == []
    before = sorted(path.name for path in blocks.iterdir())

    done = job.run("--retry-failed")

    assert done.returncode == 2
    assert "is unfinished: run the job without --retry-failed first" in done.stderr
    assert sorted(path.name for path in blocks.iterdir()) == before
    assert job.run().returncode == 0


def test_retry_that_dies_while_it_looks_leaves_a_finished_job(job: JobFolder, photos: Path) -> None:
    write(job)
    assert job.run().returncode == 0
    target = LocalTarget(job.path / "out.jsonl")
    target.prepare()  # as far as a retry gets before it has found the failed rows

    done = job.run()

    assert done.returncode == 0
    assert "already done" in done.stderr


def test_table_that_a_dead_publish_took_away_comes_back(tmp_path: Path) -> None:
    target = LocalTarget(tmp_path / "table", is_table=True)
    target.path.mkdir()
    pq.write_table(pa.table({"a": [1]}), target.path / "part-00000.parquet")
    target.prepare()
    target.start_over()
    os.rename(target.path, target.staging / "replaced-0123")

    target.restore()
    target.restore()

    assert target.is_to_be_replaced()
    assert [path.name for path in target.path.iterdir()] == ["part-00000.parquet"]


def test_nothing_is_put_in_the_place_of_what_stands_there(tmp_path: Path) -> None:
    target = LocalTarget(tmp_path / "out.jsonl")
    target.path.write_text("old")
    target.prepare()
    target.start_over()
    os.rename(target.path, target.staging / "replaced-0123")
    target.path.write_text("somebody's")

    target.restore()

    assert target.path.read_text() == "somebody's"


def test_rows_are_read_in_runs() -> None:
    calls = []

    class Counting:
        def read(self, start: int, stop: int) -> Iterator[Row]:
            calls.append((start, stop))
            return (Row(row, Kind.PATH, b"", ()) for row in range(start, stop))

    source = Counting()
    rows = array("q", [0, 1, 2, 7, 9, 10])

    assert [row.index for row in read_rows(source, rows)] == list(rows)  # type: ignore[arg-type]
    assert calls == [(0, 3), (7, 8), (9, 11)]
    assert list(read_rows(source, rows[:0])) == []  # type: ignore[arg-type]


def test_result_that_vanished_is_told(job: JobFolder, tmp_path: Path) -> None:
    job.write(input_table=None, input_oss_file="list.txt", reserved_columns=None)
    sink = open_sink(load_job(job.path / "job.yaml"), (KeyField("image"),))

    with pytest.raises(SinkError, match="cannot read"):
        sink.failures(tmp_path / "gone.jsonl")
