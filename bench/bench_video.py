"""Videos: frames out of a file against those who do only that, and whole jobs over one long video.

    python bench/bench_video.py --json out/bench/bench_video.json

`frames`: one process takes the frames nearest to k / 5 seconds, or all, out of a real clip, as
(H, W, 3) uint8 RGB at their own size, on one thread, in turns; frames of the file per second of
CPU time. Each contender is told the rate as it likes it best. "evmp" looks at the packets first,
as its scout does, and that is counted. torchcodec has the system's FFmpeg, the others bring their
own.

`jobs`: the whole command over one long video, which the clip is joined to, with one decoder and
with one a core, frames at 5 a second into 224 x 224 and consumed as in W1 of bench_pipeline.py;
steady, as there: what the long video has more over the time that it takes more.

`memory`: the highest PSS of all processes of such a job over as many frames, in a single very long
video and in short ones, of which all decoders work on one each.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import harness
import numpy as np
import workload
from cost import Cost, measure

CONFIG = workload.ROOT / "config"
PEERS = Path(__file__).resolve().parent / "peers"
sys.path[:0] = [str(PEERS), str(CONFIG)]

import demo_video  # noqa: E402
from task import Task  # noqa: E402

FPS = 5.0
CLIPS = ("bikes.mp4", "bigbuckbunny.mp4")
LIMIT_SECONDS = 600.0
ROUNDS = 3
SECONDS = {"short": 200, "long": 1000}  # of the joined video
MEMORY_SECONDS = 3600
SHORT_SECONDS = 10

Way = Callable[[Path, float], int]


# --- frames ---------------------------------------------------------------------------------------


def by_evmp(file: Path, fps: float) -> int:
    """Look at the packets, and decode what is wanted."""
    from evmp.job import Job
    from evmp.video.container import OpenVideo
    from evmp.video.frames import Frames
    from evmp.video.index import index_of
    from evmp.video.picture import Display
    from evmp.video.segment import segments_of

    job = Job(
        model_path="m",
        model_type="classifier",
        input_oss_file="i",
        output_oss_file="o",
        is_input_video=True,
        sample_fps=fps,
    )
    n_frames, display = 0, Display(-1, 1 << 30)
    with open(file, "rb", buffering=0) as opened, OpenVideo(opened, 1 << 30) as video:
        for segment in segments_of(index_of(video), job, 1 << 30):
            for wanted in Frames(video, 4, fps).read(segment):
                assert wanted.frame is not None
                display.show(wanted.frame, video.stream.sample_aspect_ratio)
                n_frames += 1
    return n_frames


def by_pyav(file: Path, fps: float) -> int:
    """Decode all, and convert each frame that is the first behind the next wanted time."""
    import av

    n_frames, wanted = 0, 0.0
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.thread_count = "NONE", 1
        for frame in container.decode(stream):
            if fps <= 0 or (frame.time or 0.0) >= wanted:
                frame.to_ndarray(format="rgb24")
                n_frames, wanted = n_frames + 1, wanted + (1 / fps if fps > 0 else 0)
    return n_frames


def by_cv2(file: Path, fps: float) -> int:
    """Grab all, and retrieve by count."""
    import cv2

    cv2.setNumThreads(1)
    options = [cv2.CAP_PROP_N_THREADS, 1]
    capture = cv2.VideoCapture(str(file), cv2.CAP_FFMPEG, options)
    step = capture.get(cv2.CAP_PROP_FPS) / fps if fps > 0 else 1
    n_frames = place = 0
    while capture.grab():
        if place >= n_frames * step:
            _, picture = capture.retrieve()
            cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
            n_frames += 1
        place += 1
    return n_frames


def by_torchcodec(file: Path, fps: float) -> int:
    """Ask for the frames at their times, in one call."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(
        str(file), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
    )
    about = decoder.metadata
    if fps <= 0:
        return len(decoder.get_frames_in_range(0, about.num_frames).data)
    times = np.arange(0, about.end_stream_seconds, 1 / fps).tolist()
    return len(decoder.get_frames_played_at(times).data)


