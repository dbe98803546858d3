"""Files over HTTP, from real servers on this machine, most of which misbehave."""

from __future__ import annotations

import datetime
import email.utils
import gzip
import ipaddress
import itertools
import os
import re
import ssl
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from httpserver import Answer, HttpServer, serving

from evmp.download import Downloads
from evmp.errors import DownloadError
from evmp.fetch import fetch
from evmp.job import Job
from evmp.remote.connection import is_public
from evmp.remote.http import MAX_REDIRECTS, HttpRemote
from evmp.remote.oss import OssRemote
from evmp.storage.oss import OssStorage

BODY = os.urandom(300_000)
LIMIT = 1 << 20


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with serving() as server:
        yield server


@pytest.fixture
def remote() -> Iterator[Callable[..., HttpRemote]]:
    """`remote(download_retries=0)`: a client with such keys; closed at the end."""
    made: list[HttpRemote] = []

    def remote(**keys: Any) -> HttpRemote:
        made.append(HttpRemote(job_of(**keys)))
        return made[-1]

    yield remote
    for one in made:
        one.close()


def job_of(**keys: Any) -> Job:
    return Job(
        model_path="m",
        model_type="classifier",
        input_oss_file="in.txt",
        output_oss_file="out.jsonl",
        **{"allow_private_hosts": True, "max_row_bytes": LIMIT, **keys},
    )


def failure_of(remote: HttpRemote, url: str) -> str:
    with pytest.raises(DownloadError) as caught:
        remote.fetch(url)
    return str(caught.value)


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> dict[str, Any]:
    """Say how to answer with such chunks."""
    framed = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
    return {
        "headers": {"Transfer-Encoding": "chunked"},
        "length": None,
        "pieces": lambda: iter([*framed, end]),
    }


def test_a_file_comes_whole_in_every_wrapping(
    server: HttpServer, remote: Callable[..., HttpRemote]
) -> None:
    gzips = gzip.compress(BODY[:9]) + bytes(8) + gzip.compress(BODY[9:]) + bytes(8)
    wrappings = {
        "/length": Answer(BODY),
        "/close": Answer(BODY, length=None),
        "/chunked": Answer(**chunked(BODY[:10], BODY[10:200_000], BODY[200_000:])),
        "/gzip": Answer(gzip.compress(BODY), headers={"Content-Encoding": "gzip"}),
        "/gzips": Answer(gzips, headers={"Content-Encoding": "gzip"}),
        "/gzips-in-pieces": Answer(
            pieces=lambda: iter([*(gzips[i : i + 1] for i in range(80)), gzips[80:]]),
            length=len(gzips),
            headers={"Content-Encoding": "gzip"},
        ),
        "/deflate": Answer(zlib.compress(BODY), headers={"Content-Encoding": "Deflate"}),
        "/identity": Answer(BODY, headers={"Content-Encoding": "identity"}),
        "/slow": Answer(pieces=lambda: iter([BODY[:9], BODY[9:]]), length=len(BODY), pause=0.01),
    }
    client = remote()

    for path, answer in wrappings.items():
        assert client.fetch(server.put(path, answer)) == BODY, path
    for path, answer in {"/empty": Answer(b""), "/none": Answer(**chunked())}.items():
        assert client.fetch(server.put(path, answer)) == b""
        assert server.requests[path] == 1


def test_a_connection_is_used_again(server: HttpServer, remote: Callable[..., HttpRemote]) -> None:
    client = remote()
    server.put("/gone", Answer(b"no such file", status=404))
    server.put("/moved", Answer(status=302, headers={"Location": "/x"}))
    url = server.put("/x", BODY)

    for _ in range(5):
        client.fetch(url)
        client.fetch(server.url + "/moved")
        failure_of(client, server.url + "/gone")

    assert server.n_connections == 1


