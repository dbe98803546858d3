"""The job that is disturbed: photographs at several sizes, some bad rows, a small network."""

from __future__ import annotations

import io
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import demo
from conftest import COMMAND, ROOT, write_table, write_tiny_model
from jobfolder import JobFolder
from PIL import Image

from evmp.child import call_in_child
from evmp.target.local import LocalTarget

SIZES: Final = ((48, 64), (96, 72), (160, 120), (300, 200))  # (width, height) of the images
BAD_EVERY: Final = 53  # rows: one is bad
BAD: Final = ("no Base64!", None, b"no image", b"\xff\xd8\xff\xe0 a JPEG's start", "")
MODEL_STEPS: Final = 60  # of the network: about 1 ms an image
STALL_SECONDS: Final = 6.0  # the import of torch takes less, on two cores that share the work
OUTPUTS: Final[Mapping[str, tuple[str, str]]] = {
    "lines": ("output_oss_file", "out.jsonl"),
    "table": ("output_table", "out/pt=1"),
    "text": ("output_oss_file", "out.txt"),
    "parquet": ("output_oss_file", "out.parquet"),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What of the job may differ.

    Attributes:
        form: of the output, by OUTPUTS.
        is_fresh: whether it replaces an older result.
    """

    form: str
    is_fresh: bool = False
    n_decoders: int = 2
    n_predictors: int = 1
    batch_size: int = 8
    block_rows: int = 50


@dataclass(frozen=True, slots=True)
class Whole:
    """What comes of the job.

    Attributes:
        files: of the result, by their names below the job's folder.
        n_failed: of the rows.
    """

    files: Mapping[str, bytes]
    n_failed: int


class Task:
    """Input and model of the job.

    Args:
        folder: where they are put; must be there.
        n_rows: of the input.
    """

    def __init__(self, folder: Path, n_rows: int) -> None:
        self.n_rows = n_rows
        self._table, self._model = folder / "in.parquet", folder / "model"
        self._folder = folder
        self._undisturbed: dict[str, Whole] = {}
        call_in_child(self._make)  # so that what it imports does not stay

    def _make(self) -> None:
        write_tiny_model(self._model, steps=MODEL_STEPS)
        write_table(self._table, list(_images(self.n_rows)))

    def write(self, folder: Path, shape: Shape) -> LocalTarget:
        """Write job.yaml to `folder`. Returns where its result goes."""
        key, name = OUTPUTS[shape.form]
        usual: dict[str, Any] = {"output_oss_file": None, key: name}
        JobFolder(folder, self._model, subprocess.run, subprocess.Popen).write(
            input_table=str(self._table),
            num_worker=2,
            preprocess_thread_num=shape.n_decoders,
            predict_thread_num=shape.n_predictors,
            batch_size=shape.batch_size,
            queue_size=16 * shape.batch_size,
            block_rows=shape.block_rows,
            stall_timeout_seconds=STALL_SECONDS,
            **usual,
        )
        return LocalTarget(folder / name, is_table=key == "output_table")

    def undisturbed(self, form: str) -> Whole:
        """Return what comes of the job if nobody disturbs it."""
        if form not in self._undisturbed:
            folder = self._folder / form
            folder.mkdir()
            target = self.write(folder, Shape(form))
            command = [*COMMAND, "--config", "job.yaml", "--quiet", "-Dstall_timeout_seconds=300"]
            subprocess.run(command, cwd=folder, env=environment(), check=True)
            self._undisturbed[form] = whole_of(folder, target)
        return self._undisturbed[form]


def environment() -> dict[str, str]:
    """Return the environment of the command."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def whole_of(folder: Path, target: LocalTarget) -> Whole:
    """Return what has come of a job that is done."""
    record = json.loads(target.record.read_bytes())
    return Whole(files_of(folder, target), record["failed"])


def files_of(folder: Path, target: LocalTarget) -> dict[str, bytes]:
    """Return the files of the result by their names, none where it is not there."""
    path = target.path
    paths = [it for it in path.rglob("*") if it.is_file()] if path.is_dir() else [path]
    return {str(it.relative_to(folder)): it.read_bytes() for it in paths if it.exists()}


def _images(n_rows: int) -> Iterator[bytes | str | None]:
    pictures = []
    for data in demo.photographs(demo.fetch()).values():
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        picture.thumbnail((480, 480))
        pictures.append(picture)
    for row in range(n_rows):
        if row % BAD_EVERY == 5:
            yield BAD[row // BAD_EVERY % len(BAD)]
        else:
            yield _image(pictures, row)


def _image(pictures: Sequence[Image.Image], row: int) -> bytes:
    """Cut the image of a row out of a photograph, elsewhere for each row."""
    picture = pictures[row % len(pictures)]
    width, height = SIZES[row // len(pictures) % len(SIZES)]
    left = row * 37 % (picture.width - width)
    top = row * 53 % (picture.height - height)
    file = io.BytesIO()
    cut = picture.crop((left, top, left + width, top + height))
    cut.save(file, "PNG" if row % 23 == 0 else "JPEG")
    return file.getvalue()
