"""Whole jobs over videos: frames, clips, summaries, what is bad, and what is killed."""

from __future__ import annotations

import io
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import av
import numpy as np
import orjson
import psutil
import pyarrow.parquet as pq
import pytest
from clip import make_clip
from conftest import TINY_LABELS, tiny_logits
from httpserver import Answer, serving
from jobfolder import JobFolder, wait_for

MakeTable = Callable[..., Any]
VIDEOS: dict[str, Any] = {
    "input_table": None,
    "input_oss_file": "videos.txt",
    "is_input_video": True,
    "reserved_columns": None,
}
CLIPS: dict[str, Any] = {
    **VIDEOS,
    "model_path": "mine.py",
    "model_type": "self_define",
    "user_resource": "mine.py",
    "user_predictor_cls": "mine.Mine",
    "use_image_predictor": False,
    "decode_batch_size": 8,
    "decode_keep_size": 2,
    "sample_fps": 10,
    "batch_size": 2,
}
MINE = """
import evmp

class Mine(evmp.PredictorInterfaceV2):
    def predict(self, input_data, batch_size):
        return [
            {
                "ids": it["valid_frame_ids"],
                "seconds": it["pts_seconds"],
                "shape": it["image"].shape,
                "means": [int(frame.mean()) for frame in it["image"]],
                "name": it.get("name", ""),
            }
            for it in input_data
        ]
"""

OWN_FRAMES: dict[str, Any] = {
    "input_table": "in.parquet",
    "image_type": "url",
    "allow_private_hosts": True,
    "is_input_video": True,
    "model_path": "mine.py",
    "model_type": "self_define",
    "user_resource": "mine.py",
    "user_predictor_cls": "mine.Mine",
    "preprocess_thread_num": 1,
    "stall_timeout_seconds": 2,
}
OWN_FRAME = """
import evmp

class Mine(evmp.PredictorInterfaceV2):
    def predict(self, input_data, batch_size):
        return [
            {"saw": [it["frame_id"], it["pts_seconds"], *it["image"].shape]} for it in input_data
        ]
"""


def write_list(job: JobFolder, videos: dict[str, bytes]) -> None:
    for name, data in videos.items():
        (job.path / name).write_bytes(data)
    (job.path / "videos.txt").write_text("".join(f"{name}\n" for name in videos))


