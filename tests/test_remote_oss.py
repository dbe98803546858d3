"""Objects of OSS, by oss2 from a server on this machine that checks what the real one checks."""

from __future__ import annotations

import gzip
import os
import re
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oss2
import pytest
from httpserver import Answer, serving
from jobfolder import JobFolder
from ossserver import KEY_ID, KEY_SECRET, REGION, TOKEN, OssServer, serving_oss
from test_remote_http import LIMIT, job_of, self_signed
from test_remote_rows import REMOTE

from evmp.errors import DownloadError
from evmp.remote import AnyRemote
from evmp.remote.oss import OssRemote
from evmp.remote.ossclient import Places, region_of

BODY = os.urandom(300_000)
KEYS = ["a.jpg", "deep/er/b.jpg", "with space, %41+plus?and#hash.jpg", "/leading", "图/片.jpg"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OssServer]:
    """An OSS with a bucket, whose credentials are in the environment."""
    monkeypatch.setenv("OSS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", KEY_SECRET)
    with serving_oss() as server:
        server.objects["bkt"] = {"x": BODY}
        yield server


@pytest.fixture
def remote(server: OssServer) -> Iterator[Callable[..., OssRemote]]:
    """`remote(download_retries=0)`: a client for that OSS; closed at the end."""
    made: list[OssRemote] = []

    def remote(**keys: Any) -> OssRemote:
        made.append(OssRemote(job_of(**{"ossHost": server.endpoint, **keys})))
        return made[-1]

    yield remote
    for one in made:
        one.close()


def failure_of(remote: OssRemote | AnyRemote, location: str) -> str:
    with pytest.raises(DownloadError) as caught:
        remote.fetch(location)
    return str(caught.value)


@pytest.mark.parametrize("version", ["V1", "V4"])
def test_objects_of_any_name_come_whole(
    server: OssServer,
    remote: Callable[..., OssRemote],
    monkeypatch: pytest.MonkeyPatch,
    version: str,
) -> None:
    if version == "V4":
        monkeypatch.setenv("OSS_REGION", REGION)
    server.objects["bkt"] = {key: key.encode() + BODY for key in KEYS}
    client = remote()

    for key in KEYS:
        assert client.fetch(f"oss://bkt/{key}") == key.encode() + BODY

    assert server.signatures == {version}


def test_what_oss2_has_put_comes_back(server: OssServer, remote: Callable[..., OssRemote]) -> None:
    bucket = oss2.Bucket(oss2.Auth(KEY_ID, KEY_SECRET), server.endpoint, "bkt")
    once = {"x-oss-forbid-overwrite": "true"}
    bucket.put_object("new", BODY, headers=once)
    with pytest.raises(oss2.exceptions.OssError) as caught:
        bucket.put_object("new", b"other", headers=once)
    assert caught.value.code == "FileAlreadyExists"
    bucket.put_object("packed", gzip.compress(BODY), headers={"Content-Encoding": "gzip"})
    client = remote()

    assert client.fetch("oss://bkt/new") == client.fetch("oss://bkt/packed") == BODY
    assert bucket.get_object("new", byte_range=(10, 19)).read() == BODY[10:20]

    bucket.delete_object("new")
    assert failure_of(client, "oss://bkt/new") == "404 NoSuchKey"


def test_what_may_pass_is_tried_again(server: OssServer, remote: Callable[..., OssRemote]) -> None:
    client = remote(download_retries=1)
    faults: dict[str | int, str] = {
        "flip": "the object has come with another CRC64 than it has",
        "cut": "the body ended before its announced length",
        "reset": "the connection broke off",
        "lose": "the connection broke off",
        "tear": "the connection broke off",
        500: "500 InternalError",
        503: "503 SlowDown",
    }

    for fault, message in faults.items():
        server.fail("x", fault)
        assert client.fetch("oss://bkt/x") == BODY
        server.fail("x", fault, fault)
        assert failure_of(client, "oss://bkt/x") == f"{message}; tried 2 times"


def test_what_cannot_pass_is_asked_for_once(
    server: OssServer, remote: Callable[..., OssRemote]
) -> None:
    server.objects["bkt"].update(huge=bytes(LIMIT + 1), secret=BODY)
    server.denied.add("secret")
    client = remote()

    assert failure_of(client, "oss://bkt/none") == "404 NoSuchKey"
    assert failure_of(client, "oss://other/none2") == "404 NoSuchBucket"
    assert failure_of(client, "oss://bkt/huge") == "1048577 bytes exceed max_row_bytes, 1048576"
    assert failure_of(client, "oss://bkt/secret") == "403 AccessDenied"
    assert server.requests == {"none": 1, "none2": 1, "huge": 1, "secret": 1}


