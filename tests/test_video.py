"""Videos: which frames are wanted, when they are shown, what they look like; cut or not."""

from __future__ import annotations

import io
import struct
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from clip import HEIGHT, RATE, WIDTH, make_clip, picture
from fieldclip import make_field_clip
from PIL import Image

from evmp.errors import DecodeError
from evmp.job import Job
from evmp.plan import choose_block_rows
from evmp.video import container
from evmp.video.container import OpenVideo
from evmp.video.ending import missing_end
from evmp.video.frames import Frames
from evmp.video.index import NONE, Index, index_of
from evmp.video.picture import Display
from evmp.video.sampling import Grid, Sampler
from evmp.video.segment import Clips, Segment, segments_of

MAX_PIXELS = 1 << 24
CLIPS: dict[str, dict[str, Any]] = {
    "h264": {"g": 50, "bf": 0},
    "h264 with B frames": {"g": 40, "bf": 3},
    "h264 with open groups": {
        "format": "matroska",
        "g": 40,
        "bf": 3,
        "x264-params": "open-gop=1",
    },
    "h264 refreshed bit by bit": {"g": 40, "bf": 0, "x264-params": "intra-refresh=1"},
    "h264 in a transport stream": {"format": "mpegts", "g": 40, "bf": 2},
    "h264 of 10 bit": {"pix_fmt": "yuv420p10le", "g": 40},
    "h264 in FLV": {"format": "flv", "g": 40, "bf": 2},
    "h264 without timestamps": {"format": "h264", "g": 40, "bf": 2},
    "h264 in AVI": {"format": "avi", "g": 40, "bf": 2},
    "hevc": {"codec": "libx265", "x265-params": "keyint=40:open-gop=1:log-level=none"},
    "vp9": {"codec": "libvpx-vp9", "format": "webm", "g": 40, "cpu-used": 8},
    "mpeg4": {"codec": "mpeg4", "g": 40, "bf": 2},
    "intra only": {"codec": "mjpeg", "format": "matroska", "pix_fmt": "yuvj420p"},
    "h264 behind an edit list": {"g": 20, "bf": 2, "pts": [i - 31 for i in range(150)]},
    "h264 of negative times": {
        "format": "mpegts",
        "g": 40,
        "bf": 2,
        "pts": [i - 60 for i in range(150)],
        "avoid_negative_ts": "disabled",
    },
    "h264 interlaced": {"format": "mpegts", "g": 40, "bf": 2, "x264-params": "interlaced=1"},
    "mpeg2 in a program stream": {"codec": "mpeg2video", "format": "vob", "g": 40, "bf": 2},
    "mpeg2 interlaced": {"codec": "mpeg2video", "g": 40, "bf": 2, "flags": "+ildct+ilme"},
    "variable rate": {
        "format": "matroska",
        "g": 40,
        "bf": 2,
        "pts": [i * 40 + (i * i) % 37 for i in range(150)],
        "time_base": Fraction(1, 1000),
    },
}


class Truth:
    """A file decoded whole, frame by frame, by nothing but PyAV."""

    def __init__(self, data: bytes) -> None:
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            self.frames = list(container.decode(stream))
            pts = [frame.pts for frame in self.frames]
            assert stream.time_base is not None
            self.are_ascending = None not in pts and sorted(pts) == pts
            if self.are_ascending:
                self.seconds = [(it - pts[0]) * stream.time_base for it in pts]
            else:  # a file without times of its own
                self.seconds = [Fraction(i, 25) for i in range(len(pts))]
        self._data = data

        self._place = {frame.pts: i for i, frame in enumerate(self.frames)}

    @cached_property
    def without_b(self) -> dict[int, Any]:
        """The frames that FFmpeg makes of a file when it leaves out B frames, by their number.

        They are not quite those that it makes otherwise: others may refer to what is left out.
        """
        if not self.are_ascending:  # told apart by their order alone
            return {i: it for i, it in enumerate(self.frames) if it.pict_type != 3}
        with av.open(io.BytesIO(self._data)) as container:
            container.streams.video[0].codec_context.skip_frame = "BIDIR"
            found = {self._place[it.pts]: it for it in container.decode(video=0)}
            return {i: it for i, it in found.items() if it.pict_type != 3}

    def decoded(self, decode_type: int) -> dict[int, Any]:
        """Return the frames of a decode type, by their number."""
        if decode_type == 3:
            return self.without_b
        return {i: it for i, it in enumerate(self.frames) if is_of(decode_type, it)}

    def chosen(self, decode_type: int, fps: float, end: Fraction) -> list[int]:
        """Return the numbers of the frames that are wanted."""
        decoded = list(self.decoded(decode_type))
        if fps <= 0:
            return decoded
        chosen: list[int] = []
        k = 0
        while k / Fraction(str(fps)) < end:
            at = k / Fraction(str(fps))
            nearest = min(decoded, key=lambda i: (abs(self.seconds[i] - at), i))
            if nearest not in chosen:
                chosen.append(nearest)
            k += 1
        return chosen


