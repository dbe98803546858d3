"""The demo of videos, with the real network: where real videos are cut."""

from __future__ import annotations

import subprocess
from pathlib import Path

import demo_video
import orjson
import pytest
import yaml
from conftest import ROOT
from jobfolder import JobFolder


@pytest.mark.slow
def test_cuts_of_a_real_video_are_found_across_its_clips(job: JobFolder) -> None:
    wheels = demo_video.fetch()
    demo_video.build_network(wheels, job.path / "transnetv2")
    (job.path / "bikes.mp4").write_bytes(demo_video.video(wheels, "bikes.mp4"))
    (job.path / "videos.txt").write_text("bikes.mp4\n")
    keys = yaml.safe_load((ROOT / "config" / "demo_cuts.yaml").read_text())
    keys.update(
        model_path="transnetv2",
        user_resource=str(ROOT / "config" / "examples" / "cuts.py"),
        input_oss_file="videos.txt",
        output_oss_file="out.jsonl",
    )
    (job.path / "job.yaml").write_text(yaml.safe_dump(keys))

    done = job.run(timeout=240)

    assert done.returncode == 0, done.stderr
    ((row),) = job.rows()
    clips = row["prediction_result"]["clips"]
    assert len(clips) == 4
    cuts = sorted({cut for clip in clips for cut in clip["result"]["cuts"]})
    assert cuts == [29, 75, 136, 186, 241]


def test_demo_is_told_in_words(tmp_path: Path) -> None:
    frame = {"class_name": "tandem", "class_probs": {"tandem": 0.4}}
    video = {"duration_seconds": 10.0}
    rows = {
        "frames": {"video": video, "frames": [{"frame_id": 0, "result": frame}]},
        "cuts": {"video": video, "clips": [{"result": {"cuts": [29]}}, {"result": {"cuts": [29]}}]},
    }
    for name, result in rows.items():
        row = {"image": "a/bikes.mp4", "prediction_result": result}
        (tmp_path / f"{name}.jsonl").write_bytes(orjson.dumps(row) + b"\n")

    said = list(demo_video.tell(tmp_path))

    assert said[:3] == [
        "  bikes.mp4, 10.0 s, at each second:",
        "    tandem 40 %",
        "  bikes.mp4 is cut at frames 29",
    ]


def test_make_knows_the_demo() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "demo-video"], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert "config/demo_cuts.yaml" in done.stdout
