"""Faults of disks, files, clocks and neighbours: a clear end, and then the same command ends right.

No fault costs what was committed, and none makes a wrong result.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from forked import fork, wait
from jobfolder import SECONDS, JobFolder, kill, wait_for
from test_stop import rewrite
from test_writer import filled_ring, make_writer

from evmp.errors import SinkError
from evmp.grid import Block
from evmp.job import Job
from evmp.key import KeyField
from evmp.ledger import Ledger
from evmp.publish import publish
from evmp.sink import Record, open_sink
from evmp.storage.local import LocalStorage
from evmp.target.local import LocalTarget

N_ROWS, BLOCK_ROWS = 96, 8
OUTPUT = "out/result.jsonl"
MS_RDONLY, MS_REMOUNT, MS_BIND, MNT_DETACH = 1, 32, 4096, 2  # <sys/mount.h>
DISK_BYTES = 2 << 20


@pytest.fixture(scope="module")
def whole(undisturbed_job: Callable[..., Path]) -> Path:
    """The folder of a slow job that nobody disturbed, with its staging place."""
    keys = {"output_oss_file": OUTPUT, "block_rows": BLOCK_ROWS}
    return undisturbed_job(N_ROWS, "-Dkeep_staging=true", steps=2000, **keys)


@pytest.fixture
def new_job(job: JobFolder, whole: Path) -> JobFolder:
    """The job of `whole`, to be run elsewhere."""
    (job.path / "job.yaml").write_bytes((whole / "job.yaml").read_bytes())
    return job


@pytest.fixture
def staged_job(new_job: JobFolder, whole: Path) -> JobFolder:
    """The same when all its blocks are committed, and nothing is published."""
    shutil.copytree(staging(whole), staging(new_job.path))
    return new_job


def staging(folder: Path) -> Path:
    return folder / f"{OUTPUT}.evmp"


def blocks(job: JobFolder) -> set[str]:
    """Name the records of committed blocks."""
    return {path.name for path in staging(job.path).glob("blocks/*.json")}


def start_and_wait(job: JobFolder, **options: Any) -> subprocess.Popen[str]:
    """Start a job, and wait until it has committed two blocks; it has not committed all then."""
    process = job.start(**options)
    wait_for(process, lambda: len(blocks(job)) >= 2)
    return process


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait until a job has ended."""
    output, errors = process.communicate(timeout=SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def error_of(done: subprocess.CompletedProcess[str], code: int = 3) -> str:
    """Return what a job that shall have failed with this exit code has said at last."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert " died " not in done.stderr
    return "evmp: " + f"\n{done.stderr}".rpartition("\nevmp: ")[2]


def finish(job: JobFolder, whole: Path, *arguments: str) -> str:
    """Run a job, which shall end as if nothing had ever happened. Returns what it said."""
    done = job.run(*arguments)
    assert done.returncode == 0, done.stderr
    assert (job.path / OUTPUT).read_bytes() == (whole / OUTPUT).read_bytes()
    assert job.leftovers() == []
    return done.stderr


# --- the disk -------------------------------------------------------------------------------------


class Disk:
    """A small file system at `folder`, that can be filled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fill(self, spare_pages: int) -> None:
        """Leave so many pages free."""
        hog = self._folder / "hog"
        hog.unlink(missing_ok=True)
        status = os.statvfs(self._folder)
        hog.write_bytes(bytes((status.f_bfree - spare_pages) * status.f_frsize))

    def clear(self) -> None:
        """Make room."""
        (self._folder / "hog").unlink()


@pytest.fixture
def disk(new_job: JobFolder) -> Iterator[Disk]:
    """A disk of two megabytes where the output goes."""
    folder = new_job.path / "out"
    folder.mkdir()
    mount(b"tmpfs", folder, b"tmpfs", 0, b"size=%d" % DISK_BYTES)
    yield Disk(folder)
    unmount(folder)


def mount(source: bytes, folder: Path, kind: bytes, flags: int, options: bytes = b"") -> None:
    """Call mount(2), which not every user may."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source, bytes(folder), kind, flags, options):
        reason = os.strerror(ctypes.get_errno())
        if ctypes.get_errno() == errno.EPERM:
            pytest.skip(f"A FAULT OF THE DISK IS NOT TESTED: this user may not mount one: {reason}")
        raise OSError(ctypes.get_errno(), reason)


def unmount(folder: Path) -> None:
    ctypes.CDLL(None).umount2(bytes(folder), MNT_DETACH)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nobody write into a folder by its name, whatever is open there already."""
    mount(bytes(folder), folder, b"", MS_BIND)
    try:
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                mount(b"", folder, b"", MS_BIND | MS_REMOUNT | MS_RDONLY)
                break
            except OSError as error:  # Somebody has just opened a file.
                assert error.errno == errno.EBUSY and time.monotonic() < deadline
        yield
    finally:
        unmount(folder)


def test_disk_that_is_full_at_any_page_of_a_publish(
    new_job: JobFolder, disk: Disk, whole: Path
) -> None:
    shutil.copytree(staging(whole), staging(new_job.path))
    before = blocks(new_job)

    for spare_pages in range(50):
        disk.fill(spare_pages)
        done = new_job.run()
        if done.returncode == 0:
            break
        assert "No space left on device" in error_of(done)
        assert blocks(new_job) == before
        assert not (new_job.path / OUTPUT).exists()

    assert spare_pages > 3
    assert (new_job.path / OUTPUT).read_bytes() == (whole / OUTPUT).read_bytes()
    assert new_job.leftovers() == []


@pytest.mark.slow
def test_disk_that_is_full_at_any_page_of_a_run(
    new_job: JobFolder, disk: Disk, whole: Path
) -> None:
    for spare_pages in range(50):
        before = blocks(new_job)
        disk.fill(spare_pages)
        done = new_job.run()
        if done.returncode == 0:
            break
        assert "No space left on device" in error_of(done)
        assert blocks(new_job) >= before

    assert spare_pages > 3
    assert (new_job.path / OUTPUT).read_bytes() == (whole / OUTPUT).read_bytes()
    assert new_job.leftovers() == []


@pytest.mark.slow
def test_table_that_cannot_be_published_for_want_of_room(new_job: JobFolder, disk: Disk) -> None:
    rewrite(new_job, output_oss_file="out/result.parquet")
    result = new_job.path / "out" / "result.parquet"
    assert new_job.run("-Dkeep_staging=true").returncode == 0
    expected = result.read_bytes()
    result.unlink()
    disk.fill(2)

    said = error_of(new_job.run())

    assert "No space left on device" in said and "run the same command again" in said
    assert not result.exists()
    disk.clear()
    done = new_job.run()
    assert done.returncode == 0, done.stderr
    assert result.read_bytes() == expected
    assert new_job.leftovers() == []


def test_commit_without_room_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    ledger = Ledger(tmp_path / "out.evmp")
    ledger.open({})
    monkeypatch.setattr(LocalStorage, "create", fail)

    with pytest.raises(SinkError, match=r"No space left on device.* run the same command again"):
        make_writer(ledger, filled_ring(range(3)), [Block(0, 3)]).run()


def test_output_that_becomes_read_only_half_way(new_job: JobFolder, whole: Path) -> None:
    (new_job.path / "out").mkdir()
    process = start_and_wait(new_job)
    with read_only(new_job.path / "out"):
        said = error_of(ended(process))
        before = blocks(new_job)
        again = error_of(new_job.run())

    assert "Read-only file system" in said and "run the same command again" in said
    assert "cannot be written: Read-only file system" in again
    assert len(before) >= 2 and blocks(new_job) == before
    assert "resuming: " in finish(new_job, whole)


@pytest.mark.parametrize("place", ["result.jsonl.evmp", "result.jsonl.evmp/tmp", "."])
def test_output_that_is_removed_half_way(new_job: JobFolder, whole: Path, place: str) -> None:
    process = start_and_wait(new_job)
    gone = new_job.path / "out" / place
    while gone.exists():
        shutil.rmtree(gone, ignore_errors=True)

    said = error_of(ended(process))

    assert str(staging(new_job.path)) in said and "run the same command again" in said
    assert not gone.exists()
    finish(new_job, whole)


# --- files of the staging place -------------------------------------------------------------------


def test_torn_stage_files_of_a_killed_run_are_no_rows(new_job: JobFolder, whole: Path) -> None:
    assert kill(start_and_wait(new_job)) == []
    drafts = staging(new_job.path) / "tmp"
    for file in drafts.iterdir():
        if file.stat().st_nlink == 1:  # another name would be that of something committed
            os.truncate(file, file.stat().st_size // 2)
    (drafts / "0123.000000000080").write_bytes(b'{"id":"80","prediction_result":{"cla')
    (drafts / "merged.jsonl").write_bytes(b'{"id":"0"')

    assert "resuming: " in finish(new_job, whole)


def damage(records: Path) -> list[Path]:
    """Make one record after the other a bad one, each in its own way. Returns which they are."""
    stranger = records.parent.parent.parent / "stranger"
    files = sorted(records.iterdir())
    texts = [json.loads(file.read_bytes()) for file in files]
    shutil.copy(records.parent / "data" / texts[3]["data"], stranger)
    files[0].write_bytes(files[0].read_bytes()[:9])
    files[1].write_bytes(b"")
    files[2].write_bytes(b'["rows", 3]')
    files[3].write_text(json.dumps({**texts[3], "data": "../../../stranger"}))
    files[4].write_text(json.dumps({"rows": 3}))
    files[5].write_text(json.dumps({**texts[5], "stop": "48"}))
    files[6].write_text(json.dumps({**texts[6], "reasons": {"decode: ": 3}}))
    files[7].write_text(json.dumps({**texts[7], "stop": texts[7]["stop"] + 4}))
    files[9].write_text(json.dumps(texts[10]))
    files[11].write_text(json.dumps({**texts[11], "stop": N_ROWS + 4}))
    (records / "notes.txt").write_text("mine")
    (records / "000000000090.json").mkdir()
    return [*files[:8], files[9], files[11], records / "notes.txt", records / "000000000090.json"]


def test_bad_records_are_named_with_what_to_do(staged_job: JobFolder, whole: Path) -> None:
    bad = damage(staging(staged_job.path) / "blocks")
    named: list[Path] = []

    while len(named) < len(bad):
        said = error_of(staged_job.run())
        found = re.search(r"ledger record (\S+) .*; delete it to do its rows again", said)
        assert found, said
        named.append(Path(found[1]))
        shutil.rmtree(named[-1]) if named[-1].is_dir() else named[-1].unlink()

    assert set(named) == set(bad)
    assert f"resuming: {N_ROWS - 10 * BLOCK_ROWS} of {N_ROWS} rows" in finish(staged_job, whole)


def test_stage_file_that_somebody_has_changed_is_done_again(
    staged_job: JobFolder, whole: Path
) -> None:
    (file,) = staging(staged_job.path).glob("data/000000000016.*")
    file.write_bytes(file.read_bytes().replace(b'"class":', b'"class": 1', 1))

    said = error_of(staged_job.run())

    assert f"stage file {file} has changed since its commit: " in said
    record = said.partition("; delete ")[2].partition(" ")[0]
    Path(record).unlink()
    assert f"resuming: {N_ROWS - BLOCK_ROWS} of {N_ROWS} rows" in finish(staged_job, whole)


def test_staging_place_of_another_version_is_left_alone(staged_job: JobFolder, whole: Path) -> None:
    file, before = staging(staged_job.path) / "job.json", blocks(staged_job)
    file.write_text(json.dumps({**json.loads(file.read_bytes()), "format": 99}))

    said = error_of(staged_job.run(), 2)

    assert "another version of evmp: format 99, expected 1;" in said
    assert "finish it with that version, or start over with --fresh" in said
    assert blocks(staged_job) == before
    assert "resuming" not in finish(staged_job, whole, "--fresh")


@pytest.mark.parametrize("text", ["", "[]", '{"form'])
def test_staging_place_of_nobody_knows_whom_is_left_alone(staged_job: JobFolder, text: str) -> None:
    (staging(staged_job.path) / "job.json").write_text(text)
    before = blocks(staged_job)

    said = error_of(staged_job.run())

    assert "job.json is damaged" in said and "start over with --fresh" in said
    assert blocks(staged_job) == before


# --- the clock ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jumping_clock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the wall clock leaps by days whenever somebody looks at it."""
    library = tmp_path_factory.mktemp("c") / "jumping_clock.so"
    source = ROOT / "tests" / "c" / "jumping_clock.c"
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, source, "-o", library], check=True)
    return {"LD_PRELOAD": str(library)}


