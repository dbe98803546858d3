"""A whole job whose rows lie on OSS, S3 and the web at once, through faults and kills."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator

import psutil
import pytest
from httpserver import Answer, HttpServer, serving
from jobfolder import SECONDS, JobFolder, wait_for
from ossserver import KEY_ID, KEY_SECRET, OssServer, serving_oss
from s3server import S3Server, environment_of, serving_s3
from test_custom_job import CUSTOM, MINE
from test_remote_rows import name_of

N_ROWS = 80
FAULTS = 0.02
WEB_FAULTS = [
    Answer(status=503),
    Answer(status=429, headers={"Retry-After": "0"}),
    Answer(b"half", length=100, cut=True),
    Answer(b"half", length=100, reset=True),
    Answer(raw=lambda: iter([])),
]


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[HttpServer, OssServer, S3Server]]:
    """Three servers, whose credentials are in the environment."""
    with serving() as web, serving_oss() as oss, serving_s3() as s3:
        keys = {"OSS_ACCESS_KEY_ID": KEY_ID, "OSS_ACCESS_KEY_SECRET": KEY_SECRET}
        for name, value in {**keys, **environment_of(s3)}.items():
            monkeypatch.setenv(name, value)
        oss.objects = {"texts": {}, "results": {}}
        yield web, oss, s3


def test_rows_of_mixed_values_are_exact_through_faults_and_kills(
    job: JobFolder,
    cloud: tuple[HttpServer, OssServer, S3Server],
    photo_file: Callable[..., bytes],
) -> None:
    web, oss, s3 = cloud
    chance = random.Random(3)
    lines, expected = [], []
    for n in range(N_ROWS):
        photo = photo_file("coffee", size=(40 + n, 30))
        faults = [fault for fault in WEB_FAULTS if chance.random() < FAULTS]
        image = web.put(f"/{n}.jpg", *faults, photo)
        oss.objects["texts"][f"{n} 图.txt"] = text = f"text {n}".encode() * 500
        other = s3.put(f"{n}.bin", f"other {n}".encode())
        if chance.random() < FAULTS:
            s3.fail(f"{n}.bin", 503)
        row = {"n": n, "image": image, "text": f"oss://texts/{n} 图.txt", "other": other, "x": None}
        lines.append(json.dumps(row) + "\n")
        known = {"text": text.decode(), "other": f"other {n}", "n": n, "x": None}
        expected.append((row, known, [30, 40 + n, 3]))
    oss.trouble = random.Random(4), FAULTS
    (job.path / "mine.py").write_text(MINE)
    (job.path / "in.jsonl").write_text("".join(lines))
    job.write(
        **{**CUSTOM, "output_oss_file": "oss://results/mixed.jsonl", "ossHost": oss.endpoint},
        allow_private_hosts=True,
        read_timeout_seconds=1,
        num_worker=2,
        block_rows=16,
        download_concurrency=4,
    )

    process = job.start()
    killed: set[int] = set()

    def kill_decoders() -> bool:
        """Kill a decoder whenever some more files have been asked for."""
        if web.requests.total() >= 15 * (len(killed) + 1):
            family = psutil.Process(process.pid).children(recursive=True)
            decoders = [it.pid for it in family if "decoder" in name_of(it.pid)]
            for pid in set(decoders[:1]) - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        return len(killed) >= 3

    wait_for(process, kill_decoders)
    process.kill()
    process.communicate(timeout=SECONDS)
    done = job.run()

    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in oss.objects["results"]["mixed.jsonl"].splitlines()]
    assert len(found) == N_ROWS
    for line, (row, known, shape) in zip(found, expected, strict=True):
        result = line.pop("prediction_result")
        assert line == row
        assert result.pop("image")["shape"] == shape
        assert result == known
    assert sorted(oss.objects["results"]) == ["mixed.jsonl", "mixed.jsonl.evmp.json"]
    assert not any(upload.parts for upload in oss.uploads.values())
