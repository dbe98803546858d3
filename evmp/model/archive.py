"""What a file of weights is, told before torch touches it.

torch.jit.load answers whatever is no TorchScript with an internal error of its zip reader, and a
checkpoint written by torch.save, the commonest mistake, with a missing file. This module names
them, and says whether the archive needs torchvision. It unpickles nothing.
"""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath

from evmp.errors import ModelError

REMEDY = (
    "build the network in Python, load the weights into it, and save "
    "torch.jit.trace(network.eval(), example)"
)
# How TorchScript's own code spells a call of torchvision::nms and the like.
TORCHVISION_CALL = b"ops.torchvision."


def needs_torchvision(file: Path) -> bool:
    """Say whether a TorchScript archive calls torchvision's operators.

    Raises:
        ModelError: the file is missing, unreadable, damaged or no TorchScript.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            _check_members(file, archive.namelist())
            code = [name for name in archive.namelist() if _is_code(name)]
            return any(TORCHVISION_CALL in archive.read(name) for name in code)
    except zipfile.BadZipFile as error:
        raise ModelError(f"{file}: {_describe(file, str(error))}") from error
    except OSError as error:
        raise ModelError(
            f"{file}: cannot be read: {(error.strerror or str(error)).lower()}"
        ) from error


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


def _describe(file: Path, reason: str) -> str:
    """Say what a file is that is no whole zip archive."""
    with open(file, "rb") as stream:
        head = stream.read(16)
    if not head:
        return "an empty file, expected a TorchScript archive"
    if head.startswith(b"PK"):
        return f"a truncated or damaged archive ({reason.lower()}); copy or save it again"
    if head.startswith(b"\x80"):
        return f"a checkpoint written by torch.save in its old format, no TorchScript; {REMEDY}"
    start = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in head)
    return f"no TorchScript archive (starts with '{start}'); {REMEDY}"
