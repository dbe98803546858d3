"""Users' code in whole jobs: what it gets, what becomes of what it gives, and of its deaths."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import tiny_logits, write_table
from jobfolder import JobFolder
from modelfolder import write_package
from PIL import Image
from test_resource import write_tar, write_zip

CUSTOM: dict[str, Any] = {
    "model_path": "mine.py",
    "model_type": "self_define",
    "input_table": None,
    "input_oss_file": "in.jsonl",
    "reserved_columns": None,
    "user_resource": "mine.py",
    "user_predictor_cls": "mine.Mine",
    "max_error_fraction": 1,
    "batch_size": 4,
}
# What tells of a sample, in few words.
MINE = """
import os, sys, time, threading, ctypes
import numpy as np
import evmp

class Mine(evmp.PredictorInterfaceV2):
    def predict(self, input_data, batch_size):
        return [self.one(it) for it in input_data]

    def one(self, it):
        do = getattr(self, it.get("do", "tell"))
        return do(it)

    def tell(self, it):
        return {name: self.word(value) for name, value in it.items()}

    def word(self, value):
        if isinstance(value, np.ndarray):
            return {"shape": value.shape, "mean": int(value.mean())}
        return value.read().decode() if hasattr(value, "read") else value
"""


@pytest.fixture
def mine(job: JobFolder) -> Callable[..., list[Any]]:
    """`mine(text, rows)`: the results of a job with this code in mine.py."""

    def mine(text: str, rows: list[Any], **keys: Any) -> list[Any]:
        (job.path / "mine.py").write_text(text)
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (job.path / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))
        done = job.do(**{**CUSTOM, **keys})
        assert len(done) == len(rows)
        return [row["prediction_result"] for row in done]

    return mine


def write_images(folder: Path, n: int) -> list[str]:
    """Write PNGs of one shade each, of different sizes. Returns their names."""
    names = [f"{shade}.png" for shade in range(n)]
    for shade, name in enumerate(names):
        Image.fromarray(np.full((4 + shade, 9, 3), shade, np.uint8)).save(folder / name)
    return names


def test_predictor_gets_every_member_of_a_line(
    mine: Callable[..., list[Any]], tmp_path: Path
) -> None:
    write_images(tmp_path, 3)
    (tmp_path / "prior.txt").write_text("a file")

    results = mine(
        MINE,
        [
            {"image": "2.png", "prior": "prior.txt", "config": {"key1": 1, "key2": "value2"}},
            {"image": "0.png", "scan": "1.png", "text": "no file", "n": None, "list": ["0.png"]},
            {"id": 3},
            "1.png",
            {"image": "none.png"},
            {"scan": "prior.txt", "image": "prior.txt"},
            {"image": ""},
            {"image": "0.png", "prior": "zip://host/prior.txt"},
            "{",
            {"image": 5, "prior": "."},
        ],
    )

    assert results[0] == {
        "image": {"shape": [6, 9, 3], "mean": 2},
        "prior": "a file",
        "config": {"key1": 1, "key2": "value2"},
    }
    assert results[1] == {
        "image": {"shape": [4, 9, 3], "mean": 0},
        "scan": {"shape": [5, 9, 3], "mean": 1},
        "text": "no file",
        "n": None,
        "list": ["0.png"],
    }
    assert results[2] == {"id": 3}
    assert results[3] == {"image": {"shape": [5, 9, 3], "mean": 1}}
    assert results[4] == {
        "error_stage": "read",
        "error_msg": "image: 'none.png': no such file or directory",
    }
    assert results[5]["error_stage"] == "decode"
    assert results[5]["error_msg"].startswith("image: not an image")
    assert results[6]["error_msg"].startswith("image: the location is empty")
    assert results[7]["error_msg"].startswith("prior: zip://host/prior.txt: zip:// cannot be")
    assert results[8]["error_stage"] == "read"
    assert results[9] == {"image": 5, "prior": "."}


def test_rows_of_a_table_are_images_at_their_own_size(
    job: JobFolder, make_table: Callable[..., Path], photo_file: Callable[..., bytes]
) -> None:
    (job.path / "mine.py").write_text(MINE)
    images = [photo_file("coffee", size=(300, 200)), b"none", photo_file("chelsea", "PNG")]
    make_table(job.path / "in.parquet", images)
    keys = {**CUSTOM, "input_table": "in.parquet", "input_oss_file": None}

    rows = job.do(**{**keys, "reserved_columns": "id"}, max_image_pixels=300 * 451)

    assert [row["id"] for row in rows] == ["0", "1", "2"]
    assert rows[0]["prediction_result"]["image"]["shape"] == [200, 300, 3]
    assert rows[1]["prediction_result"]["error_stage"] == "decode"
    assert rows[2]["prediction_result"]["image"]["shape"] == [300, 451, 3]


CHAIN = (
    MINE
    + """
