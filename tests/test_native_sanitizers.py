"""The whole extension under sanitizers, with Python around it: what it takes and what it keeps.

The kernels and the ring have sanitizer tests without Python, in test_sanitizers.py and
test_ring_sanitizers.py; here it is the code between them and Python that is watched. The tests of
the extension run once more, in a process in which `evmp._native` is a build with
AddressSanitizer and UndefinedBehaviorSanitizer. They must pass, and nothing may be reported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c11", "-g", "-O1", "-fno-omit-frame-pointer", "-ffp-contract=off"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
TESTS = ["test_base64.py", "test_normalize.py", "test_resize.py", "test_ring.py"]
# Imported before any test, this is `evmp._native` for all that follow.
PLUGIN = """
import importlib.machinery, importlib.util, os, sys
import evmp
path = os.environ["SANITIZED_NATIVE"]
loader = importlib.machinery.ExtensionFileLoader("evmp._native", path)
spec = importlib.util.spec_from_file_location("evmp._native", path, loader=loader)
native = sys.modules["evmp._native"] = evmp._native = importlib.util.module_from_spec(spec)
loader.exec_module(native)
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension, built with sanitizers, beside the plugin that loads it."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    extension = tmp_path_factory.mktemp("native") / "sanitized.so"
    (extension.parent / "sanitized_native.py").write_text(PLUGIN)
    sources = sorted((ROOT / "csrc").glob("*.c"))
    includes = [f"-I{ROOT / 'csrc'}", f"-I{sysconfig.get_paths()['include']}"]
    command = ["gcc", *FLAGS, *SANITIZERS, "-fPIC", "-shared", *includes, *sources, "-lm"]
    subprocess.run([*command, "-o", extension], check=True)
    return extension


def library(name: str) -> str:
    command = ["gcc", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def under_sanitizers(extension: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "SANITIZED_NATIVE": str(extension),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(extension.parent), str(ROOT / "tests")]),
        # The sanitizer must come first; it looks for what C++ throws with, for torch, right behind.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
        # Python leaves much to the end of the process; that is not our leak.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        # Python's own allocator would hide what lies beside a small object.
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_tests(extension: Path, *arguments: str) -> str:
    # Of what a process has written that is ended, pytest would otherwise show nothing.
    options = ["-q", "--capture=sys", "-p", "sanitized_native", "-p", "no:cacheprovider"]
    run = under_sanitizers(extension, "-m", "pytest", *options, *arguments)
    assert run.returncode == 0, run.stdout
    return run.stdout


def test_sanitizers_see_the_extension(sanitized: Path) -> None:
    code = (
        "import sanitized_native; from evmp import _native; import ctypes\n"
        "print(_native.__file__)\n"
        "_native.base64_decode(b'QUJD', (ctypes.c_char * 3).from_address(8))"
    )

    run = under_sanitizers(sanitized, "-c", code)

    assert run.stdout.startswith(str(sanitized))
    assert "ERROR: AddressSanitizer: SEGV" in run.stdout
    assert run.returncode != 0


def test_ring_is_clean(sanitized: Path) -> None:
    assert " passed" in run_tests(sanitized, "tests/test_ring.py", "-k", "refused or own or plain")


@pytest.mark.slow
@pytest.mark.parametrize("name", TESTS)
def test_extension_is_clean(sanitized: Path, name: str) -> None:
    # What is freed stays in the sanitizer's quarantine, where a giant's memory is to go back.
    assert " passed" in run_tests(sanitized, f"tests/{name}", "-k", "not giant")
