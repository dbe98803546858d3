"""A predictor and a process of one's own. docs/custom-code.md explains them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from evmp import PredictorInterfaceV2, Process


class Namer(PredictorInterfaceV2):
    """Names the colour of a palette that is nearest to an image's mean colour."""

    def __init__(self, model_path: str, model_config: str | None = None) -> None:
        palette = json.loads(Path(model_path, "palette.json").read_text())
        self._names = list(palette)
        self._colours = np.array(list(palette.values()), np.float32)
        self._side = json.loads(model_config or "{}").get("card_side", 8)

    def predict(self, input_data: list[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
        return [self._name(sample) for sample in input_data]

    def get_output_type(self) -> dict[str, str]:
        return {"card": "image"}

    def _name(self, sample: dict[str, Any]) -> dict[str, Any]:
        mean = sample["image"].mean(axis=(0, 1), dtype=np.float32)
        distances = np.linalg.norm(self._colours - mean, axis=1)
        nearest = int(distances.argmin())
        card = np.full((self._side, self._side, 3), self._colours[nearest], np.uint8)
        return {
            "colour": self._names[nearest],
            "distances": dict(zip(self._names, distances, strict=True)),
            "card": card,
        }


class Crop(Process):
    """Cuts a margin off an image; one of which nothing is left has no prediction."""

    def __init__(self, margin: int) -> None:
        self._margin = margin

    def process(self, input_data: dict[str, Any]) -> dict[str, Any] | None:
        inner = slice(self._margin, -self._margin)
        image = input_data["image"][inner, inner]
        return {**input_data, "image": image} if image.size else None
