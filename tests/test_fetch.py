"""What a job names elsewhere: fetched whole, once, checked, and told of when it cannot be had."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from httpserver import Answer, HttpServer, serving
from jobfolder import JobFolder, kill, wait_for
from ossserver import KEY_ID, KEY_SECRET, OssServer, serving_oss
from test_remote_http import chunked
from test_resource import write_zip
from test_sink import file_size_limit

from evmp.asset import localize
from evmp.errors import ConfigError, DownloadError, EvmpError, ModelError
from evmp.fetch import Copy, fetch
from evmp.job import Job
from evmp.remote.ossclient import CRC_HEADER
from evmp.source import Kind, open_source
from evmp.storage.upload import PART_BYTES

BODY = os.urandom(300_000)
PROCESS = """
import evmp

class Mine(evmp.Process):
    def process(self, it):
        return it
"""
CODE: dict[str, Any] = {"user_process_config": [{"user_process_cls": "mine.Mine"}]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "evmp"


@pytest.fixture
def oss(monkeypatch: pytest.MonkeyPatch) -> Iterator[OssServer]:
    """An OSS, whose credentials are in the environment."""
    monkeypatch.setenv("OSS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", KEY_SECRET)
    with serving_oss() as server:
        yield server


@pytest.fixture
def web() -> Iterator[HttpServer]:
    with serving() as server:
        yield server


def job_of(**keys: Any) -> Job:
    least = {"model_path": "m", "model_type": "classifier", "input_oss_file": "in.txt"}
    return Job(**{**least, "output_oss_file": "out.jsonl", **keys})


def put_model(oss: OssServer, model: Path, prefix: str) -> dict[str, bytes]:
    files = {f"{prefix}{file.name}": file.read_bytes() for file in model.iterdir()}
    return {**files, f"{prefix}": b""}  # as the console makes folders


def photos_of(photo_file: Callable[..., bytes], n: int) -> dict[str, bytes]:
    return {f"{i} %41+图.jpg": photo_file("coffee", size=(50 + i, 40)) for i in range(n)}


def test_everything_may_be_in_another_bucket_among_faults_and_a_kill(
    job: JobFolder, oss: OssServer, tiny_model: Path, photo_file: Callable[..., bytes]
) -> None:
    images = photos_of(photo_file, 40)
    names = list(images)
    for name, data in images.items():
        (job.path / name).write_bytes(data)
    (job.path / "mine.py").write_text(PROCESS)
    samples = [{"image": name, "id": n} for n, name in enumerate(names[:4])]
    (job.path / "in.txt").write_text("\n".join([*names, *map(json.dumps, samples)]))
    local = {"input_table": None, "reserved_columns": None, "batch_size": 4, "block_rows": 16}
    expected = job.do(**local, **CODE, input_oss_file="in.txt", user_resource="mine.py")
    for sample in samples:
        sample.update(image=f"oss://photos/{sample['image']}", note="oss://code/mine.py")
    lines = [*(f"oss://photos/{name}" for name in names), *map(json.dumps, samples), "mine.py"]
    lines.append(json.dumps({"image": str(job.path / names[0])}))
    oss.objects = {
        "photos": images,
        "lists": {"a/in.txt": "\n".join(lines).encode()},
        "code": {"mine.py": PROCESS.encode()},
        "models": put_model(oss, tiny_model, "nets/tiny/"),
        "out": {},
    }
    job.write(
        **local,
        **CODE,
        model_path="oss://models/nets/tiny/",
        input_oss_file="oss://lists/a/in.txt",
        user_resource="oss://code/mine.py",
        output_oss_file="oss://out/out.jsonl",
        ossHost=oss.endpoint,
        download_retries=5,
        read_timeout_seconds=1,
    )
    oss.trouble = (Random(1), 0.02)

    process = job.start()
    wait_for(process, lambda: oss.requests[names[20]])
    assert kill(process) == []
    done = job.run()

    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in oss.objects["out"]["out.jsonl"].splitlines()]
    found = [row["prediction_result"] for row in rows]
    assert found[:44] == [row["prediction_result"] for row in expected]
    assert [row["note"] for row in rows[40:44]] == ["oss://code/mine.py"] * 4
    elsewhere = "which an input from elsewhere may name only with allow_local_paths: true"
    assert [elsewhere in it["error_msg"] for it in found[44:]] == [True] * 2
    n_asked = oss.requests["nets/tiny/model.yaml"]
    assert "already done: 46 rows" in job.run().stderr
    assert oss.requests["nets/tiny/model.yaml"] == n_asked

    oss.objects["lists"]["a/in.txt"] += b"\n"
    assert "input.files[0].etag" in job.run().stderr


def test_model_and_code_may_be_archives_of_a_web_server(
    job: JobFolder, web: HttpServer, tiny_model: Path, photo_file: Callable[..., bytes]
) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(tiny_model, "tiny-1.0")
    code = write_zip(job.path / "c.zip", {"mine.py": PROCESS.encode()}).read_bytes()
    web.put("/model.tar.gz?token=geheim", packed.getvalue())
    web.put("/code.zip?token=geheim", Answer(code, headers={"ETag": '"1"'}))
    web.put("/list", web.put("/0.jpg", photo_file("coffee", size=(50, 40))).encode())
    secret = web.url.replace("//", "//me:geheim@")
    keys = {"input_table": None, "reserved_columns": None, "allow_private_hosts": True}
    job.write(
        **keys,
        model_path=f"{secret}/model.tar.gz?token=geheim",
        input_oss_file=f"{web.url}/list",
        user_resource=f"{web.url}/code.zip?token=geheim",
        **CODE,
    )

    done = job.run()

    assert done.returncode == 0, done.stderr
    assert "class" in job.rows()[0]["prediction_result"]
    assert web.headers["/model.tar.gz?token=geheim"]["authorization"].startswith("Basic ")
    told = [done.stderr, done.stdout, (job.path / "out.jsonl.evmp.json").read_text()]
    assert not any("geheim" in text for text in told)


def fetch_model(uri: str, **keys: Any) -> Copy:
    return fetch("model_path", uri, job_of(**keys), is_folder=True)


def test_copies_are_made_once_for_each_version(oss: OssServer, cache: Path) -> None:
    large = bytes(PART_BYTES + 1)  # more than is asked for at once
    oss.objects["bkt"] = {"m/a": b"1", "m/b/c": large, "m2/a": b"3"}
    keys = {"ossHost": oss.endpoint}

    first = fetch_model("oss://bkt/m", **keys)
    n_got = oss.requests["m/b/c"]
    again = fetch_model("oss://bkt/m", **keys)
    oss.objects["bkt"]["m/a"] = b"2"
    other = fetch_model("oss://bkt/m", **keys)

    assert first == again and oss.requests["m/b/c"] > n_got
    files = {str(it.relative_to(first.folder)) for it in first.folder.rglob("*")}
    assert files == {"a", "b", "b/c"}
    assert (first.folder / "a").read_bytes() == b"1" and (other.folder / "a").read_bytes() == b"2"
    assert (other.folder / "b/c").read_bytes() == large
    assert not list(cache.glob("*.part"))


def test_what_breaks_off_goes_on_where_it_was(web: HttpServer) -> None:
    head = {"ETag": '"1"'}
    half = Answer(BODY[: len(BODY) // 2], length=len(BODY), headers=head, cut=True)
    size = len(half.body)
    rest = {**head, "Content-Range": f"bytes {size}-{len(BODY) - 1}/{len(BODY)}"}
    whole = Answer(BODY, headers=head)
    url = web.put("/m.bin", whole, half, Answer(BODY[size:], status=206, headers=rest), whole)

    copy = fetch_model(url)

    assert copy.file.read_bytes() == BODY
    assert web.requests["/m.bin"] == 4
    assert fetch_model(url) == copy and web.requests["/m.bin"] == 5


def test_a_server_without_etags_is_asked_for_the_whole_again(web: HttpServer) -> None:
    half = Answer(BODY[:1000], length=len(BODY), cut=True)
    url = web.put("/m.bin", Answer(BODY), half, Answer(BODY))

    copy = fetch_model(url)

    assert copy.file.read_bytes() == BODY
    (item,) = copy.items.values()
    assert item.etag == f"sha256:{hashlib.sha256(BODY).hexdigest()}"
    assert fetch_model(url) == copy


def test_damaged_objects_are_fetched_again_or_refused(oss: OssServer) -> None:
    large = bytes(PART_BYTES) + BODY
    oss.objects["bkt"] = {"m": BODY, "large": large}
    oss.fail("m", 0, 0, 503, "reset", "cut", "flip")
    oss.fail("large", 0, 0, 0, "flip")

    assert fetch_model("oss://bkt/m", ossHost=oss.endpoint).file.read_bytes() == BODY
    assert fetch_model("oss://bkt/large", ossHost=oss.endpoint).file.read_bytes() == large

    oss.fail("large", *[0, 0, 0, "flip"], *[0, 0, "flip"] * 2)
    oss.objects["bkt"]["large"] = large + b"1"
    message = "the object has come with another CRC64"
    assert failure_of("oss://bkt/large", ossHost=oss.endpoint) == message


def failure_of(uri: str, **keys: Any) -> str:
    with pytest.raises(DownloadError) as caught:
        fetch_model(uri, **keys)
    return str(caught.value)


def test_what_cannot_be_had_is_told(oss: OssServer, web: HttpServer, cache: Path) -> None:
    oss.objects = {"bkt": {"m": BODY, "no": b"", "up/../m": b""}, "far": {}}
    oss.denied = {"no"}
    keys = {"ossHost": oss.endpoint}
    web.put("/far", Answer(status=302, headers={"Location": "http://169.254.169.254/m"}))
    web.put("/huge", Answer(length=10**12))
    web.put("/endless", Answer(length=None, pieces=lambda: iter([BODY])))
    few = {"fetch_limit_bytes": 1000, **keys}

    assert failure_of("oss://bkt/none", **keys) == "404 NoSuchKey: there is nothing of that name"
    assert failure_of("oss://none/m", **keys) == "404 NoSuchBucket"
    assert failure_of("oss://bkt/no", **keys) == "403 AccessDenied"
    oss.elsewhere = {"far": "oss-cn-far.aliyuncs.com"}
    assert failure_of("oss://far/m", **keys) == (
        "403 AccessDenied; the bucket is at oss-cn-far.aliyuncs.com"
    )
    assert "oss.example.com is no host of OSS" in failure_of("oss://bkt.oss.example.com/m", **keys)
    assert failure_of("oss://bkt/m", **few) == f"{len(BODY)} bytes exceed fetch_limit_bytes, 1000"
    assert failure_of("oss://bkt/up", **keys) == "names '../m', a place outside of itself"
    oss.objects["bkt"].update((f"many/{n}", b"") for n in range(10_001))
    assert failure_of("oss://bkt/many", **keys) == "more than 10000 files"
    oss.skew = 3600
    assert failure_of("oss://bkt/m", **keys) == "403 RequestTimeTooSkewed"
    for told in ({}, {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT", CRC_HEADER: "abc"}):
        web.put("/bkt/m", Answer(BODY, headers=told))
        assert failure_of("oss://bkt/m", ossHost=web.url) == "the answer is none of OSS's"
    assert failure_of(f"{web.url}/none") == "404 Not Found"
    assert failure_of("http://there-is-none.invalid/m").startswith("there is no host")
    assert failure_of("http://[bad/m") == "not a URL"
    assert "169.254.169.254, an address that is not" in failure_of(
        f"{web.url}/far", allow_private_hosts=False
    )
    assert failure_of(f"{web.url}/huge").endswith("exceed fetch_limit_bytes, 68719476736")
    assert failure_of(f"{web.url}/endless", **few) == "more bytes come than fetch_limit_bytes, 1000"
    assert not [it for it in cache.iterdir() if it.suffix not in (".lock", ".part")]


def test_many_at_once_fetch_one_copy(web: HttpServer) -> None:
    url = web.put("/m", Answer(BODY, headers={"ETag": '"1"'}))

    with ThreadPoolExecutor(4) as threads:
        copies = list(threads.map(fetch_model, [url] * 4))

    assert len({copy.folder for copy in copies}) == 1
    assert web.requests["/m"] == 4 + 2  # each looks; one fetches, and looks again


def test_copies_need_a_folder(web: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = web.put("/m", BODY)

    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    assert failure_of(url).startswith("cannot be kept in /proc/evmp: ")


def test_a_full_disk_is_told_as_what_it_is(oss: OssServer, web: HttpServer, cache: Path) -> None:
    oss.objects["bkt"] = {"m": BODY}
    url = web.put("/m", Answer(BODY, headers={"ETag": '"1"'}))

    with file_size_limit(100_000):
        for uri in (url, "oss://bkt/m"):
            message = failure_of(uri, ossHost=oss.endpoint)
            assert message.startswith(f"cannot be kept in {cache}: file too large; XDG_CACHE_HOME")
    assert web.requests["/m"] == 3  # one looks, one fetches, and one looks again


def test_files_that_cannot_be_side_by_side_here_are_told(oss: OssServer) -> None:
    oss.objects["bkt"] = {"m/a": b"1", "m/a/b": b"2", f"n/{'图' * 100}": b"3"}

    assert failure_of("oss://bkt/m/", ossHost=oss.endpoint) == (
        "names 'a' as a file and as a folder of others"
    )
    assert "which is too long for a file here" in failure_of("oss://bkt/n/", ossHost=oss.endpoint)


def test_what_takes_long_is_told_meanwhile(
    oss: OssServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    oss.objects["bkt"] = {"m/a": bytes(9_000_000), "m/b": bytes(2_000_000)}
    caplog.set_level("INFO")
    fetch_model("oss://bkt/m/", ossHost=oss.endpoint)
    assert caplog.messages == []  # it takes no time

    oss.objects["bkt"]["m/b"] = bytes(2_000_001)
    monkeypatch.setattr("evmp.fetch.TELL_SECONDS", 0)
    fetch_model("oss://bkt/m/", ossHost=oss.endpoint)

    assert caplog.messages[-1] == "fetching model_path: 0.01 of 0.01 GB have come"


def test_a_lost_end_of_what_has_come_begins_anew(web: HttpServer) -> None:
    whole, lost = chunked(BODY), chunked(BODY, end=b"")
    for answer in (whole, lost):
        answer["headers"]["ETag"] = '"1"'
    url = web.put("/m", Answer(**whole), Answer(**lost), Answer(status=416), Answer(**whole))

    assert fetch_model(url).file.read_bytes() == BODY


def test_what_changes_meanwhile_is_refused(oss: OssServer, web: HttpServer, cache: Path) -> None:
    old, new = (Answer(BODY, headers={"ETag": f'"{n}"'}) for n in (1, 2))
    url = web.put("/m", old, old, new)
    changed = "it was changed while it was fetched; run the job again"

    assert failure_of(url) == changed
    assert not [it for it in cache.iterdir() if it.suffix not in (".lock", ".part")]
    assert fetch_model(url).file.read_bytes() == BODY


def test_a_private_host_that_the_job_names_is_asked(web: HttpServer) -> None:
    url = web.put("/m", b"it")

    assert fetch_model(url, allow_private_hosts=False).file.read_bytes() == b"it"


def test_errors_name_the_key_and_no_secret(web: HttpServer) -> None:
    url = web.url.replace("//", "//me:geheim@") + "/x.zip?sign=geheim"
    shown = web.url.replace("//", "//***@") + "/x.zip?sign=***: 404 Not Found"
    list_of = {"input_table": "", "input_oss_file": url}
    made: list[tuple[type[EvmpError], str, Callable[[], object]]] = [
        (ModelError, "model_path", lambda: localize(job_of(model_path=url))),
        (ConfigError, "user_resource", lambda: localize(job_of(user_resource=url, **CODE))),
        (EvmpError, "input_oss_file", lambda: open_source(job_of(**list_of)).describe()),
    ]

    for kind, key, call in made:
        with pytest.raises(kind) as caught:
            call()
        assert str(caught.value) == f"{key}: {shown}"


def test_a_bad_archive_is_no_model(web: HttpServer, cache: Path) -> None:
    damaged = web.put("/m.tar.gz", b"no archive")
    job = job_of(model_path=damaged)

    with pytest.raises(ModelError, match=r"^model_path: http.*m.tar.gz is damaged"):
        localize(job)
    assert not [it for it in cache.iterdir() if it.suffix not in (".lock", ".part")]


def test_rows_of_a_list_from_elsewhere_come_from_its_copy(web: HttpServer) -> None:
    url = web.put("/in.txt", b"http://h/1.jpg\n/etc/passwd\n")
    job = job_of(input_table="", input_oss_file=url)
    planned = open_source(job).describe()
    web.put("/in.txt", b"")

    rows = list(open_source(job, planned).read(0, planned.n_rows))

    assert [row.kind for row in rows] == [Kind.URL, Kind.ERROR]
