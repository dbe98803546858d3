"""Programs of torch.export against torch itself, and files that are none against `ModelError`."""

from __future__ import annotations

import logging
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from evmp.errors import ModelError
from evmp.model import Model, open_model, preload
from evmp.model.device import Cpu
from evmp.model.network import BatchNetwork
from evmp.model.package import ModelInput, ModelOutput, ModelPackage, load_package

SIZE = 32
FRAMES = np.random.default_rng(0).integers(0, 256, (8, SIZE, SIZE, 3), np.uint8)
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
ANY = Dim("n")


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(), nn.Linear(8, 5)).eval()


def export(
    module: nn.Module, file: Path, *, n: Any = ANY, examples: tuple[Any, ...] | None = None
) -> Path:
    """Export for batches of n, a number or a range; `examples` stand for a batch of images."""
    size = n if isinstance(n, int) else 4
    examples = examples or (torch.zeros(size, 3, SIZE, SIZE),)
    dynamic = None if isinstance(n, int) else tuple({0: n} for _ in examples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, examples, dynamic_shapes=dynamic)
        torch.export.save(program, file)
    return file


def package_of(file: Path, **spec: Any) -> ModelPackage:
    spec = {"height": SIZE, "width": SIZE, "mean": MEAN, "std": STD} | spec
    model_input = ModelInput.model_validate(spec)
    return ModelPackage(file.parent, file, "classifier", "fp32", model_input, ModelOutput(), ())


def opened(file: Path, cpu_batch_size: int = 1, **spec: Any) -> Model:
    return open_model(package_of(file, **spec), "cpu", len(FRAMES), 1, cpu_batch_size)


def expected(module: Callable[[Tensor], Tensor], frames: np.ndarray) -> np.ndarray:
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous() / 255
    planes = (planes - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.inference_mode():
        return module(planes).numpy()


@pytest.mark.parametrize("cpu_batch_size", [1, 3])
def test_outputs_equal_the_networks(tmp_path: Path, cpu_batch_size: int) -> None:
    module = convolutions()

    rows = opened(export(module, tmp_path / "m.pt2"), cpu_batch_size).predict(FRAMES, [5, 0, 3, 7])

    logits = [row["0"] for row in rows]
    np.testing.assert_allclose(logits, expected(module, FRAMES[[5, 0, 3, 7]]), atol=1e-5)


@pytest.mark.parametrize(
    ("n", "at_once"), [(1, 1), (4, 4), (Dim("n", min=4), 4), (Dim("n", max=2), 2)]
)
def test_a_program_gets_batches_of_the_size_it_takes(tmp_path: Path, n: Any, at_once: int) -> None:
    module = convolutions()
    file = export(module, tmp_path / "m.pt2", n=n, examples=(torch.zeros(at_once, 3, SIZE, SIZE),))

    model = opened(file, 3)
    rows = model.predict(FRAMES, range(6))

    assert model.rows_at_once == at_once
    np.testing.assert_allclose([row["0"] for row in rows], expected(module, FRAMES[:6]), atol=1e-5)


def test_a_fixed_batch_is_not_halved_for_want_of_memory(tmp_path: Path) -> None:
    def short_of_memory(batch: Tensor) -> Tensor:
        if batch.max() > 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch.flatten(1)

    package = package_of(tmp_path / "m.pt2", mean=[0] * 3, std=[1] * 3)
    model = BatchNetwork(nn.Identity(), package, lambda _: short_of_memory, 4, Cpu(), 4)

    with pytest.raises(ModelError, match="out of memory"):
        model.predict(FRAMES, range(6))
    assert model.rows_at_once == 4


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"mean": x.mean((2, 3)), "most": x.amax((1, 2, 3)).int()}


def test_outputs_keep_their_names_and_kinds(tmp_path: Path) -> None:
    (row,) = opened(export(Named(), tmp_path / "m.pt2")).warm_up()

    assert {name: (array.shape, array.dtype.name) for name, array in row.items()} == {
        "mean": ((3,), "float32"),
        "most": ((), "int32"),
    }


def test_its_name_does_not_matter(tmp_path: Path) -> None:
    file = export(convolutions(), tmp_path / "m.pt2").rename(tmp_path / "model.pt")

    assert load_package(tmp_path).weights == file
    assert opened(file).warm_up()


