"""ONNX models against onnxruntime itself, and files that are none against `ModelError`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from jobfolder import JobFolder
from modelfolder import INPUT, write_onnx
from onnx import TensorProto, helper

from evmp import machine
from evmp.errors import ModelError
from evmp.model import DeviceLost, Model, open_model, preload
from evmp.model.archive import files_of
from evmp.model.package import ModelInput, ModelOutput, ModelPackage, load_package

SIZE = 32
FRAMES = np.random.default_rng(0).integers(0, 256, (8, SIZE, SIZE, 3), np.uint8)
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
PLAIN: dict[str, Any] = {"scale": 1, "mean": (0, 0, 0), "std": (1, 1, 1)}

MEANS = helper.make_node("ReduceMean", ["image"], ["mean"], axes=[2, 3], keepdims=0)
MOST = helper.make_node("ReduceMax", ["image"], ["most"], axes=[1, 2, 3], keepdims=0)


def package_of(file: Path, precision: str = "fp32", **spec: Any) -> ModelPackage:
    spec = {"height": SIZE, "width": SIZE, "mean": MEAN, "std": STD} | spec
    model_input = ModelInput.model_validate(spec)
    return ModelPackage(file.parent, file, "classifier", precision, model_input, ModelOutput(), ())


def opened(file: Path, cpu_batch_size: int = 1, **spec: Any) -> Model:
    return open_model(package_of(file, **spec), "cpu", len(FRAMES), 1, cpu_batch_size)


def convolutions(folder: Path, **options: Any) -> Path:
    """A convolution, its maximum over the image and a matrix, as (N, 5) `logits`."""
    random = np.random.default_rng(1)
    weights = {
        "kernel": random.normal(size=(8, 3, 3, 3)).astype(np.float32),
        "matrix": random.normal(size=(8, 5)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["convolved"]),
        helper.make_node("Relu", ["convolved"], ["relu"]),
        helper.make_node("ReduceMax", ["relu"], ["pooled"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["pooled", "matrix"], ["logits"]),
    ]
    return write_onnx(folder / "model.onnx", nodes, ["logits"], weights=weights, **options)


def expected(file: Path, frames: np.ndarray) -> list[np.ndarray]:
    """Run a model as onnxruntime's documentation shows it."""
    planes = (frames.transpose(0, 3, 1, 2) / 255 - np.array(MEAN)[:, None, None]) / np.array(STD)[
        :, None, None
    ]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": planes.astype(np.float32)})


@pytest.mark.parametrize("cpu_batch_size", [1, 3])
def test_outputs_equal_plain_onnxruntimes(tmp_path: Path, cpu_batch_size: int) -> None:
    file = convolutions(tmp_path)

    rows = opened(file, cpu_batch_size).predict(FRAMES, [5, 0, 3, 7])

    (logits,) = expected(file, FRAMES)
    np.testing.assert_allclose([row["logits"] for row in rows], logits[[5, 0, 3, 7]], rtol=1e-4)
    assert rows[0]["logits"].dtype == np.float32


def test_a_row_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    model = opened(convolutions(tmp_path), 3)

    alone = [model.predict(FRAMES, [n])[0]["logits"] for n in range(8)]

    for row, other in zip(model.predict(FRAMES, range(8)), alone, strict=True):
        assert np.array_equal(row["logits"], other)


@pytest.mark.parametrize("n", [1, 4])
def test_a_model_of_a_fixed_batch_size_runs_in_that_size(tmp_path: Path, n: int) -> None:
    file = convolutions(tmp_path, shape=(n, 3, SIZE, SIZE))

    model = opened(file, 3)
    rows = model.predict(FRAMES, range(6))

    assert model.rows_at_once == n
    (logits,) = expected(convolutions(tmp_path / "free"), FRAMES[:6])
    np.testing.assert_allclose([row["logits"] for row in rows], logits, rtol=1e-4)


def test_a_model_of_free_sizes_runs_in_each(tmp_path: Path) -> None:
    file = write_onnx(tmp_path / "m.onnx", [MEANS], ["mean"], shape=("N", 3, "H", "W"))
    model = opened(file, **PLAIN)

    for height, width in [(32, 32), (8, 40), (32, 32)]:
        frames = FRAMES.reshape(-1)[: 2 * height * width * 3].reshape(2, height, width, 3)
        rows = model.predict(frames, [1])
        np.testing.assert_allclose(rows[0]["mean"], frames[1].mean((0, 1)), rtol=1e-5)


