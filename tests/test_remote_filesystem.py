"""Files that fsspec opens: on a real S3 by s3fs, and on a WebHDFS, which knows no limit of time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.asyn import get_loop
from httpserver import Answer, HttpServer, serving
from jobfolder import JobFolder
from s3server import BUCKET, DENIED, S3Server, environment_of, serving_s3
from test_remote_http import LIMIT, job_of
from test_remote_oss import KEYS
from test_remote_rows import REMOTE

from evmp.errors import DownloadError
from evmp.fetch import fetch as fetch_copy
from evmp.remote import AnyRemote
from evmp.source import Kind
from evmp.source.location import payload_of
from evmp.storage.filesystem import PIECE_BYTES

BODY = os.urandom(300_000)
OPEN = f"/webhdfs/v1/a.jpg?offset=0&length={len(BODY)}&op=OPEN"


@pytest.fixture(scope="module", autouse=True)
def loop() -> None:
    """Start the one loop that fsspec keeps to the end of the process."""
    get_loop()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """An S3 with an object, whose credentials are in the environment."""
    with serving_s3() as server:
        for name, value in environment_of(server).items():
            monkeypatch.setenv(name, value)
        server.put("x", BODY)
        yield server


@pytest.fixture
def hdfs() -> Iterator[HttpServer]:
    """A WebHDFS with a file, `/a.jpg`."""
    with serving() as server:
        about = {"FileStatus": {"type": "FILE", "length": len(BODY), "pathSuffix": ""}}
        server.put("/webhdfs/v1/a.jpg?op=GETFILESTATUS", json.dumps(about).encode())
        server.put(OPEN, BODY)
        yield server


def fetch(location: str, **keys: Any) -> bytes:
    remote = AnyRemote(job_of(**{"allow_private_hosts": False, **keys}))
    try:
        return remote.fetch(location)
    finally:
        remote.close()


def failure_of(location: str, **keys: Any) -> str:
    with pytest.raises(DownloadError) as caught:
        fetch(location, **keys)
    return str(caught.value)


def test_objects_of_any_name_come_whole(server: S3Server) -> None:
    for key in KEYS:
        assert fetch(server.put(key, key.encode() + BODY)) == key.encode() + BODY
    assert fetch(server.put("empty", b"")) == b""


def test_what_cannot_pass_is_told(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.put(DENIED, BODY)

    assert failure_of(f"s3://{BUCKET}/none") == "no such file or directory"
    assert failure_of("s3://no-bucket/x") == "no such file or directory"
    assert failure_of(f"s3://{BUCKET}/{DENIED}") == "permission denied"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert failure_of(f"s3://{BUCKET}/x") == "permission denied"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert failure_of(f"s3://{BUCKET}/x") == "failed with NoCredentialsError"
    assert server.n_sent < 10_000


def test_no_more_is_asked_for_than_may_come(server: S3Server) -> None:
    location = server.put("large", bytes(3 * LIMIT))

    assert failure_of(location) == f"more bytes come than max_row_bytes, {LIMIT}"
    assert fetch(location, max_row_bytes=3 * LIMIT) == bytes(3 * LIMIT)
    assert server.n_sent == 4 * LIMIT + 1


def test_what_may_pass_is_tried_again(server: S3Server) -> None:
    server.fail("x", 503, 500)

    assert fetch(f"s3://{BUCKET}/x") == BODY


def test_body_that_trickles_ends_by_the_deadline(server: S3Server) -> None:
    server.fail("x", "trickle")

    message = failure_of(f"s3://{BUCKET}/x", download_timeout_seconds=0.5)

    assert message == "not done within 0.5 seconds; raise download_timeout_seconds"


def test_a_host_that_a_row_names_is_asked_only_if_allowed(hdfs: HttpServer) -> None:
    location = f"webhdfs://127.0.0.1:{hdfs.port}/a.jpg"

    assert "allow_private_hosts: true reaches it" in failure_of(location)
    assert "allow_private_hosts" in failure_of("abfs://box@some.host/a.jpg")
    assert hdfs.n_connections == 0
    assert fetch(location, allow_private_hosts=True) == BODY


def test_library_that_hangs_is_left_to_itself(hdfs: HttpServer) -> None:
    hdfs.put(OPEN, Answer(delay=600))
    location = f"webhdfs://127.0.0.1:{hdfs.port}/a.jpg"
    keys = {"allow_private_hosts": True, "download_concurrency": 1}
    remote = AnyRemote(job_of(download_timeout_seconds=0.3, **keys))

    for _ in range(2):  # the second one finds no room
        with pytest.raises(DownloadError, match=r"not done within 0\.3 seconds"):
            remote.fetch(location)

    assert hdfs.requests[OPEN] == 1


def test_connection_that_breaks_off_is_tried_again(hdfs: HttpServer) -> None:
    hdfs.put(OPEN, Answer(raw=lambda: iter([])), BODY)
    location = f"webhdfs://127.0.0.1:{hdfs.port}/a.jpg"

    assert fetch(location, allow_private_hosts=True) == BODY


def test_a_missing_library_is_named() -> None:
    assert failure_of("gs://bucket/a.jpg") == (
        "a library is missing: Please install gcsfs to access Google Storage"
    )


def test_what_is_on_this_machine_is_no_file_of_another() -> None:
    job = job_of()
    assert payload_of("local:///etc/passwd", job) == (Kind.PATH, b"/etc/passwd")
    assert payload_of("simplecache::s3://b/k", job) == (Kind.PATH, b"simplecache::s3://b/k")
    for kind in ("memory", "zip", "reference", "generic", "dir", "github"):
        with pytest.raises(ValueError, match=f"{kind}:// cannot be read"):
            payload_of(f"{kind}://a::file:///etc/passwd", job)


def test_models_lists_and_code_may_be_on_s3(
    server: S3Server, hdfs: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    large = BODY * (PIECE_BYTES // len(BODY) + 1)
    job = job_of(allow_private_hosts=False)

    for body in (large, b"", BODY):
        copy = fetch_copy("model_path", server.put("a/m.onnx", body), job)
        assert copy.file.name == "m.onnx" and copy.file.read_bytes() == body

    n_sent = server.n_sent
    assert fetch_copy("model_path", f"s3://{BUCKET}/a/m.onnx", job) == copy
    assert server.n_sent == n_sent + 1
    with pytest.raises(DownloadError, match="no such file or directory"):
        fetch_copy("user_resource", f"s3://{BUCKET}/none.py", job)
    uri = f"webhdfs://127.0.0.1:{hdfs.port}/a.jpg"
    assert fetch_copy("input_oss_file", uri, job).file.read_bytes() == BODY


def test_models_may_be_folders(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    job = job_of()
    files = {"model.yaml": b"a", "deep/er/w 图%.bin": b"b"}
    for name, body in files.items():
        server.put(f"nets/tiny/{name}", body)
    server.put("nets/tiny/", b"")  # as some tools make for folders
    server.put("nets/tiny2/x", b"c")
    for uri in (f"s3://{BUCKET}/nets/tiny", f"s3://{BUCKET}/nets/tiny/"):
        copy = fetch_copy("model_path", uri, job, is_folder=True)
        assert {name: (copy.folder / name).read_bytes() for name in copy.items} == files
    with pytest.raises(DownloadError, match="is a directory"):
        fetch_copy("user_resource", f"s3://{BUCKET}/nets/tiny", job)
    for end, reason in (("none", "no such file or directory"), ("none/", "nothing of that name")):
        with pytest.raises(DownloadError, match=reason):
            fetch_copy("model_path", f"s3://{BUCKET}/{end}", job, is_folder=True)

    server.put("nets/tiny/model.yaml", b"d")
    other = fetch_copy("model_path", f"s3://{BUCKET}/nets/tiny", job, is_folder=True)
    assert (other.folder / "model.yaml").read_bytes() == b"d"


def test_a_folder_of_hadoop_may_be_a_model(
    hdfs: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = {"type": "FILE", "length": len(BODY), "pathSuffix": "a.jpg"}
    folder = {"type": "DIRECTORY", "length": 0, "pathSuffix": ""}
    nets = "/webhdfs/v1/nets"
    hdfs.put(f"{nets}?op=GETFILESTATUS", json.dumps({"FileStatus": folder}).encode())
    files = {"FileStatuses": {"FileStatus": [file]}}
    hdfs.put(f"{nets}?op=LISTSTATUS", json.dumps(files).encode())
    hdfs.put(f"{nets}/a.jpg?op=GETFILESTATUS", json.dumps({"FileStatus": file}).encode())
    hdfs.put(f"{nets}/a.jpg?offset=0&length={len(BODY)}&op=OPEN", BODY)
    uri = f"webhdfs://127.0.0.1:{hdfs.port}/nets"

    copy = fetch_copy("model_path", uri, job_of(allow_private_hosts=False), is_folder=True)

    assert [*copy.items] == ["a.jpg"] and copy.file.read_bytes() == BODY


def test_rows_of_a_job_and_their_list_may_be_on_s3(
    job: JobFolder,
    server: S3Server,
    photo_file: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = photo_file("coffee", size=(60, 40))
    (job.path / "0.jpg").write_bytes(image)
    lines = ["0.jpg", *(server.put(f"{n}.jpg", image) for n in range(20)), f"s3://{BUCKET}/none"]
    place = server.put("a list/in.txt", "".join(f"{line}\n" for line in lines).encode())
    monkeypatch.setenv("XDG_CACHE_HOME", str(job.path / "cache"))
    keys = {"input_oss_file": place, "allow_private_hosts": False, "allow_local_paths": True}

    rows = job.do(**{**REMOTE, **keys})

    results = [row["prediction_result"] for row in rows]
    assert all(result == results[0] and "class" in result for result in results[:-1])
    assert results[-1] == {
        "error_stage": "download",
        "error_msg": f"s3://{BUCKET}/none: no such file or directory",
    }
    record = (job.path / "out.jsonl.evmp.json").read_text()
    assert server.key_id not in record and server.secret not in record


def test_piece_comes_with_the_size_of_the_whole(server: S3Server) -> None:
    remote = AnyRemote(job_of())

    middle = remote.fetch_piece(f"s3://{BUCKET}/x", 100, 200)
    end = remote.fetch_piece(f"s3://{BUCKET}/x", len(BODY) - 10, len(BODY) + 90)

    assert middle.data == BODY[100:200]
    assert end.data == BODY[-10:]
    assert middle.size == end.size == len(BODY)
    assert middle.version == end.version != ""
    remote.close()
