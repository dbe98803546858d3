"""Base64 decoding: evmp at every SIMD level, the standard library, pybase64, memcpy.

    python bench/bench_base64.py --json out/bench/base64.json

Everybody gets the same text, made from a fixed seed, and refuses bad characters; a rate counts
characters. evmp decodes into a buffer that it is given, the others make a new object. memcpy copies
the text.
"""

from __future__ import annotations

import base64
import binascii
import functools
import random

import harness

from evmp import _native

SIZES = {"1 kB": 1_000, "10 kB": 10_000, "50 kB": 50_000, "100 kB": 100_000, "1 MB": 1_000_000}
SEED = 1


def decode_at(level: str, text: bytes, dst: bytearray) -> None:
    """Decode at one level."""
    _native.set_simd_level(level)
    _native.base64_decode(text, dst)


def decode_lines(text: bytes, dst: bytearray) -> None:
    """Decode text with line breaks at the best level."""
    _native.set_simd_level(_native.simd_levels()[-1])
    _native.base64_decode(text, dst, whitespace=True)


def copy(text: bytes, dst: memoryview) -> None:
    """Copy the text, which is what decoding can hardly beat."""
    dst[:] = text


def main() -> None:
    """Measure every contender at every size."""
    bench = harness.Bench("base64", __doc__, ["pybase64"])
    pybase64 = harness.peer("pybase64")
    rng = random.Random(SEED)
    for name, size in SIZES.items():
        data = rng.randbytes(size)
        text, lines = base64.b64encode(data), base64.encodebytes(data)
        dst = bytearray(size)
        contenders: dict[str, harness.Work] = {
            "base64": functools.partial(base64.b64decode, text, validate=True),
            "binascii": functools.partial(binascii.a2b_base64, text),
        }
        if pybase64:
            contenders["pybase64"] = functools.partial(pybase64.b64decode, text, validate=True)
        for level in _native.simd_levels():
            contenders[f"evmp {level}"] = functools.partial(decode_at, level, text, dst)
        contenders["evmp, lines of 76"] = functools.partial(decode_lines, lines, dst)
        contenders["memcpy"] = functools.partial(copy, text, memoryview(bytearray(len(text))))
        bench.compare(name, contenders, len(text) / 1e6, "MB/s")
    bench.finish()


if __name__ == "__main__":
    main()
