"""The types of a job's values: URIs, names, classes, processes; and how to print them safely.

The forms are those of the specification. Comma lists may be YAML lists, JSON texts YAML mappings.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal
from urllib.parse import unquote

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from evmp.setting import Integer, key, show

ModelType = Literal[
    "feature_extractor",
    "classifier",
    "multilabel_classifier",
    "detector",
    "text_detector",
    "text_recognizer",
    "text_detection_recognition",
    "text_spotter",
    "segmentor",
    "self_define",
]

HTTP: Final = ("http", "https")
OSS: Final = ("oss",)
FILE_SYSTEMS: Final = (
    *("abfs", "abfss", "adl", "az", "box", "dropbox", "ftp", "gcs", "gs", "hdfs", "hf", "lakefs"),
    *("oci", "s3", "s3a", "sftp", "smb", "ssh", "tos", "webdav", "webhdfs"),
)
"""What fsspec opens on other machines. What it opens on this one, or within other files, rows may
not name."""
REMOTE: Final = (*HTTP, *OSS, *FILE_SYSTEMS)
"""Schemes of files on other machines."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_TABLE = re.compile(r"odps://[^/]+/tables/[^/=]+(/[^/=]+=[^/]+)*/?")
_OBJECT = re.compile(r"oss://[^/]+/.+")
_BUCKET = re.compile(r"oss://[^/.]+\.[^/]+(/.*)?")
_ARN = re.compile(r"acs:ram::[^:]+:role/.+")
_ENDPOINT = re.compile(r"https?://[^/@\s?#]+(/[^\s?#]*)?")
_HOST = re.compile(r"[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*(:\d+)?")
_CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_CREDENTIALS = re.compile(r"(?<=://)[^/?#]*@")
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


@dataclass(frozen=True, slots=True)
class TableName:
    """A MaxCompute table, or one partition of it."""

    uri: str
    project: str
    name: str
    partition: dict[str, str]
    """Values of the partition columns, in the table's order; empty for a table without."""

    @property
    def spec(self) -> str:
        """The partition as MaxCompute writes it, `pt=1,hour=2`."""
        return ",".join(f"{name}={value}" for name, value in self.partition.items())


def table_of(uri: str) -> TableName:
    """Return the table that a valid `odps://` URI names."""
    project, _, name, *parts = uri.removeprefix("odps://").rstrip("/").split("/")
    pairs = (part.partition("=") for part in parts)
    return TableName(uri, project, name, {column: unquote(value) for column, _, value in pairs})


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


def _class_path(value: str) -> str:
    if value and not _CLASS_PATH.fullmatch(value):
        raise ValueError(f"got {show(value)}, expected a module and a class such as module.Class")
    return value


def _names(value: object) -> object:
    """Split `a, b` at its commas; lists pass."""
    if value == "":
        return ()
    if not isinstance(value, str):
        return value
    names = tuple(part.strip() for part in value.split(","))
    if "" in names:
        raise ValueError(f"got {show(value)}, expected names separated by single commas")
    return names


def _processes(value: object) -> object:
    """Read the JSON text of the specification, one object or a list of them; YAML passes."""
    if value == "":
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            message = f"got no JSON ({str(error).lower()})"
            raise ValueError(f"{message}, expected one object or a list of them") from error
        except RecursionError as error:
            raise ValueError("nested too deeply, expected one object or a list") from error
    return (value,) if isinstance(value, dict) else value


def _json_text(value: object) -> object:
    """Write a mapping as JSON; text must be JSON already."""
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and value:
        try:
            json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"got no JSON ({str(error).lower()}), expected JSON") from error
    return value


def _digit(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _endpoint(value: str) -> str:
    if value and not _ENDPOINT.fullmatch(value):
        raise ValueError(f"got {show(value)}, expected http(s)://<host>[:<port>][/<path>]")
    return value


def _host(value: str) -> str:
    if value and not _HOST.fullmatch(value):
        raise ValueError(f"got {show(value)}, expected <host>[:<port>]")
    return value


Uri = Annotated[str, AfterValidator(_uri)]
Endpoint = Annotated[str, AfterValidator(_endpoint)]
Host = Annotated[str, AfterValidator(_host)]
Arn = Annotated[str, AfterValidator(_arn)]
ClassPath = Annotated[str, AfterValidator(_class_path)]
Name = Annotated[str, Field(min_length=1)]
DecodeType = Annotated[Literal[1, 2, 3, 4], BeforeValidator(_digit)]

_CommaList = BeforeValidator(_names, json_schema_input_type=str | list[str])
Names = Annotated[tuple[Name, ...], _CommaList]
Buckets = Annotated[tuple[Annotated[str, AfterValidator(_bucket)], ...], _CommaList]


JsonText = Annotated[
    str, BeforeValidator(_json_text, json_schema_input_type=str | dict[str, Any] | list[Any])
]


class ProcessConfig(BaseModel):
    """One custom process between decoding and prediction; its other fields go to the class."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    user_process_cls: ClassPath = key(
        "Custom code", ..., "the process class, as `module.Class`", example="module.Class"
    )
    job_name: str = key("Custom code", "", "the name of the process in messages")
    num_threads: Integer = key("Custom code", 1, "copies that run at once", ge=1, le=1024)
    batch_size: Integer = key("Custom code", 1, "samples of one call", ge=1, le=65536)


Processes = Annotated[
    tuple[ProcessConfig, ...],
    BeforeValidator(_processes, json_schema_input_type=str | ProcessConfig | list[ProcessConfig]),
]
