"""What predicts where two models read text together: one finds lines, the other reads them.

Lines are cut out of whole images, so its rows are samples. All crops of a call go through the
recognizer together, those of one input size at once, whichever image they are from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evmp.custom import image_of
from evmp.sampleengine import FittedModel

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.model.package import ModelPackage
    from evmp.outputdir import Place
    from evmp.sample import Sample


class TextPredictor:
    """A detector and a recognizer on the images of samples; see FrameEngine for its arguments."""

    def __init__(self, job: Job, package: ModelPackage, gpu: str, batch_rows: int) -> None:
        from evmp.head import open_text_reader

        detector, recognizer = package.parts
        self._reader = open_text_reader(package)
        self._detector = FittedModel(job, detector, gpu, batch_rows)
        self._recognizer = FittedModel(job, recognizer, gpu, batch_rows)
        self.rows_at_once = self._detector.rows_at_once

    def predict(self, samples: Sequence[Sample], places: Sequence[Place]) -> list[bytes]:
        images = [image_of(sample) for sample in samples]
        lines = self._reader.lines(self._detector.outputs(images), images)
        read = self._recognizer.outputs([line.crop for line in lines])
        return self._reader.results(lines, read, len(images))

    def close(self) -> None:
        self._detector.close()
        self._recognizer.close()
