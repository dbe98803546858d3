"""The contract of Storage, for every member; and what only one of them can go wrong with."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from forked import fork, wait
from ossserver import KEY_ID, KEY_SECRET, REGION, OssServer, serving_oss
from test_remote_http import job_of

from evmp.storage import Storage
from evmp.storage.local import LocalStorage
from evmp.storage.oss import OssStorage


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OssServer]:
    """An OSS with two buckets, whose credentials are in the environment."""
    monkeypatch.setenv("OSS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", KEY_SECRET)
    with serving_oss() as server:
        server.objects = {"bkt": {}, "other": {}}
        yield server


@pytest.fixture
def oss_of(server: OssServer, tmp_path: Path) -> Iterator[Callable[..., OssStorage]]:
    """`oss_of("oss://bkt/folder", connect_timeout_seconds=3)`: a storage; closed at the end."""
    made: list[OssStorage] = []
    (tmp_path / "drafts").mkdir(exist_ok=True)

    def oss_of(uri: str = "oss://bkt/some where/+%", **keys: Any) -> OssStorage:
        job = job_of(ossHost=server.endpoint, **keys)
        made.append(OssStorage(uri, job, tmp_path / "drafts"))
        return made[-1]

    yield oss_of
    for storage in made:
        storage.close()


@pytest.fixture
def oss(oss_of: Callable[..., OssStorage]) -> OssStorage:
    """An empty storage."""
    return oss_of()


@pytest.fixture(params=["local", "oss", "oss V4"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage."""
    if request.param == "local":
        (tmp_path / "root").mkdir()
        (tmp_path / "drafts").mkdir()
        return LocalStorage(tmp_path / "root", tmp_path / "drafts")
    if request.param == "oss V4":
        request.getfixturevalue("monkeypatch").setenv("OSS_REGION", REGION)
    storage: OssStorage = request.getfixturevalue("oss")
    return storage


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of a few megabytes."""
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 10) * 3000)
    return file


def test_object_is_created_once(storage: Storage) -> None:
    assert storage.create("it/one", b"first")
    assert not storage.create("it/one", b"second")

    assert storage.read("it/one") == b"first"
    with storage.file("it/one") as file:
        assert file.read_bytes() == b"first"


def test_one_of_many_creates_an_object(storage: Storage) -> None:
    children = [
        fork(lambda number=number: storage.create("it/one", b"%d" % number)) for number in range(8)
    ]

    codes = [wait(pid) for pid in children]

    assert sorted(codes) == [0] * 7 + [1]
    assert storage.read("it/one") == b"%d" % codes.index(1)


def test_adopted_file_is_an_object_and_stays(storage: Storage, file: Path) -> None:
    data = file.read_bytes()

    storage.adopt(file, "it/adopted")
    file.unlink()

    with storage.file("it/adopted") as copy:
        assert copy.read_bytes() == data


def test_names_are_sorted_and_of_one_folder(storage: Storage, file: Path) -> None:
    storage.create("it/b", b"")
    storage.adopt(file, "it/a")
    storage.create("other", b"")

    assert storage.names("it") == ["it/a", "it/b"]
    assert storage.names("it", "b") == ["it/b"]
    assert storage.names("", "o") == ["other"]
    assert storage.names("none") == []


def test_written_object_takes_the_place_of_another(storage: Storage) -> None:
    storage.create("it/one", b"first")
    before = storage.stat("it/one")

    storage.write("it/one", b"second")
    storage.write("it/two", b"new")

    assert (storage.read("it/one"), storage.read("it/two")) == (b"second", b"new")
    assert storage.stat("it/one").etag != before.etag


def test_status_tells_size_and_age_by_the_storage_s_own_clock(storage: Storage) -> None:
    before = storage.now()
    storage.create("it/one", b"12345")
    after = storage.now()

    status = storage.stat("it/one")

    assert status.size == 5
    assert before <= status.modified <= after
    assert status == storage.stat("it/one")
    with pytest.raises(FileNotFoundError):
        storage.stat("it/none")


def test_several_objects_come_in_the_order_that_is_asked_for(storage: Storage) -> None:
    names = [f"it/{number}" for number in range(20)]
    for name in names:
        storage.create(name, name.encode())

    assert [*storage.read_all(names[::-1])] == [name.encode() for name in names[::-1]]
    assert [*storage.read_all(names[:1])] == [b"it/0"]
    assert [*storage.read_all([])] == []
    found = storage.read_all(["it/3", "it/none"])
    assert next(found) == b"it/3"
    with pytest.raises(FileNotFoundError):
        next(found)


def test_stream_yields_a_part_or_all(storage: Storage, file: Path) -> None:
    data = file.read_bytes()
    storage.adopt(file, "it/one")

    assert b"".join(storage.stream("it/one")) == data
    assert b"".join(storage.stream("it/one", 10, 2_000_000)) == data[10:2_000_000]
    assert b"".join(storage.stream("it/one", len(data) - 5)) == data[-5:]
    assert b"".join(storage.stream("it/one", len(data), len(data) + 1)) == b""
    assert b"".join(storage.stream("it/one", 7, 7)) == b""
    with pytest.raises(FileNotFoundError):
        next(storage.stream("it/none"))


def test_copy_joins_objects_and_replaces(storage: Storage, file: Path) -> None:
    storage.adopt(file, "it/big")
    storage.create("it/small", b"small")
    storage.write("joined", b"old")

    storage.copy(storage, ["it/small", "it/big", "it/small"], "joined")
    storage.copy(storage, [], "it/empty")

    assert b"".join(storage.stream("joined")) == b"small" + file.read_bytes() + b"small"
    assert storage.read("it/empty") == b""


def test_copy_takes_objects_of_another_storage(storage: Storage, tmp_path: Path) -> None:
    other = LocalStorage(tmp_path / "other", tmp_path / "drafts")
    other.create("one", b"from elsewhere")

    storage.copy(other, ["one"], "it/copy")

    assert storage.read("it/copy") == b"from elsewhere"
    with pytest.raises(FileNotFoundError):
        storage.copy(other, ["one", "none"], "it/half")
    assert storage.names("it") == ["it/copy"]


def test_clear_deletes_a_folder_with_all_in_it(storage: Storage) -> None:
    for name in ("it/a", "it/deep/er/b", "items", "other/c"):
        storage.create(name, b"")

    storage.clear("it")
    storage.clear("none")

    assert storage.names("it") == storage.names("it/deep/er") == []
    assert storage.names("", "it") == ["items"]
    assert storage.names("other") == ["other/c"]


def test_deleted_object_is_gone_and_may_be_made_again(storage: Storage) -> None:
    storage.create("it/one", b"first")

    storage.delete("it/one")
    storage.delete("it/one")

    with pytest.raises(FileNotFoundError):
        storage.read("it/one")
    assert storage.names("it") == []
    assert storage.create("it/one", b"second")


def test_missing_object_is_told(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("it/none")


def test_empty_object_is_an_object(storage: Storage) -> None:
    assert storage.create("it/empty", b"")
    assert storage.read("it/empty") == b""


def test_object_is_whole_or_not_there_when_its_maker_dies(storage: Storage) -> None:
    data = bytes(range(256)) * 4000
    for after_ms in range(0, 12, 2):
        name = f"it/{after_ms}"
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, after_ms / 1000))
            while not storage.create(name, data):
                storage.delete(name)
            while True:
                time.sleep(1)  # the signal may have come just now
        assert wait(pid) == -signal.SIGKILL

        if name in storage.names("it"):
            assert storage.read(name) == data
        else:
            assert storage.create(name, data)


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path: Path) -> LocalStorage:
    (tmp_path / "drafts").mkdir()
    return LocalStorage(tmp_path, tmp_path / "drafts")


def test_no_draft_is_left(local: LocalStorage, tmp_path: Path) -> None:
    local.create("one", b"first")
    local.create("one", b"second")

    assert list((tmp_path / "drafts").iterdir()) == []


def test_lost_answer_of_link_is_understood(
    local: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def lose_answer(draft: Path, name: Path) -> None:
        link(draft, name)
        link(draft, name)  # as a client of NFS does whose first answer was lost

    monkeypatch.setattr("evmp.storage.local.os.link", lose_answer)

    assert local.create("one", b"mine")
    assert not local.create("one", b"another's")
    assert local.read("one") == b"mine"


def test_folder_that_is_gone_is_an_error(local: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "drafts").rmdir()

    with pytest.raises(FileNotFoundError):
        local.create("one", b"")


def test_draft_that_cannot_be_written_is_removed(
    local: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evmp.storage.local.os.write", full)

    with pytest.raises(OSError, match="No space left"):
        local.create("one", b"data")
    assert not (tmp_path / "one").exists()
    assert list((tmp_path / "drafts").iterdir()) == []


# --- OSS ------------------------------------------------------------------------------------------


def test_lost_answer_of_creation_is_understood(server: OssServer, oss: OssStorage) -> None:
    key = oss.key("it/one")
    server.fail(key, "lose", "lose", 503)

    assert oss.create("it/one", b"mine")

    server.fail(key, "reset", "lose")
    assert not oss.create("it/one", b"another's")
    assert oss.read("it/one") == b"mine"


def test_what_oss_forbids_is_told_with_its_code(
    server: OssServer, oss: OssStorage, oss_of: Callable[..., OssStorage]
) -> None:
    server.denied.add(oss.key("it/secret"))

    for ask in (oss.read, oss.stat, lambda name: oss.write(name, b""), oss.delete):
        with pytest.raises(
            OSError, match=r"403 AccessDenied: '?oss://bkt/some where/\+%/it/secret"
        ):
            ask("it/secret")
    with pytest.raises(OSError, match="404 NoSuchBucket"):
        oss_of("oss://none/x").create("a", b"")
    with pytest.raises(OSError, match="404 NoSuchBucket"):
        oss_of("oss://none/x").stat("a")
    with pytest.raises(OSError, match="404 NoSuchBucket"):
        oss_of("oss://none/x").names("a")


def test_time_is_limited(server: OssServer, oss_of: Callable[..., OssStorage]) -> None:
    oss = oss_of(storage_timeout_seconds=0.3)
    server.fail(oss.key("one"), *[503] * 100)

    with pytest.raises(OSError, match="503 SlowDown; no time for another attempt"):
        oss.read("one")


def test_large_object_goes_in_parts_and_comes_in_ranges_whatever_fails(
    server: OssServer, oss: OssStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("oss", "upload"):
        monkeypatch.setattr(f"evmp.storage.{module}.PART_BYTES", 1 << 19)
    data = os.urandom(1 << 10) * 1200
    (tmp_path / "large").write_bytes(data)
    server.fail(oss.key("it/large"), "lose", 0, "reset", 500, "lose", 0, "lose")

    oss.adopt(tmp_path / "large", "it/large")
    server.fail(oss.key("it/large"), "lose", 0, "cut", "lose", 503)
    found = b"".join(oss.stream("it/large"))
    server.fail(oss.key("it/large"), 0, "flip")
    with pytest.raises(OSError, match="another CRC64"):
        b"".join(oss.stream("it/large"))

    server.fail(oss.key("it/large"), 0, "flip", 0)
    with oss.file("it/large") as file:
        assert file.read_bytes() == found == data
    assert server.calls["put_part"] >= 3
    assert all(not upload.parts for upload in server.uploads.values())


def test_object_that_comes_damaged_from_elsewhere_is_asked_for_again(
    server: OssServer, oss: OssStorage, oss_of: Callable[..., OssStorage], monkeypatch: Any
) -> None:
    for module in ("oss", "upload"):
        monkeypatch.setattr(f"evmp.storage.{module}.PART_BYTES", 1 << 17)
    data = os.urandom(300_000)
    oss.write("it/large", data)
    endpoint = server.endpoint.replace("127.0.0.1", "localhost")
    far = OssStorage("oss://other/x", job_of(ossHost=endpoint), Path())
    server.fail(oss.key("it/large"), 0, 0, 0, "flip")

    far.copy(oss, ["it/large"], "copy")

    assert far.read("copy") == data
    assert server.calls["copy_part"] == 0
    far.close()


def test_objects_that_have_no_crc_come_all_the_same(
    server: OssServer, oss: OssStorage, tmp_path: Path
) -> None:
    server.has_crcs = False
    (tmp_path / "large").write_bytes(os.urandom(9 << 20))

    oss.adopt(tmp_path / "large", "it/large")

    assert b"".join(oss.stream("it/large")) == (tmp_path / "large").read_bytes()


def test_object_that_is_stored_packed_is_refused(server: OssServer, oss: OssStorage) -> None:
    oss.write("it/one", b"x")
    server.about["bkt", oss.key("it/one")].headers["content-encoding"] = "gzip"

    with pytest.raises(OSError, match="stored with Content-Encoding: gzip, expected none"):
        b"".join(oss.stream("it/one"))


def test_objects_are_joined_where_they_are(
    server: OssServer, oss: OssStorage, oss_of: Callable[..., OssStorage]
) -> None:
    other = oss_of("oss://other/x")
    sizes = [50_000, 200_000, 10, 300_000, 150_000, 99_999, 1, 0, 200_000, 7]
    pieces = [os.urandom(size) for size in sizes]
    for number, piece in enumerate(pieces):
        oss.write(f"it/{number}", piece)

    other.copy(oss, [f"it/{number}" for number in range(len(pieces))], "joined")

    assert other.read("joined") == b"".join(pieces)
    assert server.calls["copy_part"] >= 2
    assert server.uploads == {}


def test_object_that_somebody_has_changed_is_not_joined(server: OssServer, oss: OssStorage) -> None:
    oss.write("it/one", b"x" * 200_000)
    server.objects["bkt"][oss.key("it/one")] = b"y" * 200_000

    with pytest.raises(OSError, match="somebody else has changed the object"):
        oss.copy(oss, ["it/one"], "joined")
    assert oss.names("", "joined") == []


def test_long_lists_come_in_pages(server: OssServer, oss: OssStorage) -> None:
    names = [f"it/{number:05d} 图" for number in range(2500)]
    server.objects["bkt"].update({oss.key(name): b"" for name in names})
    server.objects["bkt"][oss.key("it/folder/x")] = b""
    server.page = 700

    assert oss.names("it") == names

    oss.clear("it")
    assert server.objects["bkt"] == {}


@pytest.mark.slow
def test_list_of_100_000_keys_is_whole(server: OssServer, oss: OssStorage) -> None:
    names = [f"it/{number:06d}" for number in range(100_000)]
    server.objects["bkt"].update({oss.key(name): b"" for name in names})
    server.trouble = Random(5), 0.02

    assert oss.names("it") == names

    assert server.calls["list"] >= 100


def test_upload_that_its_maker_has_left_is_found_and_aborted(
    server: OssServer, oss: OssStorage
) -> None:
    def die() -> int:
        with oss.upload("it/large") as upload:
            upload.add(bytes(20 << 20))
            os._exit(7)

    assert wait(fork(die)) == 7
    assert [name for name, _ in oss.uploads("it/")] == ["it/large"]

    oss.clear("it")

    assert server.uploads == {}
    oss.abort("it/large", "over already")


def test_keys_may_begin_with_a_slash(server: OssServer, oss_of: Callable[..., OssStorage]) -> None:
    oss = oss_of("oss://bkt//lead/")

    oss.write("/a", b"x")

    assert server.objects["bkt"] == {"/lead///a": b"x"}
    assert oss_of("oss://bkt/").names("") == []
    assert oss_of("oss://bkt//lead").uri("a") == "oss://bkt//lead/a"
