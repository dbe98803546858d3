"""One job in a folder of its own, run there by the real command."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import psutil
import pyarrow.parquet as pq
import yaml

SECONDS = 60.0  # that a wait may take; it takes a few hundred milliseconds


class JobFolder:
    """A folder with a job.yaml in it, in which `evmp` is started.

    Args:
        path: the folder; the job's paths are relative to it.
        model: the model package of jobs that name none.
        run, start: the fixtures `run_evmp` and `start_evmp`.
    """

    def __init__(
        self,
        path: Path,
        model: Path,
        run: Callable[..., subprocess.CompletedProcess[str]],
        start: Callable[..., subprocess.Popen[str]],
    ) -> None:
        self.path = path
        self._model = model
        self._run, self._start = run, start

    def write(self, **keys: Any) -> Path:
        """Write job.yaml: `keys` over a small table job; None leaves a key out."""
        joined = {
            "model_path": str(self._model),
            "model_type": "classifier",
            "input_table": "in.parquet",
            "output_oss_file": "out.jsonl",
            "reserved_columns": "id",
            "num_worker": 1,
            "preprocess_thread_num": 2,
            "predict_thread_num": 1,
            "torch_threads": 1,
            "batch_size": 8,
            **keys,
        }
        file = self.path / "job.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in joined.items() if v is not None}))
        return file

    def run(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `evmp --config job.yaml` with further arguments to its end."""
        return self._run("--config", "job.yaml", *arguments, cwd=self.path, **options)

    def start(self, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        """Start `evmp --config job.yaml` with further arguments."""
        return self._start("--config", "job.yaml", *arguments, cwd=self.path, **options)

    def do(self, *arguments: object, **keys: Any) -> list[dict[str, Any]]:
        """Write and run a job that shall end well, and return its rows."""
        self.write(**keys)
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return self.rows(keys.get("output_table") or keys.get("output_oss_file") or "out.jsonl")

    def rows(self, name: str = "out.jsonl") -> list[dict[str, Any]]:
        """Return the rows of a result, in order: JSON lines or Parquet."""
        file = self.path / name
        if file.suffix == ".jsonl":
            return [orjson.loads(line) for line in file.read_bytes().splitlines()]
        return pq.ParquetDataset(file, partitioning=None).read().to_pylist()

    def leftovers(self) -> list[str]:
        """Name what a job has left beside its result, its record aside."""
        return sorted(
            path.name
            for path in self.path.rglob("*")
            if (".evmp" in path.name and not path.name.endswith(".evmp.json"))
            or ".part-" in path.name
        )


def wait_for(process: subprocess.Popen[str], is_so: Callable[[], object]) -> None:
    """Wait until something is so, while the job runs."""
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Kill a job, and wait until its processes are gone. Returns those that are not."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    return psutil.wait_procs(children, timeout=SECONDS)[1]