def is_of(decode_type: int, frame: Any) -> bool:
    kinds = {1: frame.pict_type == 1, 2: frame.key_frame, 4: True}
    return bool(kinds[decode_type])


@cache
def clip_of(name: str) -> tuple[bytes, Truth]:
    data = make_clip(150, **CLIPS[name])
    return data, Truth(data)


def make_job(**keys: Any) -> Job:
    return Job(
        model_path="model",
        model_type="self_define",
        user_predictor_cls="a.B",
        input_oss_file="in.txt",
        output_oss_file="out.jsonl",
        is_input_video=True,
        **keys,
    )


def opened(data: bytes) -> OpenVideo:
    return OpenVideo(io.BytesIO(data), MAX_PIXELS)


def planned(data: bytes, enough: int = 10**9, **keys: Any) -> tuple[Index, list[Segment]]:
    with opened(data) as video:
        index = index_of(video)
    return index, list(segments_of(index, make_job(**keys), enough))


def read(data: bytes, enough: int = 10**9, **keys: Any) -> list[tuple[int, float, Any]]:
    """Return number, seconds and pixels of the frames, each segment by a decoder of its own."""
    job = make_job(**keys)
    index, segments = planned(data, enough, **keys)
    found = []
    for segment in reversed(segments):
        with opened(data) as video:
            frames = Frames(video, job.decode_type, job.sample_fps).read(segment)
            found.append([(it.frame_id, index.seconds(it.time), pixels_of(it)) for it in frames])
    return [frame for several in reversed(found) for frame in several]


def pixels_of(wanted: Any) -> Any:
    return None if wanted.frame is None else wanted.frame.to_ndarray(format="rgb24")


