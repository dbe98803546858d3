"""Where the result goes, what stands there already, and how it comes to stand there.

A target has a ledger, whose *staging place* holds what is done while the job is unfinished, and a
record of the run that made the result, which stays beside it. What a run may rely on: the result
appears in one step, whole; nothing that the run has not been told of is replaced; and whoever dies
in between leaves what the next run needs to go on. Members: `local`, a file or a table on this
machine; `oss`, a file on OSS; `maxcompute`, a table there.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import uuid
from array import array
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from evmp.errors import ConfigError
from evmp.ledger import Commit, Ledger
from evmp.storage import Storage, open_storage
from evmp.value import scheme

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.key import KeyField
    from evmp.publish import Merge
    from evmp.sink import Sink


class Target(Protocol):
    """The place of a job's result.

    A run calls prepare first, and then, under the ledger's lock, restore; start_over or settle; and
    publish. What says that it looks writes nothing.
    """

    ledger: Ledger

    @property
    def uri(self) -> str:
        """How people name the result."""

    def is_begun(self) -> bool:
        """Return whether a run has begun, and has not removed all that it has left."""

    def finished(self) -> dict[str, Any] | None:
        """Return the record of the run that made what stands here, or None.

        Raises:
            SinkError: when something stands here that no run of evmp has made.
        """

    def standing(self) -> dict[str, Any] | None:
        """Return the record of the result that stands here, be it to be replaced or not, or None.

        It names the result in `result`: another one, or one that was changed, differs in that.
        """

    def is_to_be_replaced(self) -> bool:
        """Return whether what stands here is what replace_standing has seen."""

    def failures(self, sink: Sink) -> array[int]:
        """Return the numbers of the error rows of the result that stands here.

        Raises:
            SinkError: when it cannot be read.
        """

    def check_replaceable(self) -> None:
        """Make sure that --fresh replaces nothing but a result.

        Raises:
            SinkError: when something stands here that it does not replace.
        """

    def check_writable(self) -> None:
        """Look whether the result could be written, and write nothing.

        Raises:
            SinkError: when it could not.
        """

    def prepare(self) -> None:
        """Make sure that the result can be written, before hours of work.

        Raises:
            SinkError: when it cannot.
        """

    def restore(self) -> None:
        """Put a result back that a publish has taken away, and then died before its own was there.

        Raises:
            SinkError: when it cannot be put back.
        """

    def start_over(self) -> None:
        """Forget unfinished work. A result that stands here stays until the new one replaces it.

        Raises:
            SinkError: when the staging place cannot be cleared.
        """

    def replace_standing(self) -> None:
        """Let the new result replace what stands here now, and nothing else.

        Raises:
            SinkError: when that cannot be noted.
        """

    def retreat(self) -> None:
        """Undo what prepare and start_over have made, after a start that has led to nothing."""

    def publish(self, merge: Merge, record: dict[str, Any]) -> None:
        """Make the merged rows the result, in one step, and leave the record beside it.

        Raises:
            SinkError: when something stands there that start_over has not seen, or a step fails.
                The staged blocks stay.
            OSError: when the rows cannot be merged for want of room or rights.
        """

    def settle(self) -> bool:
        """Finish a publish that died after the result was put in place.

        Returns: whether the result that stands there is that of this staging place.

        Raises:
            SinkError: when its record cannot be put beside it.
        """

    def write_part(self, worker: int, n_workers: int, commits: Sequence[Commit]) -> None:
        """Leave a worker's part of a text result beside it: the specification's part file.

        Parts are for people who look into a running job. Nothing depends on them: the result is
        made of the blocks themselves, and where there is little room parts are left out.

        Args:
            commits: the worker's blocks, in order.
        """

    def remove_parts(self) -> None:
        """Remove the part files, those of runs with another number of workers included."""

    def clean_up(self) -> None:
        """Delete the staging place, or of it what can be deleted."""


def open_target(job: Job, keys: tuple[KeyField, ...]) -> Target:
    """Return the place that a job names.

    Args:
        keys: the input's key columns.

    Raises:
        ConfigError: when it is, holds, or lies within what the job reads.
    """
    if scheme(job.output_table) == "odps":
        from evmp.target.maxcompute import MaxComputeTarget

        return MaxComputeTarget(job, keys)
    if scheme(job.output_oss_file) == "oss":
        try:
            from evmp.target.oss import OssTarget
        except ImportError:
            raise ConfigError("oss:// needs oss2: pip install evmp[oss]") from None
        return OssTarget.of(job)
    from evmp.target.local import LocalTarget

    return LocalTarget.of(job)


def open_ledger(job: Job, place: str) -> Ledger:
    """Return the ledger of a job.

    Args:
        place: its staging place, a path or a URI, where the job names no other folder for it.

    Raises:
        ConfigError: when there is no such storage.
    """
    uri = place
    if job.staging:
        uri = os.path.join(job.staging, os.path.basename(place))
    if not scheme(uri):
        return Ledger(Path(uri).absolute())
    digest = sha256(f"{uri} {job.ossHost}".encode()).hexdigest()[:16]
    scratch = Path(tempfile.gettempdir(), f"evmp-{os.getuid()}-{digest}")
    return Ledger(scratch, open_storage(uri, job, scratch / "tmp"))


def read_note(storage: Storage, name: str) -> dict[str, Any] | None:
    """Return what a JSON object of a target's own holds; None where there is none, or another."""
    try:
        found = json.loads(storage.read(name))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def probe(storage: Storage) -> None:
    """Make an object, and find out that it is made once, as the blocks of a job have to be.

    Raises:
        OSError: when it is not, or cannot be made.
    """
    name = f"probe-{uuid.uuid4().hex}"
    try:
        if storage.create(name, b"one") and storage.create(name, b"another"):
            raise OSError(
                errno.ENOTSUP,
                "a bucket that keeps versions lets objects be overwritten; staging may name a "
                "folder of another bucket",
                storage.uri(),
            )
    finally:
        storage.delete(name)
