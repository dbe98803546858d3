"""Everything that people get wrong: one clear error, or one error row, and never a wrong result."""

from __future__ import annotations

import base64
import ctypes
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import tiny_network, write_tiny_model
from jobfolder import JobFolder

MS_RDONLY, MS_REMOUNT, MNT_DETACH = 1, 32, 2  # <sys/mount.h>

MakeTable = Callable[..., Path]
PhotoFile = Callable[..., bytes]


def error_of(job: JobFolder, code: int, *arguments: object) -> str:
    """Run a job that shall fail with this exit code. Returns the last thing that it said."""
    done = job.run(*arguments)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return "evmp: " + f"\n{done.stderr}".rpartition("\nevmp: ")[2]


# --- the job file ---------------------------------------------------------------------------------


def test_job_file_that_is_missing(job: JobFolder) -> None:
    (job.path / "jobs.yaml").touch()

    said = error_of(job, 2)

    assert said == "evmp: bad job: job.yaml: cannot be read: no such file or directory\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty, expected keys and values"),
        ("- a\n- b\n", "got a list, expected keys and values"),
        ("{", "not YAML"),
        ("\x00", "not YAML"),
        ("model_path: a\n\tb: c\n", "not YAML"),
    ],
)
def test_job_file_that_is_no_mapping(job: JobFolder, text: str, message: str) -> None:
    (job.path / "job.yaml").write_text(text)

    said = error_of(job, 2)

    assert said.startswith("evmp: bad job: job.yaml")
    assert message in said


def test_all_that_is_wrong_is_said_at_once(job: JobFolder) -> None:
    job.write(batch_size=0, batchsize=4, num_worker="many", image_type="jpeg")

    said = error_of(job, 2, "-Dtop_k=-1", "-Dnonsense=1")

    assert said.startswith("evmp: 6 problems:\n")
    for problem in (
        "batch_size: got 0, expected an integer from 1 to 65536",
        "batchsize: unknown key, did you mean batch_size?",
        'num_worker: got "many", expected an integer',
        'image_type: got "jpeg", expected base64 or url',
        "-Dtop_k: got -1, expected an integer of at least 0",
        "-Dnonsense: unknown key",
    ):
        assert problem in said


# --- the input ------------------------------------------------------------------------------------


def test_input_that_does_not_exist(job: JobFolder, make_table: MakeTable) -> None:
    make_table(job.path / "inn.parquet", [])
    job.write()

    said = error_of(job, 3)

    path = job.path / "in.parquet"
    assert said == (
        f"evmp: input: input_table: {path} does not exist; did you mean {job.path}/inn.parquet\n"
    )


def test_input_that_lacks_the_column(job: JobFolder, make_table: MakeTable) -> None:
    make_table(job.path / "in.parquet", ["x"])
    job.write(image_col="imge")

    assert "has no column 'imge', it has 'id', 'image'; did you mean 'image'" in error_of(job, 3)


def test_input_that_lacks_a_reserved_column(job: JobFolder, make_table: MakeTable) -> None:
    make_table(job.path / "in.parquet", ["x"])
    job.write(reserved_columns="id, name")

    assert "has no column 'name'" in error_of(job, 3)


def test_input_that_is_no_table(job: JobFolder) -> None:
    (job.path / "in.parquet").write_text("id,image\n1,abc\n")
    job.write()

    assert "in.parquet is not a Parquet file or is damaged" in error_of(job, 3)


@pytest.mark.parametrize("output", ["out.jsonl", "out.txt", "out.parquet", "out"])
def test_input_without_rows_gives_a_result_without_rows(
    job: JobFolder, make_table: MakeTable, output: str
) -> None:
    make_table(job.path / "in.parquet", [])
    way = "output_oss_file" if "." in output else "output_table"
    job.write(**{"output_oss_file": None, way: output})

    done = job.run()

    assert done.returncode == 0, done.stderr
    assert "done: 0 rows" in done.stderr
    if "parquet" in output or way == "output_table":
        table = pq.ParquetDataset(job.path / output).read()
        assert (table.num_rows, table.schema.names) == (0, ["id", "prediction_result"])
    else:
        assert (job.path / output).read_bytes() == b""
    assert job.leftovers() == []


def test_list_without_entries_gives_a_result_without_rows(job: JobFolder) -> None:
    (job.path / "list.txt").write_text("\n \n")

    assert job.do(input_table=None, input_oss_file="list.txt", reserved_columns=None) == []


# --- the machine ----------------------------------------------------------------------------------


def test_job_too_large_for_the_memory(job: JobFolder) -> None:
    job.write(memory_limit_bytes=1 << 20, batch_size=64)

    said = error_of(job, 2)

    assert "of shared memory and their processes at least" in said
    assert "but there are 1 MiB; lower batch_size (64), queue_size" in said


