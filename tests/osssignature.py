"""Who asks an OSS: signatures of versions 1 and 4, as the real one computes and compares them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from email.message import Message
from email.utils import parsedate_to_datetime
from urllib.parse import quote

KEY_ID, KEY_SECRET, TOKEN = "LTAI-test-id", "test-secret", "test-token"
REGION = "cn-hangzhou"
V4 = "OSS4-HMAC-SHA256"
# The parameters that are part of what a signature of version 1 names; others are not signed.
SUBRESOURCES = {
    "acl", "append", "continuation-token", "delete", "location", "partNumber", "position",
    "security-token", "stat", "uploadId", "uploads", "bucketInfo",
}  # fmt: skip


def moment_of(headers: Message) -> float:
    """Return when a request says that it was made, in seconds since 1970."""
    try:
        return parsedate_to_datetime(headers["Date"]).timestamp()
    except (TypeError, ValueError):
        text = headers.get("x-oss-date", "")
        return time.mktime(time.strptime(text, "%Y%m%dT%H%M%SZ")) - time.timezone


def expected(
    method: str, bucket: str, key: str, query: dict[str, str], headers: Message, secret: str
) -> str:
    """Return the Authorization that a request with the key's secret would have."""
    if headers.get("Authorization", "").startswith(f"{V4} "):
        return _sign_v4(method, bucket, key, query, headers, secret)
    return _sign_v1(method, bucket, key, query, headers, secret)


def key_id_of(headers: Message) -> str:
    """Return whose key the Authorization of a request names."""
    text = headers.get("Authorization", "")
    if text.startswith(f"{V4} "):
        return text.partition("Credential=")[2].partition("/")[0]
    return text.removeprefix("OSS ").partition(":")[0]


def _own_headers(headers: Message, *others: str) -> list[tuple[str, str]]:
    pairs = [(name.lower(), value.strip()) for name, value in headers.items()]
    return sorted(pair for pair in pairs if pair[0].startswith("x-oss-") or pair[0] in others)


def _sign_v1(
    method: str, bucket: str, key: str, query: dict[str, str], headers: Message, secret: str
) -> str:
    plain = [headers.get(name, "") for name in ("Content-MD5", "Content-Type", "Date")]
    own = [f"{name}:{value}" for name, value in _own_headers(headers)]
    signed = sorted((name, value) for name, value in query.items() if name in SUBRESOURCES)
    parameters = "&".join(f"{name}={value}" if value else name for name, value in signed)
    resource = f"/{bucket}/{key}" + (f"?{parameters}" if parameters else "")
    text = "\n".join([method, *plain, *own, resource])
    digest = hmac.new(secret.encode(), text.encode(), hashlib.sha1).digest()
    return f"OSS {key_id_of(headers)}:{base64.b64encode(digest).decode()}"


def _sign_v4(
    method: str, bucket: str, key: str, query: dict[str, str], headers: Message, secret: str
) -> str:
    moment = headers["x-oss-date"]
    scope = f"{moment[:8]}/{REGION}/oss/aliyun_v4_request"
    signed = _own_headers(headers, "content-type", "content-md5")
    lines = "".join(f"{name}:{value}\n" for name, value in signed)
    pairs = sorted((quote(name, ""), quote(value, "")) for name, value in query.items())
    parameters = "&".join(f"{name}={value}" if value else name for name, value in pairs)
    path = quote(f"/{bucket}/{key}")
    request = "\n".join([method, path, parameters, lines, "", "UNSIGNED-PAYLOAD"])
    hashed = hashlib.sha256(request.encode()).hexdigest()
    text = f"{V4}\n{moment}\n{scope}\n{hashed}"
    chain = b"aliyun_v4" + secret.encode()
    for part in scope.split("/"):
        chain = hmac.new(chain, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(chain, text.encode(), hashlib.sha256).hexdigest()
    return f"{V4} Credential={key_id_of(headers)}/{scope}, Signature={signature}"
