"""The contracts of Readable and Storage, for every member; and what only one can go wrong with."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
from forked import fork, wait
from fsspec.asyn import get_loop
from httpserver import Answer, serving
from ossserver import KEY_ID, KEY_SECRET, REGION, OssServer, serving_oss
from s3server import BUCKET, environment_of, serving_s3
from test_remote_http import job_of

from evmp.remote.retry import Deadline
from evmp.storage import Readable, Storage, open_readable
from evmp.storage.http import HttpStorage
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
def storage(request: pytest.FixtureRequest) -> Storage:
    """An empty storage."""
    return empty(request.param, request)


def empty(kind: str, request: pytest.FixtureRequest) -> Storage:
    if kind == "local":
        root: Path = request.getfixturevalue("tmp_path")
        (root / "root").mkdir()
        (root / "drafts").mkdir()
        return LocalStorage(root / "root", root / "drafts")
    if kind == "oss V4":
        request.getfixturevalue("monkeypatch").setenv("OSS_REGION", REGION)
    storage: OssStorage = request.getfixturevalue("oss")
    return storage


class Place(NamedTuple):
    """Where objects are to be read."""

    storage: Readable
    name: str
    """Of an object that is not there yet."""
    put: Callable[[str, bytes], object]
    """Makes an object."""


@pytest.fixture(scope="module", autouse=True)
def loop() -> None:
    """Start the one loop that fsspec keeps to the end of the process."""
    get_loop()


@pytest.fixture(params=["local", "oss", "oss V4", "http", "s3"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A place without objects; that of a web server is good for one."""
    if request.param == "http":
        with serving() as web:
            url = web.url.replace("//", "//me:geheim@") + "/a/b%20c?token=geheim"
            yield from opened(url, lambda _, data: web.put("/a/b%20c?token=geheim", page(data)))
    elif request.param == "s3":
        with serving_s3() as s3:
            for variable, value in environment_of(s3).items():
                monkeypatch.setenv(variable, value)
            yield from opened(f"s3://{BUCKET}/a/b c", lambda name, data: s3.put(f"a/{name}", data))
    else:
        storage = empty(request.param, request)
        yield Place(storage, "a/b c", storage.write)


def page(data: bytes) -> Answer:
    return Answer(data, headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})


def opened(uri: str, put: Callable[[str, bytes], object]) -> Iterator[Place]:
    deadline = Deadline("fetch_timeout_seconds", 60)
    storage, name = open_readable(uri, job_of(allow_private_hosts=False), deadline)
    yield Place(storage, name, put)
    storage.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of a few megabytes."""
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 10) * 3000)
    return file


def test_object_is_read_whole_or_in_pieces(place: Place, file: Path) -> None:
    storage, name, put = place
    for data in (b"", b"small", file.read_bytes()):
        put(name, data)

        assert storage.read(name) == data
        assert b"".join(storage.stream(name)) == data
        assert storage.stat(name).size == len(data)


def test_another_version_has_another_etag(place: Place) -> None:
    storage, name, put = place
    put(name, b"first")
    before = storage.stat(name).etag
    assert storage.stat(name).etag == before != ""

    put(name, b"other")

    assert storage.stat(name).etag != before


def test_object_that_is_not_there_is_told_with_its_name(place: Place) -> None:
    storage, name, _ = place
    for read in (storage.read, storage.stat, lambda name: next(storage.stream(name))):
        with pytest.raises(FileNotFoundError) as caught:
            read(name)
        assert caught.value.filename == storage.uri(name)
        with pytest.raises(FileNotFoundError):
            read("none")
    assert name.rpartition("/")[2] in unquote(storage.uri(name))
    assert "geheim" not in storage.uri(name)


def test_tree_tells_of_all_that_is_below_a_folder(place: Place) -> None:
    storage, name, put = place
    is_flat = isinstance(storage, HttpStorage)
    put(name, b"12345")
    for other in () if is_flat else ("it/b", "it/deep/er/a", "items"):
        put(other, b"12")

    everything = [name] if is_flat else [name, "it/b", "it/deep/er/a", "items"]
    assert sorted(storage.tree("")) == [(it, storage.stat(it)) for it in everything]
    below = [] if is_flat else ["it/b", "it/deep/er/a"]
    assert sorted(it for it, _ in storage.tree("it")) == below
    assert [*storage.tree("none")] == []


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


# --- a web server, and what fsspec opens ----------------------------------------------------------


def test_what_has_broken_off_for_good_says_why() -> None:
    with serving() as web:
        half = Answer(b"half", length=8, cut=True)
        moved = [Answer(b"half", length=8, cut=True, headers={"ETag": f'"{n}"'}) for n in (1, 2)]
        for answers, reason in (
            ([half], "the body ended before its announced length"),
            (moved, "the rest of the file is not to be had"),
        ):
            (place,) = opened(web.put(f"/{len(answers)}", *answers), lambda name, data: None)
            stream = place.storage.stream(place.name)
            assert next(stream) == b"half"
            with pytest.raises(OSError, match=reason) as caught:
                next(stream)
            assert caught.value.errno == errno.EBADMSG


def test_whatever_comes_of_a_body_is_a_success() -> None:
    def part(at: int) -> Answer:
        span = {"Content-Range": f"bytes {at}-4/5"} if at else {}
        headers = {"ETag": '"1"', **span}
        return Answer(b"x", 206 if at else 200, headers, length=5 - at, cut=True)

    with serving() as web:
        url = web.put("/x", *(part(at) for at in range(5)))
        deadline = Deadline("fetch_timeout_seconds", 60)
        storage, name = open_readable(url, job_of(download_retries=1), deadline)

        assert storage.read(name) == b"xxxxx"
        storage.close()


def test_pieces_are_all_of_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evmp.storage.filesystem.PIECE_BYTES", 10)
    with serving_s3() as server:
        for name, value in environment_of(server).items():
            monkeypatch.setenv(name, value)
        (place,) = opened(server.put("x", b"0" * 20), lambda name, data: None)
        stream = place.storage.stream("x")
        assert next(stream) == b"0" * 10

        server.put("x", b"1" * 20)

        with pytest.raises(OSError, match="it was changed while it was read") as caught:
            next(stream)
        assert caught.value.errno == errno.EBADMSG


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
