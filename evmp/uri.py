"""The forms in which a job names tables, files, buckets and roles, and how to print them safely."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator

from evmp.setting import show

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_TABLE = re.compile(r"odps://[^/]+/tables/[^/=]+(/[^/=]+=[^/]+)*/?")
_OBJECT = re.compile(r"oss://[^/]+/.+")
_BUCKET = re.compile(r"oss://[^/.]+\.[^/]+(/.*)?")
_ARN = re.compile(r"acs:ram::[^:]+:role/.+")
_CREDENTIALS = re.compile(r"(?<=://)[^/@]*:[^/@]*@")
_QUERY = re.compile(r"(?<=[?&])([^=&]+)=[^&]+")
_SECRET_NAME = re.compile(r"secret|passw|token|credential|access_?key|signature", re.IGNORECASE)


def scheme(uri: str) -> str:
    """Return the scheme in lower case, `oss` for `oss://...`; empty for a local path."""
    match = _SCHEME.match(uri)
    return match[1].lower() if match else ""


def mask(value: Any, name: str = "") -> Any:
    """Return a JSON-able value with what may be a credential replaced by `***`.

    That is the user and password of a URL, the values of its query, and whatever stands under a
    name that speaks of a secret.
    """
    if isinstance(value, dict):
        return {inner: mask(item, inner) for inner, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if value and _SECRET_NAME.search(name):
        return "***"
    if not scheme(value):
        return value
    return _QUERY.sub(r"\1=***", _CREDENTIALS.sub("***@", value))


def _uri(value: str) -> str:
    if "\0" in value:
        raise ValueError(f"got {show(value)}, a path cannot contain a NUL character")
    if value.startswith("odps://") and not _TABLE.fullmatch(value):
        form = "odps://<project>/tables/<table>[/<column>=<value>...]"
        raise ValueError(f"got {show(value)}, expected {form}")
    if value.startswith("oss://") and not _OBJECT.fullmatch(value):
        raise ValueError(f"got {show(value)}, expected oss://<bucket>.<oss_host>/<path>")
    return value


def _bucket(value: str) -> str:
    if not _BUCKET.fullmatch(value):
        raise ValueError(f"got {show(value)}, expected oss://<bucket>.<oss_host>/<path>/")
    return value


def _arn(value: str) -> str:
    if value and not _ARN.fullmatch(value):
        raise ValueError(f"got {show(value)}, expected acs:ram::<account>:role/<name>")
    return value


Uri = Annotated[str, AfterValidator(_uri)]
Bucket = Annotated[str, AfterValidator(_bucket)]
Arn = Annotated[str, AfterValidator(_arn)]
