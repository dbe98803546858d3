"""Stand-ins for the CUDA libraries that torchvision wants and the CPU build of torch lacks.

torchvision's wheels are built for CUDA. Beside a CPU build of torch its operators cannot be loaded,
because the libraries that it is linked to are missing; on the CPU it calls nothing in them. So they
are replaced by empty ones: whatever torchvision does not find elsewhere returns 0.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
from pathlib import Path

LIBRARIES = "libc10_cuda.so", "libtorch_cuda.so", "libcudart.so.13"


def load_stubs(folder: Path) -> None:
    """Build the libraries in a folder, and load them in this process and those that it starts.

    Raises:
        LookupError: torchvision is not installed.
        OSError, subprocess.CalledProcessError: there is no C compiler.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise LookupError("torchvision is not installed")
    wanted = [_wanted_of(file) for file in sorted(Path(spec.origin).parent.glob("*.so"))]
    _build(folder, {name: version for symbols in wanted for name, version in symbols.items()})
    paths = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    for name in LIBRARIES:  # the loader has read that variable when this process began
        ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)


def _wanted_of(file: Path) -> dict[str, str]:
    """Return the CUDA functions that a library leaves open, with their version or none."""
    text = subprocess.check_output(["nm", "-D", "--undefined-only", file], text=True)
    names = re.findall(r" U (\w*cuda\w*)(?:@(\S+))?$", text, re.MULTILINE)
    return dict(names)


def _build(folder: Path, wanted: dict[str, str]) -> None:
    for library in LIBRARIES:
        is_runtime = "cudart" in library
        names = [name for name, version in wanted.items() if bool(version) == is_runtime]
        source, versions = folder / "stub.c", folder / "stub.map"
        source.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in names))
        versions.write_text(f"{library} {{ *; }};\n")
        script = [f"-Wl,--version-script={versions}"] if is_runtime else []
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", *script, source]
        subprocess.run([*command, "-w", "-o", folder / library], check=True)
