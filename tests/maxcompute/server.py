"""The service: one HTTP server for the REST endpoint, under /api, and the tunnel's.

The calls that `fault` and `calls` know by name:

    table                 GET a table or a partition; nothing of its rows
    tunnel                GET where the tunnel is
    job.create            POST a statement that makes a table or a partition
    job.status            GET how it is with that
    upload.create         POST ?uploads
    upload.reload         GET ?uploadid
    upload.block          PUT ?uploadid&blockid
    upload.commit         POST ?uploadid
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
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit
from xml.sax.saxutils import escape

from maxcompute import ddl, wire
from maxcompute.fault import Fault, Faults, Harm
from maxcompute.signature import Refused, check_signature
from maxcompute.store import MAX_FIELD_BYTES, NO_PARTITION, Download, Table, Upload

API = "/api"
RESOURCE = re.compile(
    r"/projects/(?P<project>[^/]+)(/(?P<kind>tables|tunnel|instances)(/(?P<name>[^/]+))?)?"
)


class Answer(NamedTuple):
    """What is answered to a call that goes well."""

    kind: str
    body: Iterator[bytes]
    status: int = 200
    location: str = ""


class MaxCompute:
    """A service with one project, for whoever has its key.

    Args:
        token: that requests must carry, too, as those of temporary keys do.
        delay: seconds that each answer takes.
        skew: seconds that its clock is ahead of ours.
    """

    key_id, secret = "evmp-test-key-id", "evmp-test-key-secret"

    def __init__(
        self, project: str = "shop", *, token: str = "", delay: float = 0.0, skew: float = 0.0
    ) -> None:
        self.project, self.token, self.delay, self.skew = project, token, delay, skew
        self.lent: dict[str, tuple[str, str]] = {}
        """Secrets and tokens of temporary keys, by their ids."""
        self.tables: dict[str, Table] = {}
        self.downloads: dict[str, Download] = {}
        self.uploads: dict[str, Upload] = {}
        self.jobs: dict[str, str] = {}
        """Of each job what has made it fail; empty if nothing has."""
        self.expires: list[str] = []
        """Calls, each of which finds, once, that the session of an upload has expired."""
        self.on_step: Callable[[str], None] = lambda step: None
        """Told of each call as it arrives, and when it has had its effect: `upload.commit done`."""
        self.faults = Faults()
        self.calls: list[tuple[str, dict[str, str]]] = []
        """What was asked for so far: the call and its query."""
        self._lock = threading.Lock()
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

    # --- calls ---------------------------------------------------------------------------------

    def do(self, call: str, name: str, query: dict[str, str], body: bytes, fewer: int) -> Answer:
        """Do what is asked for, but leave `fewer` rows of a range out.

        Args:
            name: of the table or the job.

        Raises:
            Refused: when the service would refuse it.
        """
        group, _, action = call.partition(".")
        with self._lock:
            if call == "tunnel":
                address = self.tunnel_endpoint.removeprefix("http://")
                return Answer("text/plain", iter((address.encode(),)))
            if call == "job.create":
                return self._create_job(body)
            if call == "job.status":
                return self._job(name, query)
            if name.lower() not in self.tables:
                raise Refused(404, "NoSuchTable", f"The specified table {name} does not exist.")
            table = self.tables[name.lower()]
            if call == "table":
                return Answer("text/xml", iter((self._describe(table, query).encode(),)))
            if group == "upload":
                return self._upload(action, table, query, body)
            if action == "create":
                return self._create_download(table, query.get("partition", NO_PARTITION))
        session = self.downloads.get(query["downloadid"])
        if session is None:
            raise Refused(404, "NoSuchDownload", "The specified download id does not exist.")
        if action == "reload":
            return _json(_session(query["downloadid"], session))
        return self._data(session, query, fewer)

    def _create_job(self, body: bytes) -> Answer:
        statement, settings = ddl.statement_of(body)
        self.jobs[job := uuid.uuid4().hex] = ""
        try:
            ddl.run(statement, settings, self.project, self.tables)
        except ddl.Failed as failure:
            self.jobs[job] = str(failure)
        location = f"{self.endpoint}/projects/{self.project}/instances/{job}"
        return Answer("text/xml", iter(()), 201, location)

    def _job(self, job: str, query: dict[str, str]) -> Answer:
        if job not in self.jobs:
            raise Refused(404, "NoSuchInstance", f"The specified instance {job} does not exist.")
        status = "Failed" if self.jobs[job] else "Success"
        task = f"<Name>SQLTask</Name><Status>{status}</Status>"
        if "result" in query:
            task = f'<Name>SQLTask</Name><Result Format="text">{escape(self.jobs[job])}</Result>'
        tasks = f'<Tasks><Task Type="SQL">{task}</Task></Tasks>'
        text = f"<Instance><Status>Terminated</Status>{tasks}</Instance>"
        return Answer("text/xml", iter((text.encode(),)))

    def _upload(self, action: str, table: Table, query: dict[str, str], body: bytes) -> Answer:
        if action == "create":
            name, partition = uuid.uuid4().hex, query.get("partition", NO_PARTITION)
            table.data(partition)
            self.uploads[name] = Upload(table, partition, query.get("overwrite") == "true")
        else:
            name = query["uploadid"]
        session = self.uploads.get(name)
        if session is None:
            raise Refused(404, "NoSuchUpload", "The specified upload id does not exist.")
        if f"upload.{action}" in self.expires:
            self.expires.remove(f"upload.{action}")
            session.status = "EXPIRED"
        if action == "block":
            read = wire.read_arrow if "arrow" in query else wire.read_records
            session.put(int(query["blockid"]), read(body, table.schema))
        elif action == "commit":
            session.commit()
        return _json(
            {
                "UploadID": name,
                "Status": session.status,
                "Schema": {**_schema(table), "IsVirtualView": False},
                "UploadedBlockList": [{"BlockID": number} for number in sorted(session.blocks)],
                "MaxFieldSize": MAX_FIELD_BYTES,
            }
        )

    def _create_download(self, table: Table, partition: str) -> Answer:
        session = Download(table, partition, table.data(partition))
        self.downloads[name := uuid.uuid4().hex] = session
        return _json(_session(name, session))

    def _data(self, session: Download, query: dict[str, str], fewer: int) -> Answer:
        start, count = map(int, query["rowrange"].strip("()").split(","))
        columns = query["columns"].split(",") if "columns" in query else []
        is_arrow = "arrow" in query
        rows = session.range(start, count, columns, in_order=not is_arrow)
        rows = rows.slice(0, rows.num_rows - fewer)
        return Answer("application/octet-stream", (wire.arrow if is_arrow else wire.records)(rows))

    def _describe(self, table: Table, query: dict[str, str]) -> str:
        if "partition" in query:
            data = table.data(query["partition"].replace("'", ""))
            schema = {"createTime": table.created, "lastModifiedTime": data.modified}
            text = escape(json.dumps({**schema, "partitionRecordNum": data.rows.num_rows}))
            return f"<Partition><Schema>{text}</Schema></Partition>"
        data = table.partitions.get(NO_PARTITION)
        modified = data.modified if data else table.created
        schema = {
            **_schema(table),
            "createTime": table.created,
            "isVirtualView": table.is_view,
            "lifecycle": table.lifecycle,
        }
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


def _json(answer: dict[str, Any]) -> Answer:
    return Answer("application/json", iter((json.dumps(answer).encode(),)))


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

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        service = self.server.service
        call, fault = "", Fault("")
        try:
            # A request whose body is not whole has no effect, and nobody to be answered.
            body = self._body()
            call, name, query = self._request()
            service.calls.append((call, query))
            service.on_step(call)
            fault = service.faults.of(call)
            time.sleep(service.delay + fault.seconds)
            if fault.status:
                raise Refused(fault.status, fault.code, "This was asked for.")
            if call == "upload.block":
                if fault.harm == Harm.RESET:
                    self._reset()
                    return
                body = _harmed(body, fault, 0)
            answer = service.do(call, name, query, body, fault.fewer)
            service.on_step(f"{call} done")
        except EOFError:
            self.close_connection = True
            return
        except Refused as refusal:
            self._refuse(refusal, is_tunnel=call.startswith(("download", "upload")))
            return
        if fault.lost:
            self._reset()
        else:
            self._send(answer, Fault("") if call == "upload.block" else fault)

    def _body(self) -> bytes:
        """Return the request's body, in one piece or in chunks.

        Raises:
            EOFError: when it ends too early.
        """
        if self.headers.get("transfer-encoding") != "chunked":
            return self._exactly(int(self.headers.get("content-length", 0)))
        body = bytearray()
        while size := int(self.rfile.readline() or self._exactly(1), 16):
            body += self._exactly(size)
            self._exactly(2)
        self._exactly(2)
        return bytes(body)

    def _exactly(self, n_bytes: int) -> bytes:
        data = self.rfile.read(n_bytes)
        if len(data) < n_bytes:
            raise EOFError
        return data

    def _request(self) -> tuple[str, str, dict[str, str]]:
        """Return the call, the table or the job, and the query, of a request that is signed."""
        service = self.server.service
        path = self.path.removeprefix(API)
        check_signature(
            self.command,
            path,
            {name.lower(): value for name, value in self.headers.items()},
            {service.key_id: (service.secret, service.token), **service.lent},
            now=time.time() + service.skew,
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
        if match["kind"] == "instances":
            return "job.status" if match["name"] else "job.create", match["name"] or "", query
        if match["kind"] is None:
            raise Refused(404, "NoSuchObject", "There is no such resource.")
        if self.path.startswith(API):
            return "table", match["name"], query
        return _tunnel_call(self.command, query), match["name"], query

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

    def _send(self, answer: Answer, fault: Fault) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        if answer.location:
            self.send_header("Location", answer.location)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        sent = 0
        for piece in answer.body:
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


def _tunnel_call(method: str, query: dict[str, str]) -> str:
    """Name what is asked of the tunnel."""
    if "uploads" in query or "uploadid" in query:
        actions = {"PUT": "block", "GET": "reload", "POST": "commit"}
        return f"upload.{'create' if 'uploads' in query else actions[method]}"
    names = {"downloads": "create", "data": "data"}
    return f"download.{next((names[name] for name in names if name in query), 'reload')}"


def _harmed(piece: bytes, fault: Fault, sent: int) -> bytes:
    """Return what is left of a piece of a body that `sent` bytes have been sent of."""
    place = fault.after - sent
    if fault.harm is None or not 0 <= place < len(piece):
        return piece
    if fault.harm == Harm.FLIP:
        return piece[:place] + bytes([piece[place] ^ 1]) + piece[place + 1 :]
    return piece[:place]
