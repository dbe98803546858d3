"""Scout and decoder of videos on rings of their own: what is left by those that have died."""

from __future__ import annotations

import base64
import pickle
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import orjson
import pytest
from clip import make_clip
from forked import die_before_line, fork, wait
from httpserver import Answer, serving
from PIL import Image
from test_video import make_job

import evmp.scout
import evmp.video.footage
import evmp.video.spool
from evmp.metrics import Board
from evmp.pipeline import Worker
from evmp.ring import MAX_ATTEMPTS, Header, Mark, Ring
from evmp.sample import unpack
from evmp.scout import Scout, mark_failed
from evmp.source import Kind
from evmp.video.container import OpenVideo
from evmp.video.gathering import Gathering
from evmp.video.index import index_of
from evmp.video.part import Of, part_of
from evmp.video.segment import segments_of
from evmp.video.spool import Spool
from evmp.video.task import FAILURE_BYTES, Footage, Task, give_up, rows_of
from evmp.videodecoder import VideoDecoder

SCOUT, DECODER = 1, 2
SCOUTING = tuple(it.__file__ for it in (evmp.scout, evmp.video.footage, evmp.video.spool))


class World:
    """Rings for a few videos, and who works on them."""

    def __init__(
        self,
        paths: list[Path],
        sample_bytes: int = 1 << 20,
        task_bytes: int = 1 << 20,
        n_segments: int = 32,
        **keys: Any,
    ) -> None:
        self.job = make_job(**keys)
        self.rows = Ring("videos", 8, 1, 16 << 20)
        self.segments = Ring("segments", n_segments, 1, task_bytes)
        self.samples = Ring("samples", 512, 1, sample_bytes)
        self.results = Ring("results", 512, 1, 1 << 20)
        self.rings = [self.rows, self.segments, self.samples, self.results]
        self.spool = Spool(self.segments.n_slots, self.rows.row_bytes)
        self.seats = Board(["worker", "scout", "decoder"], 1).workers[0]
        for n, path in enumerate(paths):
            self.rows.set_note(n, pickle.dumps((str(path),)))
            kind, data = Kind.PATH, str(path).encode()
            if path.suffix == ".base64":
                kind, data = Kind.BASE64, base64.b64encode(path.read_bytes())
            self.rows.put(n, Header(n, n + 1, kind=kind), data)
        self.rows.close(len(paths))

    def scout(self) -> None:
        self.scout_of().run()

    def scout_of(self) -> Any:
        scout = Scout(self.job, self.rings, self.spool, self.seats[1], SCOUT, lambda: False)
        scout.open()
        return scout

    def plan(self, path: Path, enough_items: int | None, url: str = "") -> None:
        """Do the scout's work for the first video, and cut it as the test wants."""
        with open(path, "rb") as file, OpenVideo(file, self.job.max_image_pixels) as video:
            segments = list(segments_of(index_of(video), self.job, enough_items))
        footage = Footage(url=url) if url else Footage(path=str(path))
        n = 0
        for m, it in enumerate(segments):
            n_rows = it.n_items + it.is_last
            n += n_rows
            task = Task(0, (str(path),), footage, segment=it)
            self.segments.put(m, Header(0, n, kind=m, width=n_rows), pickle.dumps(task))
        self.segments.close(len(segments))
        self.results.close(n)

    def decode(self) -> None:
        self.decoder().run()

    def decoder(self) -> Any:
        decoder = VideoDecoder(
            self.job, None, self.segments, self.rings[2:], self.spool, self.seats[2], DECODER
        )
        decoder.open()
        return decoder

    def found(self) -> list[Any]:
        """Return the frame number, the error or the facts of each row that is not empty."""
        assert self.results.end is not None
        found: list[Any] = []
        for n in range(self.results.end):
            header = self.samples.header(n)
            if header.mark == Mark.DATA:
                (sample,) = unpack(self.samples.data(n))
                found.append(sample["frame_id"])
            elif self.results.header(n).mark != Mark.EMPTY:
                found.append(orjson.loads(bytes(self.results.data(n))))
        return found

    def gathered(self, reel: Path) -> Any:
        """Return the result of the only video; of a clip, its frames and its shape."""
        assert self.results.end is not None
        gathering, record = Gathering(self.job), None
        gathering.open(reel)
        for n in range(self.results.end):
            result = self.results.header(n)
            data, failed = bytes(self.results.data(n)), result.mark == Mark.ERROR
            if self.samples.header(n).mark == Mark.DATA:
                (sample,) = unpack(self.samples.data(n))
                data = orjson.dumps([sample["valid_frame_ids"], sample["image"].shape])
            elif result.mark == Mark.EMPTY:
                continue
            keys, part = part_of(pickle.loads(self.results.note(n)))
            record = gathering.add(n, 0, keys, part, failed, data)
        assert record is not None
        found = orjson.loads(bytes(record.result))
        gathering.close()
        return found


