"""A small STS on this machine, over TLS: it lends roles to those whose signature is right."""

from __future__ import annotations

import base64
import calendar
import hashlib
import hmac
import json
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

SKEW_SECONDS = 15 * 60
ROLE = "acs:ram::1234567890:role/evmp"


class Refused(Exception):
    """A request that gets an error: its status and code."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class StsServer(ThreadingHTTPServer):
    """Lends one role.

    Args:
        certificate: the server's key and certificate, in one file.
        grant: called with the id, the secret and the token of each key that is lent, for the
            service that shall take it.
    """

    daemon_threads = True
    block_on_close = True

    def __init__(
        self, certificate: Path, key_id: str, secret: str, grant: Callable[[str, str, str], None]
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.keys, self.grant = {key_id: secret}, grant
        self.endpoint = f"127.0.0.1:{self.server_address[1]}"
        self.seconds = 3600
        """How long a key holds; less than what is asked for where a test wants it."""
        self.faults: list[int] = []
        """The statuses of the next answers, which are refusals."""
        self.secrets: list[str] = []
        """All that nobody else may learn: secrets and tokens that were lent."""
        self.n_lent = self.n_connections = 0
        self._nonces: set[str] = set()
        self._lock = threading.Lock()

    def lend(self, query: dict[str, str]) -> dict[str, object]:
        """Answer AssumeRole.

        Raises:
            Refused: says why.
        """
        if self.faults:
            status = self.faults.pop(0)
            raise Refused(status, "InternalError" if status >= 500 else "NoPermission")
        self._check(query)
        with self._lock:
            self.n_lent += 1
            key_id, secret, token = f"STS.{uuid.uuid4().hex}", uuid.uuid4().hex, uuid.uuid4().hex
            self.secrets += [secret, token]
        self.grant(key_id, secret, token)
        expires = time.gmtime(time.time() + min(self.seconds, int(query["DurationSeconds"])))
        credentials = {
            "AccessKeyId": key_id,
            "AccessKeySecret": secret,
            "SecurityToken": token,
            "Expiration": time.strftime("%Y-%m-%dT%H:%M:%SZ", expires),
        }
        return {"RequestId": "0", "Credentials": credentials}

    def _check(self, query: dict[str, str]) -> None:
        if query.get("Action") != "AssumeRole" or query.get("Version") != "2015-04-01":
            raise Refused(404, "InvalidAction.NotFound")
        if query["AccessKeyId"] not in self.keys:
            raise Refused(404, "InvalidAccessKeyId.NotFound")
        moment = calendar.timegm(time.strptime(query["Timestamp"], "%Y-%m-%dT%H:%M:%SZ"))
        if abs(moment - time.time()) > SKEW_SECONDS:
            raise Refused(400, "InvalidTimeStamp.Expired")
        wanted = signature(query, self.keys[query["AccessKeyId"]])
        if not hmac.compare_digest(wanted, query["Signature"]):
            raise Refused(400, "SignatureDoesNotMatch")
        with self._lock:
            if query["SignatureNonce"] in self._nonces:
                raise Refused(400, "SignatureNonceUsed")
            self._nonces.add(query["SignatureNonce"])
        if not 900 <= int(query["DurationSeconds"]) <= 43200:
            raise Refused(400, "InvalidParameter.DurationSeconds")
        if query["RoleArn"] != ROLE:
            raise Refused(404, "EntityNotExist.Role")

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are nothing to tell of."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: StsServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.n_connections += 1

    def log_message(self, *arguments: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        query = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        try:
            status, answer = 200, self.server.lend(query)
        except Refused as refused:
            # The real one quotes what it has been sent.
            status, answer = refused.status, {"Code": refused.code, "Message": json.dumps(query)}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def signature(query: dict[str, str], secret: str) -> str:
    """Return the signature that a query of whoever has the secret would have."""

    def enc(text: str) -> str:
        return quote(text, safe="~")

    pairs = sorted((name, value) for name, value in query.items() if name != "Signature")
    joined = "&".join(f"{enc(name)}={enc(value)}" for name, value in pairs)
    text = f"GET&%2F&{enc(joined)}"
    digest = hmac.new(f"{secret}&".encode(), text.encode(), hashlib.sha1).digest()
    return base64.b64encode(digest).decode()


@contextmanager
def serving_sts(
    certificate: Path, key_id: str, secret: str, grant: Callable[[str, str, str], None]
) -> Iterator[StsServer]:
    """Run an STS for a while."""
    server = StsServer(certificate, key_id, secret, grant)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