def test_job_of_too_many_processes(job: JobFolder) -> None:
    job.write(preprocess_thread_num=300)

    assert "has too many processes, expected at most 250; raise num_worker" in error_of(job, 2)


# --- the model ------------------------------------------------------------------------------------


@pytest.fixture
def table_job(job: JobFolder, make_table: MakeTable, photo_file: PhotoFile) -> JobFolder:
    """A job that is right but for its model or its output."""
    make_table(job.path / "in.parquet", [photo_file("coffee", size=(60, 40))] * 3)
    return job


def test_model_that_is_missing(table_job: JobFolder) -> None:
    table_job.write(model_path="models/none")

    said = error_of(table_job, 3)

    assert said == "evmp: model: models/none: no such file or directory; correct model_path\n"


def write_weights(folder: Path, weights: Any) -> None:
    folder.mkdir()
    if isinstance(weights, torch.nn.Module):
        torch.jit.save(torch.jit.script(weights), folder / "model.pt")
    elif isinstance(weights, bytes):
        (folder / "model.pt").write_bytes(weights)
    else:
        torch.save(weights, folder / "model.pt")
    spec = {"height": 32, "width": 32, "resize": "stretch"}
    package = {"model_type": "classifier", "input": spec}
    (folder / "model.yaml").write_text(yaml.safe_dump(package))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (b"not a model", "no TorchScript archive and no ONNX model (starts with 'not a model')"),
        (b"", "an empty file, expected a TorchScript or torch.export archive"),
        ({"weight": torch.zeros(3)}, "a checkpoint written by torch.save (a state_dict, say)"),
        (torch.nn.Identity(), "the model returned (1, 3, 32, 32) for an image, expected (1, cl"),
        (
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)),
            "it was given (1, 3, 32, 32) in torch.float32, as input.height, input.width",
        ),
    ],
    ids=["text", "empty", "state_dict", "wrong output", "wrong input"],
)
def test_model_that_is_none(table_job: JobFolder, weights: Any, message: str) -> None:
    write_weights(table_job.path / "model", weights)
    table_job.write(model_path="model")

    said = error_of(table_job, 3)

    assert said.startswith("evmp: model: model/model.pt: ")
    assert message in said
    assert table_job.leftovers() == []


def test_model_whose_labels_do_not_fit(table_job: JobFolder) -> None:
    write_tiny_model(table_job.path / "model", output={"labels": ["cat", "dog"]})
    table_job.write(model_path="model")

    said = error_of(table_job, 3)

    assert "returned (1, 5) for an image, expected (1, 2) for 2 labels from class 0 on" in said
    # What was wrong is corrected, and the same command goes through.
    write_tiny_model(table_job.path / "model")
    assert table_job.run().returncode == 0


def test_device_that_is_not_there(
    table_job: JobFolder, make_tiny_model: Callable[..., Path]
) -> None:
    table_job.write(device="cuda", model_path=str(make_tiny_model(network=tiny_network())))

    done = table_job.run(env={"CUDA_VISIBLE_DEVICES": ""})

    assert done.returncode == 3
    assert "finds no GPU; set device: cpu or auto" in done.stderr


# --- the output -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_output_that_exists_is_not_touched(table_job: JobFolder, kind: str) -> None:
    out = table_job.path / "out"
    if kind == "file":
        out.write_text("mine")
        table_job.write(output_oss_file="out")
    else:
        out.mkdir()
        (out / "mine.parquet").write_text("mine")
        table_job.write(output_oss_file=None, output_table="out")

    said = error_of(table_job, 3)

    assert said.startswith(f"evmp: output: output {out} exists and was not made by a run of this")
    assert "--fresh" in said
    assert (out if kind == "file" else out / "mine.parquet").read_text() == "mine"
    assert table_job.leftovers() == []


def test_check_tells_of_an_output_that_exists(table_job: JobFolder) -> None:
    (table_job.path / "out.jsonl").write_text("mine")
    table_job.write()

    assert "out.jsonl exists" in error_of(table_job, 3, "--check")


@pytest.mark.parametrize(
    ("output", "reason"),
    [("job.yaml/out.jsonl", "Not a directory"), ("/proc/out.jsonl", "No such file or directory")],
)
def test_output_that_cannot_be_created(table_job: JobFolder, output: str, reason: str) -> None:
    table_job.write(output_oss_file=output)

    said = error_of(table_job, 3)

    assert said.startswith("evmp: output: output ")
    assert f"cannot be written: {reason}" in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=1m"):
        reason = os.strerror(ctypes.get_errno())
        pytest.skip(f"A FULL DISK IS NOT TESTED: this user may not mount a small one ({reason})")
    yield folder
    libc.umount2(bytes(folder), MNT_DETACH)