def test_outputs_keep_their_names_and_kinds(tmp_path: Path) -> None:
    nodes = [MEANS, MOST, helper.make_node("ArgMax", ["mean"], ["best"], axis=1, keepdims=0)]
    file = write_onnx(tmp_path / "m.onnx", nodes, ["best", "most", "mean"])

    (row,) = opened(file).warm_up()

    assert {name: (array.shape, array.dtype.name) for name, array in row.items()} == {
        "best": ((), "int64"),
        "most": ((), "float32"),
        "mean": ((3,), "float32"),
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [("FLOAT16", 0.5), ("DOUBLE", 1e-3), ("UINT8", 0)])
def test_an_input_of_another_type_is_given_that(
    tmp_path: Path, dtype: str, tolerance: float
) -> None:
    cast = helper.make_node("Cast", ["image"], ["same"], to=getattr(TensorProto, dtype))
    file = write_onnx(tmp_path / "m.onnx", [cast], ["same"], dtype=dtype)

    (row,) = opened(file, **PLAIN).predict(FRAMES, [2])

    np.testing.assert_allclose(row["same"], FRAMES[2].transpose(2, 0, 1), atol=tolerance)
    assert row["same"].dtype == (np.uint8 if dtype == "UINT8" else np.float32)


def test_weights_may_lie_in_a_file_beside_the_model(tmp_path: Path) -> None:
    file = convolutions(tmp_path)
    whole = package_of(file).fingerprint()["weights"]
    (logits,) = expected(file, FRAMES)

    onnx.save(
        onnx.load(file), file, save_as_external_data=True, location="data.bin", size_threshold=0
    )
    package = package_of(file)

    assert package.files == (file, tmp_path / "data.bin")
    (row,) = open_model(package, "cpu", 8, 1).predict(FRAMES, [4])
    np.testing.assert_allclose(row["logits"], logits[4], rtol=1e-4)
    before = package.fingerprint()["weights"]
    (tmp_path / "data.bin").write_bytes(bytes((tmp_path / "data.bin").stat().st_size))
    assert whole != before != package.fingerprint()["weights"]


def test_a_folder_with_a_single_onnx_file_is_a_package(tmp_path: Path) -> None:
    file = convolutions(tmp_path)

    assert load_package(tmp_path).weights == load_package(file).weights == file