@pytest.fixture
def clip(tmp_path: Path) -> Callable[..., Path]:
    def clip(name: str, n_frames: int, **options: Any) -> Path:
        (tmp_path / name).write_bytes(make_clip(n_frames, **options))
        return tmp_path / name

    return clip


def tasks_of(world: World) -> list[tuple[Header, bytes]]:
    assert world.segments.end is not None
    segments, numbers = world.segments, range(world.segments.end)
    return [(segments.header(m), bytes(segments.data(m))) for m in numbers]


def facts(n_frames: int) -> dict[str, Any]:
    return {
        "duration_seconds": n_frames / 25,
        "fps": 25.0,
        "width": 96,
        "height": 72,
        "n_frames": n_frames,
    }


def test_rows_are_frames_in_order_and_then_what_is_known(clip: Callable[..., Path]) -> None:
    world = World([clip("a.mp4", 300, g=30, preset="ultrafast"), clip("b.mp4", 30)])
    world.scout()
    world.decode()

    assert world.found() == [*range(0, 300, 5), facts(300), *range(0, 30, 5), facts(30)]
    _, part = part_of(pickle.loads(world.results.note(0)))
    assert (part.n, part.of, part.label) == (0, Of.ITEM, "_0")
    assert orjson.loads(part.head + b"}") == {"frame_id": 0, "pts_seconds": 0.0}


def test_next_scout_goes_on_behind_what_is_published(clip: Callable[..., Path]) -> None:
    paths = [clip("a.mp4", 600, g=30, preset="ultrafast"), clip("b.mp4", 30)]
    whole, cut = World(paths), World(paths)
    whole.scout()
    for m in range(2):  # as a scout leaves it that dies in the midst of the first video
        cut.segments.put(m, whole.segments.header(m), whole.segments.data(m))
    cut.scout()

    assert cut.segments.end == whole.segments.end > 3
    for m in range(cut.segments.end):
        assert cut.segments.header(m) == whole.segments.header(m)
    cut.decode()
    assert cut.found() == [*range(0, 600, 5), facts(600), *range(0, 30, 5), facts(30)]


def test_video_that_kills_scouts_is_an_error(clip: Callable[..., Path]) -> None:
    world = World([clip("a.mp4", 30), clip("b.mp4", 30)])
    mark_failed(world.rows, 0, "the scout died of this video: SIGSEGV")
    world.scout()
    world.decode()

    error, *others = world.found()
    assert error == {
        "error_stage": "decode",
        "error_msg": "the scout died of this video: SIGSEGV",
    }
    assert others == [*range(0, 30, 5), facts(30)]


def test_segment_that_kills_decoders_costs_its_own_frames(clip: Callable[..., Path]) -> None:
    world = World([clip("a.mp4", 600, g=30, preset="ultrafast")])
    world.scout()
    give_up(world.segments, 1, "decode", "the decoder died of this segment: hung")
    lost = rows_of(world.segments.header(1))
    world.decode()

    found = world.found()
    errors = [it for it in found if isinstance(it, dict) and "error_msg" in it]
    assert len(errors) == len(lost)
    assert all(it["error_msg"] == "the decoder died of this segment: hung" for it in errors)
    numbers = [it for it in found if isinstance(it, int)]
    assert numbers == [i * 5 for i in range(120) if i not in lost]


