"""An S3 on this machine: moto's, which checks signatures and rights, with faults in front of it."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moto import settings
from moto.core import DEFAULT_ACCOUNT_ID
from moto.core.authorization import ActionAuthenticatorMixin
from moto.iam.models import iam_backends
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "evmp-bucket"
DENIED = "denied.jpg"
RIGHTS = {
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Allow", "Action": "s3:*", "Resource": "*"},
        {"Effect": "Deny", "Action": "s3:*", "Resource": f"arn:aws:s3:::{BUCKET}/{DENIED}"},
    ],
}
Fault = int | str
"""A status, or `trickle`: a body that comes byte by byte and never ends."""


class S3Server:
    """The server, with one bucket; `requests` counts by path.

    Attributes:
        key_id, secret: who may ask.
    """

    def __init__(self) -> None:
        self._backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        self._backend.create_bucket(BUCKET, "us-east-1")
        self._application = DomainDispatcherApplication(create_backend_app)
        self._faults: dict[str, list[Fault]] = {}
        self._is_closed = threading.Event()
        self.requests: Counter[str] = Counter()
        self.n_sent = 0  # bytes of bodies
        users = iam_backends[DEFAULT_ACCOUNT_ID]["aws"]
        users.create_user("us-east-1", "reader")
        users.put_user_policy("reader", "rights", json.dumps(RIGHTS))
        key = users.create_access_key("reader")
        self.key_id, self.secret = key.access_key_id, key.secret_access_key
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Quiet)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.05])
        self._thread.start()

    def put(self, key: str, body: bytes) -> str:
        """Make an object. Returns its location."""
        self._backend.put_object(BUCKET, key, body)
        return f"s3://{BUCKET}/{key}"

    def fail(self, key: str, *faults: Fault) -> None:
        """Let the next requests for an object fail."""
        self._faults[f"/{BUCKET}/{key}"] = list(faults)

    def close(self) -> None:
        """End the server."""
        self._is_closed.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        self.requests[path] += 1
        if self._faults.get(path):
            return self._fault(self._faults[path].pop(0), start)
        return self._counted(self._application(environ, start))

    def _fault(self, fault: Fault, start: Callable[..., Any]) -> Iterable[bytes]:
        if fault == "trickle":
            start("200 OK", [("Content-Length", "99999"), ("ETag", '"0"')])
            return self._trickle()
        start(f"{fault} no", [("Content-Length", "0")])
        return []

    def _trickle(self) -> Iterator[bytes]:
        while not self._is_closed.wait(0.05):
            yield b"a"

    def _counted(self, body: Iterable[bytes]) -> Iterator[bytes]:
        for piece in body:
            self.n_sent += len(piece)
            yield piece


class Quiet(WSGIRequestHandler):
    """A connection of which nothing is logged."""

    def log(self, *arguments: Any) -> None:
        """Keep quiet."""


def environment_of(server: S3Server) -> dict[str, str]:
    """Return the variables by which a client finds the server and has its key, and nothing else."""
    return {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": server.key_id,
        "AWS_SECRET_ACCESS_KEY": server.secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }


@contextmanager
def serving_s3() -> Iterator[S3Server]:
    """Run an S3 for a while, whose every request is checked."""
    server = S3Server()
    before = settings.INITIAL_NO_AUTH_ACTION_COUNT
    settings.INITIAL_NO_AUTH_ACTION_COUNT = 0
    ActionAuthenticatorMixin.request_count = 0
    try:
        yield server
    finally:
        settings.INITIAL_NO_AUTH_ACTION_COUNT = before
        server.close()
        s3_backends.reset()
        iam_backends.reset()
