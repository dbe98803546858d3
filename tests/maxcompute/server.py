"""The service: one HTTP server for the REST endpoint, under /api, and the tunnel's.

The calls that `fault` and `calls` know by name:

    table                 GET a table or a partition; nothing of its rows
    tunnel                GET where the tunnel is
    download.create       POST ?downloads
    download.reload       GET ?downloadid
    download.data         GET ?data&rowrange=(start,count)
"""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from xml.sax.saxutils import escape

from maxcompute import wire
from maxcompute.fault import Fault, Faults, Harm
from maxcompute.signature import Refused, check_signature
from maxcompute.store import NO_PARTITION, Download, Table

API = "/api"
RESOURCE = re.compile(r"/projects/(?P<project>[^/]+)(/(?P<kind>tables/(?P<table>[^/]+)|tunnel))?")


class MaxCompute:
    """A service with one project, for whoever has its key.

    Args:
        token: that requests must carry, too, as those of temporary keys do.
        delay: seconds that each answer takes.
    """

    key_id, secret = "evmp-test-key-id", "evmp-test-key-secret"

    def __init__(self, project: str = "shop", *, token: str = "", delay: float = 0.0) -> None:
        self.project, self.token, self.delay = project, token, delay
        self.tables: dict[str, Table] = {}
        self.downloads: dict[str, Download] = {}
        self.faults = Faults()
        self.calls: list[tuple[str, dict[str, str]]] = []
        """What was asked for so far: the call and its query."""
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.service = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> MaxCompute:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def tunnel_endpoint(self) -> str:
        """Where the tunnel is."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def endpoint(self) -> str:
        """Where all the rest is."""
        return self.tunnel_endpoint + API

    def environment(self) -> dict[str, str]:
        """Return the variables by which a client finds the service and has its key."""
        token = {"ALIBABA_CLOUD_SECURITY_TOKEN": self.token} if self.token else {}
        return {
            "ODPS_ENDPOINT": self.endpoint,
            "ALIBABA_CLOUD_ACCESS_KEY_ID": self.key_id,
            "ALIBABA_CLOUD_ACCESS_KEY_SECRET": self.secret,
            "NO_PROXY": "127.0.0.1",
            **token,
        }

    def add(self, name: str, types: dict[str, str], *keys: str, is_view: bool = False) -> Table:
        """Make a table; `keys` are its partition columns."""
        self.tables[name] = Table(name, types, keys, is_view)
        return self.tables[name]

    def count(self, call: str) -> int:
        """Return how often there was this call."""
        return sum(name == call for name, _ in self.calls)

    # --- calls; each returns the type of the answer's content, and the content -----------------

    def do(
        self, call: str, table: str, query: dict[str, str], fewer: int
    ) -> tuple[str, Iterator[bytes]]:
        """Do what is asked for, but leave `fewer` rows of a range out.

        Raises:
            Refused: when the service would refuse it.
        """
        if call == "tunnel":
            return "text/plain", iter((self.tunnel_endpoint.encode()[len("http://") :],))
        if table not in self.tables:
            raise Refused(404, "NoSuchTable", f"The specified table {table} does not exist.")
        if call == "table":
            return "text/xml", iter((self._describe(self.tables[table], query).encode(),))
        if call == "download.create":
            return self._create_download(self.tables[table], query.get("partition", NO_PARTITION))
        session = self.downloads.get(query["downloadid"])
        if session is None:
            raise Refused(404, "NoSuchDownload", "The specified download id does not exist.")
        if call == "download.reload":
            return _json(_session(query["downloadid"], session))
        return self._data(session, query, fewer)

    def _create_download(self, table: Table, partition: str) -> tuple[str, Iterator[bytes]]:
        session = Download(table, partition, table.data(partition))
        self.downloads[name := uuid.uuid4().hex] = session
        return _json(_session(name, session))

    def _data(
        self, session: Download, query: dict[str, str], fewer: int
    ) -> tuple[str, Iterator[bytes]]:
        start, count = map(int, query["rowrange"].strip("()").split(","))
        columns = query["columns"].split(",") if "columns" in query else []
        is_arrow = "arrow" in query
        rows = session.range(start, count, columns, in_order=not is_arrow)
        rows = rows.slice(0, rows.num_rows - fewer)
        return "application/octet-stream", (wire.arrow if is_arrow else wire.records)(rows)

    def _describe(self, table: Table, query: dict[str, str]) -> str:
        if "partition" in query:
            data = table.data(query["partition"].replace("'", ""))
            schema = {"createTime": table.created, "lastModifiedTime": data.modified}
            text = escape(json.dumps({**schema, "partitionRecordNum": data.rows.num_rows}))
            return f"<Partition><Schema>{text}</Schema></Partition>"
        data = table.partitions.get(NO_PARTITION)
        modified = data.modified if data else table.created
        schema = {**_schema(table), "createTime": table.created, "isVirtualView": table.is_view}
        return (
            f"<Table><Name>{table.name}</Name><TableId>{id(table):x}</TableId>"
            f'<Schema format="Json">{escape(json.dumps(schema))}</Schema>'
            f"<CreationTime>{formatdate(table.created, usegmt=True)}</CreationTime>"
            f"<LastModifiedTime>{formatdate(modified, usegmt=True)}</LastModifiedTime></Table>"
        )


def _schema(table: Table) -> dict[str, Any]:
    columns = [{"name": name, "type": kind} for name, kind in table.types.items()]
    keys = [{"name": name, "type": "string"} for name in table.keys]
    return {"columns": columns, "partitionKeys": keys}


def _session(name: str, session: Download) -> dict[str, Any]:
    return {
        "DownloadID": name,
        "Status": "EXPIRED" if session.is_expired else "NORMAL",
        "RecordCount": session.data.rows.num_rows,
        "Schema": {**_schema(session.table), "IsVirtualView": False},
    }


def _json(answer: dict[str, Any]) -> tuple[str, Iterator[bytes]]:
    return "application/json", iter((json.dumps(answer).encode(),))


class _Server(ThreadingHTTPServer):
    service: MaxCompute
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that have gone."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing of what goes well."""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        service = self.server.service
        self.rfile.read(int(self.headers.get("content-length", 0)))
        call, fault = "", Fault("")
        try:
            call, table, query = self._request()
            service.calls.append((call, query))
            fault = service.faults.of(call)
            time.sleep(service.delay + fault.seconds)
            if fault.status:
                raise Refused(fault.status, fault.code, "This was asked for.")
            kind, body = service.do(call, table, query, fault.fewer)
        except Refused as refusal:
            self._refuse(refusal, is_tunnel=call.startswith("download"))
            return
        if fault.lost:
            self._reset()
        else:
            self._send(kind, body, fault)

    def _request(self) -> tuple[str, str, dict[str, str]]:
        """Return the call, the table and the query, of a request that is signed."""
        service = self.server.service
        path = self.path.removeprefix(API)
        check_signature(
            self.command,
            path,
            {name.lower(): value for name, value in self.headers.items()},
            key_id=service.key_id,
            secret=service.secret,
            token=service.token,
        )
        url = urlsplit(path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        match = RESOURCE.fullmatch(url.path)
        if match is None:
            raise Refused(404, "NoSuchObject", "There is no such resource.")
        if match["project"] != service.project:
            raise Refused(404, "NoSuchProject", f"The project {match['project']} does not exist.")
        if match["kind"] == "tunnel":
            return "tunnel", "", query
        if self.path.startswith(API):
            return "table", match["table"], query
        names = {"downloads": "create", "data": "data"}
        action = next((names[name] for name in names if name in query), "reload")
        return f"download.{action}", match["table"], query

    def _refuse(self, refusal: Refused, *, is_tunnel: bool) -> None:
        request, host = uuid.uuid4().hex, "127.0.0.1"
        if is_tunnel:
            body = json.dumps({"Code": refusal.code, "Message": str(refusal)}).encode()
        else:
            body = (
                f"<Error><Code>{refusal.code}</Code><Message>{escape(str(refusal))}</Message>"
                f"<RequestId>{request}</RequestId><HostId>{host}</HostId></Error>"
            ).encode()
        self.send_response(refusal.status)
        self.send_header("x-odps-request-id", request)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send(self, kind: str, body: Iterator[bytes], fault: Fault) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        sent = 0
        for piece in body:
            harmed = _harmed(piece, fault, sent)
            if harmed:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(harmed), harmed))
            sent += len(piece)
            if fault.harm in (Harm.CUT, Harm.RESET) and sent > fault.after:
                break
        if fault.harm == Harm.RESET:
            self._reset()
        else:
            self.wfile.write(b"0\r\n\r\n")

    def _reset(self) -> None:
        """Close the connection so that the client's next read fails."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True


def _harmed(piece: bytes, fault: Fault, sent: int) -> bytes:
    """Return what is left of a piece of a body that `sent` bytes have been sent of."""
    place = fault.after - sent
    if fault.harm is None or not 0 <= place < len(piece):
        return piece
    if fault.harm == Harm.FLIP:
        return piece[:place] + bytes([piece[place] ^ 1]) + piece[place + 1 :]
    return piece[:place]
