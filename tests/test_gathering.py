"""The results of a video's frames, gathered on disk: by writers that die, and for long videos."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from evmp.errors import SinkError
from evmp.key import KeyField
from evmp.sink import Record
from evmp.sink.lines import JsonLines, LineSink
from evmp.video.gathering import MAX_BYTES, Gathering
from evmp.video.part import Of, Part

FACTS = orjson.dumps({"duration_seconds": 2.0, "n_frames": 50})
JOB: Any = SimpleNamespace(
    use_image_predictor=True, user_process_config=(), model_type="classifier", result_column="r"
)


@pytest.fixture
def reel(tmp_path: Path) -> Path:
    return tmp_path / "run.reel"


@pytest.fixture
def gathering(reel: Path) -> Iterator[Gathering]:
    gathering = Gathering(JOB)
    gathering.open(reel)
    yield gathering
    gathering.close()
    assert not reel.exists()


def frame(
    gathering: Gathering, n: int, *, row: int = 7, failed: bool = False, more: str = ""
) -> None:
    head = orjson.dumps({"frame_id": n, "pts_seconds": n / 25})[:-1]
    result = {"class_probs": {"a": n / 10, "b": 0.5}, "more": more}
    if failed:
        result = {"error_stage": "predict", "error_msg": "no"}
    part = Part(0, Of.ITEM, f"_{n}", head)
    assert gathering.add(n, row, ("x",), part, failed, orjson.dumps(result)) is None


def end(gathering: Gathering, n: int, row: int = 7) -> Record:
    record = gathering.add(n, row, ("x",), Part(0, Of.END), False, FACTS)
    assert record is not None
    return record


def test_result_has_the_frames_in_order_and_their_mean(gathering: Gathering) -> None:
    for n in range(5):
        frame(gathering, n)

    record = end(gathering, 5)

    result = orjson.loads(record.result)
    assert (record.index, record.keys, record.failed) == (7, ("x",), False)
    assert list(result) == ["video", "frames", "summary"]
    assert [it["frame_id"] for it in result["frames"]] == [0, 1, 2, 3, 4]
    assert result["summary"]["class_probs"] == {"a": pytest.approx(0.2), "b": 0.5}
    assert result["summary"]["class_name"] == "b"


def test_next_writer_goes_on_where_the_last_one_died(gathering: Gathering, reel: Path) -> None:
    for n in range(3):
        frame(gathering, n)
    with open(reel, "ab") as file:
        file.write(b"torn")
    second = Gathering(JOB)
    second.open(reel)

    for n in range(1, 5):  # those that were not released come again
        frame(second, n)
    result = orjson.loads(end(second, 5).result)

    assert [it["frame_id"] for it in result["frames"]] == [0, 1, 2, 3, 4]
    assert result["summary"]["class_probs"]["a"] == pytest.approx(0.2)


def test_next_writer_knows_of_damage_and_of_the_size(gathering: Gathering, reel: Path) -> None:
    heads = [orjson.dumps({"frame_id": n, "pts_seconds": n / 25})[:-1] for n in range(2)]
    first = Part(0, Of.ITEM, "_0", heads[0], ("decode", "damaged"), (90, 60))
    good = orjson.dumps({"class_probs": {"a": 1.0}})
    gathering.add(0, 7, ("x",), first, False, good)
    second = Gathering(JOB)
    second.open(reel)

    second.add(1, 7, ("x",), Part(0, Of.ITEM, "_1", heads[1], "later"), False, good)
    video = orjson.loads(end(second, 2).result)["video"]
    frame(second, 3, row=8)
    other = orjson.loads(end(second, 4, row=8).result)["video"]

    assert video["error_msg"] == "damaged"
    assert (video["height"], video["width"]) == (90, 60)
    assert other == orjson.loads(FACTS)


def test_videos_do_not_mix(gathering: Gathering) -> None:
    frame(gathering, 0)
    end(gathering, 1)
    frame(gathering, 2, row=8)

    result = orjson.loads(end(gathering, 3, row=8).result)
    empty = end(gathering, 4, row=9)

    assert [it["frame_id"] for it in result["frames"]] == [2]
    assert empty.failed
    assert orjson.loads(empty.result)["error_msg"] == "no frame came out of it"


def test_failed_frame_is_told_and_only_failed_ones_are_an_error(gathering: Gathering) -> None:
    frame(gathering, 0)
    frame(gathering, 1, failed=True)
    some = end(gathering, 2)
    frame(gathering, 3, row=8, failed=True)
    none = end(gathering, 4, row=8)

    result = orjson.loads(some.result)
    assert not some.failed
    assert result["video"]["error_msg"] == "1 frames failed, the first at 1: no"
    assert result["frames"][1]["result"]["error_stage"] == "predict"
    assert none.failed
    assert orjson.loads(none.result) == {
        "error_stage": "predict",
        "error_msg": "all of its 1 frames failed; no",
    }


def test_long_result_passes_through_a_file(gathering: Gathering, tmp_path: Path) -> None:
    more = "x" * 100_000
    for n in range(MAX_BYTES // len(more) + 2):
        frame(gathering, n, more=more)
    record = end(gathering, 1000)
    sink = LineSink(JsonLines(JOB, [KeyField("image")]))

    with open(tmp_path / "stage", "wb", buffering=0) as file:
        sink.append(file, [record, Record(8, ("y",), b"1", False)])

    assert isinstance(record.result, memoryview)
    first, second = (tmp_path / "stage").read_bytes().splitlines()
    assert len(orjson.loads(first)["r"]["frames"]) == MAX_BYTES // len(more) + 2
    assert orjson.loads(second) == {"image": "y", "r": 1}
    assert sink.recover(tmp_path / "stage") == (2, 0)


def test_disk_that_is_full_is_an_error_with_a_remedy(
    gathering: Gathering,
) -> None:
    frame(gathering, 0)
    frame(gathering, 1, more="x" * MAX_BYTES)
    room, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, most))
    try:
        with pytest.raises(SinkError, match="make room"):
            end(gathering, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