BROKEN = [
    (Answer(BODY, length=len(BODY) + 1, cut=True), "the body ended before its announced length"),
    (Answer(BODY[:1000], length=len(BODY), reset=True), "the connection broke off"),
    (Answer(raw=lambda: iter([])), "the connection broke off"),
    (Answer(raw=lambda: iter([b"HTTP/1.1 200 OK\r\nServ"])), "the connection broke off"),
    (Answer(raw=lambda: iter([b"HTTP/1.1 200 OK\r\nServer: x\r\n"])), "the connection broke off"),
    (Answer(raw=lambda: iter([b"SSH-2.0-OpenSSH\r\n"])), "the connection broke off"),
    (Answer(**chunked(BODY[:1000], end=b"")), "the connection broke off"),
    (Answer(**chunked(end=b"")), "the connection broke off"),
    (Answer(length=None), "the answer is empty"),
    (Answer(**chunked(BODY[:1000], end=b"5\r\nab")), "the connection broke off"),
    (Answer(status=408), "408 Request Timeout"),
    (Answer(status=429), "429 Too Many Requests"),
    (Answer(status=500), "500 Internal Server Error"),
    (Answer(status=503), "503 Service Unavailable"),
    (Answer(status=599), "status 599"),
    (
        Answer(gzip.compress(BODY)[:-9], headers={"Content-Encoding": "gzip"}),
        "the gzip stream is cut short",
    ),
]


def test_what_may_pass_is_tried_again(
    server: HttpServer, remote: Callable[..., HttpRemote]
) -> None:
    client = remote(download_retries=1)

    for number, (broken, reason) in enumerate(BROKEN):
        once, always = f"/once/{number}", f"/always/{number}"
        assert client.fetch(server.put(once, broken, BODY)) == BODY, reason
        assert failure_of(client, server.put(always, broken)) == f"{reason}; tried 2 times"
        assert server.requests[once] == server.requests[always] == 2


FINAL = [
    (Answer(status=404), "404 Not Found"),
    (Answer(status=403), "403 Forbidden"),
    (Answer(status=204), "204 No Content"),
    (Answer(BODY, status=206), "206 Partial Content"),
    (Answer(status=304), "304 Not Modified"),
    (Answer(b"no gzip at all", headers={"Content-Encoding": "gzip"}), "the packed body is damaged"),
    (
        Answer(gzip.compress(b"x") + b"more", headers={"Content-Encoding": "gzip"}),
        "the packed body is damaged",
    ),
    (Answer(b"?", headers={"Content-Encoding": "br"}), "packed by 'br', expected gzip"),
    (Answer(length=10 << 30), "10737418240 bytes exceed max_row_bytes, 1048576"),
    (
        Answer(length=None, pieces=lambda: itertools.repeat(bytes(65536))),
        "more bytes come than max_row_bytes, 1048576",
    ),
    (
        Answer(gzip.compress(bytes(64 << 20)), headers={"Content-Encoding": "gzip"}),
        "more bytes come than max_row_bytes, 1048576",
    ),
    (
        Answer(
            length=None,
            headers={"Content-Encoding": "gzip"},
            pieces=lambda: itertools.chain([gzip.compress(b"x")], itertools.repeat(bytes(65536))),
        ),
        "more bytes come than max_row_bytes, 1048576",
    ),
    (Answer(status=302, headers={"Location": "file:///etc/passwd"}), "a redirect to file: is not"),
    (Answer(status=302, headers={"Location": "ftp://host/x"}), "a redirect to ftp: is not"),
    (Answer(status=302), "302 Found"),
    (Answer(status=302, headers={"Location": "http://[::1"}), "not a URL"),
]


def test_what_cannot_pass_is_asked_for_once(
    server: HttpServer, remote: Callable[..., HttpRemote]
) -> None:
    client = remote()

    for number, (answer, reason) in enumerate(FINAL):
        message = failure_of(client, server.put(f"/{number}", answer))
        assert reason in message and "tried" not in message
        assert server.requests[f"/{number}"] == 1


def test_redirects_end(server: HttpServer, remote: Callable[..., HttpRemote]) -> None:
    url = server.put("/x", Answer(status=302, headers={"Location": "/x"}))

    assert failure_of(remote(), url) == f"more than {MAX_REDIRECTS} redirects"

    assert server.requests["/x"] == MAX_REDIRECTS + 1


def test_retry_after_is_obeyed(server: HttpServer, remote: Callable[..., HttpRemote]) -> None:
    client = remote()

    for form in ("seconds", "date"):
        started = time.time()
        text = "1" if form == "seconds" else email.utils.formatdate(started + 2, usegmt=True)
        busy = Answer(status=503, headers={"Retry-After": text})
        assert client.fetch(server.put(f"/{form}", busy, BODY)) == BODY
        assert time.time() - started >= 0.9


