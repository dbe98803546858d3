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
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)
from typing_extensions import Self

from evmp.document import Document, parse_value, read_document
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
from evmp.uri import Arn, Bucket, Uri, mask

ModelType = Literal[
    "feature_extractor",
    "classifier",
    "multilabel_classifier",
    "detector",
    "text_detector",
    "text_recognizer",
    "text_detection_recognition",
    "text_spotter",
    "segmentor",
    "self_define",
]
MODEL, INPUT, OUTPUT, SPEED = "Model", "Input", "Output", "Workers and speed"
FAILURE, CUSTOM, VIDEO, CLOUD = "Failures", "Custom code", "Video", "Cloud"

_CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def _names(value: object) -> object:
    """Split `a, b` at its commas; lists pass."""
    if value == "":
        return ()
    if not isinstance(value, str):
        return value
    names = tuple(part.strip() for part in value.split(","))
    if "" in names:
        raise ValueError(f"got {show(value)}, expected names separated by single commas")
    return names


def _class_path(value: str) -> str:
    if value and not _CLASS_PATH.fullmatch(value):
        raise ValueError(f"got {show(value)}, expected a module and a class such as module.Class")
    return value


def _processes(value: object) -> object:
    """Read the JSON text of the specification, one object or a list of them; YAML passes."""
    if value == "":
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            message = f"not JSON at character {error.pos + 1}: {error.msg.lower()}"
            raise ValueError(f"{message}; expected one object or a list of them") from error
    return (value,) if isinstance(value, dict) else value


def _digit(value: object) -> object:
    return int(value) if isinstance(value, str) and value in "1234" and value else value