def test_deaths_count_anew_when_frames_have_come_in_between(clip: Callable[..., Path]) -> None:
    world = World([clip("a.mp4", 30)])
    world.scout()
    blamed: list[int] = []

    def fail(m: int) -> bool:
        blamed.append(m)
        return True

    def die(reached: int) -> None:
        assert world.segments.claim(DECODER, 0.0) == 0
        world.segments.recover(DECODER, lambda m: False, fail, at=0, reached=lambda m: reached)

    for reached in (0, 0, 1, 1, 2, 2):
        die(reached)
    assert blamed == []
    for _ in range(MAX_ATTEMPTS):
        die(3)

    assert blamed == [0]
    assert world.segments.claim(DECODER, 0.0) == 0  # it stays for whoever makes errors of it


def test_worker_settles_what_a_decoder_held(clip: Callable[..., Path]) -> None:
    world = World([clip("a.mp4", 30)])
    world.scout()
    worker: Any = Worker.__new__(Worker)
    worker._job, worker._rings, worker._seats = world.job, world.rings, world.seats
    worker._layout = None

    for _ in range(MAX_ATTEMPTS):
        assert world.segments.claim(DECODER, 0.0) == 0
        worker._recover_video(DECODER, lambda m: worker._give_up_video(m, DECODER, "hung"), 0)
    world.decode()

    *errors, end = world.found()
    assert [it["error_msg"] for it in errors] == ["the decoder died of this segment: hung"] * 6
    assert end["error_msg"] == "the decoder died of this segment: hung"


def damage(path: Path, start: float, stop: float) -> None:
    """Blank a part of a file, from one fraction of it to another."""
    data = bytearray(path.read_bytes())
    first, last = int(len(data) * start), int(len(data) * stop)
    data[first:last] = bytes(last - first)
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0.1, 0.9])
def test_damage_is_told_wherever_a_video_is_cut(
    clip: Callable[..., Path], tmp_path: Path, place: float
) -> None:
    path = clip("a.mp4", 900, g=30, preset="ultrafast")
    damage(path, place, place + 0.01)
    keys = {"use_image_predictor": False, "decode_batch_size": 4, "decode_keep_size": 1}
    cut, whole = World([path], **keys), World([path], **keys)
    cut.plan(path, 10)
    whole.plan(path, None)
    cut.decode()
    whole.decode()

    found = cut.gathered(tmp_path / "reel")
    assert cut.segments.end == 6
    assert whole.segments.end == 1
    assert "seconds" in found["video"]["error_msg"]
    assert any(len(it["result"][0]) < 4 for it in found["clips"][:-1])
    assert found == whole.gathered(tmp_path / "reel")


def test_frame_size_is_known_when_the_last_segment_is_lost(
    clip: Callable[..., Path], tmp_path: Path
) -> None:
    path = clip("a.mp4", 900, g=30, preset="ultrafast", rotation=90)
    world = World([path], use_image_predictor=False, decode_batch_size=4)
    world.plan(path, 10)
    give_up(world.segments, 3, "decode", "the decoder died of this segment: hung")
    world.decode()

    video = world.gathered(tmp_path / "reel")["video"]

    assert (video["height"], video["width"]) == (96, 72)
    assert video["error_msg"] == "the decoder died of this segment: hung"


@pytest.mark.parametrize("decode_type", [2, 4])
def test_video_that_cannot_be_opened_again_is_opened_for_its_next_segment(
    clip: Callable[..., Path], tmp_path: Path, decode_type: int
) -> None:
    path = clip("a.mp4", 600, g=10, preset="ultrafast")
    data = path.read_bytes()
    keys = {"use_image_predictor": False, "decode_batch_size": 1, "decode_type": decode_type}
    world = World([path], **keys)
    world.plan(path, 20)
    assert world.segments.end is not None
    assert world.segments.end > 2

    decoder = world.decoder()
    for m in (1, 0, *range(2, world.segments.end)):  # what starts the file opens it anew
        path.write_bytes(b"" if m == 0 else data)
        decoder._work(world.segments.header(m), world.segments.data(m))
    decoder._close()

    clips = world.gathered(tmp_path / "reel")["clips"]
    failed = [i for i, it in enumerate(clips) if "error_msg" in it["result"]]
    assert failed == list(rows_of(world.segments.header(0)))


