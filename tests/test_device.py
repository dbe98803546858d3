"""Devices: frames there and outputs back, by one contract for the CPU and a GPU."""

from __future__ import annotations

import io
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from conftest import ROOT, tiny_network
from jobfolder import JobFolder
from latedevice import Late
from PIL import Image

import evmp.model
from evmp.child import call_in_child
from evmp.grid import Block
from evmp.job import load_job
from evmp.metrics import Board
from evmp.model import open_model
from evmp.model.device import Cpu, Device, Gpu
from evmp.model.network import BatchNetwork
from evmp.model.package import load_package
from evmp.pipeline import Worker
from evmp.plan import make_plan
from evmp.ring import Ring

GPU = pytest.param(Gpu, marks=pytest.mark.needs_cuda)


@pytest.fixture
def tiny_model(make_tiny_model: Callable[..., Path]) -> Path:
    """The folder of the tiny model in TorchScript."""
    return make_tiny_model(network=tiny_network())


@pytest.fixture(params=[Cpu, GPU], ids=["Cpu", "Gpu"])
def device(request: pytest.FixtureRequest) -> Device:
    made: Device = request.param()
    return made


@pytest.fixture
def memory() -> Iterator[memoryview]:
    """Shared memory such as a ring has, of 1 MiB."""
    with mmap.mmap(-1, 1 << 20) as shared:
        view = memoryview(shared)
        yield view
        view.release()


