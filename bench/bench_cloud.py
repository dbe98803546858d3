"""What it costs that rows come from elsewhere: downloads against local files, tables of MaxCompute.

    python bench/bench_cloud.py --json out/bench/bench_cloud.json

`downloads`: whole jobs with four decoders over the same JPEGs of 500 x 375, as local files and from
a web server that answers at once, or after 50 ms; steady, as in bench_pipeline.py. W1 consumes the
rows at once, so that each CPU second of a download is one less for decoding: its rate on few cores
is the worst case. W2 runs a network of ResNet-18's size. The server's CPU time is not evmp's, but
it is of the same cores.

`table`: one process reads a table of Base64 cells of 100 kB from the server of the tests, which
keeps up with neither for long: by pyodps alone, and as evmp's reader does. `memory` is that of the
reader, at every tenth of a long table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import workload
from cost import Cost, measure, pss

PEERS = Path(__file__).resolve().parent / "peers"
TESTS = workload.ROOT / "tests"
sys.path[:0] = [str(PEERS), str(TESTS)]

from task import Task  # noqa: E402

DELAY_SECONDS = 0.05
DECODERS = 4
CELL_BYTES = 100_000
LIMIT_SECONDS = 600.0
SIZES = {"w1": (2000, 12_000), "w2": (100, 500)}
QUICK_SIZES = {"w1": (200, 600), "w2": (20, 60)}
CELLS, QUICK_CELLS = 2000, 200
LONG_CELLS, QUICK_LONG_CELLS = 100_000, 1000
ROUNDS = 5


# --- downloads ------------------------------------------------------------------------------------


class Web(asyncio.Protocol):
    """A connection to a web server that has the files of a folder, far away."""

    def __init__(self, files: dict[bytes, bytes], delay: float) -> None:
        self._files, self._delay, self._line = files, delay, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._line += data
        while b"\r\n\r\n" in self._line:
            head, _, self._line = self._line.partition(b"\r\n\r\n")
            body = self._files[head.split()[1]]
            answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            asyncio.get_running_loop().call_later(self._delay, self._transport.write, answer)


@contextmanager
def serving(folder: Path) -> Iterator[dict[str, str]]:
    """Serve a folder by a thread of this process, which has nothing else to do.

    Yields: where the folder is, on this machine and by URLs, by what to call it.
    """
    loop = asyncio.new_event_loop()
    files = {f"/{file.name}".encode(): file.read_bytes() for file in folder.iterdir()}
    servers = [
        loop.run_until_complete(
            loop.create_server(partial(Web, files, delay), "127.0.0.1", 0, backlog=512)
        )
        for delay in (0.0, DELAY_SECONDS)
    ]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    near, far = (f"http://127.0.0.1:{it.sockets[0].getsockname()[1]}" for it in servers)
    yield {"local files": str(folder), "a server": near, "a server 50 ms away": far}
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    for server in servers:
        server.close()


def run_once(work: str, where: str, images: Path, n_rows: int) -> Cost:
    """Run a job over `n_rows` images below a folder or a URL."""
    names = sorted(file.name for file in images.iterdir())
    with tempfile.TemporaryDirectory(dir=workload.CACHE) as folder:
        rows = Path(folder, "rows.txt")
        lines = (f"{where}/{names[number % len(names)]}\n" for number in range(n_rows))
        rows.write_text("".join(lines))
        task = Task(
            work=work,
            table=str(rows),
            network=str(workload.network() / "model.pt"),
            out=f"{folder}/out.jsonl",
            resize="",
            n_cores=len(os.sched_getaffinity(0)),
            report=f"{folder}/report.json",
        )
        command = [sys.executable, __file__, "--run", json.dumps(asdict(task))]
        cost = measure(command, dict(os.environ), sample=False, limit=LIMIT_SECONDS)
        results = Path(task.out).read_text()
        assert results.count("\n") == n_rows and "error_stage" not in results, results[:500]
    return cost


def run_here(task: Task) -> None:
    """Be the evmp command of a run."""
    import evmp_job

    from evmp import cli

    evmp_job.prepare(task)
    job = {
        **evmp_job.job_of(task),
        "input_table": "",
        "input_oss_file": task.table,
        "reserved_columns": "",
        "preprocess_thread_num": DECODERS,
        "allow_private_hosts": True,
    }
    config = Path(task.report).with_suffix(".yaml")
    config.write_text(json.dumps(job))
    cli.main(["--config", str(config), "--fresh", "--quiet"])


def downloads(sizes: dict[str, tuple[int, int]], n_rounds: int) -> list[dict[str, Any]]:
    """Run both works, near and far, in turns; return a row for each."""
    images = workload.images()
    rows = []
    with serving(images) as places:
        for work, (few, many) in sizes.items():
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in places}
            for number in range(n_rounds):
                print(f"{work}, round {number + 1}/{n_rounds}", file=sys.stderr, flush=True)
                for name, rates in found.items():
                    short, long = (run_once(work, places[name], images, n) for n in (few, many))
                    rows_more = many - few
                    rates.append(
                        (rows_more / (long.wall - short.wall), rows_more / (long.cpu - short.cpu))
                    )
            rows += [
                {
                    "work": work.upper(),
                    "images": name,
                    "n": n_rounds,
                    "steady, rows/s": harness.spread([wall for wall, _ in rates]),
                    "rows/CPU-s": harness.spread([cpu for _, cpu in rates]),
                    "of the local rate, %": harness.spread(
                        [100 * a / b for (a, _), (b, _) in zip(rates, near_of(found), strict=True)]
                    ),
                }
                for name, rates in found.items()
            ]
    return rows


def near_of(found: dict[str, list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the rates of the local files, which come first."""
    return next(iter(found.values()))


