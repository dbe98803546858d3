"""TorchScript models against torch itself, and files that are none against `ModelError`.

model.yaml is tested in test_package.py; here it is written down as a ModelPackage.
"""

from __future__ import annotations

import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trouble import Fussy

from evmp import machine
from evmp.engine import open_built_in
from evmp.errors import ModelError
from evmp.model import open_model
from evmp.model.device import Cpu
from evmp.model.network import BatchNetwork, open_network
from evmp.model.package import ModelInput, ModelOutput, ModelPackage, load_package

SIZE = 32
FRAMES = np.random.default_rng(0).integers(0, 256, (8, SIZE, SIZE, 3), np.uint8)
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def torchscript_without_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit", DeprecationWarning)
        yield


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(), nn.Linear(8, 5)).eval()


def package_of(file: Path, precision: str = "fp32", **spec) -> ModelPackage:
    spec = ModelInput(**{"height": SIZE, "width": SIZE, "mean": MEAN, "std": STD} | spec)
    return ModelPackage(file.parent, file, "classifier", precision, spec, ModelOutput(), ())


def save(module: nn.Module, folder: Path) -> Path:
    torch.jit.save(torch.jit.script(module), folder / "model.pt")
    return folder / "model.pt"


def open_on_cpu(module: nn.Module, folder: Path, **spec):
    return open_model(package_of(save(module, folder), **spec), "cpu", len(FRAMES), 1)


def expect(module: nn.Module, frames: np.ndarray) -> np.ndarray:
    """Run a module as torch's documentation shows it: divide, normalise, batch."""
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous() / 255
    planes = (planes - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.inference_mode():
        return module(planes).numpy()


def test_outputs_equal_plain_torchs(tmp_path):
    module = convolutions()
    model = open_on_cpu(module, tmp_path)

    outputs = model.predict(FRAMES, range(8))

    assert model.device == "cpu"
    assert [list(row) for row in outputs] == [["0"]] * 8
    assert all(row["0"].dtype == np.float32 and row["0"].shape == (5,) for row in outputs)
    found = np.stack([row["0"] for row in outputs])
    np.testing.assert_allclose(found, expect(module, FRAMES), atol=1e-5)


def test_rows_come_in_the_order_asked_for_and_to_the_bit_alike(tmp_path):
    model = open_on_cpu(convolutions(), tmp_path)
    whole = model.predict(FRAMES, range(8))

    some = model.predict(FRAMES, [5, 2])
    alone = model.predict(FRAMES[5:6], [0])

    np.testing.assert_array_equal(some[0]["0"], whole[5]["0"])
    np.testing.assert_array_equal(some[1]["0"], whole[2]["0"])
    np.testing.assert_array_equal(alone[0]["0"], whole[5]["0"])


def test_outputs_of_a_row_outlive_the_next(tmp_path):
    model = open_on_cpu(nn.Identity(), tmp_path)

    outputs = model.predict(FRAMES, [0, 1])

    assert not np.array_equal(outputs[0]["0"], outputs[1]["0"])


def test_warm_up_gives_the_outputs_of_a_black_image(tmp_path):
    module = convolutions()

    (outputs,) = open_on_cpu(module, tmp_path).warm_up()

    black = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    np.testing.assert_allclose(outputs["0"], expect(module, black)[0], atol=1e-5)


def test_batches_on_a_device_equal_single_images(tmp_path):
    file = save(convolutions(), tmp_path)
    package = package_of(file)
    single = open_model(package, "cpu", 8, 1)
    batched = BatchNetwork(torch.jit.load(file), package, torch.jit.freeze, 8, Cpu())

    found = batched.predict(FRAMES, [6, 1])

    assert batched.warm_up()[0]["0"].shape == (5,)
    for row, expected in zip(found, single.predict(FRAMES, [6, 1]), strict=True):
        np.testing.assert_allclose(row["0"], expected["0"], atol=1e-5)


def test_inputs_of_many_sizes_may_come_in_any_order(tmp_path):
    module, sizes = convolutions(), [(4 * n, 100 - 6 * n) for n in range(1, 12)]
    model = open_model(package_of(save(module, tmp_path), size="dynamic"), "cpu", 2, 1, 2)
    frames = {
        size: np.random.default_rng(1).integers(0, 256, (2, *size, 3), np.uint8) for size in sizes
    }

    for size in (*sizes, *reversed(sizes)):
        found = model.predict(frames[size], [1, 0])
        expected = expect(module, frames[size])
        for row, other in zip(found, reversed(expected), strict=True):
            np.testing.assert_allclose(row["0"], other, atol=1e-5)


def test_model_of_one_size_only_is_refused_for_a_dynamic_one(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # to be what it was afterwards
    module = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * SIZE**2, 5))
    file = save(module.eval(), tmp_path)
    job = SimpleNamespace(device="cpu", torch_threads=1, cpu_batch_size=1, top_k=0)

    open_built_in(job, package_of(file), "", 1)
    with pytest.raises(ModelError, match=r"it was given \(1, 3, 8, 8\), the smallest of the dynam"):
        open_built_in(job, package_of(file, size="dynamic", multiple_of=8), "", 1)