def test_a_bucket_redirects_nobody_and_takes_no_token(
    server: OssServer, remote: Callable[..., OssRemote], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OSS_SESSION_TOKEN", TOKEN)
    server.token = TOKEN
    with serving() as other:
        server.moved["x"] = other.put("/x", BODY)

        assert failure_of(remote(), "oss://bkt/x") == "302 a redirect, which is not followed"
        assert other.n_connections == 0


def test_a_silent_oss_ends_by_the_read_timeout(
    server: OssServer, remote: Callable[..., OssRemote]
) -> None:
    server.fail("x", "stall")

    message = failure_of(remote(read_timeout_seconds=0.2, download_retries=0), "oss://bkt/x")

    assert message == "nothing came for 0.2 seconds"


def test_an_endpoint_that_is_not_the_bucket_s_is_told(
    server: OssServer, remote: Callable[..., OssRemote]
) -> None:
    def told(endpoint: str) -> str:
        return failure_of(remote(ossHost=endpoint, download_retries=0), "oss://bkt/x")

    with serving() as gone:
        nobody = gone.url
    with serving() as web:
        assert told(web.url) == "404 without a reason"
        web.put("/bkt/x", Answer(b"<html>Welcome", status=403))
        assert told(web.url) == "403 without a reason"
    assert told(nobody) == "127.0.0.1: connection refused"
    assert re.fullmatch("there is no host .*|.* cannot be looked up now", told("http://a.invalid"))
    server.elsewhere["bkt"] = "oss-cn-shanghai.aliyuncs.com"
    message = "403 AccessDenied; the bucket is at oss-cn-shanghai.aliyuncs.com"
    assert told(server.endpoint) == message


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("OSS_ACCESS_KEY_SECRET", "wrong", "403 SignatureDoesNotMatch"),
        ("OSS_ACCESS_KEY_ID", "wrong", "403 InvalidAccessKeyId"),
        ("OSS_SESSION_TOKEN", "wrong", "403 InvalidSecurityToken"),
        ("OSS_ACCESS_KEY_ID", "", "OSS_ACCESS_KEY_SECRET is set, and OSS_ACCESS_KEY_ID is not"),
        ("OSS_ACCESS_KEY_SECRET", "", "OSS_ACCESS_KEY_ID is set, and OSS_ACCESS_KEY_SECRET is not"),
    ],
)
def test_credentials_that_do_not_serve_are_told(
    remote: Callable[..., OssRemote],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.setenv(variable, value)

    assert failure_of(remote(), "oss://bkt/x").startswith(message)


def test_a_clock_that_is_wrong_is_told(
    server: OssServer, remote: Callable[..., OssRemote], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.skew = 1800

    assert failure_of(remote(), "oss://bkt/x") == "403 RequestTimeTooSkewed"
    monkeypatch.setenv("OSS_REGION", REGION)
    assert failure_of(remote(), "oss://bkt/x") == "403 RequestTimeTooSkewed"


def test_a_session_s_token_goes_along(
    server: OssServer, remote: Callable[..., OssRemote], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token = TOKEN
    monkeypatch.setenv("OSS_SESSION_TOKEN", TOKEN)

    assert remote().fetch("oss://bkt/x") == BODY


def test_a_certificate_must_be_known(
    server: OssServer,
    remote: Callable[..., OssRemote],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    certificate = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    endpoint = server.endpoint.replace("http:", "https:")

    unknown = failure_of(remote(ossHost=endpoint), "oss://bkt/x")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))

    assert unknown == "TLS failed, perhaps by the certificate"
    assert remote(ossHost=endpoint).fetch("oss://bkt/x") == BODY


def test_places() -> None:
    keys = {"buckets": ("oss://named.oss.my.net/p/",), "ossHost": "oss-cn-beijing.aliyuncs.com"}
    places = Places(job_of(**keys))

    assert places.find("oss://b.oss-eu-west-1-internal.aliyuncs.com/k/1.jpg") == (
        ("https://oss-eu-west-1-internal.aliyuncs.com", "b", "k/1.jpg")
    )
    assert places.find("oss://named/k").endpoint == "https://oss.my.net"
    assert places.find("oss://b.oss.my.net/k").endpoint == "https://oss.my.net"
    assert places.find("OSS://other/k").endpoint == "https://oss-cn-beijing.aliyuncs.com"
    assert region_of("https://oss-eu-west-1-internal.aliyuncs.com") == "eu-west-1"
    assert region_of("https://oss-accelerate.aliyuncs.com") == ""
    assert region_of("https://oss.my.net") == ""


@pytest.mark.parametrize(
    "location",
    [
        "oss://b.evil.net/k",
        "oss://b.1234.cn-hangzhou.fc.aliyuncs.com/k",
        "oss://b.evil.net?.oss-cn-hangzhou.aliyuncs.com/k",
        "oss://b.me@evil.net:80#oss-cn-hangzhou.aliyuncs.com/k",
        "oss://b.oss-cn-hangzhou.aliyuncs.com.evil.net/k",
        "oss://bucket",
        "oss://bucket/",
        "oss:///key",
    ],
)
def test_rows_do_not_say_who_gets_the_credentials(location: str) -> None:
    with pytest.raises(DownloadError, match=r"is no host of OSS|expected oss://"):
        Places(job_of(ossHost="oss-cn-hangzhou.aliyuncs.com")).find(location)


def test_a_bucket_without_a_host_is_told() -> None:
    with pytest.raises(DownloadError, match="no host for bucket b; set ossHost"):
        Places(job_of()).find("oss://b/k")


def test_rows_of_a_job_may_be_on_oss(
    job: JobFolder, server: OssServer, photo_file: Callable[..., bytes]
) -> None:
    image = photo_file("coffee", size=(60, 40))
    (job.path / "0.jpg").write_bytes(image)
    server.objects["bkt"] = {f"{n}.jpg": image for n in range(30)}
    lines = ["0.jpg", *(f"oss://bkt/{n}.jpg" for n in range(31))]
    (job.path / "in.txt").write_text("".join(f"{line}\n" for line in lines))

    rows = job.do(**{**REMOTE, "ossHost": server.endpoint, "allow_private_hosts": False})

    results = [row["prediction_result"] for row in rows]
    assert all(result == results[0] and "class" in result for result in results[:-1])
    assert results[-1] == {
        "error_stage": "download",
        "error_msg": "oss://bkt/30.jpg: 404 NoSuchKey",
    }
    record = (job.path / "out.jsonl.evmp.json").read_text()
    assert KEY_ID not in record and KEY_SECRET not in record