with open("importers", "a") as file:
    file.write(open("/proc/self/comm").read())

class Tag(evmp.Process):
    def __init__(self, tag): self.tag = tag
    def process(self, it):
        return {**it, "tags": [*it.get("tags", []), self.tag]}

class Fan(evmp.Process):
    def process(self, it):
        for i in range(it["id"] % 3):
            self.put({**it, "part": i})
    def destroy(self):
        open("destroyed", "a").write("x")

class Pairs(evmp.Process):
    def process(self, some):
        assert len(some) <= 3
        for it in some:
            if it["id"] == 8: raise ValueError("eight")
        return [None if it["id"] == 10 else {**it, "n": len(some) > 1} for it in some]
"""
)


def test_chain_of_processes_changes_splits_and_drops(
    mine: Callable[..., list[Any]], tmp_path: Path
) -> None:
    chain = [
        {"user_process_cls": "mine.Tag", "tag": "first", "num_threads": 2},
        {"user_process_cls": "mine.Fan"},
        {"user_process_cls": "mine.Tag", "tag": "last"},
        {"user_process_cls": "mine.Pairs", "batch_size": 3},
    ]

    results = mine(CHAIN, [{"id": i} for i in range(24)], user_process_config=chain)

    for i, result in enumerate(results):
        told = {"id": i, "tags": ["first", "last"]}
        if i == 8:
            assert result["error_stage"] == "process"
            assert result["error_msg"].startswith("ValueError: eight (mine.py:")
        elif i % 3 == 0 or i == 10:
            assert result is None
        elif i % 3 == 1:
            assert {**result, "n": 0} == {**told, "part": 0, "n": 0}
        else:
            assert [{**it, "n": 0} for it in result] == [
                {**told, "part": part, "n": 0} for part in range(2)
            ]
    assert (tmp_path / "destroyed").read_text() == "x"
    importers = (tmp_path / "importers").read_text().splitlines()
    assert {name.partition("[")[0] for name in importers} == {"evmp process", "evmp predict"}
    assert len(importers) == 6


def test_new_samples_of_a_batch_are_those_of_their_rows(mine: Callable[..., list[Any]]) -> None:
    text = MINE + (
        "class Odd(evmp.Process):\n"
        "    def process(self, some):\n"
        "        for it in some:\n"
        "            n = it['id'] % 2 * 2\n"
        "            for i in range(n): self.put({'id': it['id'], 'part': i})\n"
    )
    chain = {"user_process_cls": "mine.Odd", "batch_size": 4}

    results = mine(text, [{"id": i} for i in range(8)], user_process_config=chain)

    parts = [[{"id": i, "part": part} for part in range(2)] for i in range(8)]
    assert results == [parts[i] if i % 2 else None for i in range(8)]


def test_built_in_model_takes_the_images_that_a_process_gives(
    job: JobFolder, make_table: Callable[..., Path], photo: Callable[[str], np.ndarray]
) -> None:
    (job.path / "mine.py").write_text(
        "import evmp\n"
        "class Left(evmp.Process):\n"
        "    def process(self, it):\n"
        "        if it['image'].shape[1] == 64: return {'image': it['image'].astype(float)}\n"
        "        self.put({'image': it['image'][:, :32]})\n"
        "        self.put({'image': it['image'][:, 32:]})\n"
    )
    images = [np.ascontiguousarray(photo(name)[:32, :96]) for name in ("coffee", "chelsea")]
    files = []
    for image in [*images, images[0][:, :64]]:
        Image.fromarray(image).save(job.path / "x.png")
        files.append((job.path / "x.png").read_bytes())
    make_table(job.path / "in.parquet", files)

    rows = job.do(user_resource="mine.py", user_process_config={"user_process_cls": "mine.Left"})

    for row, image in zip(rows, images, strict=False):
        left, right = row["prediction_result"]
        logits = tiny_logits(image[:, :32])
        expected = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(list(left["class_probs"].values()), expected, atol=1e-5)
        assert right["class_probs"].keys() == left["class_probs"].keys()
    assert rows[2]["prediction_result"] == {
        "error_stage": "predict",
        "error_msg": "image: got (32, 64, 3) float64, expected (H, W, 3) uint8",
    }


TROUBLE = (
    MINE
    + """
    def fail(self, it): return it["nothing"]
    def leave(self, it): sys.exit(7)
    def quit(self, it): os._exit(0)
    def crash(self, it): ctypes.string_at(0)
    def hang(self, it): time.sleep(3600)
    def set(self, it): return {"a": [1, {2}]}
    def bare(self, it): return 5
    def glow(self, it): return {"mask": np.ones((4, 4, 3))}
    def half(self, it): return {"mask": np.zeros((4, 4, 3), np.uint8), "a": {2}}
    def draw(self, it): return {"mask": np.full((4, 4, 3), it["n"], np.uint8)}
    def get_output_type(self): return {"mask": "image"}
    def destroy(self): time.sleep(3600)