def test_rows_at_once_do_not_show_in_each_other(tmp_path):
    file = save(convolutions(), tmp_path)
    one_by_one = open_model(package_of(file), "cpu", 8, 1)
    in_threes = open_model(package_of(file), "cpu", 8, 1, 3)
    expected = in_threes.predict(FRAMES, range(8))

    assert in_threes.rows_at_once == 3
    for rows in ([0], [7, 3], [2, 1, 0], [5, 4, 6, 7], list(range(7, -1, -1))):
        for row, found in zip(rows, in_threes.predict(FRAMES, rows), strict=True):
            assert np.array_equal(found["0"], expected[row]["0"])
    for found, other in zip(expected, one_by_one.predict(FRAMES, range(8)), strict=True):
        np.testing.assert_allclose(found["0"], other["0"], atol=1e-5)


@pytest.mark.parametrize("is_gpu", [False, True])
def test_row_fails_for_no_other_row(tmp_path, is_gpu):
    file = save(Fussy(convolutions()).eval(), tmp_path)
    package = package_of(file, mean=[0] * 3, std=[1] * 3)
    frames = FRAMES.copy()
    frames[2] = 255
    if is_gpu:  # as on one, that is
        model = BatchNetwork(torch.jit.load(file), package, torch.jit.freeze, 8, Cpu())
    else:
        model = open_model(package, "cpu", 8, 1, 4)

    with pytest.raises(ModelError, match="too bright"):
        model.predict(frames, range(8))
    assert len(model.predict(frames, [0, 1, 3])) == 3
    with pytest.raises(ModelError, match="too bright"):
        model.predict(frames, [2])
    assert len(model.predict(frames, [7])) == 1


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 2 GiB", None])
def test_batch_that_does_not_fit_is_halved(tmp_path, caplog, said):
    module = torch.jit.load(save(convolutions(), tmp_path))
    sizes: list[int] = []

    def short_of_memory(tensor):
        sizes.append(len(tensor))
        if len(tensor) > 3 and len(sizes) > 1:
            raise RuntimeError(said) if said else torch.OutOfMemoryError("CUDA is full")
        return module(tensor)

    package = package_of(tmp_path / "model.pt")
    whole = BatchNetwork(module, package, torch.jit.freeze, 8, Cpu())
    model = BatchNetwork(module, package, lambda _: short_of_memory, 8, Cpu())
    found = model.predict(FRAMES, range(8))

    assert model.rows_at_once == 2
    assert sizes[1:] == [8, 4, 2, 2, 2, 2]  # the first is the probe
    assert "out of GPU memory: from now on 2 images at once" in caplog.text
    for row, expected in zip(found, whole.predict(FRAMES, range(8)), strict=True):
        np.testing.assert_allclose(row["0"], expected["0"], atol=1e-5)


def test_memory_that_is_short_from_the_start_halves_the_batch_at_the_start(tmp_path):
    def short_of_memory(tensor):
        sizes.append(len(tensor))
        if len(tensor) > 3:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return tensor.flatten(1)

    sizes: list[int] = []
    module = torch.jit.load(save(convolutions(), tmp_path))
    package = package_of(tmp_path / "model.pt")
    model = BatchNetwork(module, package, lambda _: short_of_memory, 8, Cpu())

    assert len(model.warm_up()) == 1
    assert sizes == [8, 4, 2, 2, 2]


