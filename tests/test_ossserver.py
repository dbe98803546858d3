"""The OSS of the tests answers oss2 as the real one does, also where evmp does not go."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from typing import Any

import oss2
import pytest
from ossserver import KEY_ID, KEY_SECRET, REGION, TOKEN, OssServer, serving_oss

DATA = os.urandom(250_000)
KEY = "with space, %41+plus?and#hash/图.bin"


@pytest.fixture
def server() -> Iterator[OssServer]:
    with serving_oss() as server:
        server.objects = {"bkt": {}, "other": {}}
        yield server


@pytest.fixture(params=["V1", "V4", "STS"])
def bucket(server: OssServer, request: pytest.FixtureRequest) -> Iterator[oss2.Bucket]:
    """A bucket of that, whose requests are signed in one of the versions."""
    auth: Any = oss2.Auth(KEY_ID, KEY_SECRET)
    if request.param == "V4":
        auth = oss2.AuthV4(KEY_ID, KEY_SECRET)
    if request.param == "STS":
        server.token = TOKEN
        auth = oss2.StsAuth(KEY_ID, KEY_SECRET, TOKEN)
    session = oss2.Session()
    yield oss2.Bucket(auth, server.endpoint, "bkt", session=session, region=REGION)
    session.session.close()


def code_of(ask: Callable[[], object]) -> tuple[int, str]:
    with pytest.raises(oss2.exceptions.OssError) as caught:
        ask()
    return caught.value.status, caught.value.code


def test_appended_pieces_follow_each_other(bucket: oss2.Bucket) -> None:
    position = bucket.append_object(KEY, 0, DATA[:1000]).next_position
    bucket.append_object(KEY, position, DATA[1000:])

    assert bucket.get_object(KEY).read() == DATA
    with pytest.raises(oss2.exceptions.PositionNotEqualToLength) as caught:
        bucket.append_object(KEY, position, b"again")
    assert caught.value.next_position == len(DATA)
    bucket.put_object("whole", b"")
    assert code_of(lambda: bucket.append_object("whole", 0, b"x")) == (409, "ObjectNotAppendable")


def test_objects_are_copied_between_buckets(server: OssServer, bucket: oss2.Bucket) -> None:
    server.objects["other"][KEY] = DATA

    etag = bucket.copy_object("other", KEY, "copy").etag

    assert bucket.head_object("copy").etag == etag
    assert bucket.get_object("copy", byte_range=(5, 14)).read() == DATA[5:15]
    refused = {"x-oss-copy-source-if-match": "another"}
    other = (412, "PreconditionFailed")
    assert code_of(lambda: bucket.copy_object("other", KEY, "copy", headers=refused)) == other
    assert code_of(lambda: bucket.copy_object("none", KEY, "copy")) == (404, "NoSuchBucket")
    assert code_of(lambda: bucket.copy_object("other", "none", "copy")) == (404, "NoSuchKey")


def test_lists_come_in_pages_of_keys_and_folders(bucket: oss2.Bucket) -> None:
    keys = sorted(["a", "b/1", "b/2", "c d+%", "图", "z"], key=str.encode)
    for key in keys:
        bucket.put_object(key, b"x")

    assert [it.key for it in oss2.ObjectIterator(bucket, max_keys=2)] == keys
    found = [it.key for it in oss2.ObjectIteratorV2(bucket, delimiter="/", max_keys=2)]
    assert found == ["a", "b/", "c d+%", "z", "图"]
    assert [it.key for it in oss2.ObjectIteratorV2(bucket, prefix="b/")] == ["b/1", "b/2"]
    bucket.batch_delete_objects(keys[:-1])
    assert [it.key for it in oss2.ObjectIterator(bucket)] == keys[-1:]


def test_parts_become_an_object_if_they_are_right(server: OssServer, bucket: oss2.Bucket) -> None:
    upload = bucket.init_multipart_upload(KEY).upload_id
    pieces = [DATA[:110_000], DATA[110_000:]]
    parts = [
        oss2.models.PartInfo(n, bucket.upload_part(KEY, upload, n, piece).etag, part_crc=0)
        for n, piece in enumerate(pieces, 1)
    ]
    listed = bucket.list_parts(KEY, upload).parts
    assert [(it.part_number, it.size) for it in listed] == [(1, 110_000), (2, 140_000)]
    assert [it.upload_id for it in oss2.MultipartUploadIterator(bucket)] == [upload]
    bucket.enable_crc = False

    wrong = [oss2.models.PartInfo(1, parts[1].etag), parts[1]]
    assert code_of(lambda: bucket.complete_multipart_upload(KEY, upload, wrong)) == (
        (400, "InvalidPart")
    )
    small = bucket.upload_part(KEY, upload, 1, b"small")
    first = oss2.models.PartInfo(1, small.etag)
    assert code_of(lambda: bucket.complete_multipart_upload(KEY, upload, [first, parts[1]])) == (
        (400, "EntityTooSmall")
    )
    bucket.upload_part(KEY, upload, 1, pieces[0])
    bucket.put_object(KEY, b"there")
    once = {"x-oss-forbid-overwrite": "true"}
    assert code_of(lambda: bucket.complete_multipart_upload(KEY, upload, parts, headers=once)) == (
        (409, "FileAlreadyExists")
    )
    bucket.complete_multipart_upload(KEY, upload, parts)

    assert bucket.get_object(KEY).read() == DATA
    assert code_of(lambda: bucket.abort_multipart_upload(KEY, upload)) == (404, "NoSuchUpload")


def test_large_files_go_as_oss2_sends_them(bucket: oss2.Bucket, tmp_path: Any) -> None:
    (tmp_path / "file").write_bytes(DATA)
    store = oss2.ResumableStore(str(tmp_path))

    oss2.resumable_upload(
        bucket,
        KEY,
        str(tmp_path / "file"),
        store=store,
        multipart_threshold=100_000,
        part_size=120_000,
        num_threads=1,
    )

    bucket.get_object_to_file(KEY, str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == DATA


def test_what_comes_damaged_is_not_kept(server: OssServer, bucket: oss2.Bucket) -> None:
    digest = base64.b64encode(bytes(16)).decode()

    refused = code_of(lambda: bucket.put_object(KEY, DATA, headers={"Content-MD5": digest}))

    assert refused == (400, "InvalidDigest")
    assert server.objects["bkt"] == {}