def test_output_on_a_read_only_disk(table_job: JobFolder, small_disk: Path) -> None:
    flags = MS_REMOUNT | MS_RDONLY
    assert ctypes.CDLL(None).mount(b"tmpfs", bytes(small_disk), b"tmpfs", flags, b"size=1m") == 0
    table_job.write(output_oss_file="disk/out.jsonl")

    assert "disk/out.jsonl cannot be written: Read-only file system" in error_of(table_job, 3)


def test_table_on_a_full_disk(
    job: JobFolder, make_table: MakeTable, photo_file: PhotoFile, small_disk: Path
) -> None:
    images = [photo_file("coffee", size=(60, 40))] * 100
    notes = [base64.b64encode(os.urandom(15_000)).decode() for _ in images]
    make_table(job.path / "in.parquet", images, note=notes)
    job.write(output_oss_file=None, output_table="disk/out", reserved_columns="note")

    said = error_of(job, 3)

    assert said.startswith("evmp: output: cannot write ")
    assert "No space left on device; what was committed is kept" in said
    assert not (small_disk / "out").exists()


def test_full_disk_that_gets_room_goes_on(
    job: JobFolder, make_table: MakeTable, photo_file: PhotoFile, small_disk: Path
) -> None:
    images = [photo_file("coffee", size=(60, 40))] * 100
    make_table(job.path / "in.parquet", images, note=["x" * 3000] * len(images))
    hog = small_disk / "hog"
    hog.write_bytes(bytes(700 << 10))
    job.write(output_oss_file="disk/out.jsonl", reserved_columns="id, note", block_rows=10)
    assert "No space left" in error_of(job, 3)

    hog.unlink()
    done = job.run()

    assert done.returncode == 0, done.stderr
    assert "resuming: " in done.stderr
    assert [row["id"] for row in job.rows("disk/out.jsonl")] == [*map(str, range(100))]


# --- rows -----------------------------------------------------------------------------------------