def test_download_that_fails_while_decoding_is_told_as_such(clip: Callable[..., Path]) -> None:
    path = clip("a.mp4", 600, g=30, preset="ultrafast")
    world = World([path], allow_private_hosts=True)
    with serving() as server:
        good = Answer(path.read_bytes(), has_parts=True)
        world.plan(path, 10, server.put("/a.mp4", Answer(status=404), good))
        world.decode()

    n_lost = len(rows_of(world.segments.header(0)))
    found = world.found()
    assert all(it["error_stage"] == "download" for it in found[:n_lost])
    assert all("404" in it["error_msg"] for it in found[:n_lost])
    assert found[n_lost:-1] == list(range(n_lost * 5, 600, 5))


def test_video_of_unknown_frames_that_cannot_be_had_is_one_error(
    clip: Callable[..., Path], tmp_path: Path
) -> None:
    path = clip("a.mp4", 30)
    world = World([path], allow_private_hosts=True, decode_type=1)
    with serving() as server:
        world.plan(path, 10, server.put("/a.mp4", Answer(status=404)))
        world.decode()

    error = world.gathered(tmp_path / "reel")
    assert error["error_stage"] == "download"
    assert "404" in error["error_msg"]


def test_clip_that_is_too_large_is_never_held_whole(
    clip: Callable[..., Path], tmp_path: Path
) -> None:
    path = clip("a.mp4", 610, g=30, preset="ultrafast")
    keys = {"decode_batch_size": 300, "decode_keep_size": 5, "sample_fps": 0, "reshape_size": 36}
    n_bytes = 36 * 48 * 3
    world = World([path], 30 * n_bytes, use_image_predictor=False, **keys)
    world.plan(path, 10)
    decoder = world.decoder()

    tracemalloc.start()
    decoder.run()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    *large, last = world.gathered(tmp_path / "reel")["clips"]
    assert [it["result"]["error_msg"].split(";")[0] for it in large] == [
        "a clip of 300 frames exceeds the 155520 bytes that a row may have"
    ] * 2
    assert last["result"] == [list(range(590, 610)), [20, 36, 48, 3]]
    assert peak < 150 * n_bytes


def test_video_whose_plan_is_too_large_is_one_error(clip: Callable[..., Path]) -> None:
    paths = [clip("a.mp4", 400, g=30, preset="ultrafast"), clip("b.mp4", 5)]
    world = World(paths, task_bytes=FAILURE_BYTES + 1500, sample_fps=0)
    world.scout()
    world.decode()

    error, *others = world.found()
    assert "a plan of" in error["error_msg"]
    assert others == [*range(5), facts(5)]


def test_task_that_just_fits_can_be_given_up(clip: Callable[..., Path]) -> None:
    path = clip("a.mp4", 600, g=30, preset="ultrafast")
    whole = World([path])
    whole.scout()
    assert whole.segments.end is not None
    n_bytes = max(len(whole.segments.data(m)) for m in range(whole.segments.end))
    tight = World([path], task_bytes=n_bytes + FAILURE_BYTES)
    tight.scout()

    give_up(tight.segments, 0, "decode", "the decoder died of this segment: " + "x" * 1000)
    tight.decode()

    assert tight.found()[0]["error_msg"].startswith("the decoder died of this segment: xxx")
    assert tight.found()[-1]["n_frames"] == 600


def test_large_video_in_a_cell_is_cut_for_all_decoders(clip: Callable[..., Path]) -> None:
    path = clip("a.base64", 900, g=30, preset="ultrafast")
    with open(path, "ab") as file:  # a box that nobody looks into
        n_bytes = 5 << 20
        file.write(n_bytes.to_bytes(4, "big") + b"free" + bytes(n_bytes - 8))
    world = World([path])
    world.scout()
    decoders = [world.decoder(), world.decoder()]

    assert world.segments.end == 4
    for m in range(4):
        decoders[m % 2]._work(world.segments.header(m), world.segments.data(m))

    assert world.found() == [*range(0, 900, 5), facts(900)]


def test_cells_take_turns_in_the_spool(clip: Callable[..., Path]) -> None:
    world = World([clip(f"{i}.base64", 20 + i) for i in range(8)], n_segments=2)

    decoders = [fork(world.decode) for _ in range(2)]
    world.scout()

    assert [wait(pid) for pid in decoders] == [0, 0]
    frames = [[*range(0, 20 + i, 5), facts(20 + i)] for i in range(8)]
    assert world.found() == [it for each in frames for it in each]


