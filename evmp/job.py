"""The job file: every parameter with its type, default, range and meaning.

The names, types and defaults of the specification's parameters are a contract and never change;
keys of our own are snake_case. `load_job` reads a YAML file and the -D overrides and returns a
`Job` that is consistent in itself, or raises one ConfigError that lists everything wrong with it.
Whether the input exists and the model loads is found out by those who open them.

A parameter whose feature is not built yet is parsed and checked like any other, and using it is an
error that says so. Relative local paths are taken from the current directory, as on a command line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator
from typing_extensions import Self

from evmp.document import Document, is_utf8, parse_value, read_document
from evmp.errors import ConfigError, Problem
from evmp.rule import clashes
from evmp.setting import (
    Integer,
    Number,
    Truth,
    build,
    key,
    nearest,
    raise_clashes,
    schema_of,
    show,
    trait_of,
)
from evmp.value import (
    Arn,
    Buckets,
    ClassPath,
    DecodeType,
    Endpoint,
    Host,
    JsonText,
    ModelType,
    Name,
    Names,
    Processes,
    Uri,
    mask,
    scheme,
)

# The group is a heading of the reference. `result` marks the keys that results depend on, `own`
# those that the specification does not have.
_model = partial(key, "Model")
_input = partial(key, "Input")
_download = partial(key, "Downloads", own=True)
_output = partial(key, "Output")
_speed = partial(key, "Workers and speed")
_failure = partial(key, "Failures")
_custom = partial(key, "Custom code")
_video = partial(key, "Video", result=True)
_cloud = partial(key, "Cloud")


# They decide only which rows fail, so a retry of failed rows may have other values for them.
MENDING = (
    "base64_whitespace",
    "max_image_pixels",
    "max_row_bytes",
    "max_video_bytes",
    "max_video_seconds",
)
# Of a custom process, what its results do not depend on.
SPEED_OF_PROCESS = ("job_name", "num_threads")


class Job(BaseModel):
    """One job, checked: what to read, what to run, where to write, and with how many processes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_path: Uri = _model(
        ...,
        "the model package: a directory with a `model.yaml` or a single file of weights, or that",
        example="out/demo/model",
        min_length=1,
    )
    model_type: ModelType = _model(
        ...,
        "what the model does",
        example="classifier",
        result=True,
    )
    feature_name: str = _model(
        "",
        "the output that is the feature; required with `model_type: feature_extractor`",
        result=True,
    )
    top_k: Integer = _model(
        0,
        "how many of the best classes `class_probs` keeps; 0 keeps all",
        own=True,
        result=True,
        ge=0,
    )
    multilabel_threshold: Number = _model(
        0.5,
        "the probability from which on a label counts as present",
        own=True,
        result=True,
        ge=0,
        le=1,
    )
    segmentation_output: Literal["both", "preds", "probs", "png"] = _model(
        "both",
        "what a segmentor's result holds; `png` is the path of a palette PNG in `output_dir`",
        own=True,
        result=True,
    )
    device: Literal["auto", "cpu", "cuda"] = _model(
        "auto", "where the model runs; `auto` is the GPU where there is one", own=True
    )

    input_table: Uri = _input(
        "",
        "the table to read: a Parquet file, a directory of them with Hive partitions, or "
        "`odps://<project>/tables/<table>[/<column>=<value>...]`",
    )
    input_oss_file: Uri = _input("", "the list to read: a path or a JSON object on each line")
    image_col: Name = _input("image", "the column of `input_table` with the image", result=True)
    image_type: Literal["base64", "url"] = _input(
        "base64", "what that column holds: Base64 text, or a path or URL", result=True
    )
    base64_whitespace: Truth = _input(
        False,
        "skip line breaks and blanks in Base64 instead of failing the row",
        own=True,
        result=True,
    )
    base64_url_alphabet: Truth = _input(
        False, "Base64 is in the URL alphabet, `-` and `_` for `+` and `/`", own=True, result=True
    )
    max_image_pixels: Integer = _input(
        178_956_970, "a larger image is a failed row", unit="pixels", own=True, result=True, ge=1
    )
    max_row_bytes: Integer = _input(
        64 << 20,
        "a larger cell or image file is a failed row",
        unit="bytes",
        own=True,
        result=True,
        ge=1024,
        le=(1 << 31) - 1,
    )
    fast_decode: Truth = _input(
        False, "decode JPEG by faster, slightly less exact arithmetic", own=True, result=True
    )
    allow_local_paths: Truth = _input(
        False,
        "let an input that is not itself a local file name local files",
        own=True,
        result=True,
    )

    download_concurrency: Integer = _download(
        32, "files that a decoder process fetches at once", ge=1, le=256
    )
    download_timeout_seconds: Number = _download(
        60.0,
        "the time for one file in all, with redirects and further attempts",
        unit="seconds",
        gt=0,
    )
    connect_timeout_seconds: Number = _download(
        5.0, "the time for a connection to be made", unit="seconds", gt=0
    )
    read_timeout_seconds: Number = _download(
        15.0, "the longest silence on a connection", unit="seconds", gt=0
    )
    download_retries: Integer = _download(
        3, "further attempts at a file, where another may help", ge=0, le=100
    )
    fetch_timeout_seconds: Number = _download(
        3600.0,
        "the time for the model, the list or your code to be fetched before the start",
        unit="seconds",
        gt=0,
    )
    fetch_limit_bytes: Integer = _download(
        64 << 30, "a larger model, list or archive is not fetched, nor unpacked", unit="bytes", ge=1
    )
    allow_private_hosts: Truth = _download(
        False, "let rows name machines whose address is private, loopback or link-local"
    )

    output_table: Uri = _output(
        "", "the table to write: a Parquet file or a directory; created if missing"
    )
    output_oss_file: Uri = _output(
        "", "the file to write, here or on OSS: `.jsonl`, `.parquet`, or lines of `<input>, <JSON>`"
    )
    output_dir: Uri = _output(
        "", "the folder for images and videos a predictor returns, here or on OSS", result=True
    )
    reserved_columns: Names = _output(
        (), "input columns to keep in the output, a list or `a,b,c`", result=True
    )
    result_column: Name = _output(
        "prediction_result", "the output column with the result", result=True
    )
    lifecycle: Integer = _output(
        10,
        "how long MaxCompute keeps the table, or each partition of it, if the job makes it; no "
        "effect on files",
        unit="days",
        ge=1,
    )
    staging: Uri = _output(
        "",
        "the folder for the staging place, `<output>.evmp`, of unfinished work; beside the output "
        "if left out",
        own=True,
    )
    keep_staging: Truth = _output(False, "keep the staging folder when the job is done", own=True)

    num_worker: Integer = _speed(
        2, "workers, each with a reader, decoders, predictors and a writer", ge=1, le=100_000
    )
    cpuRequired: Integer = _speed(1600, "CPUs of a worker; 100 is one", unit="1/100 CPU", ge=1)
    gpuRequired: Integer = _speed(
        100,
        "GPUs of a worker; 100 is one, less shares one with other workers, 0 runs on CPUs",
        unit="1/100 GPU",
        ge=0,
        le=10_000,
    )
    batch_size: Integer = _speed(1, "images the model gets at once", unit="rows", ge=1, le=65536)
    queue_size: Integer = _speed(
        1024, "rows in flight in a worker, at least `batch_size`", unit="rows", ge=1, le=1 << 20
    )
    preprocess_thread_num: Integer = _speed(4, "decoder processes of a worker", ge=1, le=1024)
    predict_thread_num: Integer = _speed(
        2,
        "predictor processes of a worker on CPUs; on a GPU, which has one, batches in flight",
        ge=1,
        le=1024,
    )
    torch_threads: Integer = _speed(
        1,
        "threads of a predictor on CPUs; their number may change the last bits of results",
        own=True,
        ge=1,
        le=1024,
    )
    cpu_batch_size: Integer = _speed(
        1,
        "images that a predictor on a CPU runs at once, for some networks a little faster; their "
        "number may change the last bits of results",
        own=True,
        unit="rows",
        ge=1,
        le=1024,
    )
    block_rows: Integer = _speed(
        0, "rows committed at once; 0 chooses by the input", own=True, unit="rows", ge=0
    )
    memory_limit_bytes: Integer = _speed(
        0,
        "memory of the whole job; 0 is the machine's or its cgroup's",
        own=True,
        unit="bytes",
        ge=0,
    )
    enableDynamicCluster: Truth = _speed(
        False,
        "let any worker take any block, and take over those of the dead; needs "
        "`useSparseClusterSchema`",
    )
    useSparseClusterSchema: Truth = _speed(
        False, "let workers start late, and be more or fewer than `num_worker`"
    )
    drain_seconds: Number = _speed(
        25.0,
        "after a signal, the time for what is in flight; what is not done then is left for the "
        "next run",
        own=True,
        unit="seconds",
        ge=0,
    )
    lease_seconds: Number = _speed(
        10.0,
        "with `enableDynamicCluster`: a worker that does not show itself for so long has lost its "
        "blocks to others",
        own=True,
        unit="seconds",
        ge=1,
        le=3600,
    )

    max_error_fraction: Number = _failure(
        0.5, "the job fails when a larger part of its rows has failed", own=True, ge=0, le=1
    )
    stall_timeout_seconds: Number = _failure(
        300.0, "a stage without progress for so long counts as hung", own=True, unit="seconds", gt=0
    )

    user_resource: Uri = _custom("", "an archive (tar.gz, tgz, zip) or Python file with your code")
    user_predictor_cls: ClassPath = _custom(
        "", "the class to run with `model_type: self_define`, as `module.Class`", result=True
    )
    user_predictor_config: JsonText = _custom(
        "",
        "what that class gets as `model_config`: a JSON text, or a mapping",
        own=True,
        result=True,
    )
    user_process_config: Processes = _custom(
        (), "processes between decoding and prediction: an object or a list of them", result=True
    )
    process_timeout_seconds: Number = _custom(
        120.0,
        "a call of your code that takes longer is ended; its rows are tried again one by one",
        own=True,
        unit="seconds",
        gt=0,
    )

    is_input_video: Truth = _video(False, "the input rows are videos")
    use_image_predictor: Truth = _video(True, "predict single frames; false predicts clips")
    decode_type: DecodeType = _video(
        4, "frames to decode: 1 intra only, 2 keyframes, 3 without B frames, 4 all"
    )
    sample_fps: Number = _video(
        5.0, "frames to keep; 0 or less keeps every decoded one", unit="1/second"
    )
    reshape_size: Integer = _video(
        -1, "the shorter side of a frame; -1 keeps the size", unit="pixels", ge=-1, le=65536
    )
    decode_batch_size: Integer = _video(10, "frames of a clip", unit="frames", ge=1, le=65536)
    decode_keep_size: Integer = _video(
        0, "frames that a clip repeats from the one before", unit="frames", ge=0, le=65536
    )

    max_video_seconds: Number = _video(
        86_400.0, "a longer video is a failed row", unit="seconds", own=True, gt=0
    )
    max_video_bytes: Integer = _video(
        64 << 30, "a larger file of a video is a failed row", unit="bytes", own=True, ge=1024
    )

    buckets: Buckets = _cloud(
        (), "the OSS buckets, a list or `a,b,c`, each `oss://<bucket>.<oss_host>/<path>/`"
    )
    arn: Arn = _cloud("", "the RAM role, `acs:ram::<account>:role/<name>`")
    sts_endpoint: Host = _cloud(
        "",
        "where STS is, `<host>[:<port>]`, which lends the role of `arn`; `sts.aliyuncs.com` if "
        "left out",
        own=True,
    )
    odps_endpoint: Endpoint = _cloud(
        "", "where MaxCompute is; the variable `ODPS_ENDPOINT` if left out", own=True
    )
    odps_tunnel_endpoint: Endpoint = _cloud(
        "", "where its tunnel is, for the data; asked of `odps_endpoint` if left out", own=True
    )
    storage_timeout_seconds: Number = _cloud(
        120.0,
        "the time for one request about an output or a staging place on OSS, with further attempts",
        unit="seconds",
        own=True,
        gt=0,
    )
    ossHost: str = _cloud(
        "",
        "the OSS host of `oss://<bucket>/<path>` paths whose bucket `buckets` does not name",
        own=True,
    )

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Self:
        raise_clashes(clashes(self), info)
        return self

    @property
    def may_name_files(self) -> bool:
        """Whether rows may name files of this machine."""
        return self.allow_local_paths or not scheme(self.input_table or self.input_oss_file)

    def describe(self) -> dict[str, Any]:
        """Return every key with its value for logs and reports; credentials in URLs are masked."""
        values = self.model_dump(mode="json")
        if self.user_predictor_config:
            values["user_predictor_config"] = json.loads(self.user_predictor_config)
        return {name: mask(value) for name, value in values.items()}

    def fingerprint(self) -> dict[str, Any]:
        """Return the keys that change results; a resumed job must not differ in any of them.

        The model, the input and the output are not among them: their own fingerprints say more
        than their paths do.
        """
        fields = type(self).model_fields
        values = self.describe()
        values["user_process_config"] = [
            {name: it for name, it in process.items() if name not in SPEED_OF_PROCESS}
            for process in values["user_process_config"]
        ]
        return {name: it for name, it in values.items() if trait_of(fields[name]).changes_result}


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file and apply the overrides, each `key=value`; the last one for a key counts.

    Raises:
        ConfigError: anything is wrong with the file or an override; it lists every problem.
    """
    return build(Job, _override(read_document(path), overrides))


def job_schema() -> dict[str, Any]:
    """Return the JSON schema of the job file."""
    return {**schema_of(Job), "title": "evmp job file"}


def _override(document: Document, overrides: Sequence[str]) -> Document:
    values = dict(document.values)
    problems = list(document.problems)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not name or not equals:
            problems.append(Problem("expected -Dkey=value", override, "-D"))
        elif name not in Job.model_fields:
            hint = nearest(name, Job.model_fields)
            problems.append(Problem("unknown key" + hint, name, "-D"))
        elif not is_utf8(text):
            problems.append(Problem("not UTF-8", name, "-D"))
        else:
            try:
                values[name] = _override_value(name, text)
            except ConfigError as error:
                message = error.problems[0].message
                problems.append(Problem(f"got {show(text)}, {message}", name, "-D"))
    names = {override.partition("=")[0] for override in overrides}
    return replace(document, values=values, problems=tuple(problems), overridden=frozenset(names))


def _override_value(name: str, text: str) -> Any:
    """Read an override as YAML where the key takes more than text, so that `8` is a number."""
    kind = Job.model_fields[name].annotation
    if kind is str:
        return text
    try:
        value = parse_value(text)
    except ConfigError:
        if text[:1] in ("[", "{") and kind not in (int, float, bool):
            raise
        return text
    return value if kind in (int, float, bool) or isinstance(value, (list, dict)) else text