"""
)
WRONG = {
    "fail": "KeyError: 'nothing' (mine.py:",
    "leave": "SystemExit: 7 (mine.py:",
    "quit": "the predictor died of this row: exit code 0",
    "crash": "the predictor died of this row: SIGSEGV",
    "hang": "the predictor died of this row: no answer within process_timeout_seconds, 1",
    "set": 'result["a"][1]: set',
    "bare": "Mine.predict returned int for a sample, expected a dict",
    "half": 'result["a"]: set',
    "glow": 'result["mask"]: an image of float64 from 1 to 1, expected uint8; scale it',
}


def test_code_that_misbehaves_costs_its_row_and_nothing_else(
    mine: Callable[..., list[Any]], job: JobFolder
) -> None:
    kinds = [*WRONG, "draw", "tell"]
    rows = [{"id": i, "do": do} for i, kind in enumerate(kinds) for do in ("tell", kind)]
    for row in rows:
        row["n"] = row["id"]

    results = mine(TROUBLE, rows, process_timeout_seconds=1, output_dir="files")

    drawn = list((job.path / "files" / "mask").iterdir())
    for row, result in zip(rows, results, strict=True):
        if message := WRONG.get(row["do"]):
            assert result["error_stage"] == "predict"
            assert result["error_msg"].startswith(message), result
        elif row["do"] == "draw":
            assert result == {"mask": f"files/mask/{rows.index(row)}.jpg"}
            assert [str(it.relative_to(job.path)) for it in drawn] == [result["mask"]]
        else:
            assert result == row


LOUD = (
    MINE
    + """
    def shout(self, it):
        print("x" * 1_000_000)
        return {}
    def spread(self, it):
        for _ in range(4): threading.Thread(target=time.sleep, args=(3600,)).start()
        return {}