@pytest.mark.parametrize("decode_type", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_those_of_a_slow_and_obvious_decoder(name: str, decode_type: int) -> None:
    if decode_type == 2 and "refreshed" in name:
        pytest.skip("its keyframes need those before them")
    data, truth = clip_of(name)
    index, _ = planned(data)
    assert not index.damage
    end = (index.end - index.origin) * index.time_base
    frames = truth.decoded(decode_type)

    for fps in (0.0, 7.3):
        found = read(data, enough=4, decode_type=decode_type, sample_fps=fps)

        expected = truth.chosen(decode_type, fps, end)
        assert [frame_id for frame_id, _, _ in found] == expected
        for frame_id, seconds, pixels in found:
            assert seconds == pytest.approx(float(truth.seconds[frame_id]), abs=1e-9)
            assert (pixels == frames[frame_id].to_ndarray(format="rgb24")).all()


@pytest.mark.parametrize("decode_type", [1, 2, 3, 4])
def test_files_put_together_are_one_video_after_the_other(decode_type: int) -> None:
    halves = [make_clip(n, format="mpegts", g=40, bf=bf) for n, bf in ((110, 2), (90, 0))]
    first, second = (Truth(half).decoded(decode_type) for half in halves)
    frames = {**first, **{110 + i: frame for i, frame in second.items()}}

    index, _ = planned(b"".join(halves))
    found = read(b"".join(halves), enough=10, decode_type=decode_type, sample_fps=0)

    assert index.duration_seconds == pytest.approx(8.0)
    assert [frame_id for frame_id, _, _ in found] == list(frames)
    for frame_id, seconds, pixels in found:
        assert seconds == pytest.approx(frame_id / 25)
        assert (pixels == frames[frame_id].to_ndarray(format="rgb24")).all()


@pytest.mark.parametrize("decode_type", [2, 4])
@pytest.mark.parametrize("codec", ["libx265", "libx264", "mpeg2video"])
def test_recording_cut_at_an_open_group_begins_with_its_keyframe(
    codec: str, decode_type: int
) -> None:
    params = "keyint=20:open-gop=1:bframes=5:b-adapt=0:scenecut=0"
    options = {"x264-params": params, "x265-params": params}
    data = make_clip(100, codec, "mpegts", g=20, bf=2, **options)
    with opened(data) as video:
        keys = [packet.pos for packet in video.packets() if packet.is_keyframe]
    tables, group = data[: 3 * 188], keys[2]
    assert group is not None
    data = tables + data[group:]
    frames = Truth(data).decoded(decode_type)

    index, _ = planned(data)
    found = read(data, decode_type=decode_type, sample_fps=0)

    assert index.n_frames == len(Truth(data).frames)
    assert not index.damage
    assert [frame_id for frame_id, _, _ in found] == list(frames)
    for frame_id, seconds, pixels in found:
        assert seconds == pytest.approx(frame_id / 25)
        assert (pixels == frames[frame_id].to_ndarray(format="rgb24")).all()


@pytest.mark.parametrize("format", ["mpegts", "matroska", "h264"])
def test_frames_of_two_fields_are_counted_once(format: str) -> None:
    data = make_field_clip(24, format)
    frames = Truth(data).frames

    found = read(data, enough=4, sample_fps=0)

    assert [frame_id for frame_id, _, _ in found] == list(range(24))
    assert len(frames) == 24
    for frame_id, seconds, pixels in found:
        if format != "h264":  # a raw stream says nothing of times
            assert seconds == pytest.approx(frame_id / 25)
        assert (pixels == frames[frame_id].to_ndarray(format="rgb24")).all()


def test_long_video_is_cut_and_a_short_one_is_not() -> None:
    data, _ = clip_of("h264")

    assert len(planned(data, enough=10)[1]) == 2
    assert len(planned(data)[1]) == 1


@pytest.mark.parametrize("decode_type", [2, 4])
def test_program_stream_is_decoded_once(decode_type: int) -> None:
    data = make_clip(300, "mpeg2video", "vob", g=30)
    n_packets = 0

    def count() -> None:
        nonlocal n_packets
        n_packets += 1

    index, segments = planned(data, enough=16, sample_fps=0, decode_type=decode_type)
    for segment in segments:
        with opened(data) as video:
            found = list(Frames(video, decode_type, 0.0, count).read(segment))
            assert all(it.frame is not None for it in found)

    assert index.is_regular
    assert n_packets <= 301


def test_what_is_decoded_twice_is_little() -> None:
    data = make_clip(800, g=30, bf=2, preset="ultrafast")
    n_packets = 0

    def count() -> None:
        nonlocal n_packets
        n_packets += 1

    _, segments = planned(data, enough=16)
    for segment in segments:
        with opened(data) as video:
            list(Frames(video, 4, 5.0, count).read(segment))

    assert len(segments) > 3
    assert n_packets < 1.1 * 800


@pytest.mark.parametrize("size, kept", [(10, 0), (10, 3), (7, 6), (1, 0), (500, 0)])
@pytest.mark.parametrize("n_frames", [1, 2, 10, 11, 23, 200])
def test_clips_cover_every_frame_and_each_has_a_new_one(
    size: int, kept: int, n_frames: int
) -> None:
    clips = Clips(size, kept)
    spans = [clips.frames(i, n_frames) for i in range(clips.count(n_frames))]

    assert spans[0][0] == 0
    assert spans[-1][1] == n_frames
    for (start, stop), (following, end) in pairwise(spans):
        assert stop - start == size
        assert following == stop - kept
        assert end > stop


def test_segments_of_clips_give_what_one_segment_gives() -> None:
    data = make_clip(600, g=20, bf=2)
    keys = {
        "use_image_predictor": False,
        "decode_batch_size": 6,
        "decode_keep_size": 2,
        "sample_fps": 12.5,
    }
    index, segments = planned(data, enough=5, **keys)
    whole = Grid(12.5, index).kept(index.times)

    assert len(segments) > 2
    clips = Clips(6, 2)
    for segment in segments:
        assert segment.frames is not None
        for i in range(segment.n_items):
            start, stop = clips.frames(i, len(segment.frames))
            span = slice(*clips.frames(segment.first + i, len(whole)))
            assert segment.frames[start:stop].tolist() == whole[span].tolist()
    assert sum(segment.n_items for segment in segments) == clips.count(len(whole))
    assert [segment.is_last for segment in segments] == [False] * (len(segments) - 1) + [True]


@pytest.mark.parametrize("size, kept", [(10, 5), (16, 15), (4, 0)])
def test_clips_of_a_rate_that_changes_are_decoded_twice_only_here_and_there(
    size: int, kept: int
) -> None:
    steps = np.repeat([500, 10], [200, 10_000])  # two frames a second, then a hundred
    times = np.cumsum(steps)
    keys = np.arange(0, len(times), 100)
    starts = np.stack([times[keys]] * 2, axis=1)
    index = Index(Fraction(1, 1000), 0, 10**6, len(times), times, keys, starts, True, "")
    job = make_job(use_image_predictor=False, decode_batch_size=size, decode_keep_size=kept)

    segments = list(segments_of(index, job, 5))

    n_decoded = 0
    for segment in segments:
        assert segment.frames is not None
        n_decoded += int(segment.frames[-1]) + 1 - int(keys[keys <= segment.frames[0]][-1])
    assert len(segments) > 3
    assert n_decoded < 1.1 * len(times)


def test_of_two_equally_near_frames_the_earlier_is_taken() -> None:
    index = Index(Fraction(1, 25), 0, 50, 50, np.arange(50), NONE, NONE, True, "")

    # 9.9 seconds and the like lie in the middle between two frames of 1/25 s.
    kept = Grid(10.0, index).kept(index.times)

    assert kept.tolist()[:5] == [0, 2, 5, 7, 10]


@pytest.mark.parametrize("n_frames", [1, 2, 14, 400])
@pytest.mark.parametrize("fps", [0.0, 0.3, 1 / 3, 5.0, 9.99, 10.0, 30.0, 1e-300, 1e18, 1e300])
def test_frames_chosen_one_by_one_are_those_chosen_at_once(fps: float, n_frames: int) -> None:
    times = np.cumsum(np.random.default_rng(5).integers(1, 90, n_frames))
    end = int(times[-1]) + 40
    index = Index(Fraction(1, 1000), int(times[0]), end, n_frames, times, NONE, NONE, True, "")
    grid = Grid(fps, index)
    sampler = Sampler[int](grid)

    found = [kept for i, time in enumerate(times.tolist()) for kept in sampler.add(time, i)]

    assert [*found, *sampler.end()] == grid.kept(times).tolist()


def test_of_no_frames_none_is_kept() -> None:
    times = np.arange(5)
    index = Index(Fraction(1, 25), 0, 5, 5, times, NONE, NONE, True, "")

    assert Grid(5.0, index).kept(times[:0]).tolist() == []
    assert list(segments_of(index, make_job(decode_type=2), 10))[-1].is_last


def test_times_of_many_digits_lose_none() -> None:
    times = np.arange(5, dtype=np.int64) * 40_000_000_000 + (1 << 50)
    index = Index(
        Fraction(1, 1_000_000_007), 1 << 50, int(times[-1]) + 1, 5, times, NONE, NONE, True, ""
    )

    assert Grid(0.02, index).kept(times).tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("origin", [-(1 << 63), -(1 << 62), (1 << 62) + 5, (1 << 63) - 5000])
def test_times_of_any_size_count_from_the_first(origin: int) -> None:
    times = np.arange(100, dtype=np.int64) * 40 + origin
    index = Index(Fraction(1, 1000), origin, origin + 4000, 100, times, NONE, NONE, True, "")

    assert Grid(5.0, index).kept(times).tolist() == list(range(0, 100, 5))
    assert index.duration_seconds == 4.0


def test_times_that_span_all_there_are_lose_none() -> None:
    times = np.array([-(1 << 63), 0, (1 << 63) - 1])
    index = Index(Fraction(1, 1 << 30), int(times[0]), 1 << 63, 3, times, NONE, NONE, True, "")

    assert Grid(1e-9, index).kept(times).tolist() == [0, 1, 2]


# --- pictures -------------------------------------------------------------------------------------


def first_of(data: bytes, short_side: int = -1) -> Any:
    with opened(data) as video:
        index = index_of(video)
        (segment,) = segments_of(index, make_job(), 10**9)
        wanted = next(iter(Frames(video, 4, 5.0).read(segment)))
        assert wanted.frame is not None
        aspect = video.stream.sample_aspect_ratio
        return Display(short_side, MAX_PIXELS).show(wanted.frame, aspect)


def difference(pixels: np.ndarray, expected: np.ndarray) -> float:
    assert pixels.shape == expected.shape
    return float(np.abs(pixels.astype(int) - expected.astype(int)).max())


@pytest.mark.parametrize("degrees", [0, 90, -90, 180])
def test_picture_is_upright(degrees: int) -> None:
    stored = first_of(make_clip(3)).pixels

    shown = first_of(make_clip(3, rotation=degrees))

    assert difference(shown.pixels, np.rot90(stored, degrees // 90)) == 0
    assert (shown.height, shown.width) == shown.pixels.shape[:2]


@pytest.mark.parametrize("degrees", [0, 90, -90, 180])
def test_mirrored_picture_is_turned_over(degrees: int) -> None:
    """The matrix maps columns and rows that are stored to (a x + c y, b x + d y)."""
    stored = first_of(make_clip(3)).pixels
    data = bytearray(make_clip(3, rotation=degrees))
    at = data.index(b"tkhd") + 44
    a, b, _, c, d = struct.unpack(">5i", data[at : at + 20])
    data[at : at + 20] = struct.pack(">5i", -a, b, 0, -c, d)  # shown the other way round

    shown = first_of(bytes(data)).pixels

    assert difference(shown, np.rot90(stored, degrees // 90)[:, ::-1]) == 0


@pytest.mark.parametrize("short_side", [36, 100])
def test_resized_picture_is_that_of_pillow(short_side: int) -> None:
    stored = first_of(make_clip(3)).pixels
    size = round(WIDTH * short_side / HEIGHT), short_side

    shown = first_of(make_clip(3), short_side)

    expected = np.asarray(Image.fromarray(stored).resize(size, Image.Resampling.BILINEAR))
    assert difference(shown.pixels, expected) <= 1
    assert (shown.height, shown.width) == (HEIGHT, WIDTH)


def test_anamorphic_picture_is_widened() -> None:
    shown = first_of(make_clip(3, aspect=Fraction(4, 3)))

    assert shown.pixels.shape == (HEIGHT, WIDTH * 4 // 3, 3)


def test_picture_is_close_to_what_was_encoded() -> None:
    shown = first_of(make_clip(3, qp=1, size=(64, 64)))

    assert np.abs(shown.pixels.astype(int) - picture(0, 64, 64)).mean() < 8


# --- files that are bad, or none ------------------------------------------------------------------


def playlists() -> Iterator[tuple[str, bytes]]:
    yield (
        "HLS",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    )
    yield "concat", b"ffconcat version 1.0\nfile /etc/passwd\n"
    yield (
        "DASH",
        b'<?xml version="1.0"?><MPD><Period><BaseURL>file:///etc/</BaseURL></Period></MPD>',
    )
    yield "SDP", b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n"
    yield "text", b"no video at all"
    yield "nothing", b""
    yield "an mp4 without its index", make_clip(50)[:3000]
    yield "a picture", b"\x89PNG\r\n\x1a\n" + bytes(100)


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in playlists()])
def test_what_is_no_video_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError, match="not a video"):
        opened(data)


def test_nothing_that_a_file_refers_to_is_opened_whatever_its_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.ts").write_bytes(make_clip(5, "libx264", "mpegts"))
    monkeypatch.setattr(container, "FORMATS", (*container.FORMATS, "concat"))

    with pytest.raises(DecodeError, match="not a video: invalid argument"):
        opened(b"ffconcat version 1.0\nfile other.ts\n")


def several(*kinds: str) -> bytes:
    """Return an mp4 with a stream of each kind: sound, cover, or how high and wide a video is."""
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format="mp4") as container:
            streams: list[Any] = []
            for kind in kinds:
                if kind == "sound":
                    streams.append(container.add_stream("aac", rate=8000, layout="mono"))
                    continue
                streams.append(container.add_stream("mjpeg" if kind == "cover" else "libx264"))
                streams[-1].height = streams[-1].width = 64 if kind == "cover" else int(kind)
                streams[-1].pix_fmt = "yuvj420p" if kind == "cover" else "yuv420p"
                if kind == "cover":
                    streams[-1].disposition = Disposition.attached_pic
            for kind, stream in zip(kinds, streams, strict=True):
                for frame in frames_of(kind):
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
        return Path(file.name).read_bytes()


def frames_of(kind: str) -> Iterator[Any]:
    if kind == "sound":
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        yield frame
        return
    side = 64 if kind == "cover" else int(kind)
    for number in range(1 if kind == "cover" else 12):
        yield av.VideoFrame.from_ndarray(picture(number, side, side), format="rgb24")


@pytest.mark.parametrize(
    "kinds, told",
    [(["sound"], "only audio"), (["sound", "cover"], "only a picture beside sound")],
)
def test_sound_alone_is_no_video(kinds: list[str], told: str) -> None:
    with pytest.raises(DecodeError, match=f"there is no video in it, {told}"):
        opened(several(*kinds))


@pytest.mark.parametrize("kinds", [["48", "128"], ["128", "48"], ["cover", "sound", "128"]])
def test_of_several_videos_the_largest_is_taken_and_a_cover_never(kinds: list[str]) -> None:
    found = read(several(*kinds), sample_fps=0)

    assert [frame_id for frame_id, _, _ in found] == list(range(12))
    assert {pixels.shape for _, _, pixels in found} == {(128, 128, 3)}


def test_length_that_the_header_claims_is_not_believed() -> None:
    data = bytearray(make_clip(30))
    for box, skipped, scale in ((b"mvhd", 16, 1000), (b"tkhd", 20, 1000), (b"mdhd", 16, 12800)):
        at = data.index(box) + len(box) + skipped
        data[at : at + 4] = struct.pack(">I", 86400 * scale)

    index, _ = planned(bytes(data))

    assert index.duration_seconds == pytest.approx(1.2)
    assert index.n_frames == 30


def test_frames_that_the_header_claims_are_missed() -> None:
    data = bytearray(make_clip(30, format="avi"))
    for box, skipped in ((b"avih", 20), (b"strh", 36)):
        at = data.index(box) + len(box) + skipped
        data[at : at + 4] = struct.pack("<I", 86400 * 25)

    index, _ = planned(bytes(data))

    assert index.duration_seconds == pytest.approx(1.2)
    assert index.damage == "the file ends after 30 of 2160000 frames"


def test_video_of_no_frames_a_second_has_the_usual_ones() -> None:
    data = bytearray(make_clip(30, format="avi"))
    for box, skipped, size in ((b"avih", 4, 4), (b"strh", 24, 8)):
        at = data.index(box) + len(box) + skipped
        data[at : at + size] = bytes(size)

    found = read(bytes(data), sample_fps=5)

    assert [frame_id for frame_id, _, _ in found] == [0, 5, 10, 15, 20, 25]
    assert [seconds for _, seconds, _ in found] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


def test_frame_that_is_too_large_is_refused_unseen() -> None:
    with pytest.raises(DecodeError, match="exceed"):
        OpenVideo(io.BytesIO(make_clip(3)), 1000)


@pytest.mark.parametrize("codec", ["mjpeg", "libx264"])
def test_stream_that_becomes_too_large_is_not_decoded_there(codec: str) -> None:
    kind = {"codec": codec, "format": {"mjpeg": "mjpeg", "libx264": "h264"}[codec]}
    if codec == "mjpeg":
        kind["pix_fmt"] = "yuvj420p"
    data = make_clip(3, **kind) + make_clip(3, size=(512, 512), **kind)  # type: ignore[arg-type]

    with OpenVideo(io.BytesIO(data), 100 * 100) as video:
        (segment,) = segments_of(index_of(video), make_job(), 10**9)
        frames = Frames(video, 4, 0.0)
        found = [(it.frame_id, it.frame.height) for it in frames.read(segment) if it.frame]

    assert found == [(i, HEIGHT) for i in range(3)]
    assert frames.damage


def test_cut_stream_says_where_it_ends() -> None:
    data = make_clip(100, movflags="+faststart")
    index, _ = planned(data[: len(data) * 2 // 3])

    assert index.n_frames < 100
    assert index.damage.startswith("the file ")


@pytest.mark.parametrize(
    "name", ["h264 with open groups", "vp9", "h264 in a transport stream", "h264 in FLV"]
)
def test_file_cut_anywhere_says_so(name: str) -> None:
    data, _ = clip_of(name)
    for part in range(2, 19):
        index, _ = planned(data[: len(data) * part // 20 + part])

        assert index.n_frames < 150
        assert index.damage.startswith(f"the file ends after {index.n_frames} frames, with")


@pytest.mark.parametrize("shift, size, whole", [(0, 188, 188), (4, 192, 188), (0, 204, 204)])
def test_transport_stream_ends_with_a_packet_of_any_size(shift: int, size: int, whole: int) -> None:
    packets = [bytes(shift) + b"\x47" + bytes([i] * (size - shift - 1)) for i in range(100, 140)]
    data = b"".join(packets)

    assert not missing_end(io.BytesIO(data), "mpegts")
    for n_bytes in range(1, whole):
        file = io.BytesIO(data[: -size + shift + n_bytes])
        assert missing_end(file, "mpegts") == "within a packet"
        assert not file.tell()


def test_stream_that_was_written_live_claims_no_size() -> None:
    data = bytearray(clip_of("vp9")[0])
    at = data.index(b"\x18\x53\x80\x67") + 4
    data[at : at + 8] = b"\x01" + b"\xff" * 7

    assert not planned(bytes(data))[0].damage
    assert not missing_end(io.BytesIO(bytes(data[:at])), "matroska,webm")


def test_tags_of_a_muxer_that_counts_them_otherwise_prove_nothing() -> None:
    data = bytearray(clip_of("h264 in FLV")[0])
    first = 9 + 4
    following = first + 11 + int.from_bytes(data[first + 1 : first + 4], "big")
    data[following : following + 4] = bytes(4)

    assert missing_end(io.BytesIO(data[:-1]), "flv") == ""


def test_transport_stream_misses_the_packets_it_has_counted() -> None:
    data, _ = clip_of("h264 in a transport stream")
    packets = [data[at : at + 188] for at in range(0, len(data), 188)]
    pictures = [i for i, it in enumerate(packets) if it[1] & 0x1F == 1]  # number 256
    del packets[pictures[len(pictures) // 2]]

    index, _ = planned(b"".join(packets))

    assert index.damage.startswith("something is missing after ")


@pytest.mark.parametrize("later", [-5, 0, 4000])
def test_packets_are_counted_anew_in_each_piece_that_was_joined(later: int) -> None:
    n_frames, clip = 60, {"format": "mpegts", "g": 20, "bf": 2}
    pieces = [
        make_clip(n_frames, pts=[10 * RATE + since + i for i in range(n_frames)], **clip)
        for since in (0, n_frames + later * RATE)
    ]

    index, _ = planned(b"".join(pieces))

    assert index.n_frames == 2 * n_frames
    assert not index.damage


def test_damage_in_the_middle_costs_the_frames_there() -> None:
    data = bytearray(make_clip(200, g=40))
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)

    found = read(bytes(data), sample_fps=0)

    assert [frame_id for frame_id, _, _ in found] == list(range(200))
    lost = [frame_id for frame_id, _, pixels in found if pixels is None]
    assert lost
    assert lost[0] > 20
    assert lost[-1] < 180


@pytest.mark.parametrize("kind", ["intra only", "h264 in AVI", "mpeg4"])
def test_damaged_packet_of_a_stream_without_times_leaves_the_later_ones_their_numbers(
    kind: str,
) -> None:
    whole = make_clip(30, **{**CLIPS[kind], "format": "avi", "g": 10})
    data, frames = bytearray(whole), Truth(whole).frames
    with opened(whole) as video:
        packets = [bytes(packet) for packet in video.packets() if packet.size]
    for lost in (4, 5, 20):
        at = data.index(packets[lost])
        data[at : at + len(packets[lost])] = bytes(len(packets[lost]))

    found = read(bytes(data), sample_fps=0)

    if kind == "intra only":
        assert [frame_id for frame_id, _, _ in found] == sorted({*range(30)} - {4, 5, 20})
    for frame_id, seconds, pixels in found:
        assert seconds == pytest.approx(frame_id / 25)
        if kind == "intra only" or 11 < frame_id < 19:
            assert (pixels == frames[frame_id].to_ndarray(format="rgb24")).all()


@pytest.mark.parametrize("codec", ["mpeg4", "mpeg2video"])
def test_frames_behind_a_lost_b_frame_keep_their_numbers(codec: str) -> None:
    whole = make_clip(30, codec, "avi", g=12, bf=2)
    data, frames = bytearray(whole), Truth(whole).frames
    with opened(whole) as video:
        lost = [bytes(packet) for packet in video.packets() if packet.size][2]
    at = data.index(lost)
    data[at : at + len(lost)] = bytes(len(lost))

    found = read(bytes(data), sample_fps=0)

    assert [frame_id for frame_id, _, _ in found] == [0, *range(2, 30)]
    for frame_id, _, pixels in found:
        assert (pixels == frames[frame_id].to_ndarray(format="rgb24")).all()


class Forgetful(OpenVideo):
    """Loses the times of some packets, as formats may in which a time was sought."""

    def packets(self, start: int | None = None) -> Iterator[Any]:
        for i, packet in enumerate(super().packets(start)):
            if i in (5, 6):
                packet.pts = None
            yield packet


@pytest.mark.parametrize("decode_type", [1, 4])
def test_frame_that_comes_without_its_time_is_lost(decode_type: int) -> None:
    data = make_clip(12, "mpeg4", g=1)
    index, (segment,) = planned(data, sample_fps=0, decode_type=decode_type)

    with Forgetful(io.BytesIO(data), MAX_PIXELS) as video:
        frames = Frames(video, decode_type, 0.0)
        found = {it.frame_id for it in frames.read(segment) if it.frame is not None}

    assert index.is_regular
    assert found == {*range(12)} - {5, 6}
    assert frames.damage == "a frame came without its time after 0.160 seconds"


def test_one_frame_is_a_video() -> None:
    index, (segment,) = planned(make_clip(1))

    assert index.n_frames == 1
    assert segment.n_items == 1
    assert index.duration_seconds == pytest.approx(0.04)


def test_few_videos_are_committed_one_by_one() -> None:
    assert choose_block_rows(make_job(), 10, 2) == 1
    assert choose_block_rows(make_job(block_rows=5), 10, 2) == 5
    assert choose_block_rows(make_job(), 10_000, 2) > 100


def test_codec_that_is_not_built_in_is_told() -> None:
    data = make_clip(3).replace(b"avc1", b"xyz1")

    with pytest.raises(DecodeError, match="there is no decoder for this kind of video"):
        opened(data)


@pytest.mark.parametrize("format", ["mp4", "matroska", "mpegts", "avi"])
def test_damage_of_any_kind_costs_frames_or_the_video(format: str) -> None:
    whole = make_clip(40, format=format, g=20, bf=2)
    random = Random(7)
    for _ in range(40):
        data = bytearray(whole[: random.randrange(1000, len(whole) + 1)])
        for _ in range(random.choice([1, 10, 50])):
            data[random.randrange(len(data))] = random.randrange(256)
        with suppress(DecodeError):
            read(bytes(data), enough=4, decode_type=random.randint(1, 4), sample_fps=0)
