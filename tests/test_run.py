"""The main job, whole: rows in, results out, one for each row, in order, whatever the machinery."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY_LABELS, tiny_logits
from jobfolder import JobFolder
from PIL import Image

MakeTable = Callable[..., Path]


def colour(index: int) -> np.ndarray:
    """A 32 x 32 image of one colour, another for each index."""
    return np.full((32, 32, 3), np.random.default_rng(index).integers(0, 256, 3), np.uint8)


def png(pixels: np.ndarray, path: Path) -> bytes:
    """Write an image, of which nothing is lost, and return its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def pngs(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Images that each have a colour of their own."""
    folder = tmp_path_factory.mktemp("pngs")
    return [png(colour(index), folder / f"{index}.png") for index in range(150)]


def wrong(results: Sequence[dict[str, Any]], indices: Sequence[int]) -> list[int]:
    """Return the places whose result is not that of the image of this index."""
    return [
        place
        for place, (result, index) in enumerate(zip(results, indices, strict=True))
        if "class" not in result or not is_right(result, index)
    ]


def is_right(result: dict[str, Any], index: int) -> bool:
    probs = np.array(list(result["class_probs"].values()))
    expected = np.exp(tiny_logits(colour(index)))
    error = np.abs(probs - expected / expected.sum()).max()
    return bool(error < 1e-5 and result["class"] == probs.argmax())


def predictions(rows: Sequence[dict[str, Any]], column: str = "prediction_result") -> list[Any]:
    return [
        row[column] if isinstance(row[column], dict) else json.loads(row[column]) for row in rows
    ]


def test_every_row_has_its_own_result_in_order(
    job: JobFolder, make_table: MakeTable, pngs: list[bytes]
) -> None:
    make_table(job.path / "in.parquet", pngs, row_group_size=20)
    rows = job.do(num_worker=2, batch_size=16)

    assert [row["id"] for row in rows] == [str(index) for index in range(len(pngs))]
    assert wrong(predictions(rows), range(len(pngs))) == []
    first = rows[0]["prediction_result"]
    assert list(first) == ["class", "class_name", "class_probs"]
    assert list(first["class_probs"]) == TINY_LABELS
    assert first["class_name"] == TINY_LABELS[first["class"]]
    # A record is left beside it, and nothing else.
    names = sorted(path.name for path in job.path.iterdir())
    assert names == ["in.parquet", "job.yaml", "out.jsonl", "out.jsonl.evmp.json"]
    record = json.loads((job.path / "out.jsonl.evmp.json").read_bytes())
    assert (record["rows"], record["failed"], record["state"]) == (len(pngs), 0, "done")
    assert record["run"]["stages"]["predictor"]["rows"] == len(pngs)
    assert record["job"]["num_worker"] == 2


# --- outputs and inputs ---------------------------------------------------------------------------


def test_table_keeps_reserved_columns_with_their_types(
    job: JobFolder, make_table: MakeTable, pngs: list[bytes]
) -> None:
    n = len(pngs)
    columns: dict[str, Any] = {
        "id": pa.array(range(n), pa.int32()),
        "score": pa.array([index / 7 if index % 5 else None for index in range(n)], pa.float32()),
        "tags": pa.array([["a", "b"][: index % 3] for index in range(n)], pa.list_(pa.string())),
        "taken": pa.array([index * 1_000_000 for index in range(n)], pa.timestamp("us", "UTC")),
    }
    make_table(job.path / "in.parquet", pngs, **columns)
    rows = job.do(
        output_oss_file=None, output_table="out", reserved_columns="id, score, tags, taken"
    )

    table = pq.ParquetDataset(job.path / "out").read()
    assert table.schema.names == ["id", "score", "tags", "taken", "prediction_result"]
    for name, column in columns.items():
        assert table[name].combine_chunks() == column
    assert table.schema.field("prediction_result").type == pa.string()
    assert wrong(predictions(rows), range(n)) == []


def test_hive_partitions_in_and_out(
    job: JobFolder, make_table: MakeTable, pngs: list[bytes]
) -> None:
    for place, part in enumerate(["a", "b", "c"]):
        for half in range(2):
            at = 20 * place + 10 * half
            file = job.path / "in" / f"pt={part}" / f"part-{half}.parquet"
            make_table(file, pngs[at : at + 10])
    rows = job.do(
        input_table="in",
        reserved_columns="id, pt",
        output_oss_file=None,
        output_table="out/day=1/hour=2",
        num_worker=2,
    )

    assert [row["pt"] for row in rows] == ["a"] * 20 + ["b"] * 20 + ["c"] * 20
    assert wrong(predictions(rows), range(60)) == []
    assert sorted(path.name for path in (job.path / "out").iterdir()) == ["day=1"]
    whole = pq.ParquetDataset(job.path / "out").read()
    assert set(whole["day"].to_pylist()) == {1} and set(whole["hour"].to_pylist()) == {2}


def test_one_partition_of_a_table_into_a_parquet_file(
    job: JobFolder, make_table: MakeTable, pngs: list[bytes]
) -> None:
    make_table(job.path / "in" / "pt=a" / "0.parquet", pngs[:10])
    make_table(job.path / "in" / "pt=b" / "0.parquet", pngs[10:30])
    rows = job.do(
        input_table="in/pt=b",
        reserved_columns="pt",
        output_oss_file="out.parquet",
        result_column="answer",
        top_k=2,
    )

    assert (job.path / "out.parquet").is_file()
    assert [list(row) for row in rows] == [["pt", "answer"]] * 20
    for row in rows:
        answer = json.loads(row["answer"])
        assert len(answer["class_probs"]) == 2
        assert next(iter(answer["class_probs"])) == answer["class_name"]


def test_list_of_files_and_objects_into_json_lines(job: JobFolder) -> None:
    for index in range(4):
        png(colour(index), job.path / "photos" / f"{index} ü.png")
    absolute = job.path / "photos" / "2 ü.png"
    lines = [
        "photos/0 ü.png",
        '{"image": "photos/1 ü.png", "n": 1.50, "deep": {"a": [1, null]}, "s": "\\u00fc"}',
        "",
        f"  file://{str(absolute).replace(' ', '%20')}  ",
        '{"prediction_result": "old", "image": "photos/3 ü.png"}',
        '{"picture": "photos/3 ü.png"}',
        '{"image": ',
    ]
    (job.path / "list.txt").write_text("\ufeff" + "\r\n".join(lines))
    rows = job.do(input_table=None, reserved_columns=None, input_oss_file="list.txt")

    assert [list(row) for row in rows] == [
        ["image", "prediction_result"],
        ["image", "n", "deep", "s", "prediction_result"],
        ["image", "prediction_result"],
        ["image", "prediction_result"],
        ["picture", "prediction_result"],
        ["image", "prediction_result"],
    ]
    assert rows[0]["image"] == "photos/0 ü.png"
    # An object stays as it is written, but for the result behind it.
    written = (job.path / "out.jsonl").read_text().splitlines()[1]
    assert written.startswith(lines[1][:-1] + ',"prediction_result":{"class":')
    assert wrong(predictions(rows[:4]), range(4)) == []
    messages = [row["prediction_result"]["error_msg"] for row in rows[4:]]
    assert messages[0].startswith("image: got no such key")
    assert messages[1].startswith("line starts with { but is no JSON object")


def test_list_of_files_into_lines_of_text(job: JobFolder) -> None:
    for index in range(3):
        png(colour(index), job.path / f"{index}.png")
    (job.path / "list.txt").write_text("0.png\n1.png\n2.png\n")
    job.write(
        input_table=None,
        reserved_columns=None,
        input_oss_file="list.txt",
        output_oss_file="out.txt",
    )

    assert job.run().returncode == 0

    lines = (job.path / "out.txt").read_text().splitlines()
    assert [line.partition(", ")[0] for line in lines] == ["0.png", "1.png", "2.png"]
    assert wrong([json.loads(line.partition(", ")[2]) for line in lines], range(3)) == []


def test_table_of_paths(job: JobFolder, make_table: MakeTable) -> None:
    for index in range(3):
        png(colour(index), job.path / f"{index}.png")
    paths = ["0.png", "1.png", "no.png", "2.png"]
    make_table(job.path / "in.parquet", paths)
    rows = job.do(image_type="url", reserved_columns=None)

    assert [row["image"] for row in rows] == paths
    failure = rows.pop(2)["prediction_result"]
    assert failure == {"error_stage": "read", "error_msg": "'no.png': no such file or directory"}
    assert wrong(predictions(rows), range(3)) == []


# --- the same bytes, whatever the machinery -------------------------------------------------------

SHAPES = list(itertools.product([1, 3], [1, 4], [1, 7, 64]))  # workers, decoders, batch size
QUICK_SHAPES = [(1, 1, 1), (1, 4, 64), (3, 4, 7)]


def mixed_table(path: Path, pngs: list[bytes], make_table: MakeTable) -> int:
    """Write a table of good and bad rows; returns how many."""
    images: list[bytes | str | None] = list(pngs)
    for place in range(0, len(images), 9):
        images[place] = ["!", "", None, base64.b64encode(b"text").decode()][place % 4]
    make_table(path, images, row_group_size=37)
    return len(images)


def results_of(job: JobFolder, shapes: list[tuple[int, int, int]], **keys: Any) -> dict[str, Any]:
    """Run one job with each shape. Returns the result's bytes, each with its first shape."""
    found: dict[Any, Any] = {}
    for number, (workers, decoders, batch) in enumerate(shapes):
        name = f"out{number}{keys.get('suffix', '')}"
        job.write(
            output_oss_file=None if keys.get("table") else f"{name}.jsonl",
            output_table=name if keys.get("table") else None,
            num_worker=workers,
            preprocess_thread_num=decoders,
            batch_size=batch,
        )
        done = job.run()
        assert done.returncode == 0, done.stderr
        place = job.path / (name if keys.get("table") else f"{name}.jsonl")
        files = sorted(place.iterdir()) if place.is_dir() else [place]
        found.setdefault(tuple(file.read_bytes() for file in files), (workers, decoders, batch))
    return found


def test_workers_decoders_and_batches_change_no_byte(
    job: JobFolder, make_table: MakeTable, pngs: list[bytes]
) -> None:
    n_rows = mixed_table(job.path / "in.parquet", pngs, make_table)

    found = results_of(job, QUICK_SHAPES)

    assert len(found) == 1, list(found.values())
    assert job.path.joinpath("out0.jsonl").read_bytes().count(b"\n") == n_rows


@pytest.mark.slow
def test_no_shape_changes_a_byte_of_the_real_networks_results(
    job: JobFolder,
    make_table: MakeTable,
    photo_file: Callable[..., bytes],
    real_model: Path,
) -> None:
    names = ["coffee", "chelsea", "camera", "rocket", "astronaut", "china", "flower"]
    images = [photo_file(names[n % 7], size=(300 + n, 400 - n)) for n in range(50)]
    mixed_table(job.path / "in.parquet", images, make_table)
    job._model = real_model

    found = results_of(job, SHAPES)

    assert len(found) == 1, list(found.values())


@pytest.mark.slow
def test_workers_decoders_and_batches_change_no_byte_of_a_table(
    job: JobFolder, make_table: MakeTable, pngs: list[bytes]
) -> None:
    mixed_table(job.path / "in.parquet", pngs, make_table)

    found = results_of(job, QUICK_SHAPES, table=True)

    assert len(found) == 1, list(found.values())


# --- rows that make trouble for their neighbours --------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 4])
def test_batch_that_raises_costs_only_its_bad_row(
    job: JobFolder,
    make_table: MakeTable,
    pngs: list[bytes],
    trouble_model: Callable[..., Path],
    at_once: int,
) -> None:
    white = png(np.full((32, 32, 3), 255, np.uint8), job.path / "white.png")
    images = [*pngs[:11], white, *pngs[11:22]]
    make_table(job.path / "in.parquet", images)
    model = str(trouble_model("Fussy"))
    rows = job.do(model_path=model, batch_size=8, cpu_batch_size=at_once)

    failure = rows.pop(11)["prediction_result"]
    assert failure["error_stage"] == "predict"
    assert "too bright for me" in failure["error_msg"]
    assert wrong(predictions(rows), range(22)) == []


def test_row_that_kills_every_predictor_costs_only_itself(
    job: JobFolder, make_table: MakeTable, pngs: list[bytes], trouble_model: Callable[..., Path]
) -> None:
    white = png(np.full((32, 32, 3), 255, np.uint8), job.path / "white.png")
    images = [*pngs[:11], white, *pngs[11:22]]
    make_table(job.path / "in.parquet", images)
    rows = job.do(model_path=str(trouble_model("Deadly")), batch_size=8)

    failure = rows.pop(11)["prediction_result"]
    assert failure == {
        "error_stage": "predict",
        "error_msg": "the predictor died of this row: SIGFPE",
    }
    assert wrong(predictions(rows), range(22)) == []


def test_large_result_and_keys_of_a_small_row_fit(
    job: JobFolder, make_table: MakeTable, pngs: list[bytes], make_tiny_model: Callable[..., Path]
) -> None:
    labels = [f"{'a long name' * 1000}{number}" for number in range(5)]
    notes = ["x" * 50_000, "ü" * 50_000, "z"]
    make_table(job.path / "in.parquet", pngs[:3], note=notes)
    model = make_tiny_model(output={"labels": labels})
    rows = job.do(model_path=str(model), max_row_bytes=1024, reserved_columns="note")

    assert [row["note"] for row in rows] == notes
    assert wrong(predictions(rows), range(3)) == []
