"""Files beside the result: images and videos that predictors make, in the job's `output_dir`.

    <output_dir>/<key>/<name of the input>_<index>.jpg      without the index where there is one

The name is that of the input's file, or the row's number where there is none. A name belongs to the
row that has reserved it in the ledger, so that rows never overwrite each other's files and a row
that is done again finds its own; a row that comes too late for a name gets a few digits behind it,
which follow from its whole input and its number. What stood there before the job is replaced, but
for the files that the rows of the result have when only its failed rows are done again.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import orjson
import simplejpeg

from evmp.errors import CustomCodeError, SinkError
from evmp.image import IMAGE_SUFFIXES
from evmp.result import to_json
from evmp.sink import sync
from evmp.storage import Storage, open_storage
from evmp.value import scheme
from evmp.video.part import part_of

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.key import KeyField
    from evmp.ledger import Ledger
    from evmp.ring import Ring

JPEG_QUALITY: Final = 95
VIDEO_FPS: Final = 25
MAX_NAME_BYTES: Final = 180  # of the 255 that file systems allow, and digits and an index follow
N_THREADS: Final = 8  # that send files at once
DIGITS: Final = (0, 8, 16, 32)  # behind a name that others have

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Place(NamedTuple):
    """Whose a file is."""

    n: int
    """The row's sequence number."""
    row: int
    part: str = ""
    """Which of several results of a row; empty for the only one."""


class Draft(NamedTuple):
    """A file that is to be written.

    Attributes:
        place: whose it is.
        key: of the result; the name of the folder.
        end: of its name.
    """

    place: Place
    key: str
    end: str
    data: bytes


