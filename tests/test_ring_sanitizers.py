"""The ring's C, without Python: under sanitizers, in threads, and killed at every instruction.

tests/c/fuzz_ring.c passes rows through three rings, checks each, and exits with 1 where one is
wrong or a sanitizer finds something.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fuzzing import mutants

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c11", "-g", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror", "-pthread"]


def run(
    *program: str | Path, how: str, rows: int, seed: int = 1
) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*program, how, str(seed), str(rows)], capture_output=True, text=True)


def build(
    program: Path, *flags: str, ring: Path = ROOT / "csrc" / "ring.c", compiler: str = "gcc"
) -> Path:
    driver, includes = ROOT / "tests" / "c" / "fuzz_ring.c", f"-I{ROOT / 'csrc'}"
    subprocess.run([compiler, *FLAGS, *flags, includes, driver, ring, "-o", program], check=True)
    return program


def numbers(done: subprocess.CompletedProcess[str]) -> list[int]:
    """Return the numbers that a program which ended well has printed."""
    assert done.returncode == 0, done.stdout + done.stderr
    return [int(number) for number in re.findall(r"\d+", done.stdout)]


def fuzz(folder: Path, how: str, *flags: str, rows: int, seed: int = 1) -> list[int]:
    return numbers(run(build(folder / "fuzz_ring", *flags), how=how, rows=rows, seed=seed))


def test_threads_see_whole_rows(tmp_path: Path) -> None:
    assert fuzz(tmp_path, "threads", "-O1", "-fsanitize=thread", rows=30_000) == [30_000]


def test_ring_stays_inside_its_memory_while_processes_die(tmp_path: Path) -> None:
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

    n_rows, n_deaths, n_requeued = fuzz(tmp_path, "steps", "-O1", *sanitizers, rows=9_000)

    assert n_rows == 9_000
    assert n_deaths > 300 and n_requeued > 50


def test_rows_survive_a_death_at_any_instruction(tmp_path: Path) -> None:
    n_rows, n_deaths = fuzz(tmp_path, "instructions", "-O2", rows=12)

    assert n_rows == 12
    assert n_deaths > 200


@pytest.mark.parametrize("how", ["steps", "instructions"])
@pytest.mark.parametrize(
    "name", ["rows are counted instead of marked", "batch of the dead moves on"]
)
def test_broken_protocol_is_seen(tmp_path: Path, name: str, how: str) -> None:
    mutant = mutants.mutate(name, tmp_path)
    program = build(tmp_path / "fuzz_ring", "-O2", "-w", "-DMAX_SECONDS=1", ring=mutant)

    assert run(program, how=how, rows=3_000).returncode != 0


@pytest.mark.slow
def test_rows_survive_on_another_processor(tmp_path: Path) -> None:
    emulator, compiler = shutil.which("qemu-aarch64"), shutil.which("aarch64-linux-gnu-gcc")
    if emulator is None or compiler is None:
        pytest.skip("qemu-aarch64 or its compiler is not installed")
    program = build(tmp_path / "fuzz_ring", "-O2", "-static", compiler=compiler)

    n_rows, n_deaths, _ = numbers(run(emulator, program, how="steps", rows=3_000))

    assert n_rows == 3_000
    assert n_deaths > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_rows_survive_many_deaths(tmp_path: Path, seed: int) -> None:
    n_rows, n_deaths, _ = fuzz(tmp_path, "steps", "-O2", rows=300_000, seed=seed)

    assert n_rows == 300_000
    assert n_deaths > 10_000
