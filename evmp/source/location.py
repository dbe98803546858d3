"""Where things are: local paths, URIs, and what to say about those that cannot be read.

Shared by the sources and by whoever follows a location that a row names. Relative paths are taken
from the current directory, in the job file and in a list alike.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from evmp.errors import SourceError
from evmp.remote import is_remote
from evmp.source import Kind
from evmp.value import mask, scheme

if TYPE_CHECKING:
    from evmp.job import Job

MAX_SHOWN_CHARS = 200  # of an input's text in a message


def payload_of(location: str, job: Job) -> tuple[Kind, bytes]:
    """Return the kind and the payload of a row that names its image by a path or URL.

    Raises:
        ValueError: as `local_path`.
    """
    if is_remote(location):
        return Kind.URL, location.encode("utf-8")
    return Kind.PATH, local_path(location, job).encode("utf-8")


def local_path(location: str, job: Job) -> str:
    """Return the local path that `location`, a path or a `file:` or `local:` URI of a row, names.

    Raises:
        ValueError: when `location` names nothing on this machine's file system, or the job's rows
            may not name what is there; the message says why in words that end up in the row's
            result.
    """
    if not location:
        raise ValueError("the location is empty, expected a path")
    kind = scheme(location)
    if kind not in ("", "file", "local"):
        raise ValueError(
            f"{shown(mask(location))}: {kind}:// cannot be read, expected a local path, "
            "http(s)://, oss://, or what fsspec opens on other machines"
        )
    path = unquote(urlsplit(location).path) if kind else location
    if "\0" in path:
        raise ValueError(f"{shown(path)!r} holds a NUL character, expected a path")
    if not job.may_name_files:
        raise ValueError(
            f"{shown(path)} is a file of this machine, which an input from elsewhere may name only "
            "with allow_local_paths: true"
        )
    return path


def shown(text: str) -> str:
    """Return `text`, shortened if it is long, for a message."""
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."


def stat_input(key: str, path: Path) -> os.stat_result:
    """Return the status of the input `path` that the job's `key` names.

    Raises:
        SourceError: when it does not exist (the message has the nearest name) or is out of reach.
    """
    try:
        return path.stat()
    except FileNotFoundError:
        raise SourceError(f"{key}: {path} does not exist{_nearest(path)}") from None
    except OSError as error:
        raise SourceError(f"{key}: cannot open {path}: {error.strerror}") from None


def _nearest(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"; nor does its directory {parent}{_nearest(parent)}" if parent != path else ""
    try:
        names = os.listdir(parent)
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {parent / close[0]}" if close else ""