def test_clock_that_jumps_changes_nothing(
    new_job: JobFolder, whole: Path, jumping_clock: dict[str, str]
) -> None:
    look = [sys.executable, "-c", "import time; print(abs(time.time() - time.time()))"]
    assert float(subprocess.check_output(look, env={**os.environ, **jumping_clock})) > 86400

    process = start_and_wait(new_job, env=jumping_clock)
    process.send_signal(signal.SIGINT)
    stopped = ended(process)
    done = new_job.run(env=jumping_clock)

    assert stopped.returncode == 130, stopped.stderr
    assert done.returncode == 0, done.stderr
    assert "warning" not in stopped.stderr + done.stderr
    assert "resuming: " in done.stderr
    assert (new_job.path / OUTPUT).read_bytes() == (whole / OUTPUT).read_bytes()


# --- neighbours -----------------------------------------------------------------------------------

KEYS = (KeyField("image"),)


def table_of_blocks(folder: Path, way: str) -> tuple[Job, LocalTarget, int]:
    """Commit some blocks. Returns their job, its target, and how many rows there are."""
    job = Job(
        model_path="m",
        model_type="classifier",
        input_oss_file="l",
        **{way: str(folder / ("out.jsonl" if way == "output_oss_file" else "out"))},
    )
    target = LocalTarget.of(job)
    target.prepare()
    target.ledger.open({})
    sink = open_sink(job, KEYS)
    for start in range(0, 4000, 500):
        stage = target.ledger.stage("run", start)
        records = [
            Record(row, (f"{row}.jpg",), b'{"class":%d}' % row, False)
            for row in range(start, start + 500)
        ]
        with open(stage, "wb", buffering=0) as file:
            sink.append(file, records)
        target.ledger.commit(stage, Block(start, start + 500), 0, {})
    return job, target, 4000