def test_retry_after_that_tells_no_time_is_as_none(
    server: HttpServer, remote: Callable[..., HttpRemote]
) -> None:
    client = remote()

    for text in ("soon", "-1", "Mon, 01 Jan 2020 00:00:00 +" + "9" * 20):
        busy = Answer(status=503, headers={"Retry-After": text})
        assert client.fetch(server.put("/x", busy, BODY)) == BODY


def test_retry_after_beyond_the_deadline_is_not_waited_for(
    server: HttpServer, remote: Callable[..., HttpRemote]
) -> None:
    url = server.put("/x", Answer(status=429, headers={"Retry-After": "3600"}))

    message = failure_of(remote(), url)

    assert message == "429 Too Many Requests; no time for another attempt"


def test_a_silent_server_ends_by_the_read_timeout(
    server: HttpServer, remote: Callable[..., HttpRemote]
) -> None:
    client = remote(read_timeout_seconds=0.2, download_retries=1)

    for name, answer in {
        "head": Answer(BODY, delay=600),
        "body": Answer(length=2, pieces=lambda: iter([b"a", b"b"]), pause=600),
    }.items():
        message = failure_of(client, server.put(f"/{name}", answer))
        assert message == "nothing came for 0.2 seconds; tried 2 times"


def trickle(piece: bytes) -> Iterator[bytes]:
    return itertools.chain([b"HTTP/1.1 200 OK\r\n"], itertools.repeat(piece))


