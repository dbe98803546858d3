"""One job from its first start to its last, with somebody after its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter as Tally
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from conftest import COMMAND
from footprint import (
    STRAGGLER_SECONDS,
    Footprint,
    kill_left,
    left_behind,
    our_processes,
)

from chaos.family import HELPER, JOB
from chaos.hunter import Hit, Hunter
from chaos.task import Shape, Task, environment, files_of, whole_of

LOOK_SECONDS: Final = 0.01
LOST_SECONDS: Final = 90.0  # without a hit and without a row, then the job hangs
OTHERS_SECONDS: Final = 60.0  # that another program's shared memory may stay there
TAIL_LINES: Final = 60
OLD: Final = b"an older result"


class Trouble(Exception):
    """What must not be was so; says what, and all that is known of how it came."""


@dataclass(slots=True)
class Account:
    """How a trial went.

    Attributes:
        kills: processes that have died of a hit.
        hits: by role and signal.
        ends: how the starts of the job ended.
    """

    rows: int = 0
    kills: int = 0
    seconds: float = 0.0
    hits: Tally[str] = field(default_factory=Tally)
    ends: Tally[str] = field(default_factory=Tally)

    def __str__(self) -> str:
        ends = ", ".join(f"{n} {end}" for end, n in self.ends.most_common())
        hits = ", ".join(f"{n} {hit}" for hit, n in sorted(self.hits.items()))
        return f"{self.kills} kills ({hits}); starts: {ends}; {self.seconds:.1f} s"


class Trial:
    """A job that is disturbed, and started again until it is done.

    Args:
        task, shape: the job.
        folder: must be empty.
        seed: of who is hit, when, with what.
        max_kills: after so many the job is left in peace.
    """

    def __init__(
        self, task: Task, shape: Shape, folder: Path, *, seed: int, max_kills: int
    ) -> None:
        self._task, self._shape, self._seed = task, shape, seed
        self._job, self._tmp, self._log = folder / "job", folder / "tmp", folder / "log"
        self._job.mkdir()
        self._tmp.mkdir()
        self._target = task.write(self._job, shape)
        self._hunter = Hunter(seed, task.n_rows, max_kills)
        self._account = Account(rows=task.n_rows)
        self._blocks: dict[str, int] = {}
        self._old = self._put_old_result() if shape.is_fresh else {}

    def run(self) -> Account:
        """Start the job until it is done.

        Raises:
            Trouble: a start ended as none should, something was left, or the result is wrong.
        """
        started = time.monotonic()
        before = Footprint()
        try:
            end = ""
            while end != "done":
                end = self._start()
                self._account.ends[end] += 1
                self._expect(processes_left(before), [], f"processes when {end}")
                self._check_result(end)
            self._check_all()
            left = left_behind(before, files=False, seconds=OTHERS_SECONDS)
            self._expect(left, [], "left behind")
        finally:
            kill_left(before)
        self._account.seconds = time.monotonic() - started
        self._account.kills, self._account.hits = self._hunter.n_kills, self._hunter.tally()
        return self._account

    # --- a start ------------------------------------------------------------------------------

    def _start(self) -> str:
        """Run the job until it ends, whatever it ends of. Returns what that was, in a word."""
        n_hits = len(self._hunter.hits)
        fresh = ["--fresh"] if self._must_start_over() else []
        with open(self._log, "ab") as log:
            offset = log.tell()
            process = subprocess.Popen(
                [*COMMAND, "--config", "job.yaml", *fresh],
                cwd=self._job,
                env={**environment(), "TMPDIR": str(self._tmp)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._hunt(process)
        finally:
            process.kill()
            process.wait()
        said = self._log.read_bytes()[offset:].decode("utf-8", "replace")
        return self._end_of(process.returncode, self._hunter.hits[n_hits:], said)

    def _must_start_over(self) -> bool:
        """Return whether an older result stands there that the job has not been told to replace."""
        is_old = bool(self._old) and files_of(self._job, self._target) == self._old
        return is_old and not self._target.is_to_be_replaced()

    def _hunt(self, process: subprocess.Popen[bytes]) -> None:
        seen, since = (-1, -1), time.monotonic()
        while process.poll() is None:
            rows = self._committed()
            self._hunter.look(process.pid, rows)
            if (now := (rows, len(self._hunter.hits))) != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > LOST_SECONDS:
                raise self._trouble(f"no row for {LOST_SECONDS:.0f} s, {rows} were committed")
            with suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_SECONDS)

    def _committed(self) -> int:
        """Return how many rows are committed, or were when the staging place was last there."""
        blocks = self._target.staging / "blocks"
        with suppress(FileNotFoundError):
            for name in set(os.listdir(blocks)) - self._blocks.keys():
                record = json.loads((blocks / name).read_bytes())
                self._blocks[name] = record["stop"] - record["start"]
        return sum(self._blocks.values())

    def _end_of(self, code: int, hits: list[Hit], said: str) -> str:
        """Return in a word how a start ended, if the hits that it took explain it."""
        roles = {hit.role for hit in hits}
        asked = any(hit.role == JOB and hit.signal == "SIGTERM" for hit in hits)
        if code == 0:
            return "done"
        if code == -signal.SIGKILL and JOB in roles:
            return "killed"
        if code in (-signal.SIGTERM, 128 + signal.SIGTERM) and asked:
            return "stopped"
        if code == 4 and "evmp: gave up: a helper process died" in said and HELPER in roles:
            return "without its helper"
        if code == 4 and "times without progress, last: hung" in said:
            return "too slow"  # the machine is; it has more to do than this
        raise self._trouble(f"a start ended with exit code {code}")

    # --- what must be so ----------------------------------------------------------------------

    def _put_old_result(self) -> dict[str, bytes]:
        path = self._target.path
        if self._shape.form == "table":
            path = path / "part-00000.parquet"
            path.parent.mkdir(parents=True)
        path.write_bytes(OLD)
        return files_of(self._job, self._target)

    def _check_result(self, end: str) -> None:
        """A result is there whole or not at all; an older one stays until the new one is there."""
        whole = self._task.undisturbed(self._shape.form).files
        allowed = [whole, self._old]
        if self._shape.form == "table":
            allowed.append({})  # between two renames; the next start puts the old one back
        found = files_of(self._job, self._target)
        if found not in allowed or (end == "done" and found != whole):
            sizes = {name: len(data) for name, data in found.items()}
            raise self._trouble(f"the result is wrong when {end}: {sizes}")

    def _check_all(self) -> None:
        whole = self._task.undisturbed(self._shape.form)
        found = whole_of(self._job, self._target)
        self._expect(found.n_failed, whole.n_failed, "failed rows in the record")
        names = {str(it.relative_to(self._job)) for it in self._job.rglob("*") if it.is_file()}
        wanted = {*whole.files, "job.yaml", self._target.record.name}
        self._expect(names, wanted, "files")
        folders = {it for it in self._job.rglob("*") if it.is_dir()}
        wanted_folders = {*self._target.path.parents} - {self._job, *self._job.parents}
        if self._target.path.is_dir():
            wanted_folders.add(self._target.path)
        self._expect(folders, wanted_folders, "folders")
        self._expect(os.listdir(self._tmp), [], "temporary files")

    def _expect(self, found: object, wanted: object, what: str) -> None:
        if found != wanted:
            raise self._trouble(f"{what}: found {found}, expected {wanted}")

    def _trouble(self, what: str) -> Trouble:
        hits = "\n  ".join(map(str, self._hunter.hits))
        tail = "\n  ".join(self._log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        return Trouble(
            f"{what}\nseed {self._seed}, {self._shape}\nends: {dict(self._account.ends)}"
            f"\nhits:\n  {hits}\nthe job's last words:\n  {tail}"
        )


def processes_left(before: Footprint) -> list[str]:
    """Name our processes, once those that were only dying have died or the time is over."""
    deadline = time.monotonic() + STRAGGLER_SECONDS
    while (left := our_processes(before)) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    return [str(process) for process in left]