def by_decord(file: Path, fps: float) -> int:
    """Ask for the frames by their numbers, in one call."""
    import decord

    reader = decord.VideoReader(str(file), num_threads=1)
    step = reader.get_avg_fps() / fps if fps > 0 else 1.0
    places = np.arange(0, len(reader), step).astype(int).tolist()
    return len(reader.get_batch(places).asnumpy())


WAYS: dict[str, tuple[str, Way]] = {
    "evmp": ("evmp", by_evmp),
    "PyAV by hand": ("av", by_pyav),
    "OpenCV": ("cv2", by_cv2),
    "torchcodec": ("torchcodec.decoders", by_torchcodec),
    "decord": ("decord", by_decord),
}


def peer(module: str) -> Any:
    """Import a peer; None where it, or a library that it needs, is not installed."""
    try:
        return harness.peer(module)
    except (OSError, RuntimeError) as error:
        print(f"{module} is skipped: {str(error).splitlines()[0]}")
        return None


def frames(folder: Path, n_rounds: int) -> list[dict[str, Any]]:
    """Compare the ways; return a row for each clip, rate and way."""
    ways = {name: way for name, (module, way) in WAYS.items() if peer(module)}
    rows = []
    for clip in CLIPS:
        n_frames = by_pyav(folder / clip, 0)
        for fps in (FPS, 0.0):
            rates: dict[str, list[float]] = {name: [] for name in ways}
            counts = {name: way(folder / clip, fps) for name, way in ways.items()}
            for _ in range(n_rounds):
                for name, way in ways.items():
                    before = time.process_time()
                    way(folder / clip, fps)
                    rates[name].append(n_frames / (time.process_time() - before))
            best = max(ways.keys() - {"evmp"}, key=lambda name: statistics.median(rates[name]))
            of_best = {
                name: [rate / peers for rate, peers in zip(rates[name], rates[best], strict=True)]
                for name in ways
            }
            rows += [
                {
                    "clip": clip,
                    "wanted": f"{fps:g} a second" if fps else "all",
                    "way": name,
                    "frames": counts[name],
                    "n": n_rounds,
                    "frames/CPU-s": harness.spread(rates[name]),
                    "of the best peer, in turns": round(statistics.median(of_best[name]), 2),
                }
                for name in ways
            ]
    return rows


# --- jobs -----------------------------------------------------------------------------------------


def joined(clip: Path, seconds: int, out: Path) -> int:
    """Write a clip again and again, without decoding it. Returns how many frames that are."""
    import av

    n_frames = shift = 0
    with av.open(io.BytesIO(clip.read_bytes())) as source:
        stream = source.streams.video[0]
        packets = [it for it in source.demux(stream) if it.size]
        fps, time_base = stream.average_rate, stream.time_base
        assert fps and time_base
        length = round(len(packets) / fps / time_base)
        first = min(it.pts or 0 for it in packets)
        with av.open(str(out), "w") as target:
            copy: Any = target.add_stream_from_template(stream)
            originals = [(it.pts, it.dts) for it in packets]
            while n_frames < seconds * fps:
                for packet, (pts, dts) in zip(packets, originals, strict=True):
                    packet.stream, packet.time_base = copy, time_base
                    packet.pts, packet.dts = pts - first + shift, dts - first + shift
                    target.mux(packet)
                n_frames, shift = n_frames + len(packets), shift + length
    return n_frames


