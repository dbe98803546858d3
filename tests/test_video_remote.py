"""Videos of other machines: what is read of them, and what goes wrong on the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

import pytest
from clip import make_clip
from httpserver import Answer, HttpServer, serving
from jobfolder import JobFolder
from ossserver import KEY_ID, KEY_SECRET, OssServer, serving_oss
from test_remote_http import job_of

from evmp.errors import DecodeError, DownloadError
from evmp.remote import AnyRemote
from evmp.video.container import OpenVideo
from evmp.video.footage import KEPT_BYTES, Pieces, RangeFile
from evmp.video.frames import Frames
from evmp.video.index import index_of
from evmp.video.segment import segments_of
from evmp.video.task import PIECE_BYTES

BODY = os.urandom(PIECE_BYTES * 6 + 1234)


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with serving() as server:
        yield server


@pytest.fixture
def oss(monkeypatch: pytest.MonkeyPatch) -> Iterator[OssServer]:
    monkeypatch.setenv("OSS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", KEY_SECRET)
    with serving_oss() as server:
        yield server


@pytest.fixture
def remote() -> Iterator[Callable[..., AnyRemote]]:
    made: list[AnyRemote] = []

    def remote(**keys: Any) -> AnyRemote:
        made.append(AnyRemote(job_of(**keys)))
        return made[-1]

    yield remote
    for one in made:
        one.close()


def whole(pieces: Pieces) -> bytes:
    file, found = RangeFile(pieces.size, pieces.read), bytearray()
    while data := file.read(300_000):
        found += data
    return bytes(found)


def test_file_of_a_web_server_is_read_in_pieces(
    server: HttpServer, remote: Callable[..., AnyRemote]
) -> None:
    url = server.put("/a.mp4", Answer(BODY, has_parts=True))
    beats = list[int]()
    pieces = Pieces(remote(), url, 1 << 30, lambda: beats.append(server.requests["/a.mp4"]))

    assert whole(pieces) == BODY
    assert server.requests["/a.mp4"] == 7
    assert beats == list(range(1, 8))

    file = RangeFile(pieces.size, pieces.read)
    assert file.seek(-10, os.SEEK_END) == len(BODY) - 10
    assert file.read(100) == BODY[-10:]
    assert file.seek(PIECE_BYTES - 3) == PIECE_BYTES - 3
    assert file.read(10) + file.read(7) == BODY[PIECE_BYTES - 3 : PIECE_BYTES + 7]
    assert file.tell() == PIECE_BYTES + 7
    assert len(pieces._pieces) <= KEPT_BYTES // PIECE_BYTES
    small = Pieces(remote(), url, 1 << 30, piece_bytes=PIECE_BYTES // 16)
    assert whole(small) == BODY
    assert server.requests["/a.mp4"] > 7 + 6 * 16
    assert len(small._pieces) <= 16 * KEPT_BYTES // PIECE_BYTES


class Stingy(Answer):
    """Gives less than is asked for, as a server may."""

    def asked_for(self, span: str) -> Answer:
        first, last = map(int, span.removeprefix("bytes=").split("-"))
        return super().asked_for(f"bytes={first}-{min(last, first + 700_000)}")


def test_server_that_gives_less_is_asked_for_the_rest(
    server: HttpServer, remote: Callable[..., AnyRemote]
) -> None:
    url = server.put("/a.mp4", Stingy(BODY, has_parts=True))

    assert whole(Pieces(remote(), url, 1 << 30)) == BODY


def test_failure_in_mid_file_is_told_once(
    server: HttpServer, remote: Callable[..., AnyRemote], capfd: pytest.CaptureFixture[str]
) -> None:
    data = make_clip(300)
    parts = Answer(data, has_parts=True)
    for n_good in (1, 2, 5):
        url = server.put(f"/{n_good}.mp4", *[parts] * n_good, Answer(status=404))
        pieces = Pieces(remote(), url, 1 << 30, piece_bytes=len(data) // 10)
        file = cast(BinaryIO, RangeFile(pieces.size, pieces.read))
        with pytest.raises((DownloadError, DecodeError)), OpenVideo(file, 1 << 20) as video:
            assert not index_of(video).damage
            list(Frames(video, 4, 0.0).read(*segments_of(index_of(video), job_of(), None)))

    assert "dropped" not in capfd.readouterr().err


def test_object_of_oss_is_read_in_pieces(oss: OssServer, remote: Callable[..., AnyRemote]) -> None:
    oss.objects["bkt"] = {"a.mp4": BODY, "empty": b""}
    client = remote(ossHost=oss.endpoint)

    assert whole(Pieces(client, "oss://bkt/a.mp4", 1 << 30)) == BODY
    assert whole(Pieces(client, "oss://bkt/empty", 1 << 30)) == b""


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([Answer(BODY)], "exceed max_row_bytes"),
        ([Answer(status=404)], "404 Not Found"),
        ([Answer(BODY[:-1000], has_parts=True)], "exceed max_video_bytes"),
        ([Answer(b"x", status=206, headers={"Content-Range": "bytes 5-6/9"})], "another part"),
        ([Answer(b"x", status=206)], "another part"),
    ],
)
def test_what_cannot_be_read_in_pieces_is_told(
    server: HttpServer, remote: Callable[..., AnyRemote], answers: list[Answer], message: str
) -> None:
    url = server.put("/a.mp4", *answers)

    with pytest.raises(DownloadError, match=message):
        Pieces(remote(max_row_bytes=1 << 20), url, 1 << 20)


def test_small_file_of_a_server_without_parts_is_read_whole(
    server: HttpServer, remote: Callable[..., AnyRemote]
) -> None:
    url = server.put("/a.mp4", Answer(BODY))
    pieces = Pieces(remote(max_row_bytes=1 << 30), url, 1 << 30)

    assert whole(pieces) == BODY
    file = RangeFile(pieces.size, pieces.read)
    assert file.seek(5) == 5
    assert file.read(10) == BODY[5:15]
    assert server.requests["/a.mp4"] == 1


def test_file_that_changes_while_it_is_read_is_refused(
    server: HttpServer, remote: Callable[..., AnyRemote]
) -> None:
    old, new = ({"ETag": f'"{name}"'} for name in ("old", "new"))
    url = server.put(
        "/a.mp4",
        Answer(BODY, headers=old, has_parts=True),
        Answer(BODY, headers=new, has_parts=True),
    )
    pieces = Pieces(remote(), url, 1 << 30)

    with pytest.raises(DownloadError, match="has changed while it was read"):
        whole(pieces)


def test_job_over_remote_videos_gives_what_local_ones_give(
    job: JobFolder, server: HttpServer, oss: OssServer
) -> None:
    data = make_clip(300, g=50, bf=2)
    (job.path / "a.mp4").write_bytes(data)
    oss.objects["bkt"] = {"a.mp4": data}
    shaky = [Answer(status=503), Answer(data, has_parts=True)]
    urls = [
        server.put("/a.mp4", Answer(data, has_parts=True)),
        server.put("/shaky.mp4", *shaky),
        "oss://bkt/a.mp4",
        server.put("/none.mp4", Answer(status=404)),
        server.put("/playlist.m3u8", Answer(f"#EXTM3U\n{server.url}/secret.ts\n".encode())),
    ]
    (job.path / "in.txt").write_text("\n".join(["a.mp4", *urls]))

    rows = job.do(
        input_table=None,
        input_oss_file="in.txt",
        reserved_columns=None,
        is_input_video=True,
        allow_private_hosts=True,
        ossHost=oss.endpoint,
    )

    local, http, tried, object, missing, playlist = (row["prediction_result"] for row in rows)
    assert len(local["frames"]) == 60
    assert http == tried == object == local
    assert missing["error_stage"] == "download"
    assert "404 Not Found" in missing["error_msg"]
    assert playlist["error_stage"] == "decode"
    assert server.requests["/secret.ts"] == 0
