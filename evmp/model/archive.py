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

Kind: TypeAlias = Literal["torchscript", "exported", "onnx"]

REMEDY: Final = (
    "build the network in Python, load the weights into it, and save "
    "torch.jit.trace(network.eval(), example)"
)
# How TorchScript's code and torch.export's graph spell a call of torchvision::nms and the like.
TORCHVISION_CALL: Final = b"ops.torchvision."
# torch compresses code and graphs, a few megabytes, and never weights.
MAX_COMPRESSED: Final = 256 << 20


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
            # Of an archive that was cut off, one that is a member of it may be taken for the whole.
            if min((it.header_offset for it in archive.infolist()), default=0) > 0:
                raise zipfile.BadZipFile("its directory is missing")
            _check_size(file, archive.infolist())
            return _kind_of_members(file, archive.namelist())
    except zipfile.BadZipFile as error:
        reason = str(error).lower()
        raise ModelError(
            f"{file}: a truncated or damaged archive ({reason}); copy or save it again"
        ) from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ModelError(f"{file}: cannot be read: {reason}") from error


def needs_torchvision(file: Path) -> bool:
    """Say whether a whole archive of either kind calls torchvision's operators."""
    with zipfile.ZipFile(file) as archive:
        code = [name for name in archive.namelist() if _is_code(name) or _is_program(name)]
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


def _check_size(file: Path, members: list[zipfile.ZipInfo]) -> None:
    """Refuse an archive that would fill the memory: weights have about the size of the file."""
    n_more = sum(it.file_size for it in members) - file.stat().st_size
    if n_more > MAX_COMPRESSED:
        raise ModelError(
            f"{file}: its members unpack to {n_more >> 20} MiB more than the file has, expected at "
            f"most {MAX_COMPRESSED >> 20} MiB; save it again by torch, which compresses no weights"
        )


def _kind_of_members(file: Path, names: list[str]) -> Kind:
    inner = {"/".join(PurePosixPath(name).parts[1:]) for name in names}
    if "constants.pkl" in inner and any(_is_code(name) for name in names):
        return "torchscript"
    if any(_is_program(name) for name in names):
        return "exported"
    remedy = REMEDY
    if any(name.startswith("data/aotinductor/") for name in inner):
        kind = "compiled by AOTInductor for one kind of machine"
        remedy = "save the program that it was compiled from by torch.export.save"
    elif "data.pkl" in inner:
        kind = "a checkpoint written by torch.save (a state_dict, say), no TorchScript"
    else:
        kind = "a zip file without TorchScript code or a program of torch.export"
    raise ModelError(f"{file}: {kind}; {remedy}")


def _is_code(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return len(parts) > 2 and parts[1] == "code" and name.endswith(".py")


def _is_program(name: str) -> bool:
    """Say whether a member is the graph of a torch.export archive, of torch 2.8 on or older."""
    parts = PurePosixPath(name).parts
    is_model = len(parts) == 3 and parts[1] == "models" and name.endswith(".json")
    return is_model or name == "serialized_exported_program.json"


def _describe(head: bytes) -> str:
    """Say what a file is, by its first bytes, that is no archive and no ONNX."""
    if not head:
        return "an empty file, expected a TorchScript or torch.export archive or an ONNX model"
    if head.startswith(b"\x80"):
        return f"a checkpoint written by torch.save in its old format, no TorchScript; {REMEDY}"
    start = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in head)
    return f"no TorchScript archive and no ONNX model (starts with '{start}'); {REMEDY}"