def test_row_that_does_not_fit_alone_is_an_error(tmp_path):
    def full(tensor):
        if len(sizes) > 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(tensor))
        return tensor.flatten(1)

    sizes: list[int] = []
    module = torch.jit.load(save(convolutions(), tmp_path))
    package = package_of(tmp_path / "model.pt")
    model = BatchNetwork(module, package, lambda _: full, 8, Cpu())

    with pytest.raises(ModelError, match="CUDA out of memory"):
        model.predict(FRAMES, range(8))


@pytest.mark.needs_cuda
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-3), ("fp16", 2e-2), ("bf16", 0.1)]
)
def test_gpu_agrees_with_the_cpu(tmp_path, precision, tolerance):
    file = save(convolutions(), tmp_path)
    expected = open_model(package_of(file), "cpu", 8, 1).predict(FRAMES, range(8))

    model = open_model(package_of(file, precision), "auto", 8, 1)
    model.warm_up()

    assert model.device == "cuda:0"
    for row, other in zip(model.predict(FRAMES, range(8)), expected, strict=True):
        assert row["0"].dtype == np.float32
        np.testing.assert_allclose(row["0"], other["0"], atol=tolerance)


def test_real_model_names_coffee_espresso(real_model, photo):
    from PIL import Image

    package = load_package(real_model)
    size = (package.input.width, package.input.height)
    frame = np.asarray(Image.fromarray(photo("coffee")).resize(size))

    (outputs,) = open_model(package, "cpu", 1, 1).predict(frame[None], [0])

    assert package.class_names(1000)[outputs["0"].argmax()] == "espresso"


class Viewing(nn.Module):
    """Takes a view of what it has convolved, which fails with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x).view(x.size(0), -1)


def test_network_that_needs_contiguous_images_gets_them(tmp_path):
    module = Viewing().eval()
    with pytest.raises(RuntimeError, match="view"), torch.inference_mode():
        module.to(memory_format=torch.channels_last)(
            torch.zeros(1, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
        )
    module = module.to(memory_format=torch.contiguous_format)

    (outputs,) = open_on_cpu(module, tmp_path).predict(FRAMES, [3])

    np.testing.assert_allclose(outputs["0"], expect(module, FRAMES[3:4])[0], atol=1e-5)


class Training(nn.Module):
    """Doubles what it gets, except in training."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.9)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else 2 * self.dropout(x)


def test_archive_saved_in_training_mode_runs_in_evaluation(tmp_path):
    model = open_on_cpu(Training().train(), tmp_path, mean=(0, 0, 0), std=(1, 1, 1), scale=1)

    (outputs,) = model.predict(FRAMES, [0])

    np.testing.assert_array_equal(outputs["0"], 2 * FRAMES[0].transpose(2, 0, 1).astype(float))


@pytest.mark.parametrize("trace", [True, False])
def test_frozen_archive_runs(tmp_path, trace):
    module = convolutions()
    example = torch.zeros(1, 3, SIZE, SIZE)
    script = torch.jit.trace(module, example) if trace else torch.jit.script(module)
    torch.jit.save(torch.jit.freeze(script), tmp_path / "model.pt")

    (outputs,) = open_model(package_of(tmp_path / "model.pt"), "cpu", 8, 1).predict(FRAMES, [0])

    np.testing.assert_allclose(outputs["0"], expect(module, FRAMES[:1])[0], atol=1e-5)


def test_half_precision_weights_run_in_single_on_the_cpu(tmp_path):
    module = convolutions()
    file = save(convolutions().half(), tmp_path)

    (outputs,) = open_model(package_of(file, "fp16"), "cpu", 8, 1).predict(FRAMES, [0])

    np.testing.assert_allclose(outputs["0"], expect(module, FRAMES[:1])[0], atol=1e-2)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((2, 3)), x.flatten(1).argmax(1)


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"mean": x.mean((2, 3)), "most": x.amax((1, 2, 3))}


@pytest.mark.parametrize(
    ("module", "shapes"),
    [(Pair(), {"0": (3,), "1": ()}), (Named(), {"mean": (3,), "most": ()})],
)
def test_several_outputs_keep_their_names(tmp_path, module, shapes):
    (outputs,) = open_on_cpu(module, tmp_path).predict(FRAMES, [0])

    assert {name: array.shape for name, array in outputs.items()} == shapes