def noise(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def test_what_goes_up_comes_down(device: Device) -> None:
    frames = device.staging((3, 5, 7, 3))
    frames.copy_(noise((3, 5, 7, 3)))

    there = device.upload(frames)
    doubled = device.download(there.to(torch.int64) * 2)
    device.mark()()

    assert there.device == device.place
    assert torch.equal(doubled, frames.to(torch.int64) * 2)


def test_downloads_are_contiguous_and_of_their_own_memory(device: Device) -> None:
    there = device.upload(noise((4, 6)))

    copy = device.download(there.t())
    same = device.download(copy)  # of the host already, as a network may return it
    device.mark()()
    there.zero_()

    assert copy.is_contiguous() and copy.device.type == "cpu"
    assert torch.equal(copy, noise((4, 6)).t())
    assert torch.equal(same, copy) and same.data_ptr() != copy.data_ptr()


def test_many_in_flight_come_down_whole(device: Device) -> None:
    batches = [noise((8, 64, 64, 3)) + n for n in range(20)]

    begun = [(device.download(device.upload(it).float() + 0.5), device.mark()) for it in batches]

    for (copy, mark), frames in zip(begun, batches, strict=True):
        mark()
        assert torch.equal(copy, frames.float() + 0.5)


def test_pinned_memory_goes_up_like_any_other(device: Device, memory: memoryview) -> None:
    frames = torch.frombuffer(memory, dtype=torch.uint8)
    frames.copy_(noise((1 << 20,)))

    device.pin(memory)
    copy = device.download(device.upload(frames))
    device.mark()()
    device.close()

    assert torch.equal(copy, noise((1 << 20,)))
    del frames


def test_device_that_works_is_not_lost(device: Device) -> None:
    device.check()
    device.free()


@pytest.mark.needs_cuda
def test_rings_memory_is_pinned_until_the_device_is_closed() -> None:
    ring, gpu = Ring("pixels", 4, 8, 3000), Gpu()
    ring.populate(3000)
    batch = torch.frombuffer(ring.batch(2), dtype=torch.uint8)

    gpu.pin(ring.payloads)
    was_pinned = batch.is_pinned()
    gpu.close()

    assert was_pinned and not batch.is_pinned()


@pytest.mark.needs_cuda
def test_memory_that_cannot_be_pinned_costs_a_warning(
    memory: memoryview, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = Gpu()
    gpu.pin(memory)

    gpu.pin(memory)  # which is pinned already

    assert "memory of 1 MiB cannot be pinned" in caplog.text
    copy = gpu.download(gpu.upload(noise((10,))) + 1)  # the next kernel is not blamed for it
    gpu.mark()()
    assert torch.equal(copy, noise((10,)) + 1)
    gpu.close()


@pytest.mark.needs_cuda
def test_batches_in_flight_on_a_gpu_equal_those_alone(tiny_model: Path) -> None:
    model = open_model(load_package(tiny_model), "cuda", 16, 1)
    model.warm_up()
    batches = [(noise((16, 32, 32, 3)) + n).numpy() for n in range(6)]
    rows = [range(16), [3], range(4, 12), [9, 2, 5], range(16), range(1, 16)]
    alone = [model.predict(*pair) for pair in zip(batches, rows, strict=True)]

    begun = [model.start(*pair) for pair in zip(batches, rows, strict=True)]

    for pending, expected in zip(reversed(begun), reversed(alone), strict=True):
        for row, other in zip(pending.result(), expected, strict=True):
            assert np.array_equal(row["0"], other["0"])


LOSE = """
import numpy as np, os, sys
from evmp.model import DeviceLost, open_model
from evmp.model.package import load_package
model = open_model(load_package(sys.argv[1]), "cuda", 4, 1)
frames = np.zeros((4, 32, 32, 3), np.uint8)
assert len(model.predict(frames, range(4))) == 4
frames[2] = 255
try:
    model.predict(frames, range(4))
except DeviceLost as error:
    print("lost:", error, flush=True)
os._exit(0)  # a stage ends so, too: nothing of CUDA may be asked any more
"""


@pytest.mark.needs_cuda
def test_gpu_that_was_led_astray_is_lost(trouble_model: Callable[..., Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOSE, trouble_model("Stray")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("lost: CUDA error: device-side assert triggered")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cpu", "ModelError: the model failed: "),
        pytest.param(
            "cuda",
            "the predictor died of this row: exit code 70: evmp.model.DeviceLost: CUDA error",
            marks=pytest.mark.needs_cuda,
        ),
    ],
)
def test_row_that_leads_a_model_astray_costs_only_itself(
    job: JobFolder,
    make_table: Callable[..., Path],
    trouble_model: Callable[..., Path],
    device: str,
    message: str,
) -> None:
    images = []
    for number in range(40):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (255, 255, 255) if number == 19 else (number, 0, 0)).save(
            file, "PNG"
        )
        images.append(file.getvalue())
    make_table(job.path / "in.parquet", images)

    rows = job.do(
        model_path=str(trouble_model("Stray")), device=device, predict_thread_num=2, batch_size=8
    )

    failures = {
        number: row["prediction_result"]["error_msg"]
        for number, row in enumerate(rows)
        if "error_msg" in row["prediction_result"]
    }
    assert list(failures) == [19]
    assert failures[19].startswith(message)
    assert len(rows) == 40


def rehearsed(job: Path, n_rows: int) -> list[dict[str, Any]]:
    """Run a job's stages but the writer in this process; return the results."""
    plan = make_plan(load_job(job, []))
    layout = plan.layout.holding(n_rows)
    seats, ledger = Board(layout.roles, 1).workers[0], plan.target.ledger
    worker = Worker(0, plan.job, plan.package, layout, ledger, plan.source, seats, list)
    results = worker.rehearse([Block(0, n_rows)], 1)
    return [orjson.loads(results.data(n)) for n in range(n_rows)]


def test_stages_with_batches_in_flight_give_the_results_of_those_without(
    job: JobFolder, make_table: Callable[..., Path], tiny_model: Path
) -> None:
    random = np.random.default_rng(0)
    images = []
    for side in random.integers(8, 64, 45):
        file = io.BytesIO()
        pixels = random.integers(0, 256, (side, 40, 3), np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        images.append(b"no image" if side == 20 else file.getvalue())
    make_table(job.path / "in.parquet", images)
    file = job.write(
        model_path=str(tiny_model),
        predict_thread_num=3,
        batch_size=4,
        input_table=str(job.path / "in.parquet"),
        output_oss_file=str(job.path / "out.jsonl"),
    )
    expected = call_in_child(lambda: rehearsed(file, len(images)))

    def on_a_late_device() -> list[dict[str, Any]]:
        network = torch.jit.load(tiny_model / "model.pt")
        evmp.model.open_model = lambda package, *options: BatchNetwork(
            network, package, torch.jit.freeze, 4, Late()
        )
        return rehearsed(file, len(images))

    found = call_in_child(on_a_late_device)

    assert len(found) == len(images)
    for mine, other in zip(found, expected, strict=True):
        assert mine.get("class_name") == other.get("class_name")
        assert mine.get("error_msg") == other.get("error_msg")
        assert mine.get("class_probs") == pytest.approx(other.get("class_probs"), abs=1e-5)


def test_gpu_that_is_required_and_not_found_fails_its_tests() -> None:
    test = "tests/test_device.py::test_rings_memory_is_pinned_until_the_device_is_closed"
    environment = {**os.environ, "EVMP_REQUIRE_CUDA": "1", "CUDA_VISIBLE_DEVICES": ""}

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 1
    assert "torch finds none although EVMP_REQUIRE_CUDA=1" in done.stdout
