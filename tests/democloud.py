"""The demo of clouds: two jobs against small servers of OSS and MaxCompute on this machine.

    python -m democloud FOLDER       FOLDER is what config/demo.py has built

The servers are those of the tests: they check what the real ones check, and harm answers now and
then, OSS one in fifty. One job has its model, its list, the photographs and the result on OSS, the
other goes from table to table. The job files stay in out/demo-cloud, to be looked at.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import orjson
import oss2
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from demo import PHOTOGRAPHS, in_words
from maxcompute.fault import Fault, Harm
from maxcompute.server import MaxCompute
from ossserver import KEY_ID, KEY_SECRET, OssServer, serving_oss

N_ROWS = 100
HARMED = 0.02  # of OSS's requests
OUT = Path("out/demo-cloud")  # below the working directory
JOB = {
    "model_type": "classifier",
    "top_k": 5,
    "num_worker": 2,
    "preprocess_thread_num": 2,
    "predict_thread_num": 1,
    "batch_size": 16,
}


def main(folder: Path) -> None:
    """Run both jobs, and say what has come of them."""
    rows = pq.read_table(folder / "data" / "images.parquet").slice(0, N_ROWS)
    OUT.mkdir(parents=True, exist_ok=True)
    with serving_oss() as oss, MaxCompute("demo") as tables:
        files_to_file(folder / "model", rows, oss)
        table_to_table(folder / "model", rows, tables)


def files_to_file(model: Path, rows: pa.Table, oss: OssServer) -> None:
    """Put all on OSS, predict a list of photographs, and show the object with the results."""
    oss.objects.update(models={}, photos={}, results={})
    owner = oss2.Auth(KEY_ID, KEY_SECRET)
    for file in model.iterdir():
        oss2.Bucket(owner, oss.endpoint, "models").put_object(
            f"lite0/{file.name}", file.read_bytes()
        )
    photos = oss2.Bucket(owner, oss.endpoint, "photos")
    names = [name for name in rows["name"].to_pylist() if name != "damaged-base64.jpg"]
    for row in rows.to_pylist():
        if row["name"] in names:
            photos.put_object(row["name"], base64.b64decode(row["image"]))
    lines = [f"oss://photos/{name}\n" for name in [*names, "damaged-no-object.jpg"]]
    photos.put_object("photos.txt", "".join(lines))
    oss.trouble = Random(1), HARMED
    run(
        "files",
        {
            **JOB,
            "model_path": "oss://models/lite0",
            "input_oss_file": "oss://photos/photos.txt",
            "output_oss_file": "oss://results/photos.jsonl",
            "ossHost": oss.endpoint,
        },
        {"OSS_ACCESS_KEY_ID": KEY_ID, "OSS_ACCESS_KEY_SECRET": KEY_SECRET},
    )
    done = [orjson.loads(line) for line in oss.objects["results"]["photos.jsonl"].splitlines()]
    tell("oss://results/photos.jsonl", [(r["image"], r["prediction_result"]) for r in done])


def table_to_table(model: Path, rows: pa.Table, tables: MaxCompute) -> None:
    """Put photographs into a table, predict it, and show the table with the results."""
    types = {"id": "string", "name": "string", "image": "string"}
    tables.add("photos", types, "day").put(rows, "day=1")
    for harm in Harm:
        tables.faults.add(Fault("download.data", harm=harm, after=100_000))
    run(
        "table",
        {
            **JOB,
            "model_path": str(model),
            "input_table": "odps://demo/tables/photos/day=1",
            "output_table": "odps://demo/tables/predictions/day=1",
            "odps_endpoint": tables.endpoint,
            "reserved_columns": "id,name",
            "staging": str(OUT),
        },
        tables.environment(),
    )
    done = tables.tables["predictions"].partitions["day=1"].rows.to_pylist()
    results = [(row["name"], orjson.loads(row["prediction_result"])) for row in done]
    tell("odps://demo/tables/predictions/day=1", results)


def run(name: str, job: dict[str, Any], environment: dict[str, str]) -> None:
    """Run a job, whose file stays to be looked at, afresh."""
    file = OUT / f"{name}.yaml"
    file.write_text(yaml.safe_dump(job, sort_keys=False))
    print(f"$ evmp --config {file}", flush=True)
    command = [sys.executable, "-m", "evmp", "--config", file, "--fresh"]
    cache = {"XDG_CACHE_HOME": str(OUT / "cache")}
    subprocess.run(command, env={**os.environ, **cache, **environment}, check=True)


def tell(where: str, results: list[tuple[str, dict[str, Any]]]) -> None:
    """Say some results in words."""
    for name, result in results:
        last = name.rpartition("/")[2]
        if last in PHOTOGRAPHS or last.startswith("damaged"):
            print(f"  {name}: {in_words(result)}")
    print(f"All {len(results)} rows are in {where}\n", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