def test_torch_is_not_imported_for_it(tmp_path: Path) -> None:
    convolutions(tmp_path)
    text = f"model_type: classifier\nweights: model.onnx\ninput: {INPUT}\n"
    (tmp_path / "model.yaml").write_text(text)
    code = (
        "import sys, pathlib, evmp.model.package as p, evmp.model as m\n"
        "package = p.load_package(sys.argv[1]); m.preload(package)\n"
        "import os; assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"
        "print(len(os.listdir('/proc/self/task')), 'onnxruntime' in sys.modules)\n"
        "print(m.open_model(package, 'auto', 1, 1).warm_up()[0]['logits'].shape)\n"
        "print({'torch', 'onnx'} & {*sys.modules})"
    )
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    del env["ORT_DISABLE_TELEMETRY"]

    said = subprocess.check_output([sys.executable, "-c", code, str(tmp_path)], text=True, env=env)

    assert said.splitlines() == ["1 True", "(5,)", "set()"]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": ("N", 3, 64, 48)}, r"input is image: \(N, 3, 64, 48\), expected \(batch, 3,"),
        ({"shape": ("N", 1, 32, 32)}, r"image: \(N, 1, 32, 32\), expected \(batch, 3, 32, 32\)"),
        ({"shape": ("N", 32, 32, 3)}, r"image: \(N, 32, 32, 3\), with the channels last \(NHWC\)"),
        ({"shape": ("N", 3072)}, r"image: \(N, 3072\), expected \(batch, 3, 32, 32\)"),
        ({"dtype": "INT64"}, r"input image is tensor\(int64\), expected float, float16 or uint8"),
        (
            {"inputs": ("image", "size")},
            r"inputs image: .*, size: .*, expected one, .* \(batch, 3, height, width\)",
        ),
        ({"dtype": "UINT8"}, r"bytes from 0 to 255, but .*; say scale: 1, mean: \[0, 0, 0\]"),
        ({"opset": 99}, r"onnxruntime .* cannot load it: ONNX Runtime only .*opset"),
    ],
)
def test_an_unfit_model_is_refused_with_what_was_found(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    same = helper.make_node("Identity", ["image"], ["same"])
    file = write_onnx(tmp_path / "m.onnx", [same], ["same"], **options)

    with pytest.raises(ModelError, match=message) as caught:
        opened(file)

    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def test_a_fixed_size_is_no_dynamic_one(tmp_path: Path) -> None:
    dynamic = {"size": "dynamic", "resize": "stretch", "multiple_of": 8, **PLAIN}
    fixed = write_onnx(tmp_path / "m.onnx", [MEANS], ["mean"])

    with pytest.raises(
        ModelError, match=r"\(N, 3, 32, 32\), expected \(batch, 3, 8 to 32, 8 to 32"
    ):
        opened(fixed, **dynamic)
    half = write_onnx(tmp_path / "h.onnx", [MEANS], ["mean"], shape=("N", 3, 32, "W"))
    with pytest.raises(ModelError, match="8 to 32"):
        opened(half, **dynamic)
    assert opened(half, min_height=32, **dynamic).warm_up()


def test_a_precision_of_its_own_is_refused(tmp_path: Path) -> None:
    package = package_of(convolutions(tmp_path), "fp16")

    with pytest.raises(ModelError, match=r"precision: got fp16, but an ONNX model computes in the"):
        open_model(package, "cpu", 8, 1)


def test_an_operator_that_is_not_there_is_named(tmp_path: Path) -> None:
    file = write_onnx(tmp_path / "m.onnx", [helper.make_node("Frob", ["image"], ["x"])], ["x"])

    with pytest.raises(ModelError, match=r"m\.onnx: onnxruntime .* cannot load it: .* Frob"):
        opened(file)


def test_a_network_that_fails_on_the_size_is_refused_by_the_first_run(tmp_path: Path) -> None:
    wide = np.zeros((3, 48), np.float32)
    node = helper.make_node("MatMul", ["image", "wide"], ["x"])
    shape = ("N", 3, "H", "W")
    file = write_onnx(tmp_path / "m.onnx", [node], ["x"], shape=shape, weights={"wide": wide})

    with pytest.raises(ModelError, match=r"model failed: .* it was given \(1, 3, 32, 32\) in tens"):
        opened(file).warm_up()


class ShortSession:
    """A session on a card that has room for three images."""

    def __init__(self, session: Any, sizes: list[int]) -> None:
        self._session, self._sizes = session, sizes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        (batch,) = inputs.values()
        self._sizes.append(len(batch))
        if len(batch) > 3:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 8192")
        return self._session.run(names, inputs)


def test_a_batch_that_does_not_fit_is_halved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from evmp.model.onnx import OnnxModel, open_session

    file, sizes = convolutions(tmp_path), list[int]()
    model = OnnxModel(ShortSession(open_session(file), sizes), package_of(file), 8)

    rows = model.predict(FRAMES, range(8))

    assert (sizes, model.rows_at_once) == ([8, 4, 2, 2, 2, 2], 2)
    assert "out of GPU memory: from now on 2 images at once" in caplog.text
    np.testing.assert_allclose(
        [row["logits"] for row in rows], expected(file, FRAMES)[0], rtol=1e-4
    )


def test_a_fixed_batch_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    from evmp.model.onnx import OnnxModel, open_session

    file = convolutions(tmp_path, shape=(4, 3, SIZE, SIZE))
    model = OnnxModel(ShortSession(open_session(file), []), package_of(file), 8)

    with pytest.raises(ModelError, match="the model failed: Failed to allocate memory"):
        model.predict(FRAMES, range(8))


def test_a_card_that_is_lost_is_no_rows_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evmp.model.onnx import OnnxModel, open_session

    file = convolutions(tmp_path)
    session = ShortSession(open_session(file), [])
    model = OnnxModel(session, package_of(file), 8)

    def lost(*_: object) -> None:
        raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")

    monkeypatch.setattr(session, "run", lost)
    with pytest.raises(DeviceLost, match="CUDA failure 700"):
        model.predict(FRAMES, [0])


def test_an_output_that_is_no_batch_is_refused(tmp_path: Path) -> None:
    all_of_it = helper.make_node("ReduceMax", ["image"], ["all"], keepdims=0)
    file = write_onnx(tmp_path / "m.onnx", [all_of_it], ["all"])

    with pytest.raises(ModelError, match=r"output all is \(\) for a batch of 1, expected \(1"):
        opened(file).warm_up()


@pytest.mark.parametrize("place", ["../weights.bin", "/etc/passwd", "a/../../weights.bin"])
def test_weights_outside_of_the_package_are_refused(tmp_path: Path, place: str) -> None:
    file = _pointing_to(tmp_path, place)

    for call in (preload, opened_package, ModelPackage.fingerprint):
        with pytest.raises(ModelError, match=r"its external data .* leads out of the model's dir"):
            call(package_of(file))


def test_a_link_out_of_the_package_is_refused(tmp_path: Path) -> None:
    file = _pointing_to(tmp_path, "data.bin")
    with pytest.raises(ModelError, match=r'its external data "data\.bin" is not a file there'):
        opened(file)

    (file.parent / "data.bin").symlink_to(tmp_path / "weights.bin")

    with pytest.raises(ModelError, match=r'external data "data\.bin" is a link out of the model'):
        opened(file)


def opened_package(package: ModelPackage) -> Model:
    return open_model(package, "cpu", 8, 1)


def _pointing_to(folder: Path, place: str) -> Path:
    """Write a model, in a folder of its own, whose weights are said to be in `place`."""
    file = convolutions(folder / "model")
    model = onnx.load(file)
    onnx.external_data_helper.convert_model_to_external_data(model, location="x", size_threshold=0)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = place
    (folder / "weights.bin").write_bytes(bytes(4096))
    file.write_bytes(model.SerializeToString())
    return file


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[Callable[[bytes], bytes]], Path]:
    def damaged(change: Callable[[bytes], bytes]) -> Path:
        file = convolutions(tmp_path)
        file.write_bytes(change(file.read_bytes()))
        return file

    return damaged


