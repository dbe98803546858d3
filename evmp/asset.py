"""The model and the user's code, where the job names them elsewhere: their copies on this machine.

A model may be a folder, but not of a web server, or an archive, which is unpacked once.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from evmp import resource
from evmp.errors import ConfigError, DownloadError, ModelError, Problem
from evmp.fetch import fetch
from evmp.remote import is_remote
from evmp.value import mask

if TYPE_CHECKING:
    from evmp.job import Job

ARCHIVES: Final = (".tar.gz", ".tgz", ".zip")


def localize(job: Job) -> dict[str, str]:
    """Return the keys whose values are elsewhere, with where their copies are; fetches them.

    Raises:
        ModelError: when the model cannot be had.
        ConfigError: when the code cannot be had.
    """
    here: dict[str, str] = {}
    if is_remote(job.model_path):
        here["model_path"] = str(_model(job))
    if is_remote(job.user_resource):
        here["user_resource"] = str(_code(job))
    return here


def _model(job: Job) -> Path:
    shown = f"model_path: {mask(job.model_path)}"

    def finish(folder: Path) -> None:
        if _is_packed(it.name for it in folder.iterdir()):
            (file,) = folder.iterdir()
            resource.unpack(str(file), folder / "model", max_bytes=job.fetch_limit_bytes)
            file.unlink()

    try:
        copy = fetch("model_path", job.model_path, job, is_folder=True, finish=finish)
    except DownloadError as error:
        raise ModelError(f"{shown}: {error}") from None
    except ConfigError as error:
        raise ModelError(f"{shown}: {error.problems[0].message}") from None
    return _root_of(copy.folder) if _is_packed(copy.items) else copy.folder


def _is_packed(names: Iterable[str]) -> bool:
    first, *others = names
    return not others and first.endswith(ARCHIVES)


def _root_of(folder: Path) -> Path:
    """Return the outermost folder that holds more than one other."""
    inner = list(folder.iterdir())
    return _root_of(inner[0]) if len(inner) == 1 and inner[0].is_dir() else folder


def _code(job: Job) -> Path:
    try:
        return fetch(resource.KEY, job.user_resource, job).file
    except DownloadError as error:
        raise ConfigError(Problem(f"{mask(job.user_resource)}: {error}", resource.KEY)) from None
