"""The kernels on random inputs, built with sanitizers: no access outside a buffer, no overflow.

tests/c/fuzz_kernels.c compares every level with plain code and exits with 1 at a difference, or
where a sanitizer finds something. It knows no Python, so it runs on other processors, too.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted(
    str(file)
    for kind in ("simd", "base64", "resize", "normalize")
    for file in (ROOT / "csrc").glob(f"{kind}*.c")
)
FLAGS = ["-std=c11", "-g", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ROUNDS = 5_000
MANY_ROUNDS = 200_000


def build(compiler: str, program: Path, *flags: str) -> Path:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    driver = str(ROOT / "tests" / "c" / "fuzz_kernels.c")
    subprocess.run(
        [compiler, *FLAGS, *flags, f"-I{ROOT / 'csrc'}", "-o", program, driver, *KERNELS, "-lm"],
        check=True,
    )
    return program


def fuzz(*command: str | Path, seed: int, rounds: int) -> str:
    run = subprocess.run(
        [*command, str(seed), str(rounds)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = run.stdout.decode(errors="replace")
    assert run.returncode == 0, output
    return output


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("gcc", tmp_path_factory.mktemp("c") / "fuzz_kernels", "-O1", *SANITIZERS)


def test_kernels_agree_and_stay_inside_their_buffers(sanitized: Path) -> None:
    assert f"agree after {ROUNDS} rounds" in fuzz(sanitized, seed=1, rounds=ROUNDS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_kernels_agree_for_long(sanitized: Path, seed: int) -> None:
    fuzz(sanitized, seed=seed, rounds=MANY_ROUNDS)


@pytest.mark.slow
def test_clang_compiles_without_a_warning_and_agrees(tmp_path: Path) -> None:
    program = build("clang", tmp_path / "fuzz_kernels", "-O3", *SANITIZERS)

    fuzz(program, seed=1, rounds=ROUNDS)


@pytest.mark.slow
def test_neon_agrees(tmp_path: Path) -> None:
    emulator = shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("qemu-aarch64 is not installed")
    program = build("aarch64-linux-gnu-gcc", tmp_path / "fuzz_kernels", "-O3", "-static")

    assert "neon" in fuzz(emulator, program, seed=1, rounds=ROUNDS)
