"""Whole jobs whose rows are on a web server: what comes of them, in which order, under kills."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from httpserver import Answer, HttpServer, serving
from jobfolder import SECONDS, JobFolder, wait_for
from test_custom_job import CUSTOM, MINE

N_ROWS = 40
REMOTE: dict[str, Any] = {
    "input_table": None,
    "input_oss_file": "in.txt",
    "reserved_columns": None,
    "allow_private_hosts": True,
    "max_error_fraction": 1,
    "preprocess_thread_num": 1,
    "batch_size": 4,
}


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def images(photo_file: Callable[..., bytes]) -> list[bytes]:
    names = ["coffee", "chelsea", "camera", "rocket", "china"]
    return [photo_file(names[n % 5], size=(60 + n, 100)) for n in range(N_ROWS)]


def write_list(job: JobFolder, lines: list[str]) -> None:
    (job.path / "in.txt").write_text("".join(f"{line}\n" for line in lines))


def results(job: JobFolder, **keys: Any) -> list[Any]:
    return [row["prediction_result"] for row in job.do("--quiet", **{**REMOTE, **keys})]


def local_results(job: JobFolder, images: list[bytes]) -> list[Any]:
    """Predict the images as local files."""
    for n, image in enumerate(images):
        (job.path / f"{n}.jpg").write_bytes(image)
    write_list(job, [f"{n}.jpg" for n in range(len(images))])
    done = results(job)
    (job.path / "out.jsonl").unlink()
    return done


def test_remote_rows_end_as_local_ones_and_bad_ones_alone(
    job: JobFolder, server: HttpServer, images: list[bytes]
) -> None:
    expected = local_results(job, images)
    urls = [server.put(f"/{n}.jpg", image) for n, image in enumerate(images)]
    server.put("/moved", Answer(status=301, headers={"Location": "/0.jpg"}))
    server.put("/busy", Answer(status=503, headers={"Retry-After": "0"}), images[1])
    server.put("/huge", Answer(length=10 << 30))
    server.put("/page", b"<html>Not an image</html>")
    server.put("/file", Answer(status=302, headers={"Location": f"file://{job.path}/0.jpg"}))
    secret = server.url.replace("//", "//me:geheim@") + "/gone?token=geheim"
    bad = {
        secret: "***@127.0.0.1:" + str(server.port) + "/gone?token=***: 404 Not Found",
        server.url + "/huge": "10737418240 bytes exceed max_row_bytes, 67108864",
        server.url + "/file": "a redirect to file: is not followed",
    }
    samples = [{"id": n, "image": url} for n, url in enumerate(urls[:3])]
    lines = [*urls, server.url + "/moved", server.url + "/busy", "5.jpg", *map(json.dumps, samples)]
    write_list(job, [*lines, server.url + "/page", *bad])
    job.write(**{**REMOTE, "num_worker": 2})

    done = job.run()
    rows = job.rows()

    assert done.returncode == 0, done.stderr
    found = [row["prediction_result"] for row in rows]
    good = [*expected, expected[0], expected[1], expected[5], *expected[:3]]
    assert found[: len(good)] == good
    assert found[len(good)]["error_stage"] == "decode"
    for result, message in zip(found[len(good) + 1 :], bad.values(), strict=True):
        assert result["error_stage"] == "download" and message in result["error_msg"]
    record = (job.path / "out.jsonl.evmp.json").read_text()
    assert "geheim" not in done.stdout + done.stderr + record + json.dumps(found)


def test_a_private_host_is_a_failed_row(
    job: JobFolder, server: HttpServer, make_table: Callable[..., Path], images: list[bytes]
) -> None:
    make_table(job.path / "in.parquet", [server.put("/x", images[0]), "0.jpg"])
    (job.path / "0.jpg").write_bytes(images[0])
    keys = {"input_table": "in.parquet", "input_oss_file": None, "image_type": "url"}

    private, local = results(job, **keys, allow_private_hosts=False)

    assert private["error_stage"] == "download"
    assert "127.0.0.1, an address that is not public" in private["error_msg"]
    assert "class" in local and server.n_connections == 0


def test_a_slow_row_holds_no_other_up(
    job: JobFolder, server: HttpServer, images: list[bytes]
) -> None:
    all_others = threading.Event()
    urls = [server.put(f"/{n}", image) for n, image in enumerate(images[:20])]
    server.put("/0", Answer(images[0], gate=all_others))
    server.on_request = lambda: all_others.set() if len(server.requests) == 20 else None
    write_list(job, urls)

    found = results(job, download_concurrency=4)

    assert all_others.is_set() and all("class" in result for result in found)
    assert server.requests == dict.fromkeys(server.requests, 1)
    assert server.n_connections <= 4


def test_many_files_come_at_once(job: JobFolder, server: HttpServer, images: list[bytes]) -> None:
    enough = threading.Event()
    urls = [server.put(f"/{n}", Answer(image, gate=enough)) for n, image in enumerate(images)]
    server.on_request = lambda: enough.set() if server.n_now >= 16 else None
    write_list(job, urls)

    assert len(results(job)) == N_ROWS

    assert server.n_most == 16


def test_custom_code_gets_every_file_of_a_row(
    job: JobFolder, server: HttpServer, images: list[bytes]
) -> None:
    image = server.put("/a.JPG?size=1", images[0])
    text = server.put("/text", b"some words")
    rows = [
        {"image": image, "text": text, "again": text, "n": 1, "word": "hello"},
        {"image": image, "other": server.url + "/gone"},
        {"text": text, "other": image},
    ]
    (job.path / "mine.py").write_text(MINE)
    write_list(job, [json.dumps(row) for row in rows])

    whole, broken, files = results(job, **{**CUSTOM, "input_oss_file": "in.txt"})

    assert whole["image"]["shape"] == [100, 60, 3] and whole["n"] == 1 and whole["word"] == "hello"
    assert whole["text"] == whole["again"] == "some words"
    assert broken["error_stage"] == "download"
    assert broken["error_msg"] == f"other: {server.url}/gone: 404 Not Found"
    assert files["text"] == "some words" and files["other"]["shape"] == [100, 60, 3]
    assert server.requests["/text"] == 2


def test_decoders_killed_with_downloads_on_the_way_lose_and_repeat_nothing(
    job: JobFolder, server: HttpServer, images: list[bytes]
) -> None:
    expected = local_results(job, images)
    enough = threading.Event()
    urls = [
        server.put(f"/{n}.jpg", Answer(image, gate=enough if n % 2 else None))
        for n, image in enumerate(images)
    ]
    write_list(job, urls * 5)
    job.write(**{**REMOTE, "preprocess_thread_num": 2, "queue_size": 64})
    process = job.start("--quiet")
    killed: set[int] = set()
    seen = 0

    def kill_all() -> bool:
        """Kill the decoders, once they have asked for some files."""
        nonlocal seen
        family = psutil.Process(process.pid).children(recursive=True)
        decoders = {it.pid for it in family if "decoder" in name_of(it.pid)} - killed
        if len(decoders) == 2 and server.requests.total() >= seen + 8:
            for pid in decoders:
                os.kill(pid, signal.SIGKILL)
            killed.update(decoders)
            seen = server.requests.total()
        return len(killed) >= 6

    wait_for(process, kill_all)
    enough.set()
    _, errors = process.communicate(timeout=SECONDS)

    assert process.returncode == 0, errors
    assert [row["prediction_result"] for row in job.rows()] == expected * 5


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""