def race(work: Callable[[int], int]) -> list[int]:
    """Let two processes work at once. Returns what they return."""
    gate = os.pipe()

    def enter(number: int) -> int:
        os.close(gate[1])
        os.read(gate[0], 1)
        return work(number)

    pids = [fork(lambda number=number: enter(number)) for number in range(2)]
    for end in gate:
        os.close(end)
    return [wait(pid) for pid in pids]


@pytest.mark.parametrize(("way", "n_rounds"), [("output_oss_file", 80), ("output_table", 20)])
def test_one_of_two_publishers_at_once_puts_its_result_and_record_in_place(
    tmp_path: Path, way: str, n_rounds: int
) -> None:
    job, target, n_rows = table_of_blocks(tmp_path, way)

    def work(number: int) -> int:
        try:
            publish(job, KEYS, n_rows, target, {"publisher": number})
        except SinkError as error:
            return error.exit_code
        return 0

    results = set()
    for _ in range(n_rounds):
        codes = race(work)

        assert sorted(codes) == [0, SinkError.exit_code]
        record = target.finished()
        assert record is not None and record["publisher"] == codes.index(0)
        files = [target.path] if target.path.is_file() else sorted(target.path.iterdir())
        results.add(b"".join(file.read_bytes() for file in files))
        target.record.unlink()
        shutil.rmtree(target.path) if target.path.is_dir() else target.path.unlink()
    (result,) = results
    if target.path.suffix:
        assert result.count(b"\n") == n_rows


