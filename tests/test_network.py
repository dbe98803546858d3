"""What networks return, divided among the rows, and when: with several batches in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from latedevice import Late
from modelfolder import write_package
from torch import Tensor, nn

from evmp.errors import ModelError
from evmp.model import DeviceLost, Model, open_model
from evmp.model.device import Cpu, Device
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

        return BatchNetwork(_load(package.weights), package, _prepare, 8, Cpu())

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


# --- batches in flight ----------------------------------------------------------------------------


def colours(finish: Callable[[nn.Module], object], device: Device, folder: Path) -> BatchNetwork:
    """A network that returns the mean colour of each image, for batches of 4."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    package = load_package(write_package(folder / "model", network, "classifier"))
    return BatchNetwork(network, package, finish, 4, device)


def batches(n: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (n, 4, 32, 32, 3), np.uint8))


def same(network: nn.Module) -> nn.Module:
    return network


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_batches_in_flight_do_not_mix(tmp_path: Path, order: list[int]) -> None:
    model = colours(same, Late(), tmp_path)
    expected = [[row["0"].tolist() for row in model.predict(it, range(4))] for it in batches(3)]

    pending = [model.start(frames, range(4)) for frames in batches(3)]
    found = {i: pending[i].result() for i in order}

    assert model.is_asynchronous
    assert [[row["0"].tolist() for row in found[i]] for i in range(3)] == expected


def test_outputs_are_not_there_before_they_are_waited_for(tmp_path: Path) -> None:
    model = colours(same, Cpu(), tmp_path)
    late = colours(same, Late(), tmp_path)
    frames = batches(1)[0]

    first, second = late.start(frames, [3, 1]), late.start(frames, [2])

    for found, rows in ((second, [2]), (first, [3, 1])):
        expected = model.predict(frames, rows)
        assert [row["0"].tolist() for row in found.result()] == [
            row["0"].tolist() for row in expected
        ]


def test_lack_of_memory_spares_what_is_in_flight(tmp_path: Path) -> None:
    limits = [4]

    def limited(network: nn.Module) -> object:
        def run(batch: Tensor) -> Tensor:
            if len(batch) > limits[0]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return network(batch)

        return run

    one, two = batches(2)
    whole = colours(same, Cpu(), tmp_path)
    model = colours(limited, Late(), tmp_path)

    before = model.start(one, range(4))
    limits[0] = 2
    after = model.start(two, range(4))

    assert model.rows_at_once == 2
    for found, frames in ((after, two), (before, one)):
        for row, expected in zip(found.result(), whole.predict(frames, range(4)), strict=True):
            np.testing.assert_allclose(row["0"], expected["0"], rtol=1e-6)


def test_late_failure_is_the_models_while_the_device_lives(tmp_path: Path) -> None:
    device = Late()
    model = colours(same, device, tmp_path)

    pending = model.start(batches(1)[0], range(4))
    device.failure = RuntimeError("CUDA error: invalid argument\nCompile with so and so")

    with pytest.raises(ModelError, match=r"^the model failed: CUDA error: invalid argument$"):
        pending.result()


@pytest.mark.parametrize("is_late", [False, True])
def test_lost_device_is_no_failure_of_the_model(tmp_path: Path, is_late: bool) -> None:
    def failing(network: nn.Module) -> object:
        def run(batch: Tensor) -> Tensor:
            if device.is_lost and not is_late:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return network(batch)

        return run

    device = Late()
    model = colours(failing, device, tmp_path)
    pending = model.start(batches(1)[0], range(4))
    device.is_lost = True
    device.failure = RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(DeviceLost, match="the device is gone"):
        pending.result() if is_late else model.start(batches(1)[0], [1])


def test_model_on_the_cpu_has_begun_nothing_that_it_has_not_done(tmp_path: Path) -> None:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    package = load_package(write_package(tmp_path / "model", network, "classifier"))
    model = open_model(package, "cpu", 4, 1)
    frames = batches(1)[0]

    model.pin(memoryview(bytearray(8)))
    pending = model.start(frames, [2])
    model.close()

    assert not model.is_asynchronous
    (row,), (expected,) = pending.result(), model.predict(frames, [2])
    assert row["0"].tolist() == expected["0"].tolist()


@pytest.mark.parametrize(
    ("least", "n_rows", "size"), [(1, 1, 1), (1, 3, 4), (1, 5, 6), (1, 6, 6), (4, 1, 4), (6, 2, 6)]
)
def test_rows_of_a_size_of_their_own_are_not_filled_up_to_a_whole_batch(
    tmp_path: Path, least: int, n_rows: int, size: int
) -> None:
    sizes: list[tuple[int, ...]] = []

    def watched(network: nn.Module) -> object:
        return lambda batch: (sizes.append(tuple(batch.shape)), network(batch))[1]

    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    spec = {"size": "dynamic", "resize": "letterbox", "height": 64, "width": 64}
    package = load_package(write_package(tmp_path / "model", network, "classifier", input=spec))
    model = BatchNetwork(network, package, watched, 6, Cpu(), least)
    wide = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)[:, :32]

    rows = model.predict(wide, range(n_rows))

    assert sizes == [(6, 3, 64, 64), (size, 3, 32, 64)]
    for row, frame in zip(rows, wide, strict=False):
        np.testing.assert_allclose(row["0"], frame.mean((0, 1)) / 255, rtol=1e-5)
