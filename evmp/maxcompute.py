"""MaxCompute by pyodps: who asks, where, and for how long.

pyodps by itself asks a busy service again for ever, and a broken one for two minutes, in the same
rhythm as everybody else. Here each of its requests is one attempt, and whoever made it asks again,
as long as his Patience lasts. Its connections are made after the fork, by each process for itself.

Imports pyodps: only for the processes that read or write a table. pyodps' own log, which would tell
the keys, is kept quiet.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

import odps
import pyarrow as pa
import requests
import urllib3
from odps import ODPS, accounts, types
from odps.errors import NoSuchPartition, NoSuchTable, ODPSError
from odps.models import TableSchema
from odps.rest import RestClient
from odps.tunnel import TableDownloadSession, TableTunnel, TableUploadSession
from odps.tunnel.io.types import odps_type_to_arrow_type
from odps.types import Column, DataType, Partition, validate_data_type

from evmp.credentials import ALIBABA_CLOUD, OSS, CredentialsUnavailable, open_provider
from evmp.errors import ConfigError

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.value import TableName

CONNECT_SECONDS: Final = 10
READ_SECONDS: Final = 60  # that the service may be silent
FIRST_PAUSE_SECONDS: Final = 0.2
MAX_PAUSE_SECONDS: Final = 20.0
BUSY: Final = (308, 408, 429)
NO_ENDPOINT: Final = (
    "odps_endpoint: required with odps:// tables, but missing; set it, or the variable "
    "ODPS_ENDPOINT"
)


Answer = TypeVar("Answer")


class Unavailable(Exception):
    """The service cannot do it now; asking again may help."""


class Unreachable(ODPSError):  # type: ignore[misc]
    """Nobody answers there; asking again does not help."""


OUTAGE: Final = (Unavailable, requests.RequestException, urllib3.exceptions.HTTPError, OSError)
# Types that projects have known for ever; the others are there only for who asks for them.
ALL_TYPES: Final = {"odps.sql.type.system.odps2": "true", "odps.sql.decimal.odps2": "true"}


class Columns(NamedTuple):
    """The columns of a table, by their names, which are in lower case."""

    kinds: dict[str, DataType]
    partition: tuple[str, ...]
    """Names of the partition columns."""


class Patience:
    """Waits between attempts, ever longer and never as long as others do.

    Args:
        seconds: how long attempts may fail in a row.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.renew()

    def renew(self) -> None:
        """An attempt has succeeded."""
        self._end = 0.0
        self._n_failed = 0

    def wait(self) -> bool:
        """Wait after an attempt has failed. Returns False at once when patience is at its end."""
        now = time.monotonic()
        self._end = self._end or now + self._seconds
        pause = random.uniform(0, min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**self._n_failed))
        self._n_failed += 1
        if now + pause >= self._end:
            return False
        time.sleep(pause)
        return True


def persist(question: Callable[[], Answer], seconds: float) -> Answer:
    """Ask until there is an answer.

    Args:
        seconds: for how long the service may be out of order.

    Raises:
        ODPSError: when the service refuses.
        Exception: one of OUTAGE, when patience is at its end.
    """
    patience = Patience(seconds)
    while True:
        try:
            return question()
        except OUTAGE:
            if not patience.wait():
                raise


class Client(RestClient):  # type: ignore[misc]
    """Requests of pyodps, each sent once."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._owner, self._has_answered = 0, False

    @property
    def session(self) -> requests.Session:
        """The connections of this process: those of another would mix up both's answers."""
        if self._owner != os.getpid():
            self._connections, self._owner = requests.Session(), os.getpid()
        return self._connections

    def request(self, url: str, method: str, stream: bool = False, **options: Any) -> Any:
        """Send a request.

        Raises:
            Unavailable: in the place of errors that pyodps would ask again after.
            ODPSError: when the service refuses, or there is none.
        """
        try:
            answer = super().request(url, method, stream=stream, **options)
            self._has_answered = True
            return answer
        except requests.RequestException as error:
            if not self._has_answered and (reason := _lasting(error)):
                raise Unreachable(f"{urlsplit(url).hostname or '':.100}: {reason}") from None
            raise
        except CredentialsUnavailable as error:
            raise Unavailable(str(error)) from None
        except ODPSError as error:
            status = error.status_code or 0
            if status in BUSY or status >= 500:
                raise Unavailable(f"status {status}: {explain(error)}") from None
            raise


