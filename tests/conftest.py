"""What every test may use: photographs, models, tables, and the command as a real process."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import cudastub
import demo
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from footprint import Footprint, kill_left, left_behind
from hypothesis import HealthCheck, settings
from jobfolder import JobFolder
from modelfolder import write_onnx
from PIL import Image

from evmp import _native

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # for tests that call onnxruntime by themselves
os.environ["ALIBABA_CLOUD_ECS_METADATA_DISABLED"] = "true"  # no machine of theirs is asked

# How long an example takes says how busy the machine is.
settings.register_profile("evmp", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("evmp")

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "evmp"]

TINY_LABELS = ["dark", "red", "green", "blue", "bright"]
TINY_WEIGHT = np.array([[-9, -9, -9], [8, -4, -4], [-4, 8, -4], [-4, -4, 8], [5, 5, 5]], np.float32)
TINY_BIAS = np.array([9, 0, 0, 0, -7], np.float32)
TINY_YAML: dict[str, Any] = {
    "model_type": "classifier",
    "input": {"height": 32, "width": 32, "resize": "stretch", "mean": [0, 0, 0], "std": [1, 1, 1]},
    "output": {"activation": "softmax", "labels": TINY_LABELS},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # of pytest-xdist
        os.setsid()  # `footprint` tells what was forked and never exec'ed by its session


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_cuda") and not has_cuda():
        if os.environ.get("EVMP_REQUIRE_CUDA") == "1":
            pytest.fail("needs a GPU; torch finds none although EVMP_REQUIRE_CUDA=1")
        pytest.skip("needs a GPU")


@cache
def has_cuda() -> bool:
    """Ask in a process of its own: a process that has touched CUDA can no longer fork."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test that leaves a process, shared memory or an open file, and clean up after it."""
    before = Footprint()
    yield
    # CUDA keeps files of its own open from its first use to the end of the process.
    left = left_behind(before, files=not request.node.get_closest_marker("needs_cuda"))
    if left:
        kill_left(before)
        pytest.fail("the test left behind: " + "; ".join(left))


@pytest.fixture(params=_native.simd_levels())
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with every instruction set that this CPU has kernels for."""
    before = _native.simd_level()
    _native.set_simd_level(request.param)
    yield request.param
    _native.set_simd_level(before)


@pytest.fixture(scope="session")
def wheels() -> Path:
    """The folder of packages that config/demo.py takes its photographs and its network from."""
    return demo.fetch()


@pytest.fixture(scope="session")
def photo(wheels: Path) -> Callable[[str], np.ndarray]:
    """`photo("coffee")`: a real photograph, (H, W, 3) uint8 RGB.

    There are coffee, chelsea, camera, rocket, astronaut, hubble_deep_field, china and flower.
    """
    files = {Path(name).stem: data for name, data in demo.photographs(wheels).items()}

    def photo(name: str) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB"))

    return photo


@pytest.fixture(scope="session")
def photo_file(photo: Callable[[str], np.ndarray]) -> Callable[..., bytes]:
    """`photo_file("coffee", "JPEG", (320, 240), quality=90)`: the bytes of an image file.

    The size is (width, height), the photograph's own if left out; options go to Pillow's `save`.
    """

    def photo_file(
        name: str, kind: str = "JPEG", size: tuple[int, int] | None = None, **options: Any
    ) -> bytes:
        picture = Image.fromarray(photo(name))
        file = io.BytesIO()
        (picture.resize(size) if size else picture).save(file, kind, **options)
        return file.getvalue()

    return photo_file


def tiny_logits(pixels: np.ndarray) -> np.ndarray:
    """Predict like the tiny model, in plain numpy.

    Args:
        pixels: (H, W, 3) uint8 RGB, already at the model's size.

    Returns:
        (5,) float32 logits, in the order of TINY_LABELS.
    """
    mean_colour = pixels.reshape(-1, 3).mean(axis=0, dtype=np.float64) / 255
    return (TINY_WEIGHT @ mean_colour + TINY_BIAS).astype(np.float32)


def write_tiny_model(folder: Path, *, network: Any = None, steps: int = 0, **settings: Any) -> Path:
    """Write a model package that classifies the mean colour of 32 x 32 pixels scaled to [0, 1].

    An ONNX file: jobs start with a third of the CPU time that importing torch takes.

    Args:
        network: a module to write as TorchScript, around `tiny_network()` perhaps, in its place.
        steps: that make it slow, 100 of them by about a millisecond.
        settings: keys of model.yaml to add or replace; those of `input` and `output` join ours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if network is None:
        write_tiny_onnx(folder / "model.onnx", steps)
        settings["weights"] = "model.onnx"
    else:
        import torch

        torch.jit.save(torch.jit.script(network.eval()), folder / "model.pt")
    joined = {key: {**TINY_YAML[key], **settings.pop(key, {})} for key in ("input", "output")}
    (folder / "model.yaml").write_text(yaml.safe_dump({**TINY_YAML, **joined, **settings}))
    return folder


