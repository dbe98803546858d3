"""What a file of weights is, told by its content before anything heavy touches it.

torch.jit.load answers whatever is no TorchScript with an internal error of its zip reader, and a
checkpoint written by torch.save, the commonest mistake, with a missing file. This module names
them, and says whether the archive needs torchvision. It unpickles nothing.
"""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath
from typing import Final, Literal, TypeAlias

from evmp.errors import ModelError
from evmp.model import onnxfile

Kind: TypeAlias = Literal["torchscript", "onnx"]

REMEDY: Final = (
    "build the network in Python, load the weights into it, and save "
    "torch.jit.trace(network.eval(), example)"
)
# How TorchScript's own code spells a call of torchvision::nms and the like.
TORCHVISION_CALL: Final = b"ops.torchvision."


def kind_of(file: Path) -> Kind:
    """Say which adapter runs a file.

    Raises:
        ModelError: the file is missing, unreadable or damaged, or none can.
    """
    try:
        with open(file, "rb") as stream:
            head = stream.read(16)
        if head.startswith(onnxfile.START):
            onnxfile.check_whole(file)
            onnxfile.external_files(file)
            return "onnx"
        if not head.startswith(b"PK"):
            raise ModelError(f"{file}: {_describe(head)}")
        with zipfile.ZipFile(file) as archive:
            _check_members(file, archive.namelist())
        return "torchscript"
    except zipfile.BadZipFile as error:
        reason = str(error).lower()
        raise ModelError(
            f"{file}: a truncated or damaged archive ({reason}); copy or save it again"
        ) from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ModelError(f"{file}: cannot be read: {reason}") from error


def needs_torchvision(file: Path) -> bool:
    """Say whether a whole TorchScript archive calls torchvision's operators."""
    with zipfile.ZipFile(file) as archive:
        code = [name for name in archive.namelist() if _is_code(name)]
        return any(TORCHVISION_CALL in archive.read(name) for name in code)


def files_of(file: Path) -> tuple[Path, ...]:
    """Return all files that hold a model's weights: the file itself, and what it refers to.

    Raises:
        ModelError: the file cannot be read, or refers to what is not there or not its own.
    """
    try:
        with open(file, "rb") as stream:
            is_onnx = stream.read(1) == onnxfile.START
        return (file, *(onnxfile.external_files(file) if is_onnx else ()))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ModelError(f"{file}: cannot be read: {reason}") from error


def _check_members(file: Path, names: list[str]) -> None:
    inner = {"/".join(PurePosixPath(name).parts[1:]) for name in names}
    if "constants.pkl" in inner and any(_is_code(name) for name in names):
        return
    if "archive_format" in inner or "serialized_exported_program.json" in names:
        kind = "a torch.export archive, which this version cannot run"
    elif "data.pkl" in inner:
        kind = "a checkpoint written by torch.save (a state_dict, say), no TorchScript"
    else:
        kind = "a zip file without TorchScript code"
    raise ModelError(f"{file}: {kind}; {REMEDY}")


def _is_code(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return len(parts) > 2 and parts[1] == "code" and name.endswith(".py")


def _describe(head: bytes) -> str:
    """Say what a file is, by its first bytes, that is no archive and no ONNX."""
    if not head:
        return "an empty file, expected a TorchScript archive or an ONNX model"
    if head.startswith(b"\x80"):
        return f"a checkpoint written by torch.save in its old format, no TorchScript; {REMEDY}"
    start = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in head)
    return f"no TorchScript archive and no ONNX model (starts with '{start}'); {REMEDY}"
