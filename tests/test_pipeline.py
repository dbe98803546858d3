"""A worker's own process; what its stages do together is in test_run and test_stop."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, cast

from forked import fork, wait

from evmp.ledger import Ledger
from evmp.metrics import Board
from evmp.pipeline import Worker


def test_worker_whose_job_died_while_it_was_forked_does_not_begin(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    nothing = cast(Any, None)
    ledger = Ledger(tmp_path)

    def job() -> None:
        pid = os.getpid()
        seats = Board(["worker"], 1).workers[0]
        worker = Worker(0, nothing, nothing, nothing, ledger, (), seats, list)
        if os.fork() == 0:
            while os.getppid() == pid:
                time.sleep(0.001)
            os.write(write_end, b"%d" % worker.run())
            os._exit(0)

    assert wait(fork(job)) == 0
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        assert pipe.read() == b"1"