class ProcessConfig(BaseModel):
    """One custom process between decoding and prediction; its other fields go to the class."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    user_process_cls: Annotated[str, AfterValidator(_class_path)] = key(
        CUSTOM, ..., "the module path of the process class", example="module.Class"
    )
    job_name: str = key(CUSTOM, "", "the name of the process in messages")
    num_threads: Integer = key(CUSTOM, 1, "copies that run at once", ge=1, le=1024)
    batch_size: Integer = key(CUSTOM, 1, "samples a call gets", unit="rows", ge=1, le=65536)


ClassPath = Annotated[str, AfterValidator(_class_path)]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_names, json_schema_input_type=str | list[str])]
Buckets = Annotated[
    tuple[Bucket, ...],
    BeforeValidator(_names, json_schema_input_type=str | list[str]),
]
Processes = Annotated[
    tuple[ProcessConfig, ...],
    BeforeValidator(_processes, json_schema_input_type=str | ProcessConfig | list[ProcessConfig]),
]


class Job(BaseModel):
    """One job, checked: what to read, what to run, where to write, and with how many processes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_path: Uri = key(
        MODEL,
        ...,
        "the model package: a directory with a `model.yaml` or a lone `*.pt`, or a `.pt` file",
        example="out/demo/model",
        min_length=1,
    )
    model_type: ModelType = key(
        MODEL, ..., "what the model does", example="classifier", result=True
    )
    feature_name: str = key(
        MODEL,
        "",
        "the output to take as the feature; required with `feature_extractor`",
        result=True,
        comes_with="model_type feature_extractor",
    )
    top_k: Integer = key(
        MODEL, 0, "how many of the best classes `class_probs` keeps; 0 keeps all", result=True, ge=0
    )
    multilabel_threshold: Number = key(
        MODEL,
        0.5,
        "the probability from which on a label counts as present",
        result=True,
        comes_with="model_type multilabel_classifier",
        ge=0,
        le=1,
    )
    segmentation_output: Literal["both", "preds", "probs", "png"] = key(
        MODEL,
        "both",
        "what a segmentation result holds",
        result=True,
        comes_with="model_type segmentor",
    )
    device: Literal["auto", "cpu", "cuda"] = key(
        MODEL, "auto", "where the model runs; `auto` is the GPU if there is one"
    )

    input_table: Uri = key(
        INPUT, "", "the table to read: a Parquet file, or a directory of them with Hive partitions"
    )
    input_oss_file: Uri = key(INPUT, "", "the list to read: on each line a path or a JSON object")
    image_col: Name = key(
        INPUT, "image", "the column of `input_table` that holds the image", result=True
    )
    image_type: Literal["base64", "url"] = key(
        INPUT, "base64", "what that column holds: Base64 text, or a path or URL", result=True
    )
    base64_whitespace: Truth = key(
        INPUT,
        False,
        "skip line breaks and blanks within Base64 instead of failing the row",
        result=True,
    )
    base64_url_alphabet: Truth = key(
        INPUT, False, "read Base64 in the URL alphabet (`-` and `_` for `+` and `/`)", result=True
    )
    max_image_pixels: Integer = key(
        INPUT, 178_956_970, "a larger image is a failed row", unit="pixels", result=True, ge=1
    )
    max_row_bytes: Integer = key(
        INPUT,
        64 << 20,
        "a larger cell or image file is a failed row",
        unit="bytes",
        result=True,
        ge=1024,
        le=2**31 - 1,
    )
    fast_decode: Truth = key(
        INPUT, False, "decode JPEG with faster, slightly less exact arithmetic", result=True
    )
    allow_local_paths: Truth = key(
        INPUT, False, "let an input that is not a local file itself name local files", result=True
    )

    output_table: Uri = key(
        OUTPUT, "", "the table to write, in the forms of `input_table`; created if missing"
    )
    output_oss_file: Uri = key(
        OUTPUT, "", "the file to write; `.jsonl`, `.parquet`, else lines of `<input>, <JSON>`"
    )
    output_dir: Uri = key(
        OUTPUT,
        "",
        "the folder for images and videos that a predictor returns",
        comes_with="custom predictors",
    )
    reserved_columns: Names = key(OUTPUT, (), "input columns to carry into the output", result=True)
    result_column: Name = key(
        OUTPUT, "prediction_result", "the output column that holds the result", result=True
    )
    lifecycle: Integer = key(
        OUTPUT,
        10,
        "how long MaxCompute keeps the output table; without effect elsewhere",
        unit="days",
        ge=1,
    )
    keep_staging: Truth = key(
        OUTPUT, False, "keep the staging folder beside the output when the job is done"
    )

    num_worker: Integer = key(
        SPEED, 2, "workers, each a reader, decoders, predictors and a writer", ge=1, le=100_000
    )
    cpuRequired: Integer = key(
        SPEED, 1600, "CPUs for each worker, 100 for one", unit="1/100 CPU", ge=1
    )
    gpuRequired: Integer = key(
        SPEED,
        100,
        "GPUs for each worker, 100 for one; 0 runs on the CPU",
        unit="1/100 GPU",
        ge=0,
        le=10_000,
    )
    batch_size: Integer = key(
        SPEED, 1, "images the model gets at once", unit="rows", ge=1, le=65536
    )
    queue_size: Integer = key(
        SPEED,
        1024,
        "rows in flight in a worker, at least `batch_size`",
        unit="rows",
        ge=1,
        le=1 << 20,
    )
    preprocess_thread_num: Integer = key(
        SPEED, 4, "decoder processes of each worker", ge=1, le=1024
    )
    predict_thread_num: Integer = key(
        SPEED, 2, "predictor processes of each worker on the CPU", ge=1, le=1024
    )
    torch_threads: Integer = key(
        SPEED, 0, "threads within each CPU predictor; 0 shares the worker's CPUs out", ge=0, le=1024
    )
    block_rows: Integer = key(
        SPEED, 0, "rows committed at once; 0 picks a size by the input", unit="rows", ge=0
    )
    memory_limit_bytes: Integer = key(
        SPEED,
        0,
        "what the whole job may use; 0 is the limit of the machine or its cgroup",
        unit="bytes",
        ge=0,
    )
    enableDynamicCluster: Truth = key(
        SPEED,
        False,
        "let any worker take any open block, and others take over a dead one's",
        comes_with="clusters",
    )
    useSparseClusterSchema: Truth = key(
        SPEED,
        False,
        "workers need not know each other; required with `enableDynamicCluster`",
        comes_with="clusters",
    )

    max_error_fraction: Number = key(
        FAILURE, 0.5, "the job fails when a larger part of its rows failed", ge=0, le=1
    )
    stall_timeout_seconds: Number = key(
        FAILURE,
        300.0,
        "a stage without progress for this long counts as hung",
        unit="seconds",
        gt=0,
    )

    user_resource: Uri = key(
        CUSTOM,
        "",
        "an archive (tar.gz, zip) or Python file with your own code",
        result=True,
        comes_with="custom predictors",
    )
    user_predictor_cls: ClassPath = key(
        CUSTOM,
        "",
        "the class to run with `self_define`, as `module.Class`",
        result=True,
        comes_with="custom predictors",
    )
    user_process_config: Processes = key(
        CUSTOM,
        (),
        "processes between decoding and prediction: one object or a list of them",
        result=True,
        comes_with="custom processes",
    )

    is_input_video: Truth = key(
        VIDEO, False, "the input rows are videos", result=True, comes_with="video"
    )
    use_image_predictor: Truth = key(
        VIDEO,
        True,
        "predict single frames; false hands clips to the predictor",
        result=True,
        comes_with="video",
    )
    decode_type: Annotated[Literal[1, 2, 3, 4], BeforeValidator(_digit)] = key(
        VIDEO,
        4,
        "frames to decode: 1 intra only, 2 keyframes, 3 without B frames, 4 all",
        result=True,
        comes_with="video",
    )
    sample_fps: Number = key(
        VIDEO,
        5.0,
        "frames to keep; 0 or less keeps every decoded frame",
        unit="1/second",
        result=True,
        comes_with="video",
    )
    reshape_size: Integer = key(
        VIDEO,
        -1,
        "the shorter side of a frame; -1 is the original size",
        unit="pixels",
        result=True,
        comes_with="video",
        ge=-1,
        le=65536,
    )
    decode_batch_size: Integer = key(
        VIDEO,
        10,
        "frames of one clip",
        unit="frames",
        result=True,
        comes_with="video",
        ge=1,
        le=65536,
    )
    decode_keep_size: Integer = key(
        VIDEO,
        0,
        "frames at a clip's start repeated from the clip before",
        unit="frames",
        result=True,
        comes_with="video",
        ge=0,
        le=65536,
    )

    buckets: Buckets = key(
        CLOUD, (), "the OSS buckets in use, each `oss://<bucket>.<oss_host>/<path>/`"
    )
    arn: Arn = key(CLOUD, "", "the RAM role, `acs:ram::<account>:role/<name>`")
    ossHost: str = key(CLOUD, "", "the OSS endpoint of short `oss://<bucket>/<path>` paths")

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Self:
        raise_clashes(clashes(self), info)
        return self

    def describe(self) -> dict[str, Any]:
        """Return every key with its value for logs and reports; credentials in URLs are masked."""
        return {name: mask(value) for name, value in self.model_dump(mode="json").items()}

    def fingerprint(self) -> dict[str, Any]:
        """Return the keys that change results; a resumed job must not differ in any of them.

        The model, the input and the output are not among them: their own fingerprints say more
        than their paths do.
        """
        fields = type(self).model_fields
        return {
            name: value
            for name, value in self.describe().items()
            if trait_of(fields[name]).changes_result
        }


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file and apply the overrides, each `key=value`; the last one for a key counts.

    Raises:
        ConfigError: anything is wrong with the file or an override; it lists every problem.
    """
    return build(Job, _override(read_document(path), overrides))


def job_schema() -> dict[str, Any]:
    """Return the JSON schema of the job file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema_of(Job),
        "title": "evmp job file",
    }


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
        else:
            values[name] = _override_value(name, text)
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
        return text
    return value if kind in (int, float, bool) or isinstance(value, (list, dict)) else text