def test_fresh_run_beside_another_is_refused_and_harms_nothing(
    new_job: JobFolder, whole: Path
) -> None:
    first = start_and_wait(new_job)
    first.send_signal(signal.SIGSTOP)  # so that it cannot have finished before the second is there
    before = blocks(new_job)
    said = error_of(new_job.run("--fresh"))
    after = blocks(new_job)
    first.send_signal(signal.SIGCONT)

    host = re.escape(socket.gethostname())
    assert re.search(rf"another run .*: {host}, process {first.pid}, since \d{{4}}-\d\d-\d\d", said)
    assert after >= before
    assert ended(first).returncode == 0
    assert (new_job.path / OUTPUT).read_bytes() == (whole / OUTPUT).read_bytes()


# --- the input ------------------------------------------------------------------------------------


@pytest.fixture
def own_table(new_job: JobFolder, whole: Path) -> Path:
    """A table that belongs to the job alone."""
    shutil.copy2(whole / "in.parquet", new_job.path / "in.parquet")
    rewrite(new_job, input_table="in.parquet")
    return new_job.path / "in.parquet"


def test_input_that_is_another_one_at_the_next_run_is_refused(
    new_job: JobFolder,
    own_table: Path,
    whole: Path,
    make_table: Callable[..., Path],
    photo_file: Callable[..., bytes],
) -> None:
    assert kill(start_and_wait(new_job)) == []
    before = blocks(new_job)
    image = photo_file("coffee", size=(60, 40))

    for n_rows in (N_ROWS - 1, N_ROWS + 1, N_ROWS):
        make_table(own_table, [image] * n_rows)
        said = error_of(new_job.run(), 2)
        assert "What differs:" in said and "--fresh" in said
        assert "input.files[0].mtime_ns: " in said
        rows = f"input.files[0].rows: {N_ROWS} then, {n_rows} now"
        assert (rows in said) == (n_rows != N_ROWS)

    assert blocks(new_job) == before
    shutil.copy2(whole / "in.parquet", own_table)
    finish(new_job, whole)


