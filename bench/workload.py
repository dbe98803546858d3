"""What the benchmarks work on: photographs as Base64 JPEGs in Parquet tables, and a network.

Everything is made once, from the photographs of the demo and one seed, and kept in .cache/bench.
Names hold a digest of the scripts that made them, so a change here makes new ones. Importing this
imports nothing heavy.

    python bench/workload.py 2000        make the table of 2,000 rows and print its path
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "bench"
PHOTOGRAPHS = ROOT / "config" / "demo.txt"
NETWORK = Path(__file__).with_name("network.py")
SEED = 20261122
UNIQUE = 2000
"""Different images; a longer table repeats them, each time in another order."""
ROWS_PER_GROUP = 250
QUALITY = 90
MODEL_YAML = """\
model_type: classifier
weights: model.pt
precision: {precision}
input:
  height: 224
  width: 224
  resize: stretch
  mean: [0.485, 0.456, 0.406]
  std: [0.229, 0.224, 0.225]
output:
  activation: softmax
"""


def table(n_rows: int) -> Path:
    """Return a Parquet table of `n_rows`: id, and image, Base64 of JPEGs of about 500 x 375."""
    return _made(f"rows-{n_rows}", ".parquet", PHOTOGRAPHS, lambda path: _write_table(n_rows, path))


def images() -> Path:
    """Return a folder with the JPEGs of the tables, each once."""
    return _made("jpegs", "", PHOTOGRAPHS, _write_images)


def network(name: str = "resnet18", precision: str = "fp32") -> Path:
    """Return a model package: a TorchScript network of this size, with random weights."""
    make = partial(_write_network, name, precision)
    return _made(f"{name}-{precision}", "", NETWORK, make)


def photographs() -> list[Image.Image]:
    """Return the demo's photographs, RGB, at their own sizes of 450 to 1,000 pixels."""
    sys.path.insert(0, str(ROOT / "config"))
    import demo
    from PIL import Image

    files = demo.photographs(demo.fetch())
    return [Image.open(io.BytesIO(files[name])).convert("RGB") for name in sorted(files)]


def jpegs(n: int, width: int, height: int, quality: int, spread: float = 0.1) -> Iterator[bytes]:
    """Yield JPEGs of parts of the photographs, scaled to about width x height.

    Args:
        spread: by how much of itself a side may differ.
    """
    from PIL import Image

    random, sources = Random(SEED), photographs()
    for number in range(n):
        photo = sources[number % len(sources)]
        part = photo.crop(_part(photo.size, width / height, random))
        size = [round(side * random.uniform(1 - spread, 1 + spread)) for side in (width, height)]
        file = io.BytesIO()
        part.resize((size[0], size[1]), Image.Resampling.LANCZOS).save(
            file, "JPEG", quality=quality
        )
        yield file.getvalue()


def _part(size: tuple[int, int], aspect: float, random: Random) -> tuple[int, int, int, int]:
    """Choose a part of this aspect: between 3/4 and all of what fits."""
    width = min(size[0], size[1] * aspect) * random.uniform(0.75, 1.0)
    columns, rows = int(width), int(width / aspect)
    left, top = random.randint(0, size[0] - columns), random.randint(0, size[1] - rows)
    return left, top, left + columns, top + rows


def _write_table(n_rows: int, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [base64.b64encode(data) for data in jpegs(min(n_rows, UNIQUE), 500, 375, QUALITY)]
    images = _laps(texts)
    schema = pa.schema([("id", pa.string()), ("image", pa.string())])
    # A dictionary would store a repeated image once, which no real table does.
    with pq.ParquetWriter(path, schema, use_dictionary=["id"]) as writer:
        for start in range(0, n_rows, ROWS_PER_GROUP):
            rows = range(start, min(start + ROWS_PER_GROUP, n_rows))
            ids = [f"{row:06d}" for row in rows]
            cells = list(islice(images, len(rows)))
            writer.write_table(pa.table([ids, cells], schema=schema))


def _write_images(folder: Path) -> None:
    folder.mkdir()
    for number, data in enumerate(jpegs(UNIQUE, 500, 375, QUALITY)):
        (folder / f"{number:04d}.jpg").write_bytes(data)


def _laps(texts: list[bytes]) -> Iterator[str]:
    """Yield the images for ever, each lap in another order."""
    random = Random(SEED)
    while True:
        yield from (text.decode("ascii") for text in texts)
        random.shuffle(texts)


def _write_network(name: str, precision: str, folder: Path) -> None:
    folder.mkdir()
    (folder / "model.yaml").write_text(MODEL_YAML.format(precision=precision))
    # In a process of its own: whoever asks for the path need not have torch in memory.
    subprocess.run([sys.executable, NETWORK, folder / "model.pt", name], check=True)


def _made(name: str, suffix: str, script: Path, make: Callable[[Path], None]) -> Path:
    """Return the path of what `make` makes; it appears complete or not at all."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + script.read_bytes()).hexdigest()[:8]
    path = CACHE / f"{name}-{digest}{suffix}"
    if not path.exists():
        print(f"making {path.relative_to(ROOT)}", file=sys.stderr, flush=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as fresh:
            make(Path(fresh, path.name))
            os.rename(Path(fresh, path.name), path)
    return path


if __name__ == "__main__":
    print(table(int(sys.argv[1])) if len(sys.argv) > 1 else network())