class Tunnel(TableTunnel):  # type: ignore[misc]
    """The tunnel, asked through our Client."""

    def __init__(self, service: ODPS) -> None:
        super().__init__(service)
        self._asked: Client | None = None

    @property
    def tunnel_rest(self) -> Client:
        """What the tunnel is asked through; where it is, the service is asked first."""
        if self._asked is None:
            plain = super().tunnel_rest
            self._asked = Client(
                plain.account, plain.endpoint, plain.project, tag="TUNNEL", retry_enabled=False
            )
        return self._asked

    def close(self) -> None:
        """Close the connections."""
        if self._asked is not None:
            self._asked.session.close()


@contextmanager
def _understood() -> Iterator[None]:
    """Take an answer that pyodps can make nothing of for none.

    Raises:
        Unavailable: in the place of what it stumbles over.
    """
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, SyntaxError):  # the last by XML
        raise Unavailable(
            "the answer is none of MaxCompute's, whose addresses are odps_endpoint and "
            "odps_tunnel_endpoint"
        ) from None


def _whole(session: Any) -> Any:
    """Return a session that the service has told all about."""
    if not session.id or session.schema is None:
        raise ValueError
    return session


class Service:
    """One project, as seen by a job. Several threads may share it to upload, and for nothing else.

    Raises:
        ConfigError: when nothing says where the service is.
        CredentialsError: when nothing says who asks.
    """

    def __init__(self, job: Job, project: str) -> None:
        _set_options()
        endpoint = job.odps_endpoint or os.environ.get("ODPS_ENDPOINT")
        if not endpoint:
            raise ConfigError(NO_ENDPOINT)
        self._odps = ODPS(
            account=_account(job),
            project=project,
            endpoint=endpoint,
            tunnel_endpoint=job.odps_tunnel_endpoint or None,
            logview_host=endpoint,  # or it would be asked for
            rest_client_cls=Client,
            overwrite_global=False,
        )
        self._tunnel = Tunnel(self._odps)

    @_understood()
    def modified(self, table: TableName) -> int:
        """Return when the data of a table, or of a partition, was changed last: in seconds."""
        place = self._odps.get_table(table.name)
        if table.spec:
            place = place.get_partition(table.spec)
        place.reload()
        modified: datetime = place.last_data_modified_time
        return int(modified.timestamp())

    @_understood()
    def download(self, table: TableName) -> TableDownloadSession:
        """Begin a session that reads a table, or a partition."""
        return _whole(
            self._tunnel.create_download_session(
                table.name,
                partition_spec=table.spec or None,
                timeout=CONNECT_SECONDS + READ_SECONDS,
            )
        )

    @_understood()
    def upload(self, table: TableName, session: str | None = None) -> TableUploadSession:
        """Begin a session that replaces the rows of a table, or of a partition, or look at one.

        Args:
            session: the id of one that has begun.
        """
        return _whole(
            self._tunnel.create_upload_session(
                table.name, partition_spec=table.spec or None, upload_id=session, overwrite=True
            )
        )

    def put(
        self, table: TableName, session: TableUploadSession, block: int, body: Iterator[bytes]
    ) -> None:
        """Send a block of rows, in the place of the session's block of that number.

        Args:
            body: as Arrow; taken once.
        """
        tunnel = self._tunnel.tunnel_rest
        tunnel.put(
            f"{tunnel.endpoint}/projects/{table.project}/tables/{table.name}",
            data=body,
            params=session.get_common_params(uploadid=session.id, blockid=block, arrow=""),
            headers=session.get_common_headers(chunked=True),
        )

    def standing(self, table: TableName) -> dict[str, Any] | None:
        """Return what tells the rows of a table, or of a partition, from others; None without it.

        Raises:
            ODPSError: when it is one that cannot be read, such as a view.
        """
        try:
            n_rows = self.download(table).count
            return {"table": table.uri, "rows": n_rows, "modified": self.modified(table)}
        except (NoSuchTable, NoSuchPartition):
            return None

    @_understood()
    def columns(self, table: TableName) -> Columns | None:
        """Return the columns of a table; None where there is none of that name."""
        try:
            schema = self._odps.get_table(table.name).table_schema
        except NoSuchTable:
            return None
        kinds = {column.name.lower(): column.type for column in schema.simple_columns}
        return Columns(kinds, tuple(column.name.lower() for column in schema.partitions))

    def create(
        self, table: TableName, kinds: Mapping[str, str], partition: Sequence[str], days: int
    ) -> None:
        """Make a table, unless there is one of that name.

        Args:
            kinds: types of its columns, as the service writes them.
            partition: names of its partition columns.
            days: for how long the service keeps what is not changed any more.
        """
        columns = [Column(name, validate_data_type(kind)) for name, kind in kinds.items()]
        keys = [Partition(name, validate_data_type("string")) for name in partition]
        self._odps.create_table(
            table.name,
            TableSchema(columns=columns, partitions=keys),
            if_not_exists=True,
            lifecycle=days,
            hints=dict(ALL_TYPES),
        )

    def create_partition(self, table: TableName) -> None:
        """Make a partition, unless it is there."""
        self._odps.get_table(table.name).create_partition(table.spec, if_not_exists=True)

    def close(self) -> None:
        """Close the connections; they are opened again where they are needed."""
        self._odps.rest.session.close()
        self._tunnel.close()