def test_integers_stay_integers(tmp_path):
    (outputs,) = open_on_cpu(Pair(), tmp_path).predict(FRAMES, [0])

    assert outputs["1"].dtype == np.int64


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


class Text(nn.Module):
    def forward(self, x: Tensor) -> list[str]:
        return ["cat"]


class Scalar(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


class OneRow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Nothing(), "the model returned nothing, expected a tensor or several"),
        (Text(), "the model's output 0 is a str, expected a tensor"),
        (Scalar(), r"the model's output 0 is \(\) for a batch of 1, expected \(1, ...\)"),
        (OneRow(), r"output 0 is \(2, 3, 32, 32\) for a batch of 1, expected \(1, ...\)"),
    ],
)
def test_what_is_no_batch_of_outputs_is_refused(tmp_path, module, message):
    with pytest.raises(ModelError, match=message):
        open_on_cpu(module, tmp_path).warm_up()


def test_input_size_that_the_network_cannot_take_is_refused_when_opened(tmp_path):
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))

    with pytest.raises(ModelError) as caught:
        open_on_cpu(module, tmp_path)

    message = str(caught.value)
    assert "mat1 and mat2 shapes cannot be multiplied" in message
    assert "it was given (1, 3, 32, 32) in torch.float32, as input.height, input.width" in message
    assert str(tmp_path) in message and "\n" not in message


class Picky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.max() > 0.5:
            raise ValueError("too bright")
        return x.mean((2, 3))


def test_failure_of_a_row_is_told_in_one_line(tmp_path):
    model = open_on_cpu(Picky(), tmp_path)

    with pytest.raises(ModelError, match=r"^the model failed: .*too bright$"):
        model.predict(FRAMES, [0])

    assert model.predict(np.zeros_like(FRAMES), [0])


def test_loading_warns_of_nothing(tmp_path):
    file = save(convolutions(), tmp_path)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_model(package_of(file), "cpu", 8, 1).warm_up()


def test_threads_are_set(tmp_path):
    open_model(package_of(save(nn.Identity(), tmp_path)), "cpu", 8, 3)

    assert torch.get_num_threads() == 3


def test_cuda_without_a_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    package = package_of(save(nn.Identity(), tmp_path))

    with pytest.raises(
        ModelError, match=r"^device: got cuda, but torch .* finds no GPU; set device"
    ):
        open_model(package, "cuda", 8, 1)
    assert open_model(package, "auto", 8, 1).device == "cpu"


def test_gpu_that_torch_cannot_use_costs_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "gpus", list)
    package = package_of(save(nn.Identity(), tmp_path))

    assert open_model(package, "auto", 8, 1).device == "cpu"
    assert caplog.text == ""
    monkeypatch.setattr(machine, "gpus", lambda: ["0"])
    assert open_model(package, "auto", 8, 1).device == "cpu"

    assert f"torch {torch.__version__} cannot use the GPU" in caplog.text


def test_adapters_share_one_way_to_run(tmp_path):
    """Whatever a later adapter loads, `open_network` takes any callable module of torch."""
    package = package_of(tmp_path / "model.any")
    model = open_network(
        convolutions(), package, device="cpu", batch_size=8, finish=lambda module: module
    )

    assert model.warm_up()[0]["0"].shape == (5,)