def write_tiny_onnx(file: Path, steps: int = 0) -> None:
    """Write the tiny model, and beside it `steps` sines of 4,096 numbers that change nothing."""
    from onnx import helper

    node = helper.make_node
    sines = [node("Sin", [f"sine{i}"], [f"sine{i + 1}"]) for i in range(steps)]
    nodes = [
        node("ReduceMean", ["image"], ["mean"], axes=[2, 3], keepdims=0),
        node("Gemm", ["mean", "weight", "bias"], ["scores"], transB=1),
        node("ReduceMax", ["image"], ["max"], keepdims=0),
        node("Add", ["ones", "max"], ["sine0"]),
        *sines,
        node("ReduceSum", [f"sine{steps}"], ["sum"], keepdims=0),
        node("Mul", ["sum", "zero"], ["zeros"]),
        node("Add", ["scores", "zeros"], ["logits"]),
    ]
    weights = {
        "weight": TINY_WEIGHT,
        "bias": TINY_BIAS,
        "zero": np.zeros((), np.float32),
        "ones": np.ones(4096, np.float32),
    }
    write_onnx(file, nodes, ["logits"], weights=weights)


def tiny_network() -> Any:
    """The tiny model's module, (N, 3, H, W) to (N, 5)."""
    import torch

    linear = torch.nn.Linear(3, len(TINY_LABELS))
    linear.load_state_dict(
        {"weight": torch.from_numpy(TINY_WEIGHT), "bias": torch.from_numpy(TINY_BIAS)}
    )
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), linear)


