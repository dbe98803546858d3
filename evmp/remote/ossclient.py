"""Where an `oss://` path is, and who asks for it: oss2's buckets over connections of our own.

oss2 signs the requests and knows the errors; it neither tries again nor compares the CRC of what is
read in pieces, so that is done here. The credentials go along with each request, a session's token
in plain, and rows are not to say where to: only hosts that the job names, and OSS's own, are asked.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from xml.etree import ElementTree

import oss2
import requests
from oss2.exceptions import ClientError, InconsistentError, OssError, RequestError
from oss2.utils import Crc64

from evmp.credentials import ALIBABA_CLOUD, OSS, CredentialsUnavailable, open_provider
from evmp.errors import CredentialsError, DownloadError, MissingError
from evmp.remote import Piece
from evmp.remote.body import read_body, size_of, version_of
from evmp.remote.connection import Guard, Pools
from evmp.remote.failure import dismiss, failure_of, told
from evmp.remote.retry import Again, Deadline
from evmp.rule import LOCATIONS
from evmp.value import scheme

if TYPE_CHECKING:
    from evmp.job import Job

new_crc64: Final = Crc64(0).crc64.new
"""Makes what has `update` and `crcValue`. Each Crc64 would make its table anew, in 0.2 ms."""
CRC_HEADER: Final = "x-oss-hash-crc64ecma"
_HOST: Final = re.compile(r"[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*(:\d+)?")
_OWN_HOST: Final = re.compile(r"oss-(?P<region>[a-z0-9-]+?)(-internal)?\.aliyuncs\.com")


class Place(NamedTuple):
    """Where an object is."""

    endpoint: str
    bucket: str
    key: str


class Places:
    """What `oss://` paths of a job mean."""

    def __init__(self, job: Job) -> None:
        self._endpoint = job.ossHost if "://" in job.ossHost else f"https://{job.ossHost}"
        names = (bucket.partition("://")[2].partition("/")[0] for bucket in job.buckets)
        self._hosts = {bucket: host for bucket, _, host in (name.partition(".") for name in names)}
        self._own = job.ossHost.rpartition("://")[2].rstrip("/")
        own = (getattr(job, name) for name in LOCATIONS)
        uris = (uri.partition("://")[2] for uri in own if scheme(uri) == "oss")
        self._named = {uri.partition("/")[0].partition(".")[2] for uri in uris}
        self._named.update(self._hosts.values(), [self._own])

    def find(self, location: str) -> Place:
        """Return where the object `oss://<bucket>[.<oss_host>]/<key>` is.

        Raises:
            DownloadError: when the path is none, or leads to a host that the job does not know.
        """
        name, _, key = location.partition("://")[2].partition("/")
        bucket, _, host = name.partition(".")
        host = host or self._hosts.get(bucket, self._own)
        if not bucket or not key:
            raise DownloadError("expected oss://<bucket>.<oss_host>/<key>")
        if not host:
            raise DownloadError(f"no host for bucket {bucket}; set ossHost, or name it in buckets")
        if not _HOST.fullmatch(host) or not self._is_known(host):
            raise DownloadError(f"{host} is no host of OSS; ossHost or buckets may name others")
        return Place(self._endpoint if host == self._own else f"https://{host}", bucket, key)

    def _is_known(self, host: str) -> bool:
        return host in self._named or bool(_OWN_HOST.fullmatch(host))


class OssClient:
    """Asks for objects in one process, from any number of threads.

    Args:
        job: says who asks, how long a connection may take, and what hosts there are.
        n_connections: that are kept for a host.

    Attributes:
        places: what paths mean.
        guard: of the connections.
    """

    def __init__(self, job: Job, n_connections: int) -> None:
        logging.getLogger("oss2").setLevel(logging.CRITICAL)  # it tells each error itself
        self.places = Places(job)
        self._timeout = (job.connect_timeout_seconds, job.read_timeout_seconds)
        # The endpoints of a network within the cloud are private, and named by the job or known.
        self.guard = Guard(allow_private=True, connect_seconds=job.connect_timeout_seconds)
        self._session = oss2.Session()
        self._session.session = _Session(_Adapter(self.guard, n_connections))
        self._credentials = open_provider(job, OSS, ALIBABA_CLOUD)

    def bucket(self, place: Place, *, enable_crc: bool = False) -> Any:
        """Return oss2's bucket.

        Args:
            enable_crc: compare the CRC64 of what is sent with that of what has come.

        Raises:
            DownloadError: when the bucket has no proper name.
        """
        region = region_of(place.endpoint)
        signer = oss2.ProviderAuthV4 if region else oss2.ProviderAuth
        try:
            return oss2.Bucket(
                signer(self._credentials),
                place.endpoint,
                place.bucket,
                session=self._session,
                connect_timeout=self._timeout,
                enable_crc=enable_crc,
                region=region or None,
            )
        except ClientError as error:
            raise DownloadError(str(error.body)) from None

    def get(
        self, bucket: Any, key: str, limit: int, span: tuple[int, int] | None, etag: str = ""
    ) -> Piece:
        """Return an object, whose CRC64 is compared, or a part of it; for use within `guard.until`.

        Args:
            limit: the most bytes of a whole object.
            span: what part is wanted. An empty object, which has none, comes whole.
            etag: that the object must have, if any.

        Raises:
            DownloadError, Again: see `asking`.
        """
        deadline, headers = self.guard.deadline, dict[str, str]()
        if span:
            headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        if etag:
            headers["If-Match"] = etag
        with self.asking(deadline):
            answer = bucket.get_object(key, headers=headers)
        part = span if answer.status == HTTPStatus.PARTIAL_CONTENT else None
        response, crc, version = answer.resp.response.raw, new_crc64(), version_of(answer.headers)
        with told(deadline, self._timeout[1]):
            try:
                if part:
                    data = read_body(response, part[1] - part[0], deadline)
                    return Piece(part[0], data, size_of(answer.headers, part[0]), version)
                data = read_body(response, limit, deadline, crc.update)
            finally:
                dismiss(response)
        if crc.crcValue != int(answer.headers.get(CRC_HEADER, crc.crcValue)):
            raise Again("the object has come with another CRC64 than it has")
        return Piece(0, data, len(data), version)

    @contextmanager
    def asking(self, deadline: Deadline) -> Iterator[None]:
        """Turn what oss2 raises into DownloadError or Again."""
        deadline.check()
        try:
            yield
        except CredentialsError as error:
            raise DownloadError(str(error)) from None
        except CredentialsUnavailable as error:
            raise Again(str(error)) from None
        except ClientError as error:
            raise DownloadError(str(error.body)) from None
        except RequestError as error:
            deadline.check()
            raise self._meaning_of(error.exception) from None
        except requests.RequestException as error:  # in the midst of an answer
            deadline.check()
            raise self._meaning_of(error) from None
        except ElementTree.ParseError:
            raise Again("the answer has come damaged") from None
        except InconsistentError:
            raise Again("the object has come with another CRC64 than it was sent with") from None
        except OssError as error:
            if error.code == "InvalidDigest":
                raise Again("what was sent has come damaged") from None
            if error.status == 404 and error.code in ("NoSuchKey", ""):  # a head has no code
                raise MissingError(_message_of(error)) from None
            raise failure_of(error.status, _message_of(error), error.headers) from None
        except (TypeError, ValueError):  # of a header that oss2, or we, make something of
            raise DownloadError("the answer is none of OSS's") from None

    def close(self) -> None:
        """Close the connections that nobody uses."""
        self._session.session.close()

    def _meaning_of(self, error: Exception) -> Exception:
        if isinstance(error, requests.exceptions.SSLError):
            return DownloadError("TLS failed, perhaps by the certificate")
        if isinstance(error, requests.exceptions.Timeout):
            return Again(f"nothing came for {self._timeout[1]:g} seconds")
        return Again("the connection broke off")


def region_of(endpoint: str) -> str:
    """Return the region that requests are signed for; without one the signature is of version 1."""
    match = _OWN_HOST.fullmatch(endpoint.partition("://")[2])
    of_host = match["region"] if match and "accelerate" not in match["region"] else ""
    return os.environ.get("OSS_REGION", "") or of_host


def _message_of(error: OssError) -> str:
    if error.status // 100 == 3:
        return f"{error.status} a redirect, which is not followed"
    host = error.details.get("Endpoint", "")
    remedy = f"; the bucket is at {host:.100}" if host else ""
    return f"{error.status} {error.code or 'without a reason'}{remedy}"


class _Session(requests.Session):
    """Goes where it is sent, and nowhere else.

    A bucket may redirect whoever asks, anywhere, and a session's token would go along.
    """

    def __init__(self, adapter: requests.adapters.HTTPAdapter) -> None:
        super().__init__()
        self.trust_env = False  # no proxies, and no other credentials
        for prefix in ("http://", "https://"):
            self.mount(prefix, adapter)

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Say that no response leads elsewhere."""


class _Adapter(requests.adapters.HTTPAdapter):
    """Lets requests use connections that are guarded."""

    def __init__(self, guard: Guard, n_connections: int) -> None:
        self.guard, self._n_connections = guard, n_connections
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        self.poolmanager = Pools(self.guard, self._n_connections)
