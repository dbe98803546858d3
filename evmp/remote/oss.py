"""Objects of Alibaba Cloud OSS by oss2, over connections of our own.

oss2 signs the requests and knows the errors. It neither tries again nor compares the CRC of what is
read in pieces, so that is done here. The credentials are the environment's, as oss2 reads them.
They go along with each request, a session's token in plain, and rows are not to say where to: only
hosts that the job names, and OSS's own, are asked.
"""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import oss2
import requests
from oss2.credentials import EnvironmentVariableCredentialsProvider
from oss2.exceptions import ClientError, OssError, RequestError
from oss2.utils import Crc64

from evmp.errors import DownloadError
from evmp.remote.body import read_body
from evmp.remote.connection import Guard, Pools
from evmp.remote.failure import dismiss, failure_of, told
from evmp.remote.retry import Again, Deadline, persist

if TYPE_CHECKING:
    from evmp.job import Job

_HOST: Final = re.compile(r"[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*(:\d+)?")
_OWN_HOST: Final = re.compile(r"oss-(?P<region>[a-z0-9-]+?)(-internal)?\.aliyuncs\.com")
_CRC: Final = "x-oss-hash-crc64ecma"


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
        is_named = host == self._own or host in self._hosts.values()
        return is_named or bool(_OWN_HOST.fullmatch(host))


class OssRemote:
    """Objects behind `oss://` paths; see Remote."""

    def __init__(self, job: Job) -> None:
        logging.getLogger("oss2").setLevel(logging.CRITICAL)  # it tells each error itself
        self._job, self._places = job, Places(job)
        self._timeout = (job.connect_timeout_seconds, job.read_timeout_seconds)
        # The endpoints of a network within the cloud are private, and named by the job or known.
        self._guard = Guard(allow_private=True, connect_seconds=job.connect_timeout_seconds)
        self._session = oss2.Session(adapter=_Adapter(self._guard, job.download_concurrency))
        self._session.session.trust_env = False  # no proxies, and no other credentials
        self._credentials = EnvironmentVariableCredentialsProvider()

    def fetch(self, location: str) -> bytes:
        """Get the object; see Remote."""
        place = self._places.find(location)
        bucket = self._bucket(place)
        deadline = Deadline("download_timeout_seconds", self._job.download_timeout_seconds)
        with self._guard.until(deadline):
            return persist(
                lambda: self._get(bucket, place.key, deadline),
                deadline,
                self._job.download_retries,
            )

    def cut_overdue(self) -> None:
        """Shut sockets down; see Remote."""
        self._guard.cut_overdue()

    def close(self) -> None:
        """Close the session; see Remote."""
        self._session.session.close()

    def _bucket(self, place: Place) -> Any:
        region = region_of(place.endpoint)
        signer = oss2.ProviderAuthV4 if region else oss2.ProviderAuth
        try:
            self._credentials.get_credentials()
            return oss2.Bucket(
                signer(self._credentials),
                place.endpoint,
                place.bucket,
                session=self._session,
                connect_timeout=self._timeout,
                enable_crc=False,
                region=region or None,
            )
        except ClientError as error:
            raise DownloadError(_client_message(error)) from None

    def _get(self, bucket: Any, key: str, deadline: Deadline) -> bytes:
        deadline.check()
        try:
            answer = bucket.get_object(key)
        except ClientError as error:
            raise DownloadError(_client_message(error)) from None
        except RequestError as error:
            deadline.check()
            raise self._meaning_of(error.exception) from None
        except OssError as error:
            message = f"{error.status} {error.code or 'without a reason'}"
            raise failure_of(error.status, message, error.headers) from None
        response, crc = answer.resp.response.raw, Crc64(0)
        with told(deadline, self._job.read_timeout_seconds):
            try:
                body = read_body(response, self._job.max_row_bytes, deadline, crc.update)
            finally:
                dismiss(response)
        expected = answer.headers.get(_CRC)
        if expected is not None and int(expected) != crc.crc:
            raise Again("the object has come with another CRC64 than it has")
        return body

    def _meaning_of(self, error: Exception) -> Exception:
        if isinstance(error, requests.exceptions.SSLError):
            return DownloadError("TLS failed, perhaps by the certificate")
        if isinstance(error, requests.exceptions.Timeout):
            return Again(f"nothing came for {self._job.read_timeout_seconds:g} seconds")
        return Again("the connection broke off")


def region_of(endpoint: str) -> str:
    """Return the region that requests are signed for; without one the signature is of version 1."""
    match = _OWN_HOST.fullmatch(endpoint.partition("://")[2])
    of_host = match["region"] if match and "accelerate" not in match["region"] else ""
    return os.environ.get("OSS_REGION", "") or of_host


def _client_message(error: ClientError) -> str:
    if "key" in error.body and "null or empty" in error.body:
        return "no credentials for OSS; set OSS_ACCESS_KEY_ID and OSS_ACCESS_KEY_SECRET"
    return str(error.body)


class _Adapter(requests.adapters.HTTPAdapter):
    """Lets requests use connections that are guarded."""

    def __init__(self, guard: Guard, n_connections: int) -> None:
        self._guard, self._n_connections = guard, n_connections
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        self.poolmanager = Pools(self._guard, self._n_connections)