@pytest.fixture(scope="session")
def torchvision(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """torchvision with its operators, here and in every process that is started from now on."""
    import torch

    if torch.version.cuda is None:
        try:
            cudastub.load_stubs(tmp_path_factory.mktemp("cuda"))
        except (LookupError, OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"torchvision has no operators here: {error}")
    return pytest.importorskip("torchvision")


@pytest.fixture(scope="session")
def make_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_tiny_model(input={"resize": "letterbox"})`: the folder of such a tiny model."""

    def make_tiny_model(**settings: Any) -> Path:
        return write_tiny_model(tmp_path_factory.mktemp("tiny_model"), **settings)

    return make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(make_tiny_model: Callable[..., Path]) -> Path:
    """The folder of a tiny model whose answers `tiny_logits` foretells."""
    return make_tiny_model()


@pytest.fixture(scope="session")
def trouble_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`trouble_model("Fussy")`: a tiny model with one of the troubles of trouble.py."""

    def trouble_model(name: str, **options: Any) -> Path:
        import trouble

        network = getattr(trouble, name)(tiny_network(), **options)
        return write_tiny_model(tmp_path_factory.mktemp(name), network=network)

    return trouble_model


@pytest.fixture(scope="session")
def undisturbed_job(
    tmp_path_factory: pytest.TempPathFactory,
    make_tiny_model: Callable[..., Path],
    make_table: Callable[..., Path],
    photo_file: Callable[..., bytes],
) -> Callable[..., Path]:
    """`undisturbed_job(n_rows, *arguments, steps=400, **keys)`: a folder with a job and its result.

    Its model is slow by so many steps, its table's row 7 is no image.
    """

    def undisturbed_job(n_rows: int, *arguments: str, steps: int, **keys: Any) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        names = ["coffee", "chelsea", "camera", "rocket", "china"]
        images: list[bytes | str] = [
            photo_file(names[row % 5], size=(60 + row, 200 - row)) for row in range(n_rows)
        ]
        images[7] = "no Base64"
        table = make_table(folder / "in.parquet", images, row_group_size=16)
        model = make_tiny_model(steps=steps)
        JobFolder(folder, model, subprocess.run, subprocess.Popen).write(
            input_table=str(table), batch_size=4, queue_size=32, **keys
        )
        subprocess.run(
            [*COMMAND, "--config", "job.yaml", "--quiet", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
        )
        return folder

    return undisturbed_job


@pytest.fixture(scope="session")
def real_model(wheels: Path) -> Path:
    """The folder of the demo's model, EfficientNet-Lite0; traced once, then kept in .cache/."""
    source = hashlib.sha256(Path(demo.__file__).read_bytes()).hexdigest()[:12]
    return demo.kept(wheels.parent / f"model-{source}", partial(demo.build_model, wheels))


@pytest.fixture(scope="session")
def real_features(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a feature extractor, EfficientNet-Lite0 with `features` and `colour`."""
    import torch

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = demo.load_network(wheels)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"colour": x.mean((2, 3)), "features": self.network.extract_features(x)}

    folder = tmp_path_factory.mktemp("real_features")
    demo.trace_network(Features().eval(), folder / "model.pt")
    spec = yaml.safe_load(demo.MODEL_YAML)["input"]
    package = {"model_type": "feature_extractor", "input": spec}
    (folder / "model.yaml").write_text(yaml.safe_dump(package))
    return folder


def write_table(
    path: Path,
    images: Sequence[bytes | str | None],
    *,
    row_group_size: int = 64,
    **columns: Sequence[object],
) -> Path:
    """Write a Parquet table: `id` ("0", "1", ...), `image`, and further columns.

    Args:
        images: bytes become Base64; text and None stand as they are.
        columns: by name, as long as `images`; one called `id` or `image` replaces ours.
    """
    texts = [
        base64.b64encode(image).decode() if isinstance(image, bytes) else image for image in images
    ]
    ids = [str(index) for index in range(len(texts))]
    image = pa.array(texts, pa.string())
    table = pa.table({"id": pa.array(ids, pa.string()), "image": image, **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


@pytest.fixture(scope="session")
def make_table() -> Callable[..., Path]:
    """`make_table(path, images, row_group_size=64, pt=[...])`; see `write_table`."""
    return write_table


@pytest.fixture
def start_evmp() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start_evmp("--config", job)`: evmp as a process in a group of its own, output piped.

    Whatever still runs at the end of the test is killed, descendants first asked for.
    """
    before = Footprint()
    started: list[subprocess.Popen[str]] = []

    def start_evmp(
        *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start_evmp
    for process in started:
        if process.poll() is None:
            kill_left(before)
        process.communicate()


@pytest.fixture
def run_evmp(
    start_evmp: Callable[..., subprocess.Popen[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_evmp("--config", job, timeout=60)`: run evmp to its end; see `start_evmp`."""

    def run_evmp(
        *arguments: object, timeout: float = 60.0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        before = Footprint()
        process = start_evmp(*arguments, **options)
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_left(before)
            output, errors = process.communicate()
            pytest.fail(f"evmp still ran after {timeout} s; it had said:\n{output}{errors}")
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    return run_evmp


@pytest.fixture
def job(
    tmp_path: Path,
    tiny_model: Path,
    run_evmp: Callable[..., subprocess.CompletedProcess[str]],
    start_evmp: Callable[..., subprocess.Popen[str]],
) -> JobFolder:
    """A folder with a job of the tiny model in it; see `JobFolder`."""
    return JobFolder(tmp_path, tiny_model, run_evmp, start_evmp)