# --- files that are no TorchScript ---------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def write_wrong_file(kind: str, file: Path) -> None:
    state = convolutions().state_dict()
    if kind == "state_dict":
        torch.save(state, file)
    elif kind == "old state_dict":
        torch.save(state, file, _use_new_zipfile_serialization=False)
    elif kind == "module":
        torch.save(convolutions(), file)
    elif kind == "malicious":
        torch.save(Malicious(), file)
    elif kind == "AOTInductor":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("model/archive_format", "pt2")
            archive.writestr("model/data/aotinductor/model/model.wrapper.so", b"\x7fELF")
    elif kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/readme.txt", "no model")
    elif kind == "truncated":
        data = save(convolutions(), file.parent).read_bytes()
        file.write_bytes(data[: len(data) // 2])
    else:
        file.write_bytes(
            {"empty": b"", "text": b"version https://git-lfs.github.com/spec/v1"}[kind]
        )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("state_dict", "a checkpoint written by torch.save .* no TorchScript; .* torch.jit.trace"),
        ("old state_dict", "a checkpoint written by torch.save in its old format, no TorchScript"),
        ("module", "a checkpoint written by torch.save"),
        ("malicious", "a checkpoint written by torch.save"),
        ("AOTInductor", "compiled by AOTInductor for one kind of machine; save the program that"),
        ("zip", "a zip file without TorchScript code"),
        ("truncated", "a truncated or damaged archive .*; copy or save it again"),
        ("empty", "an empty file, expected a TorchScript or torch.export archive or an ONNX"),
        ("text", r"no TorchScript archive and no ONNX model \(starts with 'version https://'\)"),
    ],
)
def test_file_that_is_no_torchscript_is_named(tmp_path, monkeypatch, kind, message):
    monkeypatch.chdir(tmp_path)
    write_wrong_file(kind, tmp_path / "wrong.pt")

    with pytest.raises(ModelError, match=message) as caught:
        open_model(package_of(tmp_path / "wrong.pt"), "cpu", 8, 1)

    assert str(caught.value).startswith(str(tmp_path / "wrong.pt"))
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("member", ["m/code/a.py", "m/data/0"])
def test_archive_that_would_fill_the_memory_is_refused(tmp_path, member):
    package = package_of(tmp_path / "model.pt")
    zeros = bytes(1 << 20)
    with zipfile.ZipFile(package.weights, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("m/constants.pkl", "")
        with archive.open(member, "w") as stream:
            for _ in range(258):
                stream.write(zeros)

    with pytest.raises(ModelError, match=r"unpack to 25[67] MiB more than the file has"):
        open_model(package, "cpu", 1, 1)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"gone\.pt: cannot be read: no such file or directory$"):
        open_model(package_of(tmp_path / "gone.pt"), "cpu", 8, 1)


def replace_in_code(file: Path, old: bytes, new: bytes) -> None:
    """Rewrite an archive as if it had been saved with another operator."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            if name.endswith(".py"):
                assert old in data
                data = data.replace(old, new)
            archive.writestr(name, data)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


def test_unknown_operator_is_named(tmp_path):
    file = save(Clamp(), tmp_path)
    replace_in_code(file, b"torch.relu(", b"ops.nowhere.relu(")

    with pytest.raises(
        ModelError, match=r"needs the operator nowhere::relu, which torch .* lacks$"
    ):
        open_model(package_of(file), "cpu", 8, 1)


def test_damaged_code_is_told_in_one_line(tmp_path):
    file = save(Clamp(), tmp_path)
    replace_in_code(file, b"return ", b"returns")

    with pytest.raises(ModelError, match=r"model\.pt: torch .* cannot load it: ") as caught:
        open_model(package_of(file), "cpu", 8, 1)

    assert "\n" not in str(caught.value)


def test_torchvision_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    file = save(Clamp(), tmp_path)
    replace_in_code(file, b"torch.relu(", b"ops.torchvision.relu(")

    with pytest.raises(ModelError, match=r"needs torchvision's operators, .* cannot be imported"):
        open_model(package_of(file), "cpu", 8, 1)


def test_torchvision_is_imported_before_an_archive_that_needs_it(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torchvision.py").write_text(
        "import torch\n"
        "library = torch.library.Library('torchvision', 'FRAGMENT')\n"
        "library.define('evmp_double(Tensor x) -> Tensor')\n"
        "library.impl('evmp_double', lambda x: 2 * x, 'CompositeExplicitAutograd')\n"
    )
    file = save(Clamp(), tmp_path)
    replace_in_code(file, b"torch.relu(", b"ops.torchvision.evmp_double(")

    (outputs,) = open_model(package_of(file, scale=1), "cpu", 8, 1).predict(FRAMES, [0])

    means, stds = np.array(MEAN)[:, None, None], np.array(STD)[:, None, None]
    expected = 2 * (FRAMES[0].transpose(2, 0, 1) - means) / stds
    np.testing.assert_allclose(outputs["0"], expected, rtol=1e-5)
    sys.modules.pop("torchvision").library._destroy()
