"""The examples of docs/custom-code.md are files, and do what it says."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import yaml
from conftest import ROOT
from jobfolder import JobFolder
from PIL import Image

TEXT = (ROOT / "docs" / "custom-code.md").read_text()
EXAMPLES = ROOT / "config" / "examples"
BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize(("language", "name"), [("python", "colour.py"), ("yaml", "colour.yaml")])
def test_code_of_the_page_is_that_of_the_file(language: str, name: str) -> None:
    assert BLOCKS[language] == (EXAMPLES / name).read_text()


def test_example_gives_what_the_page_shows(job: JobFolder) -> None:
    (job.path / "data").mkdir()
    (job.path / "config").symlink_to(ROOT / "config")
    sky = np.full((20, 30, 3), (60, 60, 230), np.uint8)
    sky[:4] = 255  # what the process cuts off
    Image.fromarray(sky).save(job.path / "data" / "sky.png")
    Image.fromarray(sky[:8]).save(job.path / "data" / "dot.png")
    (job.path / "data" / "photos.txt").write_text("data/sky.png\ndata/dot.png\n")
    keys = yaml.safe_load(BLOCKS["yaml"])

    (first, second) = job.do(**{name: None for name in ("input_table", "reserved_columns")} | keys)

    shown = json.loads(BLOCKS["json"])
    result, expected = first["prediction_result"], shown["prediction_result"]
    assert first["image"] == shown["image"]
    assert list(result) == list(expected)
    assert (result["colour"], result["card"]) == (expected["colour"], expected["card"])
    assert result["distances"] == pytest.approx(expected["distances"], rel=1e-5)
    assert Image.open(job.path / result["card"]).size == (16, 16)
    assert second["prediction_result"] is None
