"""Files beside the result: what is in them, and that each row has names of its own."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evmp.errors import CustomCodeError, SinkError
from evmp.key import KeyField
from evmp.ledger import Ledger
from evmp.outputdir import OutputFiles, Place
from evmp.ring import Ring

FRAME = np.full((6, 8, 3), (200, 100, 50), np.uint8)
Make = Callable[..., OutputFiles]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make("a/b.jpg", ...)`: the output files of rows whose inputs are these."""
    ledger = Ledger(tmp_path / "staging")

    def make(*inputs: str | bytes, table: bool = False, **begun: str) -> OutputFiles:
        ledger.open(begun)
        ring = Ring("results", len(inputs), 1, 1 << 16)
        for n, it in enumerate(inputs):
            ring.set_note(n, pickle.dumps((it,)))
        names = {"input_table": "in" if table else "", "image_type": "url", "image_col": "url"}
        job: Any = SimpleNamespace(output_dir=str(tmp_path / "out"), is_input_video=False, **names)
        return OutputFiles(job, ledger, (KeyField("url" if table else "image"),), ring)

    return make


def name_of(path: object, tmp_path: Path) -> str:
    return str(Path(str(path)).relative_to(tmp_path / "out"))


@pytest.mark.parametrize(
    ("input", "name"),
    [
        ("photos/cat.png", "cat"),
        ("/a/b.c/cat.tar.gz", "cat.tar"),
        ("file:///a/na%C3%AFve%20cat.jpg", "naïve cat"),
        ("猫/猫.jpg", "猫"),
        (b'{"id": 3, "image": "x/dog.jpg"}', "dog"),
        (b'{"id": 3, "scan": "x/dog.tif"}', "dog"),
        (b'{"caption": "a dog v1.0", "photo": "x/n0.png"}', "n0"),
        ("{x}.jpg", "{x}"),
        (b'{"id": 3}', "7"),
        ("..", "7"),
        ("a" * 300 + ".jpg", "a" * 180),
        ("ü" * 100 + ".jpg", "ü" * 90),
    ],
)
def test_name_is_that_of_the_input(
    make: Make, tmp_path: Path, input: str | bytes, name: str
) -> None:
    path = make(input).save(Place(0, 7), "mask", "image", FRAME)

    assert name_of(path, tmp_path) == f"mask/{name}.jpg"
    assert Image.open(str(path)).size == (8, 6)


def test_list_has_a_file_for_each_image(make: Make, tmp_path: Path) -> None:
    files = make("cat.jpg")

    several = files.save(Place(0, 0), "crops", "image", [FRAME, FRAME[:2], FRAME[:, :, 0]])
    stacked = files.save(Place(0, 0, "_1"), "crops", "image", np.stack([FRAME]))

    assert [name_of(it, tmp_path) for it in several] == [f"crops/cat_{i}.jpg" for i in range(3)]
    assert [name_of(it, tmp_path) for it in stacked] == ["crops/cat_1_0.jpg"]
    assert np.asarray(Image.open(several[2])).std(axis=2).max() == 0


def test_image_is_what_it_was(make: Make) -> None:
    found = Image.open(str(make("a.jpg").save(Place(0, 0), "card", "image", FRAME)))

    assert np.abs(np.asarray(found, int) - FRAME).max() <= 2


def test_rows_of_one_name_have_files_of_their_own(make: Make, tmp_path: Path) -> None:
    inputs = ["a/cat.jpg", "b/cat.jpg", "a/cat.jpg", "cat_0.jpg"]
    files = make(*inputs)
    images = [np.full((4, 4, 3), 60 * row, np.uint8) for row in range(4)]

    paths = [str(files.save(Place(n, n), "x", "image", images[n])) for n in range(3)]
    listed = files.save(Place(0, 0), "x", "image", [images[0]])
    last = files.save(Place(3, 3), "x", "image", images[3])

    assert name_of(paths[0], tmp_path) == "x/cat.jpg"
    assert len({*paths, *listed, last}) == 5
    for path, image in zip([*paths, last], images, strict=True):
        assert np.abs(np.asarray(Image.open(path), int) - image).max() <= 2


