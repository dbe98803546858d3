"""Declares the C extension; everything else about the project is in pyproject.toml."""

import os
import sysconfig
from glob import glob

from setuptools import Extension, setup

FLAGS = [
    "-std=c11",
    "-O3",
    # Without it the compiler may fuse a * b + c on some machines, and results would differ.
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Wconversion",
    # Python's own headers are not held to these warnings.
    f"-isystem{sysconfig.get_paths()['include']}",
]
if os.environ.get("EVMP_WERROR") == "1":
    FLAGS.append("-Werror")

setup(
    ext_modules=[
        Extension(
            "evmp._native",
            sources=sorted(glob("csrc/*.c")),
            depends=sorted(glob("csrc/*.h")),
            libraries=["m"],
            extra_compile_args=FLAGS,
        )
    ]
)
