"""What users' code derives from: predictors and processes. `import evmp` gives these classes.

A predictor is made once in each predictor process, a process `num_threads` times; both then get
samples until the input has ended. Nothing here is called by evmp but what these docstrings say, so
that a class of the same methods, EasyVision's or EasyCV's own, serves as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class PredictorInterface:
    """A predictor that gets images."""

    version = 1

    def __init__(self, model_path: str, model_config: str | None = None) -> None:
        """Load the model.

        Args:
            model_path: the job's `model_path`, a local directory or file.
            model_config: the job's `user_predictor_config`, a JSON text; None without one.
        """

    def predict(self, input_data: list[Any], batch_size: int) -> Sequence[dict[str, Any]]:
        """Return one dict for each of the images, in their order.

        Args:
            input_data: (H, W, 3) uint8 RGB arrays, each of its own size.
            batch_size: how many there are.
        """
        raise NotImplementedError

    def get_output_type(self) -> dict[str, str]:
        """Return what becomes of the keys of a result: `json`, `image` or `video`.

        A key that is not named is JSON. An image is (H, W, 3) or (H, W) uint8, RGB; a video is a
        sequence of such images. Lists of either become several files.
        """
        return {}


class PredictorInterfaceV2(PredictorInterface):
    """A predictor that gets whole samples."""

    version = 2

    def predict(
        self, input_data: list[dict[str, Any]], batch_size: int
    ) -> Sequence[dict[str, Any]]:
        """Return one dict for each of the samples, in their order.

        Args:
            input_data: samples, with an array for each image and a binary file object for each
                other file.
            batch_size: how many there are.
        """
        raise NotImplementedError


class Process:
    """A step between decoding and prediction.

    The fields of its entry in `user_process_config` are the keyword arguments of `__init__`, but
    for `user_process_cls`, `job_name`, `num_threads` and `batch_size`.
    """

    _put: list[dict[str, Any]]

    def __init__(self, /, **config: Any) -> None:
        """Keep the fields as `config`."""
        self.config = config

    def process(self, input_data: Any) -> Any:
        """Work on a sample, or on a list of them where `batch_size` is above 1.

        Returns: the sample, changed or replaced, or None to leave its row without a prediction; of
            a list as many. Or nothing at all, where `put` was called: with every sample that the
            row shall go on as.
        """
        raise NotImplementedError

    def put(self, sample: dict[str, Any]) -> None:
        """Hand a sample on; may be called several times within one call of `process`."""
        self._put.append(sample)

    def destroy(self) -> None:
        """Give back what was taken; called once, at the end."""
