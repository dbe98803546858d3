"""A small OSS on this machine: its signatures, checks and errors, as the real one has them.

It takes objects from oss2 itself and gives them back, whole or in parts, copies and lists them; a
request whose signature (version 1 or 4), clock, token, length or digest is wrong gets the error
that OSS would send. `fail` makes the next requests for an object fail in a given way, and
`trouble` any request at random.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import random
import socket
import struct
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import crcmod
from osssignature import KEY_ID, KEY_SECRET, REGION, TOKEN, V4, expected, key_id_of, moment_of

__all__ = ["KEY_ID", "KEY_SECRET", "REGION", "TOKEN", "Fault", "OssServer", "serving_oss"]

SKEW_SECONDS = 15 * 60
MIN_PART_BYTES = 100 << 10
crc64 = crcmod.mkCrcFun(0x142F0E1EBA9EA3693, initCrc=0, xorOut=0xFFFFFFFFFFFFFFFF, rev=True)

Fault = str | int
"""A status; `flip`, `cut`, which change the body of an answer whose announced length and CRC stay;
`reset`, before anything is done; `lose`, when it is done: the answer does not come; `tear`: it is
reset in its midst; `stall`: nothing more comes in its midst; `delay` and `late`: all is done, and
the answer comes a little later, or so late that a client may not wait for it."""
FAULTS: dict[Fault, Callable[[bytes], bytes]] = {
    "flip": lambda body: bytes([body[0] ^ 1]) + body[1:] if body else body,
    "cut": lambda body: body[: len(body) // 2],
}
TROUBLES: tuple[Fault, ...] = (
    429,
    500,
    503,
    "reset",
    "lose",
    "flip",
    "cut",
    "tear",
    "delay",
    "late",
)
DELAY_SECONDS = 0.2
CODES = {429: "QpsLimitExceeded", 500: "InternalError", 503: "SlowDown", 403: "AccessDenied"}


class OssError(Exception):
    """An answer that is an error: its status and code."""

    def __init__(
        self, status: int, code: str, headers: Mapping[str, str] | None = None, details: str = ""
    ) -> None:
        super().__init__(code)
        self.status, self.code, self.headers = status, code, dict(headers or {})
        self.details = details


class Gone(Exception):
    """The answer does not come: the connection is reset."""


@dataclass
class About:
    """What is known of an object beside its bytes."""

    data: bytes
    modified: float
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "Normal"
    parts: int = 0

    @cached_property
    def crc64(self) -> str:
        return str(crc64(self.data))

    @cached_property
    def etag(self) -> str:
        digest = hashlib.md5(self.data).hexdigest().upper()
        return f"{digest}-{self.parts}" if self.parts else digest


@dataclass
class Upload:
    """A multipart upload that is neither completed nor aborted."""

    bucket: str
    key: str
    headers: dict[str, str]
    began: float
    parts: dict[int, bytes] = field(default_factory=dict)


class OssServer(ThreadingHTTPServer):
    """Buckets and their objects; `requests` counts what was asked for."""

    daemon_threads = True
    block_on_close = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.keys = {KEY_ID: KEY_SECRET}
        self.token = ""  # that requests must have
        self.tokens: dict[str, str] = {}  # by the ids of temporary keys
        self.skew = 0.0  # seconds that its clock is ahead
        self.page = 1000  # the most keys that a list has
        self.late = 2.0  # seconds until a late answer comes
        self.unlisted = 0.0  # seconds for which lists do not show new objects
        self.objects: dict[str, dict[str, bytes]] = {}
        self.about: dict[tuple[str, str], About] = {}
        self.uploads: dict[str, Upload] = {}
        self.denied: set[str] = set()  # keys, whatever is asked of them
        self.moved: dict[str, str] = {}  # keys, and where a rule of the bucket redirects to
        self.has_crcs = True  # of objects, which very old ones have not
        self.versioned: set[str] = set()  # buckets that keep versions, and so forbid no overwriting
        self.elsewhere: dict[str, str] = {}  # buckets of other regions, and the hosts they have
        self.is_closed = threading.Event()
        self.faults: dict[str, list[Fault]] = {}
        self.trouble: tuple[random.Random, float] | None = None
        self.hook: Callable[[str], object] = lambda moment: None
        """Called `before` and `after` each request that changes something, under the lock."""
        self.requests: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        """What was asked for, by kind: `put`, `get`, `copy_part`..."""
        self.signatures: set[str] = set()
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()

    def is_unlisted(self, bucket: str, key: str) -> bool:
        """Return whether an object is so new that lists do not show it."""
        if not self.unlisted:
            return False
        return time.time() + self.skew - self.describe(bucket, key).modified < self.unlisted

    def fail(self, key: str, *faults: Fault) -> None:
        """Let the next requests for an object fail, or for those in a folder, whose key has a /."""
        self.faults[key] = list(faults)

    def fault_of(self, key: str) -> Fault:
        """Return how the next request for an object fails; 0 if it does not."""
        for name in (key, key[: key.rfind("/") + 1]):
            if self.faults.get(name):
                return self.faults[name].pop(0)
        if self.trouble and self.trouble[0].random() < self.trouble[1]:
            return self.trouble[0].choice(TROUBLES)
        return 0

    def now(self) -> float:
        """Return the time by its clock."""
        return time.time() + self.skew

    def describe(self, bucket: str, key: str) -> About:
        """Return what is known of an object, which a test may have put there by itself.

        Raises:
            OssError: there is none.
        """
        try:
            data = self.objects[bucket][key]
        except KeyError:
            raise OssError(404, "NoSuchKey") from None
        about = self.about.get((bucket, key))
        if about is None or about.data is not data:
            about = self.about[bucket, key] = About(data, 0.0)
        return about

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are nothing to tell of."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: OssServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments: object) -> None:
        """Keep quiet."""

    def date_time_string(self, timestamp: float | None = None) -> str:
        """Tell the time by the server's clock."""
        return formatdate(self.server.now() if timestamp is None else timestamp, usegmt=True)

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.bucket, _, self.key = unquote(parts.path).lstrip("/").partition("/")
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.server.requests[self.key] += 1
        # The body must be read, or it would be taken for the next request.
        self.body = b"".join(self._chunks())
        try:
            self.fault = self.server.fault_of(self.key)
            if self.fault == "reset":
                raise Gone
            if isinstance(self.fault, int) and self.fault:
                raise OssError(self.fault, CODES.get(self.fault, "InternalError"))
            self._check()
            self._act()
        except OssError as error:
            self._fail(error)
        except Gone:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            os.close(self.connection.detach())  # at once: nobody else may shut it down politely
            self.close_connection = True

    def _chunks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return
        size = -1
        while size:
            size = int(self.rfile.readline(), 16)
            yield self.rfile.read(size + 2)[:-2]

    def _fail(self, error: OssError) -> None:
        body = (
            f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{error.code}</Code><Message>"
            f"no</Message><RequestId>0</RequestId><HostId>127.0.0.1</HostId>{error.details}</Error>"
        ).encode()
        headers = {"Content-Type": "application/xml", **error.headers}
        if self.command == "HEAD":
            headers["x-oss-err"] = base64.b64encode(body).decode()
        self.fault = 0
        self._send(error.status, body, headers)

    def _send(self, status: int, body: bytes = b"", headers: Mapping[str, str] = {}) -> None:
        if self.fault == "lose":
            raise Gone
        if self.fault in ("delay", "late"):
            self.server.is_closed.wait(DELAY_SECONDS if self.fault == "delay" else self.server.late)
        sent = FAULTS[self.fault](body) if self.fault in FAULTS else body
        self.send_response(status)
        self.send_header("x-oss-request-id", "0123456789")
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if self.fault in ("tear", "stall"):
                self.wfile.write(body[: len(body) // 2])
                self.server.is_closed.wait(0 if self.fault == "tear" else None)
                raise Gone
            self.wfile.write(sent)
            self.close_connection |= len(sent) < len(body)

    # --- who asks, and for what ---------------------------------------------------------------

    def _check(self) -> None:
        """Refuse those who may not ask.

        Raises:
            OssError: says why.
        """
        if abs(self.server.now() - moment_of(self.headers)) > SKEW_SECONDS:
            raise OssError(403, "RequestTimeTooSkewed")
        token = self.server.tokens.get(key_id_of(self.headers), self.server.token)
        if self.headers.get("x-oss-security-token", "") != token:
            raise OssError(403, "InvalidSecurityToken")
        found = self.headers.get("Authorization", "")
        if not found:
            raise OssError(403, "AccessDenied")
        self.server.signatures.add("V4" if found.startswith(f"{V4} ") else "V1")
        if (secret := self.server.keys.get(key_id_of(self.headers))) is None:
            raise OssError(403, "InvalidAccessKeyId")
        wanted = expected(self.command, self.bucket, self.key, self.query, self.headers, secret)
        if not hmac.compare_digest(found, wanted):
            raise OssError(403, "SignatureDoesNotMatch")
        if self.bucket not in self.server.objects:
            raise OssError(404, "NoSuchBucket")
        if host := self.server.elsewhere.get(self.bucket):
            raise OssError(403, "AccessDenied", details=f"<Endpoint>{host}</Endpoint>")
        if self.key in self.server.denied:
            raise OssError(403, "AccessDenied")
        if self.key in self.server.moved:
            raise OssError(302, "", {"Location": self.server.moved[self.key]})
        digest = self.headers.get("Content-MD5")
        if digest and base64.b64decode(digest) != hashlib.md5(self.body).digest():
            raise OssError(400, "InvalidDigest")

    def _act(self) -> None:
        """Do what is asked for."""
        call = self._call()
        self.server.calls[call] += 1
        if self.command in ("GET", "HEAD"):
            getattr(self, f"_{call}")()
            return
        with self.server.lock:
            self.server.hook("before")
            answer = getattr(self, f"_{call}")()
            self.server.hook("after")
        self._send(*answer)

    def _call(self) -> str:
        """Name what is asked for."""
        query = self.query
        is_copy = "x-oss-copy-source" in self.headers
        if not self.key:
            kinds = {"GET": "uploads" if "uploads" in query else "list", "POST": "delete_many"}
            return kinds[self.command]
        if "uploadId" in query:
            put = "copy_part" if is_copy else "put_part"
            kinds = {"PUT": put, "POST": "complete", "DELETE": "abort", "GET": "parts"}
            return kinds[self.command]
        if self.command == "POST":
            return "initiate" if "uploads" in query else "append"
        if self.command == "PUT":
            return "copy" if is_copy else "put"
        return {"GET": "get", "HEAD": "get", "DELETE": "delete"}[self.command]

    # --- whole objects ------------------------------------------------------------------------

    def _get(self) -> None:
        about = self.server.describe(self.bucket, self.key)
        if self.headers.get("If-Match", about.etag).strip('"') != about.etag:
            raise OssError(412, "PreconditionFailed")
        body, status, headers = about.data, 200, self._told(about)
        if spec := self.headers.get("Range", ""):
            first, _, last = spec.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(body)) + 1, len(body))
            if start < len(body):  # else the whole object, as the real one
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
                body, status = body[start:stop], 206
        self._send(status, body, headers)

    def _told(self, about: About) -> dict[str, str]:
        return {
            "ETag": f'"{about.etag}"',
            **({"x-oss-hash-crc64ecma": about.crc64} if self.server.has_crcs else {}),
            "x-oss-object-type": about.kind,
            "Last-Modified": formatdate(about.modified, usegmt=True),
            **about.headers,
        }

    def _put(self) -> tuple[int, bytes, dict[str, str]]:
        return self._keep(About(self.body, self.server.now(), self._kept_headers()))

    def _kept_headers(self) -> dict[str, str]:
        names = [(name.lower(), value) for name, value in self.headers.items()]
        return {n: v for n, v in names if n == "content-encoding" or n.startswith("x-oss-meta-")}

    def _keep(self, about: About) -> tuple[int, bytes, dict[str, str]]:
        """Make an object, unless that is forbidden where there is one. Returns the answer."""
        objects = self.server.objects[self.bucket]
        self._forbid_overwrite()
        objects[self.key] = about.data
        self.server.about[self.bucket, self.key] = about
        return 200, b"", {"x-oss-hash-crc64ecma": about.crc64, "ETag": f'"{about.etag}"'}

    def _forbid_overwrite(self) -> None:
        is_once = self.headers.get("x-oss-forbid-overwrite") == "true"
        is_there = self.key in self.server.objects[self.bucket]
        if is_once and is_there and self.bucket not in self.server.versioned:
            raise OssError(409, "FileAlreadyExists")

    def _delete(self) -> tuple[int, bytes, dict[str, str]]:
        self.server.objects[self.bucket].pop(self.key, None)
        return 204, b"", {}

    def _delete_many(self) -> tuple[int, bytes, dict[str, str]]:
        if not self.headers.get("Content-MD5"):
            raise OssError(400, "MissingArgument")
        keys = [node.text or "" for node in ElementTree.fromstring(self.body).iter("Key")]
        if not 0 < len(keys) <= 1000:
            raise OssError(400, "MalformedXML")
        for key in keys:
            self.server.objects[self.bucket].pop(key, None)
        deleted = "".join(f"<Deleted><Key>{quote(key, '')}</Key></Deleted>" for key in keys)
        text = f"<DeleteResult><EncodingType>url</EncodingType>{deleted}</DeleteResult>"
        return 200, text.encode(), {}

    def _append(self) -> tuple[int, bytes, dict[str, str]]:
        objects = self.server.objects[self.bucket]
        before = b""
        if self.key in objects:
            about = self.server.describe(self.bucket, self.key)
            if about.kind != "Appendable":
                raise OssError(409, "ObjectNotAppendable")
            before = about.data
        if int(self.query["position"]) != len(before):
            position = {"x-oss-next-append-position": str(len(before))}
            raise OssError(409, "PositionNotEqualToLength", position)
        about = About(before + self.body, self.server.now(), self._kept_headers(), "Appendable")
        status, body, headers = self._keep(about)
        return status, body, {**headers, "x-oss-next-append-position": str(len(about.data))}

    def _copy(self) -> tuple[int, bytes, dict[str, str]]:
        source = self._source()
        self._keep(About(source.data, self.server.now(), dict(source.headers)))
        return 200, f'<R><ETag>"{source.etag}"</ETag></R>'.encode(), {"ETag": f'"{source.etag}"'}

    def _source(self) -> About:
        """Return the object that is to be copied."""
        bucket, _, key = unquote(self.headers["x-oss-copy-source"]).lstrip("/").partition("/")
        if bucket not in self.server.objects:
            raise OssError(404, "NoSuchBucket")
        about = self.server.describe(bucket, key)
        if self.headers.get("x-oss-copy-source-if-match", about.etag).strip('"') != about.etag:
            raise OssError(412, "PreconditionFailed")
        return about

    # --- objects in parts ---------------------------------------------------------------------

    def _upload(self) -> Upload:
        upload = self.server.uploads.get(self.query["uploadId"])
        if upload is None or (upload.bucket, upload.key) != (self.bucket, self.key):
            raise OssError(404, "NoSuchUpload")
        return upload

    def _initiate(self) -> tuple[int, bytes, dict[str, str]]:
        self._forbid_overwrite()
        name = uuid.uuid4().hex.upper()
        now = self.server.now()
        self.server.uploads[name] = Upload(self.bucket, self.key, self._kept_headers(), now)
        return 200, f"<R><UploadId>{name}</UploadId></R>".encode(), {}

    def _put_part(self) -> tuple[int, bytes, dict[str, str]]:
        return self._keep_part(self.body)

    def _copy_part(self) -> tuple[int, bytes, dict[str, str]]:
        data = self._source().data
        if spec := self.headers.get("x-oss-copy-source-range", ""):
            first, _, last = spec.removeprefix("bytes=").partition("-")
            if int(last) >= len(data):
                raise OssError(416, "InvalidRange")
            data = data[int(first) : int(last) + 1]
        return self._keep_part(data)

    def _keep_part(self, data: bytes) -> tuple[int, bytes, dict[str, str]]:
        number = int(self.query["partNumber"])
        if not 1 <= number <= 10_000:
            raise OssError(400, "InvalidArgument")
        self._upload().parts[number] = data
        etag = hashlib.md5(data).hexdigest().upper()
        body = f'<R><ETag>"{etag}"</ETag></R>'.encode() if not self.body else b""
        return 200, body, {"x-oss-hash-crc64ecma": str(crc64(data)), "ETag": f'"{etag}"'}

    def _complete(self) -> tuple[int, bytes, dict[str, str]]:
        upload, data = self._upload(), list[bytes]()
        for node in ElementTree.fromstring(self.body).iter("Part"):
            number = int(node.findtext("PartNumber") or 0)
            part = upload.parts.get(number, b"")
            etag = hashlib.md5(part).hexdigest().upper()
            if number not in upload.parts or (node.findtext("ETag") or "").strip('"') != etag:
                raise OssError(400, "InvalidPart")
            data.append(part)
        if not data:
            raise OssError(400, "MalformedXML")
        if any(len(part) < MIN_PART_BYTES for part in data[:-1]):
            raise OssError(400, "EntityTooSmall")
        whole = b"".join(data)
        about = About(whole, self.server.now(), upload.headers, "Multipart", len(data))
        status, _, headers = self._keep(about)
        del self.server.uploads[self.query["uploadId"]]
        body = f"<R><Key>{escape(self.key)}</Key><ETag>{headers['ETag']}</ETag></R>"
        return status, body.encode(), headers

    def _abort(self) -> tuple[int, bytes, dict[str, str]]:
        self._upload()
        del self.server.uploads[self.query["uploadId"]]
        return 204, b"", {}

    def _parts(self) -> None:
        listed = "".join(
            f"<Part><PartNumber>{number}</PartNumber><LastModified>{_iso(0)}</LastModified>"
            f'<ETag>"{hashlib.md5(data).hexdigest().upper()}"</ETag><Size>{len(data)}</Size></Part>'
            for number, data in sorted(self._upload().parts.items())
        )
        end = "<NextPartNumberMarker>0</NextPartNumberMarker><IsTruncated>false</IsTruncated>"
        self._send(200, f"<ListPartsResult>{end}{listed}</ListPartsResult>".encode())

    # --- lists --------------------------------------------------------------------------------

    def _list(self) -> None:
        is_v2 = self.query.get("list-type") == "2"
        after = self.query.get("continuation-token" if is_v2 else "marker", "")
        after = after or self.query.get("start-after", "")
        limit = min(int(self.query.get("max-keys") or 100), self.server.page)
        found, last, is_truncated = self._entries(after, limit)
        next_name = "NextContinuationToken" if is_v2 else "NextMarker"
        end = f"<{next_name}>{quote(last, '')}</{next_name}>" if is_truncated else ""
        text = (
            f"<ListBucketResult><EncodingType>url</EncodingType>{end}<IsTruncated>"
            f"{str(is_truncated).lower()}</IsTruncated>{''.join(found)}</ListBucketResult>"
        )
        self._send(200, text.encode())

    def _entries(self, after: str, limit: int) -> tuple[list[str], str, bool]:
        """Return the entries of a page, the last one's key, and whether more follow."""
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        keys = sorted(self.server.objects[self.bucket], key=str.encode)
        found, last = list[str](), after
        for key in (key for key in keys if key.startswith(prefix)):
            rest = key[len(prefix) :]
            folder = delimiter and delimiter in rest
            name = prefix + rest[: rest.index(delimiter) + len(delimiter)] if folder else key
            if name.encode() <= last.encode():
                continue
            if len(found) == limit:
                return found, last, True
            if self.server.is_unlisted(self.bucket, key):
                continue
            last = name
            found.append(self._prefix(name) if folder else self._entry(key))
        return found, last, False

    def _prefix(self, name: str) -> str:
        return f"<CommonPrefixes><Prefix>{quote(name, '')}</Prefix></CommonPrefixes>"

    def _entry(self, key: str) -> str:
        about = self.server.describe(self.bucket, key)
        return (
            f"<Contents><Key>{quote(key, '')}</Key><LastModified>{_iso(about.modified)}"
            f'</LastModified><ETag>"{about.etag}"</ETag><Type>{about.kind}</Type>'
            f"<Size>{len(about.data)}</Size><StorageClass>Standard</StorageClass></Contents>"
        )

    def _uploads(self) -> None:
        prefix = self.query.get("prefix", "")
        listed = "".join(
            f"<Upload><Key>{quote(it.key, '')}</Key><UploadId>{name}</UploadId>"
            f"<Initiated>{_iso(it.began)}</Initiated></Upload>"
            for name, it in sorted(self.server.uploads.items())
            if it.bucket == self.bucket and it.key.startswith(prefix)
        )
        text = (
            "<ListMultipartUploadsResult><EncodingType>url</EncodingType><NextKeyMarker/>"
            f"<NextUploadIdMarker/><IsTruncated>false</IsTruncated>{listed}"
            "</ListMultipartUploadsResult>"
        )
        self._send(200, text.encode())


def _iso(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(moment))


@contextmanager
def serving_oss() -> Iterator[OssServer]:
    """Run an OSS for a while."""
    with OssServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            yield server
        finally:
            server.is_closed.set()
            server.shutdown()
            thread.join()