class OutputFiles:
    """Writes the files of one worker's rows, here or on OSS.

    Args:
        job: names the folder.
        ledger: where names are reserved.
        keys: the input's key columns.
        results: the last ring, where the reader has left each row's.
    """

    def __init__(self, job: Job, ledger: Ledger, keys: Sequence[KeyField], results: Ring) -> None:
        self._folder, self._ledger = job.output_dir, ledger
        self._bucket: Storage | None = None
        """That has the files, if the folder is one of OSS."""
        if scheme(self._folder):
            self._bucket = open_storage(self._folder.rstrip("/"), job, ledger.tmp)
        self._here = Path.cwd()  # users' code may go elsewhere
        names = [key.name for key in keys]
        column = "image" if not job.input_table else job.image_col
        is_named = not job.input_table or job.image_type == "url"
        self._place = names.index(column) if is_named and column in names else None
        self._results = results
        self._is_video = job.is_input_video

    @cached_property
    def _is_retry(self) -> bool:
        return "retry" in self._ledger.begun()

    def save(self, place: Place, key: str, kind: str, value: object) -> object:
        """Write the files of a key of a result.

        Args:
            place: whose result it is.
            key: of the result; the name of the folder.
            kind: `image` or `video`.
            value: one of them, or a list.

        Returns: what stands for it in the result: the path, or a list of paths.

        Raises:
            CustomCodeError: the value is no such thing.
            SinkError: a file cannot be written.
        """
        ((saved),) = self.save_all([{key: value}], [place], {key: kind})
        return saved[key]

    def save_all(
        self, results: Sequence[dict[str, Any]], places: Sequence[Place], kinds: dict[str, str]
    ) -> list[dict[str, Any]]:
        """Write the files of several results, on OSS at once.

        Args:
            places: whose they are.
            kinds: of the keys whose values become files, where they are not None; see save.

        Returns: the results with paths in the place of those values.

        Raises:
            CustomCodeError, SinkError: as save.
        """
        saved = [dict(result) for result in results]
        drafts: list[Draft] = []
        for result, place in zip(saved, places, strict=True):
            for key, kind in kinds.items():
                if result.get(key) is not None:
                    found, first = _drafts(place, key, kind, result[key]), len(drafts)
                    drafts += found if isinstance(found, list) else [found]
                    several = slice(first, len(drafts))
                    result[key] = several if isinstance(found, list) else first
        paths = self._write_all(drafts)
        for result in saved:
            for key in kinds:
                if result.get(key) is not None:
                    result[key] = paths[result[key]]
        return saved

    def save_maps(self, places: Sequence[Place], files: Sequence[bytes]) -> list[bytes]:
        """Write a segmentor's PNG files, and return the results that name them."""
        drafts = [
            Draft(place, "preds", ".png", data) for place, data in zip(places, files, strict=True)
        ]
        return [to_json({"preds": path}) for path in self._write_all(drafts)]

    def _write_all(self, drafts: Sequence[Draft]) -> list[str]:
        """Write files. Returns their paths.

        Raises:
            SinkError: one cannot be written.
        """
        if self._bucket is None:
            return [self._write(draft) for draft in drafts]
        with ThreadPoolExecutor(N_THREADS) as pool:
            return list(pool.map(self._write, drafts))

    def _write(self, draft: Draft) -> str:
        place = draft.place
        try:
            path = self._reserved(place.n, place.row, draft.key, f"{place.part}{draft.end}")
            if self._bucket is None:
                self._write_file(self._here / path, draft.data)
            else:
                self._bucket.write(self._name(path), draft.data)
        except OSError as error:
            raise SinkError(
                f"output_dir: cannot write {error.filename or self._folder}: {error.strerror}; "
                "what was committed is kept: make room or give access, and run the command again"
            ) from error
        return path

    def _write_file(self, target: Path, data: bytes) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        sync(target)
        sync(target.parent)

    def _reserved(self, n: int, row: int, key: str, end: str) -> str:
        """Return the path of a file, which is this row's from now on."""
        whole, label = self._input_of(n)
        stem = (_stem(whole) or str(row)) + label
        digest = hashlib.sha256(f"{row} {whole}".encode("utf-8", "replace")).hexdigest()
        for n_digits in DIGITS:
            tail = f"-{digest[:n_digits]}" if n_digits else ""
            path = os.path.join(self._folder, key, f"{stem}{tail}{end}")
            owner = self._ledger.owner_of(path)
            is_taken = self._is_retry and not tail and self._exists(path)
            if owner is None and not is_taken:
                owner = self._ledger.reserve(path, row)
            if owner == row:
                return path
        raise FileExistsError(errno.EEXIST, "no name is free", path)

    def _exists(self, path: str) -> bool:
        if self._bucket is None:
            return (self._here / path).exists()
        try:
            self._bucket.stat(self._name(path))
        except FileNotFoundError:
            return False
        return True

    def _name(self, path: str) -> str:
        """Return the name of an object in the folder."""
        return path[len(self._folder) :].lstrip("/")

    def _input_of(self, n: int) -> tuple[str, str]:
        """Return what the row says of its input, a path, a URL, or a JSON object's text; and what
        tells the frames or clips of a video apart."""
        keys, label = pickle.loads(self._results.note(n)), ""
        if self._is_video:
            keys, part = part_of(keys)
            label = part.label
        if self._place is None:
            return "", label
        value = keys[self._place]
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")
        return text, label


def _drafts(place: Place, key: str, kind: str, value: object) -> Draft | list[Draft]:
    """Return the file of a value of a result, or a list of them.

    Raises:
        CustomCodeError: it is no image, or no video.
    """
    one = _image if kind == "image" else _video
    several = _several_images(value) if kind == "image" else _several_videos(value)
    path, suffix = f'result["{key}"]', ".jpg" if kind == "image" else ".mp4"
    if several is None:
        return Draft(place, key, suffix, one(value, path))
    return [
        Draft(place, key, f"_{i}{suffix}", one(it, f"{path}[{i}]")) for i, it in enumerate(several)
    ]