def test_row_that_is_done_again_finds_its_own_name(make: Make) -> None:
    inputs = ["a/cat.jpg", "b/cat.jpg"]
    before = [make(*inputs).save(Place(n, n), "x", "image", FRAME) for n in range(2)]

    after = [make(*inputs).save(Place(n, n), "x", "image", FRAME) for n in (1, 0)]

    assert after == before[::-1]


def test_row_may_be_retried_as_often_as_it_fails(make: Make, tmp_path: Path) -> None:
    place = Place(0, 5)
    paths = {make("a/cat.jpg").save(place, "x", "image", FRAME)}

    for _ in range(5):
        shutil.rmtree(tmp_path / "staging")
        paths.add(make("a/cat.jpg", retry="yes").save(place, "x", "image", FRAME))

    assert len(paths) == 2


def test_retry_keeps_the_files_of_rows_that_it_does_not_do(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out" / "x").mkdir(parents=True)
    (tmp_path / "out" / "x" / "cat.jpg").write_bytes(b"another row's")

    path = make("a/cat.jpg", retry="yes").save(Place(0, 5), "x", "image", FRAME)
    again = make("a/cat.jpg", retry="yes").save(Place(0, 5), "x", "image", FRAME)

    assert path == again
    assert (tmp_path / "out" / "x" / "cat.jpg").read_bytes() == b"another row's"


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("image", FRAME / 255, r'result\["x"\]: an image of float64 from 0.196.* to 0.784.*uint8'),
        ("image", [FRAME, FRAME / 1.0], r'result\["x"\]\[1\]: an image of float64'),
        ("image", "a.jpg", r'result\["x"\]: str, expected an image'),
        ("image", np.zeros((2, 2, 4), np.uint8), r"of shape \(2, 2, 4\), expected \(H, W, 3\)"),
        ("image", np.zeros((0, 2, 3), np.uint8), r"of shape \(0, 2, 3\)"),
        ("video", FRAME, r'result\["x"\]: ndarray, expected a video, a list of images'),
        ("video", [FRAME, FRAME[:2]], "a video of 2 frames, expected frames of one size"),
        ("video", np.zeros((2, 4, 4, 3)), r'result\["x"\]\[0\]: an image of float64'),
        ("video", [], "a video of 0 frames"),
    ],
)
def test_what_is_no_image_is_told(make: Make, kind: str, value: object, message: str) -> None:
    with pytest.raises(CustomCodeError, match=message):
        make("a.jpg").save(Place(0, 0), "x", kind, value)


@pytest.mark.parametrize("form", [list, np.stack])
def test_video_is_a_file_of_its_frames(make: Make, tmp_path: Path, form: Any) -> None:
    av = pytest.importorskip("av")
    shades = [np.full((31, 33, 3), 20 * i, np.uint8) for i in range(10)]

    path = str(make("clip.mp4").save(Place(0, 0), "v", "video", form(shades)))

    assert name_of(path, tmp_path) == "v/clip.mp4"
    with av.open(io.BytesIO(Path(path).read_bytes())) as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 25
    assert [it.shape for it in found] == [(32, 34, 3)] * 10
    assert np.abs([it.mean() - 20 * i for i, it in enumerate(found)]).max() < 4


def test_list_of_videos_has_several_files(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("av")

    paths = make("clip.mp4").save(Place(0, 0), "v", "video", [[FRAME], np.stack([FRAME] * 2)])

    assert [name_of(it, tmp_path) for it in paths] == ["v/clip_0.mp4", "v/clip_1.mp4"]


def test_folder_that_cannot_be_written_ends_the_job(make: Make, tmp_path: Path) -> None:
    files = make("a.jpg")
    (tmp_path / "out").write_text("a file")

    with pytest.raises(SinkError, match="output_dir: cannot write"):
        files.save(Place(0, 0), "x", "image", FRAME)
