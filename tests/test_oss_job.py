"""Whole jobs whose output, ledger and files lie on OSS."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jobfolder import JobFolder
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