def test_table_that_shrinks_during_a_run_ends_it(
    new_job: JobFolder, own_table: Path, whole: Path
) -> None:
    process = start_and_wait(new_job)
    os.truncate(own_table, own_table.stat().st_size // 2)

    said = error_of(ended(process))

    assert said.startswith("evmp: input: ") and str(own_table) in said
    shutil.copy2(whole / "in.parquet", own_table)
    assert "resuming: " in finish(new_job, whole)


def test_list_that_loses_the_end_of_its_last_line_during_a_run_ends_it(
    new_job: JobFolder, photo_file: Callable[..., bytes]
) -> None:
    (new_job.path / "photo.jpg").write_bytes(photo_file("coffee", size=(60, 40)))
    # Long lines, so that the reader has not read all of them at once.
    lines = [json.dumps({"image": "photo.jpg", "row": n, "pad": 16000 * "x"}) for n in range(96)]
    file = new_job.path / "list.txt"
    file.write_text("\n".join(lines))
    status = file.stat()
    keys = yaml.safe_load((new_job.path / "job.yaml").read_text())
    del keys["input_table"], keys["reserved_columns"]
    (new_job.path / "job.yaml").write_text(yaml.safe_dump({**keys, "input_oss_file": "list.txt"}))
    process = start_and_wait(new_job)
    os.truncate(file, status.st_size - 9)

    said = error_of(ended(process))

    assert said.startswith(f"evmp: input: input_oss_file: {file} ")
    assert "was changed while the job ran" in said
    file.write_text("\n".join(lines))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert new_job.run().returncode == 0
    rows = new_job.rows(OUTPUT)
    assert [row["row"] for row in rows] == [*range(96)]
    assert all("class" in row["prediction_result"] for row in rows)