# --- tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reading:
    """What a process has read: seconds of wall and CPU time, and its memory at every tenth."""

    wall: float
    cpu: float
    megabytes: Sequence[float]


def read_here(who: str, n_rows: int) -> Reading:
    """Read the table in this process, by the bare client or by evmp's reader."""
    cells = bare(n_rows) if who == "pyodps" else reader(n_rows)
    n_bytes, megabytes = len(next(cells)), [pss(os.getpid()) / 1e6]
    wall, cpu = time.perf_counter(), time.process_time()
    for number, cell in enumerate(cells, 2):
        n_bytes += len(cell)
        if number % (n_rows // 10) == 0:
            megabytes.append(pss(os.getpid()) / 1e6)
    assert n_bytes == n_rows * CELL_BYTES, n_bytes
    return Reading(time.perf_counter() - wall, time.process_time() - cpu, megabytes)


def bare(n_rows: int) -> Iterator[Any]:
    """Read by pyodps alone."""
    from odps import ODPS, options
    from odps.tunnel import TableTunnel

    options.tunnel.string_as_binary = True
    variables = ("ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET")
    service = ODPS(
        *(os.environ[name] for name in variables),
        project="shop",
        endpoint=os.environ["ODPS_ENDPOINT"],
    )
    session = TableTunnel(service).create_download_session("cells")
    with session.open_record_reader(0, n_rows, columns=["image"]) as records:
        for record in records:
            yield record[0]


def reader(n_rows: int) -> Iterator[Any]:
    """Read as evmp's reader does."""
    from evmp.job import Job
    from evmp.source import open_source

    job = Job(
        model_path="m",
        model_type="classifier",
        input_table="odps://shop/tables/cells",
        output_oss_file="out.jsonl",
    )
    return (row.payload for row in open_source(job).read(0, n_rows))


@contextmanager
def table_of(n_rows: int) -> Iterator[dict[str, str]]:
    """Provide a table of cells; yields the environment of those who read it."""
    import pyarrow as pa
    from maxcompute.server import MaxCompute

    some = pa.table({"image": ["A" * CELL_BYTES] * min(n_rows, 100)})
    with MaxCompute() as service:
        rows = pa.concat_tables([some] * (n_rows // some.num_rows))
        service.add("cells", {"image": "string"}).put(rows)
        yield service.environment()


def read_once(who: str, n_rows: int, environment: dict[str, str]) -> Reading:
    """Read the table in a process of its own."""
    command = [sys.executable, __file__, "--read", who, "--rows", str(n_rows)]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return Reading(**json.loads(done.stdout))


def tables(n_rows: int, n_rounds: int) -> list[dict[str, Any]]:
    """Let both read, in turns; return a row for each."""
    found: dict[str, list[Reading]] = {"pyodps": [], "evmp": []}
    with table_of(n_rows) as environment:
        for _ in range(n_rounds):
            for who, readings in found.items():
                readings.append(read_once(who, n_rows, environment))
    pairs = list(zip(found["pyodps"], found["evmp"], strict=True))
    shares = {
        "pyodps": ("100", "100"),
        "evmp": (
            harness.spread([100 * bare.wall / mine.wall for bare, mine in pairs]),
            harness.spread([100 * bare.cpu / mine.cpu for bare, mine in pairs]),
        ),
    }
    return [
        {
            "reader": who,
            "n": n_rounds,
            "MB/s": harness.spread([n_rows * CELL_BYTES / 1e6 / it.wall for it in readings]),
            "MB/CPU-s": harness.spread([n_rows * CELL_BYTES / 1e6 / it.cpu for it in readings]),
            "of the bare client's rate, %": shares[who][0],
            "of its rows/CPU-s, %": shares[who][1],
        }
        for who, readings in found.items()
    ]


def memory(n_rows: int) -> list[dict[str, Any]]:
    """Let evmp read a long table; return its memory on the way."""
    with table_of(n_rows) as environment:
        reading = read_once("evmp", n_rows, environment)
    tenths = {f"{10 * tenth} %": round(mb) for tenth, mb in enumerate(reading.megabytes)}
    return [{"rows": n_rows, "GB": n_rows * CELL_BYTES / 1e9, **tenths}]


def main() -> None:
    """Measure and print everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rows, one round")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_here(Task(**json.loads(options.run)))
    if options.read:
        print(json.dumps(asdict(read_here(options.read, options.rows))))
        return
    n_rounds = options.rounds or (1 if options.quick else ROUNDS)
    found = {
        "downloads": downloads(QUICK_SIZES if options.quick else SIZES, n_rounds),
        "table": tables(QUICK_CELLS if options.quick else CELLS, n_rounds),
        "memory, MB": memory(QUICK_LONG_CELLS if options.quick else LONG_CELLS),
    }
    harness.tell(options.json, "cloud", ["numpy", "pyarrow", "pyodps", "urllib3"], found)


if __name__ == "__main__":
    main()