def check_keys(output_type: dict[str, str]) -> str:
    """Return what is wrong with keys that become folders, or nothing."""
    for key, kind in output_type.items():
        is_name = key not in ("", ".", "..") and "/" not in key and "\0" not in key
        if kind != "json" and not (is_name and len(key.encode("utf-8", "replace")) < 256):
            return f"{key!r:.40} is {kind} and no name of a folder"
    return ""


def _stem(whole: str) -> str:
    """Return the name of an input's file without its extension; empty where it names none."""
    try:
        members = orjson.loads(whole) if whole.startswith("{") else None
    except ValueError:  # a path may start so, too
        members = None
    if members is not None:
        texts = [it for it in members.values() if isinstance(it, str) and Path(it).suffix]
        texts.sort(key=lambda it: not it.lower().endswith(IMAGE_SUFFIXES))  # stable: images first
        image = members.get("image")
        whole = image if isinstance(image, str) else next(iter(texts), "")
    path = unquote(urlsplit(whole).path) if scheme(whole) else whole
    stem = Path(path).stem.replace("\0", "")
    stem = "" if stem == ".." else stem
    return stem.encode("utf-8", "replace")[:MAX_NAME_BYTES].decode("utf-8", "ignore")


def _several_images(value: Any) -> Sequence[object] | None:
    """Return the images of a list or an array of them, None for a single one."""
    return value if isinstance(value, (list, tuple)) or _rank(value) == 4 else None


def _several_videos(value: Any) -> Sequence[object] | None:
    """Return the videos of a list or an array of them, None for a single one."""
    if not isinstance(value, (list, tuple)):
        return value if _rank(value) == 5 else None
    return None if all(_rank(it) in (2, 3) for it in value) else value


def _rank(value: object) -> int:
    return value.ndim if isinstance(value, np.ndarray) else 0


def _image(value: object, place: str) -> bytes:
    """Return a JPEG."""
    pixels = _pixels(value, place)
    return simplejpeg.encode_jpeg(  # type: ignore[no-any-return]
        pixels, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444"
    )


def _pixels(value: object, place: str) -> Pixels:
    """Return (H, W, 3) uint8, C-contiguous.

    Raises:
        CustomCodeError: the value is no image.
    """
    if not isinstance(value, np.ndarray):
        raise CustomCodeError(
            f"{place}: {type(value).__name__}, expected an image, an array of uint8"
        )
    if value.dtype != np.uint8:
        remedy = "; scale it to 0 to 255, and take .astype(numpy.uint8)"
        span = f" from {value.min():g} to {value.max():g}" if value.size else ""
        raise CustomCodeError(f"{place}: an image of {value.dtype}{span}, expected uint8{remedy}")
    if value.ndim == 2:
        value = np.repeat(value[:, :, np.newaxis], 3, axis=2)
    if value.ndim != 3 or value.shape[2] != 3 or value.size == 0:
        raise CustomCodeError(
            f"{place}: an image of shape {value.shape}, expected (H, W, 3) or (H, W)"
        )
    return np.ascontiguousarray(value)


def _video(value: Any, place: str) -> bytes:
    """Return an MP4 file: H.264, 25 frames a second; sides are made even by repeating the last."""
    frames = [_pixels(it, f"{place}[{i}]") for i, it in enumerate(_frames(value, place))]
    if len({it.shape for it in frames}) != 1:
        raise CustomCodeError(
            f"{place}: a video of {len(frames)} frames, expected frames of one size"
        )
    try:
        import av
    except ImportError as error:
        raise CustomCodeError(
            f"{place}: a video needs PyAV: pip install 'evmp[video]' ({error})"
        ) from None
    height, width, _ = frames[0].shape
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=VIDEO_FPS, options={"crf": "18"})
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for pixels in frames:
            even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _frames(value: Any, place: str) -> list[object]:
    if isinstance(value, (list, tuple)) or _rank(value) == 4:
        return list(value)
    raise CustomCodeError(f"{place}: {type(value).__name__}, expected a video, a list of images")