@pytest.mark.parametrize("keep", [1, 2, 3, 0.5, 0.999])
def test_a_truncated_file_is_said_to_be_one(damaged: Callable[..., Path], keep: float) -> None:
    file = damaged(lambda data: data[: keep if isinstance(keep, int) else int(len(data) * keep)])

    message = r"model\.onnx: (a truncated or damaged ONNX file|no ONNX model, there is no graph)"
    with pytest.raises(ModelError, match=message):
        opened(file)


def test_no_damage_is_more_than_an_error(tmp_path: Path) -> None:
    data = np.frombuffer(_pointing_to(tmp_path, "data.bin").read_bytes(), np.uint8)
    random = np.random.default_rng(0)
    refused = 0

    for _ in range(300):
        broken = data.copy()
        places = random.integers(1, len(data), 3)
        broken[places] = random.integers(0, 256, 3)
        (tmp_path / "m.onnx").write_bytes(broken.tobytes())
        try:
            files_of(tmp_path / "m.onnx")
        except ModelError as error:
            refused += 1
            assert "\n" not in str(error)

    assert refused > 250  # of a whole one it is said that data.bin is not there


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file, expected a TorchScript or torch.export archive or an ONNX"),
        (b"version https://git-lfs", r"no ONNX model \(starts with 'version https://'\)"),
        (b"\x08\x0a", "no ONNX model, there is no graph in it"),
    ],
)
def test_what_is_no_onnx_is_named(
    damaged: Callable[..., Path], content: bytes, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        opened(damaged(lambda _: content))


def test_graphs_nested_without_end_are_refused(tmp_path: Path) -> None:
    graph = b""
    for _ in range(3000):  # a graph in an attribute of a node of a graph
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            graph = tag + _length(graph) + graph
    (tmp_path / "m.onnx").write_bytes(b"\x08\x0a\x3a" + _length(graph) + graph)

    with pytest.raises(ModelError, match="a truncated or damaged ONNX file"):
        opened(tmp_path / "m.onnx")


def _length(data: bytes) -> bytes:
    number, digits = len(data), []
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def test_onnxruntime_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "evmp.model.onnx", raising=False)
    package = package_of(convolutions(tmp_path))

    for call in (preload, opened_package):
        with pytest.raises(ModelError, match=r"needs onnxruntime, .*; install evmp\[onnx\]"):
            call(package)


def test_cuda_without_a_gpu_is_refused(tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    package = package_of(convolutions(tmp_path))

    with pytest.raises(ModelError, match=r"got cuda, but onnxruntime .* is built without it"):
        open_model(package, "cuda", 8, 1)
    assert open_model(package, "auto", 8, 1).device == "cpu"


def test_a_gpu_that_onnxruntime_cannot_use_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    package = package_of(convolutions(tmp_path))

    monkeypatch.setattr(machine, "gpus", list)
    open_model(package, "auto", 8, 1)
    assert caplog.text == ""
    monkeypatch.setattr(machine, "gpus", lambda: ["0"])
    open_model(package, "auto", 8, 1)

    assert "cannot use the GPU, so one process on the CPU takes its place" in caplog.text


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: _pointing_to(folder, "../weights.bin"), '"../weights.bin" leads out of'),
        (
            lambda folder: write_onnx(
                folder / "model" / "model.onnx", [MEANS], ["mean"], inputs=("image", "size")
            ),
            "the model has the inputs image: (N, 3, 32, 32), size: (N, 3, 32, 32), expected one",
        ),
    ],
)
def test_a_job_is_refused_at_its_start(
    job: JobFolder,
    make_table: Callable[..., Path],
    photo_file: Callable[..., bytes],
    write: Callable[[Path], Path],
    message: str,
) -> None:
    write(job.path)
    text = f"model_type: classifier\nweights: model.onnx\ninput: {INPUT}\n"
    (job.path / "model" / "model.yaml").write_text(text)
    make_table(job.path / "in.parquet", [photo_file("coffee", "JPEG", (40, 40))])
    job.write(model_path="model")

    done = job.run()

    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("evmp: model: ") and message in done.stderr
    assert "Traceback" not in done.stderr and not (job.path / "out.jsonl").exists()
