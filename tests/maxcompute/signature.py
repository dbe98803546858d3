"""Whether a request is signed by the right key: the service's signatures, versions 2 and 4."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from urllib.parse import parse_qsl, unquote, urlsplit

SKEW_SECONDS = 15 * 60


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def check_signature(
    method: str,
    path: str,
    headers: Mapping[str, str],
    keys: Mapping[str, tuple[str, str]],
    *,
    now: float,
) -> None:
    """Make sure that who holds the secret has signed this request, just now.

    Args:
        path: behind the endpoint, with the query, as it was sent.
        headers: by lower-case name.
        keys: secrets, and tokens that must be sent along, by the keys' ids.
        now: by the service's clock, in seconds.

    Raises:
        Refused: when something is missing or wrong.
    """
    authorization = headers.get("authorization", "")
    kind, _, rest = authorization.partition(" ")
    credential, _, signature = rest.rpartition(":")
    if kind != "ODPS" or not credential:
        raise Refused(
            401, "Unauthorized", "The request authorization header is invalid or missing."
        )
    parts = credential.split("/")
    if parts[0] not in keys:
        raise Refused(403, "InvalidAccessKeyId", "The access key id does not exist.")
    secret, token = keys[parts[0]]
    if token != headers.get("authorization-sts-token", ""):
        raise Refused(403, "NoPermission", "The security token is missing, wrong or expired.")
    sent = parsedate_to_datetime(headers["date"]).timestamp()
    if abs(now - sent) > SKEW_SECONDS:
        raise Refused(403, "RequestTimeTooSkewed", "The request time differs too much from ours.")
    expected = hmac.new(
        _key(secret, parts[1:]), canonical(method, path, headers).encode(), hashlib.sha1
    )
    if base64.b64encode(expected.digest()).decode() != signature:
        raise Refused(403, "SignatureNotMatch", "The signature does not match the request.")


def _key(secret: str, scope: list[str]) -> bytes:
    """Return the key of version 2, or that of version 4 where there is a date and a region."""
    if not scope:
        return secret.encode()
    date, region, service, request = scope
    if request != "aliyun_v4_request" or date != time.strftime("%Y%m%d", time.gmtime()):
        raise Refused(403, "SignatureNotMatch", f"The scope {scope} is none of today's.")
    key = b"aliyun_v4" + secret.encode()
    for part in (date, region, service, request):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return key


def canonical(method: str, path: str, headers: Mapping[str, str]) -> str:
    """Return the text that is signed."""
    url = urlsplit(unquote(path))
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    signed = {name: value for name, value in query.items() if name.startswith("x-odps-")}
    signed |= {name: value for name, value in headers.items() if name.startswith("x-odps-")}
    signed |= {name: headers.get(name, "") for name in ("content-md5", "content-type", "date")}
    lines = [method]
    for name, value in sorted(signed.items()):
        lines.append(f"{name}:{value}" if name.startswith("x-odps-") else value)
    terms = [f"{name}={value}" if value else name for name, value in sorted(query.items())]
    lines.append(f"{url.path}?{'&'.join(terms)}" if terms else url.path)
    return "\n".join(lines)
