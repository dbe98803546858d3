"""Heads: what a model's tensors say, as the JSON result of each `model_type`.

A head knows no torch and no adapter: it takes numpy arrays by name and gives bytes. It works row by
row, so that a result does not depend on the batch. Predictor processes use them.

    classifier              class probabilities
    multilabel_classifier   labels, each with a probability of its own
    feature_extractor       a vector
    detector                boxes; `layout` takes the model's outputs apart, `box` calculates
    segmentor               a class a pixel
    text_detector           lines of text; `quad` calculates
    text_recognizer         what a line says; `reading` decodes
    text_spotter            both
    text_reader             both, with two models, one after the other
    array                   what they share
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from evmp.errors import ModelError
from evmp.head.array import renamed
from evmp.head.classifier import Classifier
from evmp.head.detector import Detector
from evmp.head.feature_extractor import FeatureExtractor
from evmp.head.multilabel_classifier import MultilabelClassifier
from evmp.head.segmentor import Segmentor
from evmp.head.text_recognizer import TextRecognizer

if TYPE_CHECKING:
    from evmp.head.text_reader import TextReader
    from evmp.job import Job
    from evmp.model import Outputs
    from evmp.model.package import ModelPackage


class Head(Protocol):
    """The post-processing of one type of model."""

    def check(self, outputs: Outputs) -> None:
        """Look at the outputs of a first row, before any other; settles what depends on them.

        Raises:
            ModelError: they are not what such a model returns, or do not fit the labels.
        """

    def results(self, outputs: Outputs, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
        """Turn the outputs of some rows into one JSON object each, in their order.

        With `segmentation_output: png` it is one PNG file each.

        Args:
            sizes: (height, width) of the original images, in pixels.

        Raises:
            ModelError: an output has another shape than at the check, or holds NaN or infinity
                where that is no answer.
        """


def open_head(package: ModelPackage, job: Job) -> Head:
    """Make the head for the package's type of model, which the job must have been checked for.

    Raises:
        ModelError: what it needs is not installed.
    """
    return Opened(_head(package, job), package)


def _head(package: ModelPackage, job: Job) -> Head:
    match package.model_type:
        case "feature_extractor":
            return FeatureExtractor(package, feature_name=job.feature_name)
        case "multilabel_classifier":
            return MultilabelClassifier(package, threshold=job.multilabel_threshold)
        case "detector":
            return Detector(package)
        case "segmentor":
            return Segmentor(package, parts=job.segmentation_output)
        case "text_recognizer":
            return TextRecognizer(package)
        case "text_detector" | "text_spotter":
            return _finder(package)
        case _:
            return Classifier(package, top_k=job.top_k)


def open_text_reader(package: ModelPackage) -> TextReader:
    """Make what puts the results of a detector and a recognizer together.

    Raises:
        ModelError: what it needs is not installed.
    """
    with _needs_text(package):
        from evmp.head.text_reader import TextReader
    return TextReader(package)


def _finder(package: ModelPackage) -> Head:
    with _needs_text(package):
        from evmp.head.text_detector import TextDetector
        from evmp.head.text_spotter import TextSpotter
    return TextDetector(package) if package.model_type == "text_detector" else TextSpotter(package)


@contextmanager
def _needs_text(package: ModelPackage) -> Iterator[None]:
    """Import in here what needs the extra `text`, which only models that find text do."""
    try:
        yield
    except ImportError as error:
        raise ModelError(
            f"{package.directory}: a {package.model_type} needs opencv-python-headless and "
            f"pyclipper, which cannot be imported ({error}); install evmp[text]"
        ) from error


class Opened:
    """A head that knows the model's outputs by the names of `output.names`."""

    def __init__(self, head: Head, package: ModelPackage) -> None:
        self._head, self._package = head, package
        self._names = package.output.names

    def check(self, outputs: Outputs) -> None:
        try:
            self._head.check([renamed(row, self._names) for row in outputs])
        except ModelError as error:
            raise ModelError(f"{self._package.weights}: {error}") from None

    def results(self, outputs: Outputs, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
        return self._head.results([renamed(row, self._names) for row in outputs], sizes)
