"""What networks return, divided among the rows: tensors, and lists of one dict an image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from modelfolder import write_package
from torch import Tensor, nn

from evmp.errors import ModelError
from evmp.model import Model, open_model
from evmp.model.network import BatchNetwork, to_rows
from evmp.model.package import load_package

FRAMES = np.zeros((8, 32, 32, 3), np.uint8)
FRAMES[np.arange(8), :, 0] = 255 - np.arange(8, dtype=np.uint8)[:, None, None]
FRAMES[2:5, :, 1] = 255  # as many white lines as there will be boxes


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Lines(nn.Module):
    """Finds a box in each line of white pixels, as torchvision's detectors give them."""

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = []
        for image in x.unbind():
            columns = (image.amin((0, 1)) > 0.9).nonzero().flatten()
            boxes = torch.stack([columns, columns * 0, columns + 1, columns + 32], 1).float()
            found.append({"boxes": boxes, "labels": columns, "scores": boxes.amax(1) / 32})
        return found


class ListLines(nn.Module):
    """The same with the signature that torchvision's detectors have when they are scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = Lines()

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        losses: dict[str, Tensor] = {}
        return losses, self.lines(torch.stack(images))


@pytest.fixture(params=["one by one", "in threes", "on a device"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    """`opened(network)`: it as a model, in each of the ways in which rows are batched."""

    def opened(network: nn.Module) -> Model:
        folder = write_package(tmp_path / "model", network, "detector")
        package = load_package(folder)
        if request.param != "on a device":
            return open_model(package, "cpu", 8, 1, 1 if request.param == "one by one" else 3)
        from evmp.model.torchscript import _load, _prepare

        return BatchNetwork(_load(package.weights), package, _prepare, 8, torch.device("cpu"))

    return opened


@pytest.mark.parametrize("network", [Lines(), ListLines()], ids=lambda it: type(it).__name__)
def test_rows_may_have_another_number_of_boxes(opened: object, network: nn.Module) -> None:
    model = opened(network)  # type: ignore[operator]

    rows = model.predict(FRAMES, [0, 2, 7, 3])

    assert [len(row["boxes"]) for row in rows] == [1, 2, 1, 2]
    assert rows[0]["boxes"].shape == (1, 4) and rows[0]["boxes"].dtype == np.float32
    assert rows[1]["labels"].tolist() == [0, 1] and rows[1]["labels"].dtype == np.int64
    assert rows[1]["boxes"].tolist() == [[0, 0, 1, 32], [1, 0, 2, 33]]
    (black,) = model.warm_up()
    assert {name: array.shape for name, array in black.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "scores": (0,),
    }


def test_a_list_of_another_length_is_refused() -> None:
    with pytest.raises(
        ModelError, match="a list of 2 for a batch of 3, expected one dict an image"
    ):
        to_rows([{"boxes": torch.zeros(1, 4)}] * 2, 3)


def test_losses_are_no_detections() -> None:
    each = to_rows(({}, [{"boxes": torch.zeros(n, 4)} for n in range(3)]), 3)

    assert [row["boxes"].shape for row in each] == [(0, 4), (1, 4), (2, 4)]


def test_what_is_no_tensor_in_a_row_is_refused() -> None:
    with pytest.raises(ModelError, match="output names is a list, expected a tensor"):
        to_rows([{"names": ["cat"]}], 1)


def test_a_row_keeps_nothing_of_the_model() -> None:
    boxes = torch.zeros(1, 4)
    (row,) = to_rows([{"boxes": boxes}], 1)

    boxes += 1

    assert (row["boxes"] == 0).all()