"""
)


def test_code_may_print_megabytes_and_start_threads(mine: Callable[..., list[Any]]) -> None:
    results = mine(LOUD, [{"do": "shout"}, {"do": "spread"}, {"id": 3}])

    assert results == [{}, {}, {"id": 3}]


def test_process_that_misbehaves_costs_its_row_and_nothing_else(
    mine: Callable[..., list[Any]], job: JobFolder
) -> None:
    steps = TROUBLE.replace("class Mine(evmp.PredictorInterfaceV2)", "class Step(evmp.Process)")
    text = MINE + steps.replace("    def get_output_type", "    process = one\n    def kinds")
    rows = [
        {"id": i, "do": do}
        for i, kind in enumerate(["crash", "hang", "quit", "fail"])
        for do in ("tell", kind, "tell")
    ]
    text = text.replace('it.get("do", "tell")', 'it.pop("do", "tell")')

    results = mine(
        text,
        rows,
        process_timeout_seconds=1,
        user_process_config={
            "job_name": "my step",
            "user_process_cls": "mine.Step",
            "num_threads": 2,
        },
    )

    for row, result in zip(rows, results, strict=True):
        if message := WRONG.get(row["do"]):
            assert result["error_stage"] == "process"
            message = message.replace("the predictor", "the process my step")
            assert result["error_msg"].startswith(message), result
        else:
            assert result == {"id": row["id"]}


def test_process_that_is_killed_for_its_memory_comes_back(
    mine: Callable[..., list[Any]], job: JobFolder
) -> None:
    leak = "\n    n = 0\n    def tell(self, it):\n        self.n += 1\n"
    leak += "        if self.n == 6: os.kill(os.getpid(), 9)  # as the kernel does\n"
    rows = [{"id": i} for i in range(30)]

    results = mine(MINE + leak + "        return it\n", rows)

    assert results == rows
    record = json.loads((job.path / "out.jsonl.evmp.json").read_text())
    assert record["run"]["restarts"] >= 5


def test_predictor_that_leaks_up_to_its_limit_costs_rows_and_no_more(
    mine: Callable[..., list[Any]],
) -> None:
    text = MINE + (
        "    def __init__(self, path):\n"
        "        import resource\n"
        "        pages = int(open('/proc/self/statm').read().split()[0])\n"
        "        limit = pages * resource.getpagesize() + (256 << 20)\n"
        "        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "        self.kept = []\n"
        "    def tell(self, it):\n"
        "        self.kept.append(bytearray(100 << 20))\n"
        "        return it\n"
    )

    results = mine(text, [{"id": i} for i in range(8)], batch_size=1)

    assert results[0] == {"id": 0}
    for result in results[3:]:
        assert result["error_msg"].startswith("MemoryError (mine.py:"), result


def test_traceback_of_the_user_is_in_the_log_and_not_in_the_row(job: JobFolder) -> None:
    (job.path / "mine.py").write_text(TROUBLE)
    (job.path / "in.jsonl").write_text('{"do": "fail"}\n{"do": "set"}\n')
    job.write(**{**CUSTOM, "output_dir": "x", "process_timeout_seconds": 1})

    done = job.run()

    assert done.returncode == 1
    assert 'mine.py", line' in done.stderr
    assert 'return it["nothing"]' in done.stderr
    assert 'row 1 failed: result["a"][1]: set' in done.stderr
    assert "CustomCodeError" not in done.stderr
    assert "2 x" not in done.stderr


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("class Mine: pass", 3, "model: user_predictor_cls: mine.Mine has no method predict"),
        (
            "class Mine:\n def __init__(self, path): raise ValueError('no weights')\n"
            " def predict(self): pass",
            3,
            "Mine.__init__ failed: ValueError: no weights (mine.py:2)",
        ),
        (
            MINE + "    def get_output_type(self): return {'a': 'image'}\n",
            2,
            "output_dir: required",
        ),
        (
            MINE + "    def get_output_type(self): return {'a/b': 'image'}\n",
            2,
            "'a/b' is image and no name of a folder",
        ),
    ],
)
def test_job_whose_code_cannot_start_ends(
    job: JobFolder, text: str, code: int, message: str
) -> None:
    (job.path / "mine.py").write_text(text)
    (job.path / "in.jsonl").write_text("{}\n")
    job.write(**CUSTOM)

    done = job.run()

    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert job.leftovers() == []


def test_unsafe_archive_ends_the_job_before_it_begins(job: JobFolder) -> None:
    write_tar(job.path / "code.tgz", {"../mine.py": b""})
    (job.path / "in.jsonl").write_text("{}\n")
    job.write(**{**CUSTOM, "user_resource": "code.tgz"})

    done = job.run()

    assert done.returncode == 2
    assert "user_resource: code.tgz names '../mine.py', a place outside of itself" in done.stderr
    assert job.leftovers() == []


def test_code_that_has_changed_is_another_job(
    job: JobFolder, mine: Callable[..., list[Any]]
) -> None:
    files = {"pack/mine.py": MINE.encode(), "pack/other.py": b"A = 1"}
    write_zip(job.path / "code.zip", files)
    keys = {"user_resource": "code.zip", "user_predictor_cls": "pack.mine.Mine"}
    mine(MINE, [{"id": 1}], **keys)

    write_zip(job.path / "code.zip", {**files, "pack/other.py": b"A = 2"})
    done = job.run()

    assert done.returncode == 2
    assert "code.pack/other.py: " in done.stderr
    assert done.stderr.count(" then, ") == 1


def test_check_runs_the_code_once_and_writes_nothing(
    job: JobFolder, mine: Callable[..., list[Any]]
) -> None:
    chain = [{"user_process_cls": "mine.Tag", "tag": "checked", "num_threads": 2}]
    (job.path / "mine.py").write_text(
        CHAIN + "class Draw(Mine):\n"
        "    def one(self, it): return {**it, 'x': np.zeros((4, 4, 3), np.uint8)}\n"
        "    def get_output_type(self): return {'x': 'image'}\n"
    )
    (job.path / "in.jsonl").write_text('{"id": 1}\n{"id": 2}\n')
    keys = {"user_predictor_cls": "mine.Draw", "output_dir": "files"}
    job.write(**{**CUSTOM, **keys}, user_process_config=chain)
    before = {*job.path.iterdir(), job.path / "importers"}

    done = job.run("--check")

    assert done.returncode == 0, done.stderr
    assert '"tags":["checked"],"x":"files/x/0.jpg"}' in done.stdout
    assert "2 x mine.Tag" in done.stdout
    assert set(job.path.iterdir()) == before


@pytest.mark.parametrize(
    ("do", "cause"), [("hang", "SIGALRM, after stall_timeout_seconds, 2"), ("crash", "SIGSEGV")]
)
def test_check_shows_where_code_hangs_or_crashes(job: JobFolder, do: str, cause: str) -> None:
    (job.path / "mine.py").write_text(TROUBLE)
    (job.path / "in.jsonl").write_text(json.dumps({"do": do}) + "\n")
    job.write(**{**CUSTOM, "output_dir": "x", "stall_timeout_seconds": 2})

    done = job.run("--check")

    assert done.returncode == 4, done.stderr
    assert f"in {do}" in done.stderr
    assert "mine.py" in done.stderr
    assert f"the first batch cannot be tried: a helper process died: {cause}; " in done.stderr


def test_check_refuses_files_without_a_folder(job: JobFolder) -> None:
    text = MINE + "    def get_output_type(self): return {'a': 'image'}\n"
    (job.path / "mine.py").write_text(text)
    (job.path / "in.jsonl").write_text("{}\n")
    job.write(**CUSTOM)

    done = job.run("--check")

    assert (done.returncode, "output_dir: required" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("key", ["input_table", "output_table"])
def test_files_go_into_no_table(job: JobFolder, key: str) -> None:
    (job.path / "t").mkdir()
    keys = {"input_oss_file": None, "input_table": "in.parquet", "output_dir": "t/x", key: "t"}
    job.write(**{**CUSTOM, **keys}, **({"output_oss_file": None} if key == "output_table" else {}))
    (job.path / "mine.py").write_text(MINE)
    write_table(job.path / ("t/in.parquet" if key == "input_table" else "in.parquet"), [b"x"])

    done = job.run()

    assert done.returncode == 2
    assert "output_dir: t/x lies within the table t" in done.stderr


def test_memory_of_large_samples_is_checked_before_the_start(job: JobFolder) -> None:
    (job.path / "mine.py").write_text(MINE)
    (job.path / "in.jsonl").write_text("{}\n")
    job.write(**{**CUSTOM, "batch_size": 512, "queue_size": 4096}, memory_limit_bytes=4 << 30)

    done = job.run()

    assert done.returncode == 2
    assert "lower batch_size (512)" in done.stderr


# As the documentation of EasyCV has it: the interface of whichever library is there, a JSON text,
# chunks of a size that the caller names, keys that are files.
EASYCV = """
import json
import math
import os