def test_instance_normalisation_is_no_training(tmp_path: Path) -> None:
    module = nn.Sequential(nn.InstanceNorm2d(3), nn.AvgPool2d(4)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (torch.zeros(1, 3, SIZE, SIZE),))
        torch.export.save(program.run_decompositions(), tmp_path / "m.pt2")

    (row,) = opened(tmp_path / "m.pt2").predict(FRAMES, [3])

    np.testing.assert_allclose(row["0"], expected(module, FRAMES[3:4])[0], atol=1e-5)


def test_opening_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = export(convolutions(), tmp_path / "m.pt2")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(file).warm_up()
    replace_in_program(file, b"ops.aten.relu.", b"ops.nowhere.relu.")
    with pytest.raises(ModelError):
        opened(file)

    assert capfd.readouterr() == ("", "") and logging.getLogger("torch.export").filters == []


class Grid(nn.Module):
    """Makes a tensor of its own, on the device that it was exported for."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2)) * torch.arange(SIZE, device=x.device)


def test_a_program_moves_with_the_tensors_that_it_makes(tmp_path: Path) -> None:
    from evmp.model.exported import _module, load_program

    program = load_program(export(Grid(), tmp_path / "m.pt2"))

    moved = _module(program, "meta")(torch.zeros(2, 3, SIZE, SIZE, device="meta"))

    assert moved.device.type == "meta"


# --- what is refused ------------------------------------------------------------------------------


class Two(nn.Module):
    def forward(self, image: Tensor, size: Tensor) -> Tensor:
        return image.mean((2, 3)) * size


class Doubled(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return 2 * image.flatten(1)


BATCH = torch.zeros(4, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    ("module", "examples", "message"),
    [
        (
            Two(),
            (BATCH, torch.ones(4, 3)),
            r"has the inputs image: .*, size: \(4, 3\), expected on",
        ),
        (
            Doubled(),
            (torch.zeros(4, 3, 64, 48),),
            r"\(4, 3, 64, 48\), expected \(batch, 3, 32, 32\)",
        ),
        (Doubled(), (torch.zeros(4, 3072),), r"is image: \(4, 3072\), expected \(batch, 3, 32, 32"),
        (Doubled(), (BATCH.int(),), "input image is torch.int32, expected float"),
        (convolutions().train(), (BATCH,), r"exported in training \(.*norm.*\); export network.ev"),
    ],
)
def test_an_unfit_program_is_refused(
    tmp_path: Path, module: nn.Module, examples: tuple[Tensor, ...], message: str
) -> None:
    file = export(module, tmp_path / "m.pt2", n=4, examples=examples)

    with pytest.raises(ModelError, match=message) as caught:
        opened(file)

    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def replace_in_program(file: Path, old: bytes, new: bytes) -> None:
    """Rewrite a program as if it had been saved so."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(old, new) if name.endswith("model.json") else data)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            b"ops.aten.relu.",
            b"ops.nowhere.relu.",
            r"needs the operator .*nowhere\.relu\.\w+, which",
        ),
        (
            b'"major": ',
            b'"major": 9',
            "cannot load it: Serialized schema version .* does not match",
        ),
        (b'"graph_module"', b"graph_module", "cannot load it: Expecting property name"),
    ],
)
def test_a_program_that_torch_does_not_know_is_refused(
    tmp_path: Path, old: bytes, new: bytes, message: str
) -> None:
    file = export(convolutions(), tmp_path / "m.pt2")
    replace_in_program(file, old, new)

    with pytest.raises(ModelError, match=message) as caught:
        opened(file)

    assert str(caught.value).startswith(f"{file}: ") and len(str(caught.value)) < 1000


def test_a_truncated_program_is_said_to_be_one(tmp_path: Path) -> None:
    file = export(convolutions(), tmp_path / "m.pt2")
    file.write_bytes(file.read_bytes()[:-1000])

    with pytest.raises(ModelError, match=r"a truncated or damaged archive .*; copy or save it aga"):
        preload(package_of(file))


def test_torchvision_is_imported_before_a_program_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    file = export(convolutions(), tmp_path / "m.pt2")
    replace_in_program(file, b"ops.aten.relu.", b"ops.torchvision.relu.")

    for call in (preload, lambda package: open_model(package, "cpu", 1, 1)):
        with pytest.raises(ModelError, match=r"torchvision's operators, but .* cannot be imported"):
            call(package_of(file))
