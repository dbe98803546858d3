"""A small OSS on this machine: its signatures, checks and errors, as the real one has them.

It takes objects from oss2 itself and gives them back; a request whose signature (version 1 or 4),
clock, token or length is wrong gets the error that OSS would send. `fail` makes the next requests
for an object fail in a given way.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit

import crcmod

KEY_ID, KEY_SECRET, TOKEN = "LTAI-test-id", "test-secret", "test-token"
REGION = "cn-hangzhou"
SKEW_SECONDS = 15 * 60
crc64 = crcmod.mkCrcFun(0x142F0E1EBA9EA3693, initCrc=0, xorOut=0xFFFFFFFFFFFFFFFF, rev=True)

# What a fault does to an answer: to the body that is sent, whose announced length and CRC stay.
FAULTS: dict[str, Callable[[bytes], bytes]] = {
    "flip": lambda body: bytes([body[0] ^ 1]) + body[1:],
    "cut": lambda body: body[: len(body) // 2],
}


class OssError(Exception):
    """An answer that is an error: its status and code."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class OssServer(ThreadingHTTPServer):
    """Buckets and their objects; `requests` counts what was asked for."""

    daemon_threads = True
    block_on_close = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = ""  # that requests must have
        self.skew = 0.0  # seconds that its clock is ahead
        self.objects: dict[str, dict[str, bytes]] = {}
        self.headers: dict[tuple[str, str], dict[str, str]] = {}  # kept with an object
        self.faults: dict[str, list[str | int]] = {}
        self.requests: Counter[str] = Counter()
        self.signatures: set[str] = set()
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()

    def fail(self, key: str, *faults: str | int) -> None:
        """Let the next reads of an object fail: by a status, or a name in FAULTS."""
        self.faults[key] = list(faults)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are nothing to tell of."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: OssServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_PUT(self) -> None:
        self._answer(self._put)

    def do_DELETE(self) -> None:
        self._answer(self._delete)

    def _answer(self, act: Callable[[str, str], None]) -> None:
        bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        self.server.requests[key] += 1
        # The body must be read, or it would be taken for the next request.
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self._check_clock()
            self._check_signature(bucket, key)
            if bucket not in self.server.objects:
                raise OssError(404, "NoSuchBucket")
            act(bucket, key)
        except OssError as error:
            body = (
                f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{error.code}</Code><Message>"
                "no</Message><RequestId>0</RequestId><HostId>127.0.0.1</HostId></Error>"
            )
            self._send(error.status, body.encode(), {"Content-Type": "application/xml"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], length: int = -1) -> None:
        self.send_response(status)
        self.send_header("x-oss-request-id", "0123456789")
        self.send_header("Content-Length", str(len(body) if length < 0 else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if length > len(body):
            self.close_connection = True

    # --- objects ------------------------------------------------------------------------------

    def _get(self, bucket: str, key: str) -> None:
        whole = self._found(bucket, key)
        fault = self.server.faults.get(key, []) and self.server.faults[key].pop(0)
        if isinstance(fault, int):
            raise OssError(fault, "SlowDown" if fault == 503 else "InternalError")
        headers = {
            "ETag": f'"{hashlib.md5(whole).hexdigest().upper()}"',
            "x-oss-hash-crc64ecma": str(crc64(whole)),
            "x-oss-object-type": "Normal",
            "Last-Modified": formatdate(0, usegmt=True),
            **self.server.headers.get((bucket, key), {}),
        }
        body, status = whole, 200
        if spec := self.headers.get("Range", ""):
            first, _, last = spec.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(whole)) + 1, len(whole))
            if start < len(whole):  # else the whole object, as the real one
                body, status = whole[start:stop], 206
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(whole)}"
        self._send(status, FAULTS[fault](body) if fault else body, headers, len(body))

    def _put(self, bucket: str, key: str) -> None:
        forbid = self.headers.get("x-oss-forbid-overwrite") == "true"
        with self.server.lock:
            if forbid and key in self.server.objects[bucket]:
                raise OssError(409, "FileAlreadyExists")
            self.server.objects[bucket][key] = self.body
        if encoding := self.headers.get("Content-Encoding"):
            self.server.headers[bucket, key] = {"Content-Encoding": encoding}
        self._send(200, b"", {"x-oss-hash-crc64ecma": str(crc64(self.body)), "ETag": '"0"'})

    def _delete(self, bucket: str, key: str) -> None:
        self.server.objects[bucket].pop(key, None)
        self._send(204, b"", {})

    def _found(self, bucket: str, key: str) -> bytes:
        try:
            return self.server.objects[bucket][key]
        except KeyError:
            raise OssError(404, "NoSuchKey") from None

    # --- who asks -----------------------------------------------------------------------------

    def _check_clock(self) -> None:
        try:
            moment = parsedate_to_datetime(self.headers["Date"]).timestamp()
        except (TypeError, ValueError):
            text = self.headers.get("x-oss-date", "")
            moment = time.mktime(time.strptime(text, "%Y%m%dT%H%M%SZ")) - time.timezone
        if abs(time.time() + self.server.skew - moment) > SKEW_SECONDS:
            raise OssError(403, "RequestTimeTooSkewed")

    def _check_signature(self, bucket: str, key: str) -> None:
        if self.headers.get("x-oss-security-token", "") != self.server.token:
            raise OssError(403, "InvalidSecurityToken")
        found = self.headers.get("Authorization", "")
        if not found:
            raise OssError(403, "AccessDenied")
        is_v4 = found.startswith("OSS4-HMAC-SHA256 ")
        self.server.signatures.add("V4" if is_v4 else "V1")
        expected = self._sign_v4(bucket, key) if is_v4 else self._sign_v1(bucket, key)
        if KEY_ID not in found:
            raise OssError(403, "InvalidAccessKeyId")
        if not hmac.compare_digest(found, expected):
            raise OssError(403, "SignatureDoesNotMatch")

    def _own_headers(self, *others: str) -> list[tuple[str, str]]:
        pairs = [(name.lower(), value.strip()) for name, value in self.headers.items()]
        return sorted(pair for pair in pairs if pair[0].startswith("x-oss-") or pair[0] in others)

    def _sign_v1(self, bucket: str, key: str) -> str:
        plain = [self.headers.get(name, "") for name in ("Content-MD5", "Content-Type", "Date")]
        own = [f"{name}:{value}" for name, value in self._own_headers()]
        text = "\n".join([self.command, *plain, *own, f"/{bucket}/{key}"])
        digest = hmac.new(KEY_SECRET.encode(), text.encode(), hashlib.sha1).digest()
        return f"OSS {KEY_ID}:{base64.b64encode(digest).decode()}"

    def _sign_v4(self, bucket: str, key: str) -> str:
        moment = self.headers["x-oss-date"]
        scope = f"{moment[:8]}/{REGION}/oss/aliyun_v4_request"
        signed = self._own_headers("content-type", "content-md5")
        lines = "".join(f"{name}:{value}\n" for name, value in signed)
        request = "\n".join(
            [self.command, quote(f"/{bucket}/{key}"), "", lines, "", "UNSIGNED-PAYLOAD"]
        )
        hashed = hashlib.sha256(request.encode()).hexdigest()
        text = f"OSS4-HMAC-SHA256\n{moment}\n{scope}\n{hashed}"
        secret = b"aliyun_v4" + KEY_SECRET.encode()
        for part in scope.split("/"):
            secret = hmac.new(secret, part.encode(), hashlib.sha256).digest()
        signature = hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()
        return f"OSS4-HMAC-SHA256 Credential={KEY_ID}/{scope}, Signature={signature}"


@contextmanager
def serving_oss() -> Iterator[OssServer]:
    """Run an OSS for a while."""
    with OssServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
