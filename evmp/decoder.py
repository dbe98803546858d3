"""The second stage: a row's payload becomes pixels, right where the model will read them.

One memory pass: Base64 into reused scratch, JPEG into reused scratch, resized into the row's place
in the batch. A row that cannot be decoded gets its error as its result, and passes on as EMPTY.

For users' code, and for what reads text in whole images, the row becomes a sample instead, with
images at their own size: `{"image": array}`, or for users' code all members of a JSON line, with
those that name a file opened.

A row whose files are on other machines is held while they come, and others are worked on: the order
here is that of the downloads.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

import orjson

from evmp.download import Downloads, File
from evmp.errors import DecodeError, DownloadError
from evmp.image import IMAGE_SUFFIXES, Frame, ImageDecoder
from evmp.metrics import Counter, Seat, State
from evmp.payload import FetchError, base64_room, decode_base64, open_regular, unreadable
from evmp.remote import AnyRemote, is_remote
from evmp.ring import POPULATED_BYTES, Header, Mark, Ring
from evmp.rule import has_custom_code
from evmp.sample import Sample, SampleTooLarge, pack
from evmp.source import Kind
from evmp.source.location import local_path, shown
from evmp.stage import claims, put_failure
from evmp.value import mask, scheme

if TYPE_CHECKING:
    from evmp.fit import Fit
    from evmp.job import Job

KEEP_BYTES: Final = 1 << 20  # memory that a slot may keep after a large payload


class Decoder:
    """Turns rows of `payload` into rows of `pixels`; failures go straight to `results`.

    Args:
        job: limits and options.
        fit: how an image becomes the model's input; None hands samples on.
        payload, pixels, results: the rings around it.
        seat, number: where to count, and as whom to claim.
    """

    def __init__(
        self,
        job: Job,
        fit: Fit | None,
        payload: Ring,
        pixels: Ring,
        results: Ring,
        seat: Seat,
        number: int,
    ) -> None:
        self._job, self._fit = job, fit
        self._is_custom = has_custom_code(job)
        self._payload, self._pixels, self._results = payload, pixels, results
        self._seat, self._number = seat, number
        self._scratch = bytearray(1 << 18)
        self._decoder: ImageDecoder
        self._downloads = Downloads(AnyRemote(job), job.download_concurrency)
        self._files: Mapping[str, File] = {}  # of the row that is worked on
        self._fetch: dict[int, Callable[[memoryview], memoryview]] = {
            Kind.BASE64: self._decode_base64,
            Kind.PATH: lambda payload: self._read_file(str(payload, "utf-8")),
            Kind.URL: lambda payload: self._downloaded(str(payload, "utf-8")),
            Kind.SAMPLE: lambda payload: self._read_image(orjson.loads(payload)),
        }

    def open(self) -> None:
        """Make the decoder, and fault the memory in."""
        self._decoder = ImageDecoder(self._job.max_image_pixels, fast=self._job.fast_decode)
        self._payload.populate(POPULATED_BYTES)
        self._pixels.populate(self._pixels.row_bytes if self._fit else 1)

    def run(self) -> None:
        """Decode until the payload ring has drained."""
        downloads = self._downloads
        for n in claims(
            self._payload,
            self._seat,
            self._number,
            meanwhile=self._finish_one,
            is_full=lambda: downloads.is_full,
            wait=downloads.wait,
        ):
            if locations := self._remote_files(n, self._payload.header(n)):
                downloads.begin(n, locations)
            else:
                self._finish(n, {})
        downloads.close()

    def _remote_files(self, n: int, header: Header) -> set[str]:
        """Return the URLs whose files the row needs."""
        if header.mark == Mark.EMPTY or self._results.is_done(n) or self._pixels.is_done(n):
            return set()
        payload = self._payload.data(n)
        if header.kind == Kind.URL:
            return {str(payload, "utf-8")}
        if header.kind != Kind.SAMPLE:
            return set()
        sample = orjson.loads(payload)
        values = sample.values() if self._is_custom else [sample.get("image")]
        return {value for value in values if isinstance(value, str) and is_remote(value)}

    def _finish_one(self) -> bool:
        """Work on a row whose files have come, if there is one."""
        come = self._downloads.take()
        if come is None:
            return False
        self._seat.enter(State.BUSY)
        self._finish(*come)
        return True

    def _finish(self, n: int, files: Mapping[str, File]) -> None:
        self._files = files
        if not self._pixels.is_done(n):
            self._seat.counters[Counter.AT] = n + 1
            self._work(n, self._payload.header(n))
            self._seat.counters[Counter.AT] = 0
        self._payload.release(n, self._number, KEEP_BYTES)

    def _work(self, n: int, header: Header) -> None:
        if header.mark == Mark.EMPTY:
            self._results.skip(n, header.row)
        elif not self._results.is_done(n):
            try:
                self._decode(n, header)
            except FetchError as error:
                self._fail(n, header, "read", str(error))
            except DownloadError as error:
                self._fail(n, header, "download", str(error))
            except DecodeError as error:
                self._fail(n, header, "decode", str(error))
        self._pixels.skip(n, header.row)

    def _decode(self, n: int, header: Header) -> None:
        payload, place = self._payload.data(n), self._pixels.payload(n)
        if self._fit is None:
            made = Header(header.row, length=self._pack(header.kind, payload, place))
        else:
            data = self._fetch[header.kind](payload)
            frame: Frame = self._decoder.decode(data, *self._fit.enough)
            self._fit.into(frame, place)
            made = Header(header.row, height=frame.height, width=frame.width)
        self._pixels.set_header(n, made)
        self._pixels.commit(n)
        self._seat.add(Counter.ROWS, 1)
        self._seat.add(Counter.BYTES, header.length)

    def _fail(self, n: int, header: Header, stage: str, message: str) -> None:
        put_failure(self._results, n, header.row, stage, message)
        self._seat.add(Counter.FAILED, 1)

    # --- samples ------------------------------------------------------------------------------

    def _pack(self, kind: int, payload: memoryview, place: memoryview) -> int:
        """Write a row's sample to its place. Returns how many bytes it takes."""
        if kind == Kind.SAMPLE and self._is_custom:
            sample = {name: self._member(name, it) for name, it in orjson.loads(payload).items()}
        else:
            sample = {"image": self._decoder.decode(self._fetch[kind](payload)).pixels}
        try:
            return pack([sample], place)
        except SampleTooLarge as error:
            raise DecodeError(f"{error}; raise max_row_bytes or max_image_pixels") from None

    def _member(self, name: str, value: Any) -> Any:
        """Return what a member of a JSON line stands for: an image, a file, or itself."""
        if not isinstance(value, str):
            return value
        # What follows the path of a URL is no part of its name.
        path = value.partition("?")[0].partition("#")[0] if is_remote(value) else value
        is_image = name == "image" or PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES
        is_file = self._job.may_name_files and os.path.isfile(value)
        if not (is_image or scheme(value) or is_file):
            return value
        try:
            data = self._read_location(value)
            if is_image:
                return self._decoder.decode(data).pixels.copy()
            return io.BytesIO(data)
        except (ValueError, FetchError) as error:
            raise FetchError(f"{name}: {error}") from None
        except (DownloadError, DecodeError) as error:
            raise type(error)(f"{name}: {error}") from None

    # --- where the bytes of an image come from ------------------------------------------------

    def _decode_base64(self, payload: memoryview) -> memoryview:
        need = base64_room(payload)
        if need > len(self._scratch):
            self._scratch = bytearray(need)
        length = decode_base64(self._job, payload, self._scratch)
        return memoryview(self._scratch)[:length]

    def _read_image(self, sample: Sample) -> memoryview:
        path = sample.get("image")
        if not isinstance(path, str) or not path:
            found = "no such key" if "image" not in sample else f"{path!r:.40}"
            raise FetchError(f"image: got {found}, expected the path or URL of an image")
        try:
            return self._read_location(path)
        except ValueError as error:
            raise FetchError(str(error)) from None

    def _read_location(self, location: str) -> memoryview:
        return (
            self._downloaded(location)
            if is_remote(location)
            else self._read_file(local_path(location, self._job))
        )

    def _downloaded(self, url: str) -> memoryview:
        file = self._files[url]
        if isinstance(file, DownloadError):
            raise DownloadError(f"{shown(mask(url))}: {file}")
        return memoryview(file)

    def _read_file(self, path: str) -> memoryview:
        """Return the bytes of a regular file."""
        fd, size = open_regular(path, self._job.max_row_bytes, "max_row_bytes")
        try:
            if size > len(self._scratch):
                self._scratch = bytearray(size)
            view, filled = memoryview(self._scratch)[:size], 0
            while filled < size and (count := os.readv(fd, [view[filled:]])):
                filled += count
            return view[:filled]
        except OSError as error:
            raise unreadable(path, error) from None
        finally:
            os.close(fd)