def run_once(video: Path, n_decoders: int, *, n_times: int = 1, sample: bool = False) -> Cost:
    """Run a job over a video, once or more often, in processes of its own."""
    with tempfile.TemporaryDirectory(dir=workload.CACHE) as folder:
        Path(folder, "videos.txt").write_text(f"{video}\n" * n_times)
        task = Task(
            work="w1",
            table=f"{folder}/videos.txt",
            network=str(workload.network() / "model.pt"),
            out=f"{folder}/out.jsonl",
            resize="",
            n_cores=n_decoders,
            report=f"{folder}/report.json",
        )
        command = [sys.executable, __file__, "--run", json.dumps(asdict(task))]
        cost = measure(command, dict(os.environ), sample=sample, limit=LIMIT_SECONDS)
        assert b'"summary"' in Path(task.out).read_bytes()
    return cost


def run_here(task: Task) -> None:
    """Be the evmp command of a run."""
    import evmp_job

    from evmp import cli

    evmp_job.prepare(task)
    evmp_job.Consumer.results = lambda self, outputs, sizes: [  # type: ignore[method-assign]
        json.dumps({"class_probs": {}, **it}).encode() for it in outputs
    ]
    job = {
        **evmp_job.job_of(task),
        "input_table": "",
        "input_oss_file": task.table,
        "reserved_columns": "",
        "is_input_video": True,
        "sample_fps": FPS,
    }
    config = Path(task.report).with_suffix(".yaml")
    config.write_text(json.dumps(job))
    cli.main(["--config", str(config), "--fresh", "--quiet"])


def jobs(folder: Path, n_rounds: int, seconds: dict[str, int]) -> list[dict[str, Any]]:
    """Run jobs with one decoder and with one a core; return a row for each."""
    clip = folder / CLIPS[0]
    sizes = {name: joined(clip, it, folder / f"{name}.mp4") for name, it in seconds.items()}
    more = sizes["long"] - sizes["short"]
    n_cores = len(os.sched_getaffinity(0))
    rates: dict[int, list[tuple[float, float]]] = {n: [] for n in (1, n_cores)}
    for number in range(n_rounds):
        print(f"jobs, round {number + 1}/{n_rounds}", file=sys.stderr, flush=True)
        for n_decoders, found in rates.items():
            short, long = (run_once(folder / f"{name}.mp4", n_decoders) for name in sizes)
            found.append((more / (long.wall - short.wall), more / (long.cpu - short.cpu)))
    one = statistics.median(wall for wall, _ in rates[1])
    return [
        {
            "decoders": n,
            "n": n_rounds,
            "steady, frames/s": harness.spread([wall for wall, _ in found]),
            "frames/CPU-s": harness.spread([cpu for _, cpu in found]),
            "of one decoder": round(statistics.median(wall for wall, _ in found) / one, 2),
        }
        for n, found in rates.items()
    ]


def memory(folder: Path, seconds: int) -> list[dict[str, Any]]:
    """Return the memory of jobs over short videos, and over a long one."""
    rows = []
    for length in (SHORT_SECONDS, seconds):
        file, n_videos = folder / "memory.mp4", seconds // length
        n_frames = n_videos * joined(folder / CLIPS[0], length, file)
        n_decoders = len(os.sched_getaffinity(0))
        cost = run_once(file, n_decoders, n_times=n_videos, sample=True)
        megabytes = round(cost.peak_bytes / 1e6)
        rows.append({"videos": n_videos, "seconds": length, "frames": n_frames, "MB": megabytes})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--quick", action="store_true", help="only to see it run")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_here(Task(**json.loads(options.run)))
        return
    n_rounds = 1 if options.quick else ROUNDS
    seconds = {"short": 20, "long": 60} if options.quick else SECONDS
    workload.CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workload.CACHE) as name:
        folder, wheels = Path(name), demo_video.fetch()
        for clip in CLIPS:
            (folder / clip).write_bytes(demo_video.video(wheels, clip))
        tables = {
            "frames": frames(folder, 3 * n_rounds),
            "jobs": jobs(folder, n_rounds, seconds),
            "memory": memory(folder, 60 if options.quick else MEMORY_SECONDS),
        }
    harness.tell(
        options.json, "video", ("av", "opencv-python-headless", "torchcodec", "decord"), tables
    )


if __name__ == "__main__":
    main()