def huge_png(side: int) -> bytes:
    """A PNG of side x side white pixels, one bit each, in a few kilobytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        crc32 = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc32)

    packer = zlib.compressobj(9)
    line = b"\0" + b"\xff" * ((side + 7) // 8)
    pixels = b"".join([*(packer.compress(line) for _ in range(side)), packer.flush()])
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def split(text: str) -> str:
    """Break Base64 text into lines, as MIME does."""
    return "\r\n".join(text[at : at + 76] for at in range(0, len(text), 76))


def test_bad_rows_are_error_rows_in_their_places(
    job: JobFolder, make_table: MakeTable, photo_file: PhotoFile, tmp_path: Path
) -> None:
    jpeg = photo_file("coffee", size=(200, 150))
    good = base64.b64encode(jpeg).decode()
    at = good.index("+")
    bomb = huge_png(30_000)
    assert len(bomb) < 160_000
    rows: dict[str, tuple[str | bytes | None, str, str]] = {
        "no Base64": ("!!!!", "decode", "not Base64: "),
        "truncated Base64": (good[:-3], "decode", "not Base64: "),
        "empty": ("", "read", "column 'image' is empty"),
        "null": (None, "read", "column 'image' is null"),
        "blank": ("    ", "decode", "not Base64: "),
        "line breaks": (split(good), "decode", "0x0d at position 76; base64_whitespace: true"),
        "URL alphabet": (good.replace("+", "-"), "decode", f"{at}; base64_url_alphabet: true"),
        "no image": (b"just some text", "decode", "not an image: unknown format"),
        "JPEG cut short": (jpeg[: len(jpeg) // 2], "decode", "truncated JPEG"),
        "PNG cut short": (photo_file("camera", "PNG")[:5000], "decode", "truncated PNG"),
        "decompression bomb": (bomb, "decode", "30000 x 30000 pixels exceeds max_image_pixels"),
        "200 MB": ("A" * 200_000_000, "read", "200000000 bytes, more than max_row_bytes"),
    }
    images = [image for bad, *_ in rows.values() for image in (good, bad)] + [good]
    make_table(job.path / "in.parquet", images, row_group_size=5)
    results = [row["prediction_result"] for row in job.do()]

    assert len(results) == len(images)
    assert all("class" in result for result in results[::2])
    for result, (name, (_, stage, message)) in zip(results[1::2], rows.items(), strict=True):
        assert result["error_stage"] == stage, (name, result)
        assert message in result["error_msg"], (name, result)


def test_options_of_base64_let_its_dialects_through(
    job: JobFolder, make_table: MakeTable, photo_file: PhotoFile
) -> None:
    jpeg = photo_file("coffee", size=(200, 150))
    url = base64.urlsafe_b64encode(jpeg).decode()
    make_table(job.path / "in.parquet", [url, split(url), f" {url}\n", jpeg])

    rows = job.do(base64_whitespace=True, base64_url_alphabet=True)

    *good, standard = (row["prediction_result"] for row in rows)
    assert all(result == good[0] and "class" in result for result in good)
    assert "not Base64" in standard["error_msg"]


def test_bad_entries_of_a_list_are_error_rows(
    job: JobFolder, photo_file: PhotoFile, tmp_path: Path
) -> None:
    (tmp_path / "good.jpg").write_bytes(photo_file("coffee", size=(60, 40)))
    (tmp_path / "text.jpg").write_text("This is not a photograph.\n")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    with open(tmp_path / "large.jpg", "wb") as file:
        file.truncate(200_000_000)
    entries = {
        "text.jpg": "not an image: unknown format (starts with 'This is not a ph...')",
        "empty.jpg": "empty image",
        "none.jpg": "'none.jpg': no such file or directory",
        "folder.jpg": "not a file",
        "pipe.jpg": "not a file",
        "large.jpg": "200000000 bytes",
        "memory://bucket/a.jpg": "memory:// cannot be read, expected",
        "http://127.0.0.1/a.jpg": "127.0.0.1, an address that is not public",
        '{"image": 5}': "image: got 5, expected the path or URL of an image",
        '{"image": "no\\u0000.jpg"}': "",
        "[1, 2]": "no such file or directory",
        '{"image": "good.jpg"} and more': "is no JSON object",
        "\udcff.jpg": "line is not UTF-8",
    }
    lines = [line for entry in entries for line in ("good.jpg", entry)]
    text = "\n".join([*lines, "good.jpg"]).encode("utf-8", "surrogateescape")
    (tmp_path / "list.txt").write_bytes(text)

    rows = job.do(input_table=None, input_oss_file="list.txt", reserved_columns=None)

    results = [row["prediction_result"] for row in rows]
    assert all("class" in result for result in results[::2])
    for result, (entry, message) in zip(results[1::2], entries.items(), strict=True):
        assert message in result["error_msg"], (entry, result)


def test_keys_too_large_to_keep_cost_their_row(
    job: JobFolder, make_table: MakeTable, photo_file: PhotoFile
) -> None:
    jpeg = photo_file("coffee", size=(60, 40))
    make_table(job.path / "in.parquet", [jpeg] * 3, note=["a", "x" * 3_000_000, "c"])

    rows = job.do(reserved_columns="note", max_row_bytes=4096)

    assert [row["note"] for row in rows] == ["a", None, "c"]
    assert "key columns of 30000" in rows[1]["prediction_result"]["error_msg"]


# --- too many of them -----------------------------------------------------------------------------


def test_job_of_too_many_bad_rows_fails_and_publishes_nothing(
    job: JobFolder, make_table: MakeTable, photo_file: PhotoFile
) -> None:
    good = photo_file("coffee", size=(60, 40))
    make_table(job.path / "in.parquet", [good, "!", "?", b"text", b"more text", good])
    job.write(max_error_fraction=0.6)

    said = error_of(job, 1)

    assert said.startswith("evmp: failed: 4 of 6 rows failed, more than max_error_fraction 0.6")
    assert "2 x not an image" in said and "2 x not Base64" in said
    assert not (job.path / "out.jsonl").exists()

    done = job.run("-Dmax_error_fraction=0.7")

    assert done.returncode == 0, done.stderr
    assert "resuming: 6 of 6 rows are done" in done.stderr
    assert "done: 6 rows, 4 failed" in done.stderr
    assert len(job.rows()) == 6


def test_job_whose_every_row_failed_fails_always(job: JobFolder, make_table: MakeTable) -> None:
    make_table(job.path / "in.parquet", ["!"] * 4)
    job.write(max_error_fraction=1.0)

    assert "all 4 rows failed" in error_of(job, 1)


def test_hopeless_job_ends_early_and_says_why(
    job: JobFolder, make_table: MakeTable, photo_file: PhotoFile
) -> None:
    make_table(job.path / "in.parquet", [*["!"] * 1500, *[photo_file("china")] * 3000])
    job.write()

    said = error_of(job, 1)

    words = said.split()
    n_failed, n_done = int(words[2]), int(words[4])
    assert 1000 <= n_failed <= 1500 and n_done < 4500
    assert f"{n_failed} of {n_done} rows failed so far, more than max_error_fraction" in said
    assert f"{n_failed} x not Base64: bad Base64 character 0x21" in said