import numpy as np

try:
    from easy_vision.python.inference.predictor import PredictorInterface
except:
    from easycv.predictors.interface import PredictorInterface

from .label import load_labels


class Brightest(PredictorInterface):

    def __init__(self, model_path, model_config=None):
        self.config = json.loads(model_config) if model_config else {}
        self.labels = load_labels(os.path.join(model_path, 'labels.txt'))

    def get_output_type(self):
        return {'mask': 'image', 'scores': 'json'}

    def predict(self, input_data, batch_size=-1):
        results = []
        for start in range(math.ceil(len(input_data) / batch_size)):
            chunk = input_data[start * batch_size:(start + 1) * batch_size]
            means = np.stack([image.mean(axis=(0, 1)) for image in chunk])
            for image, mean in zip(chunk, means):
                results.append({
                    'class': int(mean.argmax()),
                    'class_name': self.labels[mean.argmax()],
                    'scores': mean.astype(np.float32) * self.config.get('scale', 1),
                    'mask': (image > 127).astype(np.uint8) * 255,
                })
        return results
"""
LABEL = """
def load_labels(path):
    with open(path) as f:
        return [line.strip() for line in f]
"""


def test_predictor_in_the_form_of_easycv_runs_unchanged(
    job: JobFolder, make_table: Callable[..., Path]
) -> None:
    package = {"brightest/__init__.py": b"", "brightest/label.py": LABEL.encode()}
    write_tar(job.path / "code.tar.gz", {**package, "brightest/net.py": EASYCV.encode()})
    (job.path / "weights").mkdir()
    (job.path / "weights" / "labels.txt").write_text("red\ngreen\nblue\n")
    images = []
    for channel in (2, 0, 1):
        pixels = np.zeros((5 + channel, 7, 3), np.uint8)
        pixels[:, :, channel] = 200
        Image.fromarray(pixels).save(job.path / "x.png")
        images.append((job.path / "x.png").read_bytes())
    make_table(job.path / "in.parquet", images)

    rows = job.do(
        model_path="weights",
        model_type="self_define",
        user_resource="code.tar.gz",
        user_predictor_cls="brightest.net.Brightest",
        user_predictor_config={"scale": 0.5},
        output_dir="masks",
        batch_size=2,
    )

    assert [row["prediction_result"]["class_name"] for row in rows] == ["blue", "red", "green"]
    assert rows[0]["prediction_result"]["scores"] == [0, 0, 100]
    paths = [row["prediction_result"]["mask"] for row in rows]
    assert paths == [f"masks/mask/{row}.jpg" for row in range(3)]
    assert [Image.open(job.path / path).size for path in paths] == [(7, 7), (7, 5), (7, 6)]


def test_masks_of_a_segmentor_are_files(job: JobFolder) -> None:
    import torch

    class Levels(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x[:, 0] * 255 + 0.5).long()

    write_package(job.path / "model", Levels(), "segmentor", output={"palette": [[9, 8, 7]]})
    for name in ("a", "b"):
        (job.path / name).mkdir()
        level = np.full((32, 32, 3), ord(name), np.uint8)
        Image.fromarray(level).save(job.path / name / "müll.png")
    (job.path / "in.txt").write_text("a/müll.png\nb/müll.png\n")

    rows = job.do(
        model_path="model",
        model_type="segmentor",
        segmentation_output="png",
        output_dir="maps",
        input_table=None,
        input_oss_file="in.txt",
        reserved_columns=None,
        batch_size=2,
    )

    paths = [row["prediction_result"]["preds"] for row in rows]
    assert "maps/preds/müll.png" in paths
    assert all(path.startswith("maps/preds/müll") for path in paths)
    for path, name in zip(paths, "ab", strict=True):
        image = Image.open(job.path / path)
        assert (np.asarray(image) == ord(name)).all()
        assert (image.getpalette() or [])[:3] == [9, 8, 7]


def test_code_that_goes_elsewhere_leaves_its_files_in_place(
    job: JobFolder, mine: Callable[..., list[Any]]
) -> None:
    text = MINE + (
        "    def __init__(self, path): os.chdir('/')\n"
        "    def get_output_type(self): return {'x': 'image'}\n"
        "    def tell(self, it): return {'x': np.zeros((2, 2, 3), np.uint8)}\n"
    )

    results = mine(text, [{}], output_dir="files")

    assert results == [{"x": "files/x/0.jpg"}]
    assert (job.path / "files" / "x" / "0.jpg").exists()


def test_process_that_ends_while_it_starts_is_no_success(job: JobFolder) -> None:
    (job.path / "mine.py").write_text(MINE + "    def __init__(self, path): os._exit(0)\n")
    (job.path / "in.jsonl").write_text("{}\n")
    job.write(**CUSTOM)

    done = job.run()

    assert done.returncode == 4, done.stderr
    assert "predictor[0] died 10 times without progress, last: exit code 0" in done.stderr


# --- kills ----------------------------------------------------------------------------------------


def test_chain_survives_kills_of_every_role(job: JobFolder) -> None:
    names = write_images(job.path, 40)
    rows = [{"id": i, "image": names[i % len(names)]} for i in range(1200)]
    (job.path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (job.path / "mine.py").write_text(CHAIN)
    chain = [
        {"user_process_cls": "mine.Tag", "tag": "x", "num_threads": 2, "batch_size": 1},
        {"user_process_cls": "mine.Fan", "batch_size": 1},
    ]
    job.write(**{**CUSTOM, "queue_size": 64}, user_process_config=chain, predict_thread_num=2)

    process = job.start()
    killed = kill_stages(process, {"decoder": 3, "process": 6, "predict": 4})
    _, errors = process.communicate(timeout=120)

    assert process.returncode == 0, errors
    assert sum(killed.values()) >= 5
    for row, found in zip(rows, job.rows(), strict=True):
        image = {"shape": [4 + row["id"] % 40, 9, 3], "mean": row["id"] % 40}
        told = {"id": row["id"], "image": image, "tags": ["x"]}
        parts = [{**told, "part": part} for part in range(row["id"] % 3)]
        expected = parts[0] if len(parts) == 1 else parts or None
        assert found == {**row, "prediction_result": expected}


def kill_stages(process: Any, wanted: dict[str, int]) -> dict[str, int]:
    """Kill processes of a running job by their role, one after the other, until it ends."""
    root, killed = psutil.Process(process.pid), dict.fromkeys(wanted, 0)
    chance = np.random.default_rng(7)
    while process.poll() is None and killed != wanted:
        role = chance.choice([role for role in wanted if killed[role] < wanted[role]])
        try:
            stages = [it for it in root.children(recursive=True) if f" {role}" in it.name()]
            if stages:
                chance.choice(stages).send_signal(signal.SIGKILL)
                killed[role] += 1
        except psutil.NoSuchProcess:
            continue
        time.sleep(float(chance.uniform(0.02, 0.08)))
    return killed