def test_scout_killed_at_any_line_lays_down_the_same(clip: Callable[..., Path]) -> None:
    paths = [clip("a.base64", 400, g=30, preset="ultrafast"), clip("b.base64", 20)]
    whole = World(paths)
    whole.scout()
    tasks = tasks_of(whole)

    code, n_kills = -signal.SIGKILL, 0
    while code:
        world = World(paths)

        def scout(n_lines: int = 12 * n_kills, world: World = world) -> None:
            die_before_line(iter(range(n_lines)), SCOUTING)
            world.scout()

        code = wait(fork(scout))
        world.rows.recover(SCOUT, lambda r: False, None)
        world.scout()
        n_kills += 1

        assert tasks_of(world) == tasks
        for n in range(2):
            data = paths[n].read_bytes()
            assert world.spool.read(n, 0, len(data)) == data
    assert n_kills > 10


def test_memory_of_a_cell_goes_back_when_its_video_is_done(clip: Callable[..., Path]) -> None:
    world = World([clip("a.base64", 20), clip("b.base64", 20)])
    scout = world.scout_of()
    scout._publish_video(0)
    assert any(world.spool.read(0, 0, 1000))
    world.decoder()._work(world.segments.header(0), world.segments.data(0))
    assert world.segments.claim(DECODER, 0.0) == 0
    world.segments.release(0, DECODER)

    scout._publish_video(1)

    assert not any(world.spool.read(0, 0, 1000))
    assert any(world.spool.read(1, 0, 1000))


def test_file_that_the_system_does_not_give_is_an_error(clip: Callable[..., Path]) -> None:
    unreadable = Path("/sys/class/net/lo/speed")  # a file, of which no read succeeds
    world = World([unreadable])
    world.scout()
    world.decode()

    (error,) = world.found()
    assert error["error_stage"] == "read"
    assert error["error_msg"] == f"{str(unreadable)!r}: invalid argument"


def test_file_that_cannot_be_read_further_costs_the_frames_that_are_left(
    clip: Callable[..., Path], tmp_path: Path
) -> None:
    path = clip("a.mp4", 600, g=10, preset="ultrafast")
    world = World([path], use_image_predictor=False, decode_batch_size=1)
    world.plan(path, 20)
    path.unlink()
    path.symlink_to("/sys/class/net/lo/speed")
    world.decode()

    error = world.gathered(tmp_path / "reel")

    assert error["error_stage"] == "read"
    assert "invalid argument" in error["error_msg"]


def test_video_in_a_cell_may_be_too_large(clip: Callable[..., Path]) -> None:
    world = World([clip("a.base64", 60)], max_video_bytes=1024)
    world.scout()
    world.decode()

    (error,) = world.found()
    assert error["error_stage"] == "read"
    assert error["error_msg"].endswith("exceed max_video_bytes 1024")


def test_video_may_be_too_long(clip: Callable[..., Path]) -> None:
    world = World([clip("a.mp4", 26), clip("b.mp4", 25)], max_video_seconds=1)
    world.scout()
    world.decode()

    error, *others = world.found()
    assert error == {
        "error_stage": "decode",
        "error_msg": "1.04 seconds exceed max_video_seconds 1",
    }
    assert others == [*range(0, 25, 5), facts(25)]


@pytest.mark.parametrize(("reshape_size", "size", "most"), [(-1, (96, 72), 0), (40, (53, 40), 1)])
def test_sampled_picture_is_that_of_pyav_and_pillow(
    clip: Callable[..., Path], reshape_size: int, size: tuple[int, int], most: int
) -> None:
    path = clip("a.mp4", 50)
    world = World([path], reshape_size=reshape_size)
    world.scout()
    world.decode()

    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    for n in range(10):
        (sample,) = unpack(world.samples.data(n))
        whole = Image.fromarray(frames[sample["frame_id"]].to_ndarray(format="rgb24"))
        expected = np.asarray(whole.resize(size, Image.Resampling.BILINEAR), np.int16)
        assert np.abs(sample["image"] - expected).max() <= most