def arrow_type(kind: DataType) -> pa.DataType:
    """Return the type that the service has for values of a column on their way.

    Raises:
        TypeError: when values of that type do not travel as Arrow.
    """
    if isinstance(kind, types.Decimal) and kind.scale == 0:
        return pa.decimal128(kind.precision, 0)  # pyodps takes it for the default, which is 18
    if isinstance(kind, types.Array):
        return pa.list_(arrow_type(kind.value_type))
    if isinstance(kind, types.Map):
        return pa.map_(arrow_type(kind.key_type), arrow_type(kind.value_type))
    if isinstance(kind, types.Struct):
        return pa.struct([(name, arrow_type(it)) for name, it in kind.field_types.items()])
    dtype: pa.DataType = odps_type_to_arrow_type(kind)
    return dtype


def _lasting(error: BaseException) -> str:
    """Return why there is no service at an address; empty where there may be one."""
    cause = _innermost(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"the certificate is not valid: {cause.verify_message}"
    if isinstance(cause, ssl.SSLError) and cause.reason == "WRONG_VERSION_NUMBER":
        return "no TLS is spoken there"
    if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
        return "there is no such host"
    return ""


def _innermost(error: BaseException) -> BaseException:
    inner = error.__cause__ or error.__context__
    return _innermost(inner) if inner else error


def explain(error: BaseException) -> str:
    """Return what an error says, on one line; of a request, what has gone wrong at its bottom."""
    text = str(error)
    if isinstance(error, requests.RequestException):
        place = f"{urlsplit(str(error.request.url)).netloc}: " if error.request else ""
        text = f"{place}{_innermost(error)}"
    if isinstance(error, ODPSError):
        code = error.code or type(error).__name__
        text = f"{code}: {str(error.args[0]).removeprefix(code) if error.args else ''}"
    return " ".join(text.split()) or type(error).__name__


def _set_options() -> None:
    """Have pyodps do what is said above, in this process."""
    logging.getLogger("odps").setLevel(logging.WARNING)
    options = odps.options
    options.retry_times = 0
    options.connect_timeout, options.read_timeout = CONNECT_SECONDS, READ_SECONDS
    options.tunnel.require_stream_footer = True
    options.tunnel.string_as_binary = True
    options.local_timezone = "UTC"


def _account(job: Job) -> Any:
    """Return who asks: pyodps' own variables, or who asks for the rest of the job."""
    if not job.arn and (account := accounts.from_environments()) is not None:
        return account
    provider = open_provider(job, ALIBABA_CLOUD, OSS)
    with suppress(CredentialsUnavailable):  # which passes, or ends the patience of a request
        provider.get_credentials()
    return accounts.CredentialProviderAccount(provider)