def test_a_trickled_head_ends_whatever_asks_for_it(
    server: HttpServer, remote: Callable[..., HttpRemote], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = remote(download_timeout_seconds=0.2)
    head = Answer(raw=lambda: trickle(b"a"), pause=0.05)
    late = r"not done within 0\.2 seconds; raise"
    with pytest.raises(DownloadError, match=f"{late} download_timeout_seconds"):
        client.fetch_piece(server.put("/x", head), 0, 9)
    with pytest.raises(DownloadError, match=f"{late} fetch_timeout_seconds"):
        fetch("input_oss_file", server.put("/x", head), job_of(fetch_timeout_seconds=0.2))

    monkeypatch.setenv("OSS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", "secret")
    job = job_of(ossHost=server.url, storage_timeout_seconds=0.2, download_timeout_seconds=0.2)
    storage, objects = OssStorage("oss://bkt", job, Path()), OssRemote(job)
    server.put("/bkt/x", head)
    with pytest.raises(OSError, match=f"{late} storage_timeout_seconds"):
        storage.stat("x")
    with pytest.raises(DownloadError, match=f"{late} download_timeout_seconds"):
        objects.fetch_piece("oss://bkt/x", 0, 9)
    storage.close()
    objects.close()


def test_what_went_wrong_before_the_deadline_is_told(
    server: HttpServer, remote: Callable[..., HttpRemote]
) -> None:
    client = remote(download_timeout_seconds=1.5)
    late = Answer(raw=lambda: trickle(b"a"), pause=0.05)
    url = server.put("/x", Answer(status=503, headers={"Retry-After": "0"}), late)

    with pytest.raises(DownloadError, match="after '503 Service Unavailable'; raise"):
        client.fetch_piece(url, 0, 9)

    assert server.requests["/x"] == 2


def test_a_server_that_trickles_ends_by_the_deadline(
    server: HttpServer, remote: Callable[..., HttpRemote]
) -> None:
    urls = {
        server.put("/head", Answer(raw=lambda: trickle(b"a"), pause=0.05)),
        server.put("/body", Answer(length=9999, pieces=lambda: trickle(b"a"), pause=0.05)),
        server.put("/moved", Answer(status=302, headers={"Location": "/moved"}, delay=0.2)),
    }
    client = remote(download_timeout_seconds=0.5)
    downloads = Downloads(client, 4)

    downloads.begin(7, urls)
    while not (come := downloads.take()):
        downloads.wait()

    assert come[0] == 7 and come[1].keys() == urls
    for error in come[1].values():
        assert str(error) == "not done within 0.5 seconds; raise download_timeout_seconds"
    downloads.close()


def test_a_private_address_is_reached_only_if_allowed(
    server: HttpServer, remote: Callable[..., HttpRemote]
) -> None:
    url = server.put("/x", BODY)
    client = remote(allow_private_hosts=False)

    for host in ("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"):
        message = failure_of(client, url.replace("127.0.0.1", host))
        assert "an address that is not public; allow_private_hosts: true reaches it" in message
    assert server.n_connections == 0


def test_a_redirect_from_the_internet_leads_to_no_private_address() -> None:
    # Within a network of its own, this machine may have an address of the internet's.
    here = Path(__file__).parent
    done = subprocess.run(
        ["unshare", "--map-root-user", "--net", sys.executable, here / "redirected.py"],
        env={**os.environ, "PYTHONPATH": f"{here}:{here.parent}"},
        capture_output=True,
        text=True,
    )
    if done.stderr.startswith("unshare:"):
        pytest.skip(f"there may be no network of its own here: {done.stderr}")

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("an address that is not public; allow_private_hosts") == 4


def test_an_address_within_a_network_is_not_public() -> None:
    for address in (
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
        *("0.0.0.0", "224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1%eth0", "fc00::1"),
        *("::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:0:0:0:0:80ff:fffe"),
        *("::10.0.0.1", "::", "fec0::1", "64:ff9b:1::808:808", "::ffff:0:127.0.0.1"),
    ):
        assert not is_public(address), address


def test_an_address_of_the_internet_is_public() -> None:
    assert is_public("8.8.8.8") and is_public("2606:4700::1111") and is_public("::ffff:8.8.8.8")


def test_a_host_that_is_not_there_is_told(remote: Callable[..., HttpRemote]) -> None:
    with serving() as gone:
        url = gone.url

    message = failure_of(remote(download_retries=1), url)

    assert message == "127.0.0.1: connection refused; tried 2 times"
    nowhere = failure_of(remote(download_retries=0), "http://no-such-host.invalid/")
    assert re.fullmatch("there is no host .*|.* cannot be looked up now", nowhere)
    long = "x" * 64
    assert failure_of(remote(), f"http://{long}/") == f"{long} is no name of a host"


def test_what_is_no_url_is_told(remote: Callable[..., HttpRemote]) -> None:
    for url in ("http://", "http:///x", "http://[::1", "http://a:b/", "http://a b"):
        assert failure_of(remote(), url) == "not a URL"


def test_credentials_go_to_their_host_alone(
    server: HttpServer, remote: Callable[..., HttpRemote]
) -> None:
    with serving() as other:
        elsewhere = other.put("/y", BODY)
        server.put("/here", BODY)
        server.put("/there", Answer(status=307, headers={"Location": elsewhere}))
        server.put("/back", Answer(status=307, headers={"Location": "/here"}))
        base = server.url.replace("//", "//me:p%40ss@")
        client = remote()

        assert client.fetch(base + "/back") == client.fetch(base + "/there") == BODY

    assert server.headers["/here"]["authorization"] == "Basic bWU6cEBzcw=="
    assert "authorization" not in other.headers["/y"]


def test_names_of_files_may_hold_anything(
    server: HttpServer, remote: Callable[..., HttpRemote]
) -> None:
    server.put("/a%20b%25+c/%E5%9B%BE.jpg?x=1&y=%2F", BODY)

    assert remote().fetch(server.url + "/a b%25+c/图.jpg?x=1&y=%2F#part") == BODY


def test_a_certificate_must_be_known(
    tmp_path: Path, remote: Callable[..., HttpRemote], monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serving(context) as server:
        url = server.put("/x", BODY)
        unknown = failure_of(remote(), url)
        n_before = server.requests["/x"]

        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        client = remote()

        assert unknown == "the certificate is not valid: self-signed certificate"
        assert n_before == 0
        assert client.fetch(url) == client.fetch(url) == BODY
        assert "the certificate is not valid: Hostname mismatch" in failure_of(
            client, url.replace("127.0.0.1", "localhost")
        )


def self_signed(folder: Path) -> Path:
    """Write a key and its certificate, for the address of this machine alone, as one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "evmp's tests")])
    now = datetime.datetime.now(datetime.timezone.utc)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    file = folder / "server.pem"
    file.write_bytes(pem + certificate.public_bytes(serialization.Encoding.PEM))
    return file
