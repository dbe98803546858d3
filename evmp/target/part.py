"""Part files: a worker's part of a text result, beside it, `<result>.part-00000-of-00002`.

They are for people who look into a running job. Nothing depends on them: they are plain copies of
committed blocks, and removed when the result, which is made of the blocks themselves, is there.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from evmp.ledger import Commit, Ledger
from evmp.storage import Storage

log = logging.getLogger(__name__)


def write_part(
    folder: Storage, result: str, worker: tuple[int, int], ledger: Ledger, commits: Sequence[Commit]
) -> None:
    """Leave a part in `folder`, beside the result of that name.

    Args:
        worker: its number, and how many there are.
        commits: its blocks in the ledger, in order.
    """
    part = f"{result}.part-{worker[0]:05d}-of-{worker[1]:05d}"
    try:
        folder.copy(ledger.storage, [f"data/{commit.data}" for commit in commits], part)
    except OSError as error:
        log.warning("%s is left out: %s", folder.uri(part), error)


def remove_parts(folder: Storage, result: str) -> None:
    """Remove all parts of a result, of however many workers."""
    try:
        for part in folder.names("", f"{result}.part-"):
            if re.fullmatch(r"part-\d{5}-of-\d{5}", part[len(result) + 1 :]):
                folder.delete(part)
    except OSError as error:
        log.warning("parts of %s are left behind: %s", folder.uri(result), error)
