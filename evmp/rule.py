"""The rules of a job file that join several keys, and what this version cannot do yet.

When a feature arrives, its keys lose `comes_with` in `evmp.job`, and the schemes here gain what it
brings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from evmp.setting import Clash, show, trait_of
from evmp.value import REMOTE, scheme

if TYPE_CHECKING:
    from evmp.job import Job

CUSTOM = "self_define"
"""The type that has no model package: the user's predictor opens what it wants."""
TEAM = "text_detection_recognition"
"""The type whose package holds two others."""
LOCATIONS = (
    "model_path",
    "input_table",
    "input_oss_file",
    "output_table",
    "output_oss_file",
    "output_dir",
    "staging",
    "user_resource",
)
AVAILABLE_SCHEMES = {
    "model_path": REMOTE,
    "input_table": ("odps",),
    "input_oss_file": REMOTE,
    "output_dir": ("oss",),
    "output_table": ("odps",),
    "output_oss_file": ("oss",),
    "staging": ("oss",),
    "user_resource": REMOTE,
}
# Keys that one type of model heeds, and those of them that it cannot do without.
HEEDED_BY = {
    "feature_name": "feature_extractor",
    "top_k": "classifier",
    "multilabel_threshold": "multilabel_classifier",
    "segmentation_output": "segmentor",
    "user_predictor_cls": CUSTOM,
    "user_predictor_config": CUSTOM,
}
MAX_PROCESSES = 16  # in a chain
REQUIRED = ("feature_name", "user_predictor_cls")


def has_custom_code(job: Job) -> bool:
    """Return whether users' code takes part in a job."""
    return job.model_type == CUSTOM or bool(job.user_process_config)


def clashes(job: Job) -> Iterator[Clash]:
    """Yield every rule that the job breaks."""
    yield from _one_input_one_output(job)
    yield from _columns(job)
    yield from _sizes(job)
    yield from _model(job)
    yield from _custom_code(job)
    yield from _video(job)
    yield from _cluster(job)
    yield from _not_available(job)


def _one_input_one_output(job: Job) -> Iterator[Clash]:
    for way, table, file in (
        ("input", job.input_table, job.input_oss_file),
        ("output", job.output_table, job.output_oss_file),
    ):
        keys = (f"{way}_table", f"{way}_oss_file")
        if table and file:
            yield Clash(keys, f"set together with {keys[1]}, expected exactly one of them")
        if not table and not file:
            yield Clash(keys, f"required but missing, expected {keys[0]} or {keys[1]}")
    if job.output_table and job.output_table == job.input_table:
        yield Clash(("output_table", "input_table"), "the same as input_table, expected another")
    if job.output_oss_file and job.output_oss_file == job.input_oss_file:
        yield Clash(
            ("output_oss_file", "input_oss_file"), "the same as input_oss_file, expected another"
        )


def _columns(job: Job) -> Iterator[Clash]:
    for name in sorted({n for n in job.reserved_columns if job.reserved_columns.count(n) > 1}):
        yield Clash(("reserved_columns",), f"{show(name)} is listed twice, expected each name once")
    if job.result_column in job.reserved_columns:
        message = (
            f"{show(job.result_column)} is also in reserved_columns, expected a name of its own"
        )
        yield Clash(("result_column", "reserved_columns"), message)
    if job.output_oss_file and job.result_column == "image":
        message = 'got "image", which output_oss_file uses for the input, expected another name'
        yield Clash(("result_column", "output_oss_file"), message)


def _sizes(job: Job) -> Iterator[Clash]:
    batches = [process.batch_size for process in job.user_process_config]
    together = math.lcm(job.batch_size, *batches)
    if job.queue_size < job.batch_size or job.queue_size < together:
        least = f"batch_size, which is {job.batch_size}"
        if batches:
            least = (
                f"{together}, the least common multiple of batch_size and the processes' own: they "
                "take rows in batches that begin together only so often"
            )
        message = f"got {job.queue_size}, expected at least {least}"
        yield Clash(("queue_size", "batch_size", "user_process_config"), message)
    if job.decode_keep_size >= job.decode_batch_size:
        message = f"got {job.decode_keep_size}, expected less than decode_batch_size, which is "
        yield Clash(("decode_keep_size", "decode_batch_size"), f"{message}{job.decode_batch_size}")


def _model(job: Job) -> Iterator[Clash]:
    for key, kind in HEEDED_BY.items():
        is_default = getattr(job, key) == type(job).model_fields[key].default
        if job.model_type == kind and is_default and key in REQUIRED:
            yield Clash((key, "model_type"), f"required with model_type {kind}, but missing")
        if job.model_type != kind and not is_default:
            message = f"set with model_type {job.model_type}, expected only with {kind}"
            yield Clash((key, "model_type"), message)


def _custom_code(job: Job) -> Iterator[Clash]:
    is_used = job.user_predictor_cls or job.user_process_config
    if job.user_resource and not is_used:
        message = "set without user_predictor_cls or user_process_config, expected one of them"
        yield Clash(("user_resource", "user_predictor_cls", "user_process_config"), message)
    if len(job.user_process_config) > MAX_PROCESSES:
        message = f"got {len(job.user_process_config)}, expected at most {MAX_PROCESSES} processes"
        yield Clash(("user_process_config",), message)
    if job.segmentation_output == "png" and not job.output_dir:
        message = "required with segmentation_output: png, but missing"
        yield Clash(("output_dir", "segmentation_output"), message)


def _video(job: Job) -> Iterator[Clash]:
    if job.is_input_video and not job.use_image_predictor and job.model_type != CUSTOM:
        message = f"got false with model_type {job.model_type}, which takes images, expected true"
        yield Clash(("use_image_predictor", "model_type"), message)


def _cluster(job: Job) -> Iterator[Clash]:
    if job.enableDynamicCluster and not job.useSparseClusterSchema:
        message = (
            "set without useSparseClusterSchema, expected useSparseClusterSchema: true as well"
        )
        yield Clash(("enableDynamicCluster", "useSparseClusterSchema"), message)


def _not_available(job: Job) -> Iterator[Clash]:
    for name, field in type(job).model_fields.items():
        value = getattr(job, name)
        feature = trait_of(field).comes_with
        if feature and value != field.default:
            message = f"not available in this version, comes with {feature}"
            yield Clash((name,), message)
    for name in LOCATIONS:
        found = scheme(getattr(job, name))
        if found and found not in AVAILABLE_SCHEMES.get(name, ()):
            message = f"{found}:// is not available in this version, expected a local path"
            yield Clash((name,), message)