def decoded(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def results(rows: list[dict[str, Any]]) -> list[Any]:
    return [row["prediction_result"] for row in rows]


def send(pid: int, role: str, signum: int) -> bool:
    """Send a signal to the first process of a job that has a role. Returns whether there is one."""
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.name().startswith(f"evmp {role[:7]}"):
                child.send_signal(signum)
                return True
    return False


def cut_short() -> bytes:
    data = make_clip(300, g=30, movflags="+faststart")
    return data[: len(data) // 2]


def test_every_sampled_frame_is_predicted_and_what_is_bad_is_an_error(job: JobFolder) -> None:
    plain = make_clip(300, g=50, bf=2)
    broken = bytearray(plain)
    broken[len(broken) // 2 : len(broken) // 2 + 3000] = bytes(3000)
    write_list(
        job,
        {
            "plain.mp4": plain,
            "text.mp4": b"no video",
            "short.mkv": make_clip(30, format="matroska"),
            "nothing.mp4": b"",
            "playlist.m3u8": b"#EXTM3U\n#EXTINF:9,\nplain.mp4\n#EXT-X-ENDLIST\n",
            "headless.mp4": make_clip(50)[:4000],
            "cut.mp4": cut_short(),
            "broken.mp4": bytes(broken),
            "one.mp4": make_clip(1),
        },
    )
    with open(job.path / "videos.txt", "a") as file:
        file.write("missing.mp4\n")

    rows = job.do(**VIDEOS, max_error_fraction=0.9, num_worker=2, preprocess_thread_num=3)

    found = dict(zip((row["image"] for row in rows), results(rows), strict=True))
    assert found["plain.mp4"]["video"] == {
        "duration_seconds": 12.0,
        "fps": 25.0,
        "width": 96,
        "height": 72,
        "n_frames": 300,
    }
    frames = found["plain.mp4"]["frames"]
    assert [it["frame_id"] for it in frames] == list(range(0, 300, 5))
    assert [it["pts_seconds"] for it in frames] == [pytest.approx(i / 5) for i in range(60)]
    images = decoded(plain)
    for it in frames:
        scores = np.exp(tiny_logits(images[it["frame_id"]]))
        expected = dict(zip(TINY_LABELS, (scores / scores.sum()).tolist(), strict=True))
        assert it["result"]["class_probs"] == pytest.approx(expected, abs=0.02)
    summary = found["plain.mp4"]["summary"]
    assert summary["n_frames"] == 60
    mean = np.mean([it["result"]["class_probs"]["red"] for it in frames])
    assert summary["class_probs"]["red"] == pytest.approx(mean, abs=1e-6)
    assert len(found["short.mkv"]["frames"]) == 6
    assert len(found["one.mp4"]["frames"]) == 1
    for name in ("text.mp4", "nothing.mp4", "playlist.m3u8", "headless.mp4"):
        assert found[name]["error_stage"] == "decode"
        assert found[name]["error_msg"].startswith("not a video")
    assert "no such file" in found["missing.mp4"]["error_msg"]
    cut = found["cut.mp4"]
    assert cut["video"]["error_msg"].startswith("the file ")
    assert 10 < len(cut["frames"]) < 60
    bad = found["broken.mp4"]
    assert "error_msg" in bad["video"]
    assert [it["frame_id"] for it in bad["frames"]] == list(range(0, 300, 5))
    failed = [it for it in bad["frames"] if "error_stage" in it["result"]]
    assert 0 < len(failed) < 30


def test_clips_overlap_and_carry_their_times(job: JobFolder, make_table: MakeTable) -> None:
    (job.path / "mine.py").write_text(MINE)
    data = make_clip(400, g=25, bf=2)
    make_table(job.path / "in.parquet", [data, data[:1000], make_clip(10)])
    keys = {**CLIPS, "input_table": "in.parquet", "input_oss_file": None}

    rows = job.do(**{**keys, "reserved_columns": "id", "reshape_size": 36, "queue_size": 16})

    assert [row["id"] for row in rows] == ["0", "1", "2"]
    whole, bad, short = results(rows)
    images = decoded(data)
    kept = [i["result"]["ids"] for i in whole["clips"]]
    wanted = sorted({frame for clip in kept for frame in clip})
    assert len(wanted) == 160
    assert kept[0] == wanted[:8]
    assert all(clip == wanted[i * 6 : i * 6 + 8] for i, clip in enumerate(kept))
    assert kept[-1][-1] == wanted[-1]
    for clip in whole["clips"]:
        result = clip["result"]
        assert result["shape"][1:] == [36, 48, 3]
        assert result["seconds"] == [pytest.approx(i / 25) for i in result["ids"]]
        assert (clip["start_seconds"], clip["end_seconds"]) == (
            result["seconds"][0],
            result["seconds"][-1],
        )
        for mean, frame_id in zip(result["means"], result["ids"], strict=True):
            assert mean == pytest.approx(images[frame_id].mean(), abs=2)
    assert bad["error_stage"] == "decode"
    assert [clip["result"]["ids"] for clip in short["clips"]] == [[0, 2, 5, 7]]


def test_kills_lose_and_repeat_nothing(job: JobFolder, make_table: MakeTable) -> None:
    (job.path / "mine.py").write_text(MINE)
    make_table(job.path / "in.parquet", [make_clip(300, g=30, preset="ultrafast", bf=2)] * 4)
    keys = {
        **CLIPS,
        "input_table": "in.parquet",
        "input_oss_file": None,
        "reserved_columns": "id",
        "sample_fps": 0,
        "preprocess_thread_num": 2,
    }
    expected = job.do(**keys)
    job.write(**{**keys, "output_oss_file": "again.jsonl"})

    process = job.start()
    killed = set()
    wait_for(process, lambda: list((job.path / "again.jsonl.evmp").rglob("*.reel")))
    for role in ("scout", "decoder", "writer", "predicto") * 3:
        if send(process.pid, role, signal.SIGKILL):
            killed.add(role)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == 0, errors
    assert len(killed) == 4
    assert job.rows("again.jsonl") == expected
    assert job.leftovers() == []


def test_processes_see_frames_and_a_check_shows_the_first(job: JobFolder) -> None:
    (job.path / "mine.py").write_text(
        "import evmp\n"
        "class Half(evmp.Process):\n"
        "    def process(self, it):\n"
        "        if it['frame_id'] % 2 == 0:\n"
        "            return it\n"
    )
    (job.path / "videos.txt").write_text('{"video": "a.mp4", "name": "first"}\n')
    (job.path / "a.mp4").write_bytes(make_clip(50))
    keys = {
        **VIDEOS,
        "user_resource": "mine.py",
        "user_process_config": {"user_process_cls": "mine.Half"},
    }
    job.write(**keys)

    checked = job.run("--check")
    (row,) = job.do(**keys)

    assert checked.returncode == 0, checked.stderr
    assert "class_probs" in checked.stdout
    assert row["name"] == "first"
    frames = row["prediction_result"]["frames"]
    assert [it["frame_id"] for it in frames] == list(range(0, 50, 5))
    assert [it["result"] is None for it in frames] == [i % 2 == 1 for i in range(10)]


def test_clips_need_a_predictor_of_ones_own(job: JobFolder) -> None:
    job.write(**VIDEOS, use_image_predictor=False)

    done = job.run()

    assert done.returncode == 2
    assert "use_image_predictor: got false with model_type classifier" in done.stderr


def test_decoder_that_hangs_or_crashes_in_a_video_costs_a_part_of_it(
    job: JobFolder, make_table: MakeTable
) -> None:
    """And frames go through a predictor of one's own, into a table."""
    (job.path / "mine.py").write_text(OWN_FRAME)
    long, short = make_clip(600, g=30, preset="ultrafast"), make_clip(10)
    gate = threading.Event()
    stuck = Answer(gate=gate)
    with serving() as server:
        good = Answer(long, has_parts=True)
        urls = [
            server.put("/first.mp4", Answer(short, has_parts=True)),
            server.put("/bad.mp4", good, stuck, stuck, stuck, good),
            server.put("/last.mp4", Answer(short, has_parts=True)),
        ]
        make_table(job.path / "in.parquet", urls)
        job.write(**{**OWN_FRAMES, "output_oss_file": None}, output_table="out")
        process = job.start()
        for n_requests, signum in enumerate((signal.SIGSEGV, signal.SIGSTOP, signal.SIGKILL), 2):
            wait_for(process, lambda n=n_requests: server.requests["/bad.mp4"] >= n)
            assert send(process.pid, "decoder", signum)
        _, errors = process.communicate(timeout=60)
        gate.set()

    assert process.returncode == 0, errors
    table = pq.read_table(job.path / "out")
    assert table["id"].to_pylist() == ["0", "1", "2"]
    first, bad, last = map(orjson.loads, table["prediction_result"].to_pylist())
    assert first == last
    saw = [it["result"]["saw"] for it in first["frames"]]
    assert saw == [[0, 0.0, 72, 96, 3], [5, 0.2, 72, 96, 3]]
    frames = bad["frames"]
    assert [it["frame_id"] for it in frames] == list(range(0, 600, 5))
    lost = [i for i, it in enumerate(frames) if "error_msg" in it["result"]]
    assert lost == list(range(len(lost)))
    assert 10 < len(lost) < 100
    assert "the decoder died of this segment" in bad["video"]["error_msg"]
