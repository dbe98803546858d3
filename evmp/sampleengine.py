"""Engines of rows that are samples: the user's predictor, or a model on the images within.

SampleEngine        takes rows apart into samples, and puts results together
ImagePredictor      a built-in model, behind processes of the user
CustomPredictor     the user's own, its results written as JSON and files
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from evmp.custom import Caller, Predicting, image_of
from evmp.engine import by_size, open_built_in
from evmp.errors import ConfigError
from evmp.fit import Fit
from evmp.image import Frame, Pixels
from evmp.model import Pending
from evmp.outputdir import OutputFiles, Place, check_keys
from evmp.result import to_json
from evmp.sample import Sample, unpack

if TYPE_CHECKING:
    from evmp.head.array import Row
    from evmp.job import Job
    from evmp.model import Frames, Outputs
    from evmp.model.package import ModelPackage
    from evmp.ring import Ring


class SamplePredictor(Protocol):
    """What a SampleEngine holds."""

    rows_at_once: int

    def predict(self, samples: Sequence[Sample], places: Sequence[Place]) -> list[bytes]:
        """Return the JSON result of each sample.

        Args:
            samples: at most `rows_at_once`, and the predictor's own.
            places: whose they are.
        """

    def close(self) -> None:
        """Give back what is open, after the last sample."""


class SampleEngine:
    """Rows that are samples, one or several each.

    Args:
        make: makes the predictor, in the process that it is for.
        beat: called before each call of it.
    """

    def __init__(self, make: Callable[[], SamplePredictor], beat: Callable[[], None]) -> None:
        self._make, self._beat = make, beat
        self._ring: Ring
        self._predictor: SamplePredictor

    @property
    def rows_at_once(self) -> int:
        return self._predictor.rows_at_once

    @property
    def batches_at_once(self) -> int:
        return 1

    def open(self, ring: Ring) -> None:
        self._ring = ring
        self._predictor = self._make()

    def start(self, rows: Sequence[int]) -> Pending[list[bytes]]:
        return Pending(partial(self._predict, rows))

    def _predict(self, rows: Sequence[int]) -> list[bytes]:
        ring = self._ring
        of_row = [unpack(ring.data(n)) for n in rows]
        samples = [sample for several in of_row for sample in several]
        places = [
            Place(n, ring.header(n).row, f"_{i}" if len(several) > 1 else "")
            for n, several in zip(rows, of_row, strict=True)
            for i in range(len(several))
        ]
        results: list[bytes] = []
        step = self.rows_at_once
        for start in range(0, len(samples), step):
            self._beat()
            some = slice(start, start + step)
            results += self._predictor.predict(samples[some], places[some])
        parts = iter(results)
        return [_joined([next(parts) for _ in several]) for several in of_row]

    def close(self) -> None:
        self._predictor.close()


class FittedModel:
    """A built-in model, and what brings images of any size into its input.

    Args:
        job, package, gpu, batch_rows: see FrameEngine.
    """

    def __init__(self, job: Job, package: ModelPackage, gpu: str, batch_rows: int) -> None:
        self._model, self.head = open_built_in(job, package, gpu, batch_rows)
        self._fit = Fit(package.input)

    @property
    def rows_at_once(self) -> int:
        """How many images it takes at once; `outputs` takes any number."""
        return self._model.rows_at_once

    def outputs(self, images: Sequence[Pixels]) -> Outputs:
        """Run the model on images, those of one input size together.

        Args:
            images: (H, W, 3) uint8 RGB each, C-contiguous.

        Returns: one dict for each, in their order.
        """
        outputs: dict[int, Row] = {}
        sizes = [self._fit.size_of(*image.shape[:2]) for image in images]
        for size, alike in by_size(sizes).items():
            while alike:
                some, alike = alike[: self.rows_at_once], alike[self.rows_at_once :]
                frames = self._frames([images[i] for i in some], size)
                found = self._model.predict(frames, range(len(some)))
                outputs.update(zip(some, found, strict=True))
        return [outputs[i] for i in range(len(images))]

    def close(self) -> None:
        self._model.close()

    def _frames(self, images: Sequence[Pixels], size: tuple[int, int]) -> Frames:
        frames = np.empty((len(images), *size, 3), np.uint8)
        for image, frame in zip(images, frames, strict=True):
            self._fit.into(Frame(image, *image.shape[:2]), frame.data.cast("B"))
        return frames


class ImagePredictor:
    """A built-in model on the images of samples; see FrameEngine for its arguments."""

    def __init__(
        self,
        job: Job,
        package: ModelPackage,
        gpu: str,
        batch_rows: int,
        files: OutputFiles | None = None,
    ) -> None:
        self._model = FittedModel(job, package, gpu, batch_rows)
        self._files = files
        self.rows_at_once = min(self._model.rows_at_once, batch_rows)

    def predict(self, samples: Sequence[Sample], places: Sequence[Place]) -> list[bytes]:
        images = [image_of(sample) for sample in samples]
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        results = self._model.head.results(self._model.outputs(images), sizes)
        return self._files.save_maps(places, results) if self._files else results

    def close(self) -> None:
        self._model.close()


class CustomPredictor:
    """The user's predictor, whose results are written as JSON and files.

    Args:
        job: names it.
        caller: of user code, in this process.
        gpu: as of FrameEngine.
        files: where its images and videos go.
    """

    def __init__(self, job: Job, caller: Caller, gpu: str, files: OutputFiles) -> None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        self.rows_at_once = job.batch_size
        self._files = files
        config = job.user_predictor_config
        self._predicting = Predicting(caller, job.user_predictor_cls, job.model_path, config)
        kinds = self._predicting.output_type
        self._kinds = {key: kind for key, kind in kinds.items() if kind != "json"}
        if wrong := check_keys(self._kinds):
            raise ConfigError(f"{job.user_predictor_cls}.get_output_type: {wrong}")
        if self._kinds and not job.output_dir:
            raise ConfigError(
                f"output_dir: required but missing, since {job.user_predictor_cls} says that "
                f"{', '.join(self._kinds)} are files"
            )

    def predict(self, samples: Sequence[Sample], places: Sequence[Place]) -> list[bytes]:
        found = self._predicting.predict(samples)
        if self._kinds:
            for result in found:  # a row that fails leaves no file behind
                to_json({key: it for key, it in result.items() if key not in self._kinds})
        return [to_json(it) for it in self._files.save_all(found, places, self._kinds)]

    def close(self) -> None:
        self._predicting.destroy()


def _joined(parts: Sequence[bytes]) -> bytes:
    """Return a row's result: that of its sample, of several a list."""
    return parts[0] if len(parts) == 1 else b"[" + b",".join(parts) + b"]"
