"""Whole jobs whose output, ledger and files lie on OSS: through faults, and kills, to the byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from jobfolder import SECONDS, JobFolder, kill, wait_for
from ossserver import KEY_ID, KEY_SECRET, OssServer, serving_oss


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OssServer]:
    """An OSS with two buckets, whose credentials are in the environment."""
    monkeypatch.setenv("OSS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", KEY_SECRET)
    with serving_oss() as server:
        server.objects = {"out": {}, "work": {}}
        yield server


@pytest.fixture
def rows_of(
    job: JobFolder, photo_file: Callable[..., bytes], make_table: Callable[..., Any]
) -> list[dict[str, Any]]:
    """A table of 60 images, two of them bad, and what becomes of them on this machine."""
    images: list[bytes | str] = [photo_file("coffee", size=(60 + n, 40)) for n in range(60)]
    images[7] = images[33] = "no Base64"
    make_table(job.path / "in.parquet", images)
    return job.do(block_rows=16)


def test_output_may_be_on_oss(
    job: JobFolder, server: OssServer, rows_of: list[dict[str, Any]]
) -> None:
    keys = {"ossHost": server.endpoint, "block_rows": 16, "num_worker": 2}
    job.write(output_oss_file="oss://out/a b/result.jsonl", **keys)

    done = job.run()

    assert done.returncode == 0, done.stderr
    lines = server.objects["out"]["a b/result.jsonl"].splitlines()
    assert [json.loads(line) for line in lines] == rows_of
    assert sorted(server.objects["out"]) == ["a b/result.jsonl", "a b/result.jsonl.evmp.json"]
    assert server.uploads == {}
    again = job.run()
    assert again.returncode == 0
    assert "already done: 60 rows, 2 failed, in oss://out/a b/result.jsonl" in again.stderr


DRAW = """
import numpy as np
from evmp import PredictorInterface

class Draw(PredictorInterface):
    def get_output_type(self): return {"thumb": "image", "strips": "image"}
    def predict(self, input_data, batch_size):
        return [
            {"mean": float(it.mean()), "thumb": it[::2, ::2], "strips": [it[:4], it[4:8]]}
            for it in input_data
        ]
"""


def test_job_on_oss_comes_to_its_end_through_faults_and_kills(
    job: JobFolder, server: OssServer, photo_file: Callable[..., bytes]
) -> None:
    (job.path / "mine.py").write_text(DRAW)
    images = {f"in/{n} 图.jpg": photo_file("coffee", size=(40 + n, 30)) for n in range(40)}
    server.objects["photos"] = images
    (job.path / "in.txt").write_text("".join(f"oss://photos/{key}\n" for key in [*images, "none"]))
    keys = {
        "input_table": None,
        "reserved_columns": None,
        "input_oss_file": "in.txt",
        "model_type": "self_define",
        "user_predictor_cls": "mine.Draw",
        "user_resource": "mine.py",
        "output_oss_file": "oss://out/r.jsonl",
        "output_dir": "oss://out/files",
        "staging": "oss://work/jobs",
        "ossHost": server.endpoint,
        "block_rows": 4,
        "batch_size": 4,
        "read_timeout_seconds": 1,
    }
    job.write(**keys)
    server.trouble = Random(1), 0.02

    process = job.start()
    wait_for(process, lambda: len([k for k in server.objects["work"] if "/blocks/" in k]) > 2)
    assert kill(process) == []
    done = job.run(timeout=120)

    server.trouble = None
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in server.objects["out"]["r.jsonl"].splitlines()]
    assert [row["image"] for row in rows] == [f"oss://photos/{key}" for key in [*images, "none"]]
    assert rows[-1]["prediction_result"]["error_msg"].endswith("404 NoSuchKey")
    for row, key in zip(rows[:-1], images, strict=True):
        stem = key.removeprefix("in/").removesuffix(".jpg")
        strips = [f"oss://out/files/strips/{stem}_{n}.jpg" for n in range(2)]
        found = row["prediction_result"]
        assert found["thumb"] == f"oss://out/files/thumb/{stem}.jpg"
        assert found["strips"] == strips
    files = [key for key in server.objects["out"] if key.startswith("files/")]
    assert len(files) == 3 * len(images)
    assert {key for key in server.objects["out"] if "files" not in key} == {
        "r.jsonl",
        "r.jsonl.evmp.json",
    }
    assert server.objects["work"] == {}
    assert not any(upload.parts for upload in server.uploads.values())
    told = server.objects["out"]["r.jsonl.evmp.json"] + done.stderr.encode()
    assert KEY_ID.encode() not in told and KEY_SECRET.encode() not in told


def test_two_commands_of_one_job_do_no_harm(
    job: JobFolder,
    server: OssServer,
    make_table: Callable[..., Any],
    photo_file: Callable[..., bytes],
) -> None:
    make_table(
        job.path / "in.parquet", [photo_file("coffee", size=(40 + n, 30)) for n in range(40)]
    )
    job.write(output_oss_file="oss://out/r.jsonl", ossHost=server.endpoint, block_rows=4)
    machines = [job.path / name for name in ("tmp1", "tmp2")]  # where no lock is shared
    for machine in machines:
        machine.mkdir()

    both = [job.start(env={"TMPDIR": str(machine)}) for machine in machines]
    for process in both:
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, errors

    rows = server.objects["out"]["r.jsonl"].splitlines()
    assert (
        len(rows)
        == len(set(rows))
        == json.loads(server.objects["out"]["r.jsonl.evmp.json"])["rows"]
    )
    assert sorted(server.objects["out"]) == ["r.jsonl", "r.jsonl.evmp.json"]
    assert [list(machine.iterdir()) for machine in machines] == [[], []]


def test_second_worker_of_one_number_costs_time_and_no_rows(
    job: JobFolder, server: OssServer, rows_of: list[dict[str, Any]]
) -> None:
    job.write(output_oss_file="oss://out/twice.jsonl", ossHost=server.endpoint, block_rows=4)
    machines = [job.path / name for name in ("tmp1", "tmp2", "tmp3")]  # where no lock is shared
    for machine in machines:
        machine.mkdir()

    workers = [
        job.start("--worker", worker, env={"TMPDIR": str(machine)})
        for worker, machine in zip(("0/2", "0/2", "1/2"), machines, strict=True)
    ]
    for process in workers:
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, errors

    lines = server.objects["out"]["twice.jsonl"].splitlines()
    assert [json.loads(line) for line in lines] == rows_of
    assert sorted(server.objects["out"]) == ["twice.jsonl", "twice.jsonl.evmp.json"]
