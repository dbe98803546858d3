from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from evmp.errors import ConfigError
from evmp.job import Job, job_schema, load_job
from evmp.setting import trait_of
from evmp.value import mask

LEAST: dict[str, Any] = {
    "model_path": "model",
    "model_type": "classifier",
    "input_table": "in.parquet",
    "output_table": "out.parquet",
}
FILES: dict[str, Any] = {
    "model_path": "model",
    "model_type": "classifier",
    "input_oss_file": "in.txt",
    "output_oss_file": "out.jsonl",
}


def load(folder: Path, values: dict[str, Any] | str, *overrides: str) -> Job:
    file = folder / "job.yaml"
    text = values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False)
    file.write_text(text, "utf-8")
    return load_job(file, overrides)


def problems(folder: Path, values: dict[str, Any] | str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, values, *overrides)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


# The specification's table, word for word: name, type, default.
SPECIFICATION: dict[str, tuple[str, object]] = {
    "model_path": ("STRING", ...),
    "model_type": ("STRING", ...),
    "buckets": ("STRING", ()),
    "arn": ("STRING", ""),
    "feature_name": ("STRING", ""),
    "input_table": ("STRING", ""),
    "image_col": ("STRING", "image"),
    "image_type": ("STRING", "base64"),
    "reserved_columns": ("STRING", ()),
    "result_column": ("STRING", "prediction_result"),
    "output_table": ("STRING", ""),
    "lifecycle": ("INT", 10),
    "num_worker": ("INT", 2),
    "cpuRequired": ("INT", 1600),
    "gpuRequired": ("INT", 100),
    "input_oss_file": ("STRING", ""),
    "output_oss_file": ("STRING", ""),
    "output_dir": ("STRING", ""),
    "user_resource": ("STRING", ""),
    "user_predictor_cls": ("STRING", ""),
    "user_process_config": ("STRING", ()),
    "queue_size": ("INT", 1024),
    "batch_size": ("INT", 1),
    "preprocess_thread_num": ("INT", 4),
    "predict_thread_num": ("INT", 2),
    "is_input_video": ("BOOL", False),
    "use_image_predictor": ("BOOL", True),
    "decode_type": ("INT", 4),
    "sample_fps": ("FLOAT", 5.0),
    "reshape_size": ("INT", -1),
    "decode_batch_size": ("INT", 10),
    "decode_keep_size": ("INT", 0),
    "enableDynamicCluster": ("BOOL", False),
    "useSparseClusterSchema": ("BOOL", False),
}
JSON_TYPES = {"INT": "integer", "BOOL": "boolean", "FLOAT": "number", "STRING": "string"}


@pytest.mark.parametrize("name", SPECIFICATION)
def test_a_key_of_the_specification_has_its_type_and_default(name: str) -> None:
    kind, default = SPECIFICATION[name]
    field = Job.model_fields[name]
    node = job_schema()["properties"][name]

    assert (... if field.is_required() else field.default) == default
    assert JSON_TYPES[kind] in {choice.get("type") for choice in node.get("anyOf", [node])}
    assert not trait_of(field).own


def test_all_other_keys_are_marked_as_our_own() -> None:
    ours = {name for name, field in Job.model_fields.items() if trait_of(field).own}

    assert ours == set(Job.model_fields) - set(SPECIFICATION)
    assert all(name == name.lower() for name in ours - {"ossHost"})


def test_the_least_job_has_every_default(tmp_path: Path) -> None:
    job = load(tmp_path, LEAST)

    assert job.model_dump() == {
        **{name: default for name, (_, default) in SPECIFICATION.items()},
        **{
            name: field.default
            for name, field in Job.model_fields.items()
            if name not in SPECIFICATION
        },
        **LEAST,
    }


def test_a_job_cannot_be_changed(tmp_path: Path) -> None:
    job = load(tmp_path, LEAST)

    with pytest.raises(ValidationError):
        job.batch_size = 2


def test_a_job_made_in_python_obeys_the_same_rules() -> None:
    assert Job(**LEAST, batch_size=8).batch_size == 8
    with pytest.raises(ConfigError, match="queue_size: got 1, expected at least batch_size"):
        Job(**LEAST, batch_size=8, queue_size=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batch_sise: 8", "batch_sise: unknown key, did you mean batch_size?"),
        ("CPURequired: 8", "CPURequired: unknown key, did you mean cpuRequired?"),
        ("zzz: 8", "zzz: unknown key"),
        ("batch_size: 0", "batch_size: got 0, expected an integer from 1 to 65536"),
        ("batch_size: 2.0", "batch_size: got 2.0, expected an integer from 1 to 65536"),
        ("batch_size: true", "batch_size: got true, expected an integer from 1 to 65536"),
        ("batch_size: many", 'batch_size: got "many", expected an integer from 1 to 65536'),
        ("batch_size:", "batch_size: got nothing, expected an integer from 1 to 65536"),
        ("batch_size: [1]", "batch_size: got [1], expected an integer from 1 to 65536"),
        ("lifecycle: -1", "lifecycle: got -1, expected an integer of at least 1"),
        ("gpuRequired: 10001", "gpuRequired: got 10001, expected an integer from 0 to 10000"),
        ("num_worker: {a: 1}", "num_worker: got a mapping, expected an integer from 1 to 100000"),
        ("sample_fps: .nan", "sample_fps: got NaN, expected a number"),
        ("max_error_fraction: 2", "max_error_fraction: got 2, expected a number from 0 to 1"),
        (
            "stall_timeout_seconds: 0",
            "stall_timeout_seconds: got 0, expected a number above 0",
        ),
        ("keep_staging: 1", "keep_staging: got 1, expected true or false"),
        ("image_col: ''", 'image_col: got "", expected text that is not empty'),
        ("image_col: 5", "image_col: got 5, expected text that is not empty"),
        ("image_type: ulr", 'image_type: got "ulr", expected base64 or url, did you mean url?'),
        ("decode_type: 5", "decode_type: got 5, expected 1, 2, 3 or 4"),
        ("reserved_columns: a,,b", 'reserved_columns: got "a,,b", expected names separated by'),
        ("reserved_columns: [a, 5]", "reserved_columns[1]: got 5, expected text"),
        ("reserved_columns: 5", "reserved_columns: got 5, expected text or a list"),
        ("arn: acs:ram::me", 'arn: got "acs:ram::me", expected acs:ram::<account>:role/<name>'),
        ("buckets: bucket", 'buckets[0]: got "bucket", expected oss://<bucket>.<oss_host>/<path>'),
        ("user_predictor_cls: Mine", 'user_predictor_cls: got "Mine", expected a module and a cl'),
        (
            "user_process_config: '[job_name: x]'",
            "user_process_config: got no JSON (expecting value: line 1 column 2 (char 1)), exp",
        ),
        (
            "user_process_config: {num_threads: 0, user_process_cls: a.B}",
            "user_process_config[0].num_threads: got 0, expected an integer from 1 to 1024",
        ),
        (
            "user_process_config: [{num_threads: 1}]",
            "user_process_config[0].user_process_cls: required but missing, expected the process",
        ),
    ],
)
def test_a_wrong_value_is_said_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    (found,) = problems(tmp_path, yaml.safe_dump(LEAST) + line + "\n")

    assert found.startswith(f"job.yaml:5: {message}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_table", "odps://p/t", "expected odps://<project>/tables/<table>"),
        ("input_table", "odps://p/tables/t/pt", "expected odps://<project>/tables/<table>"),
        ("model_path", "oss://bucket", "expected oss://<bucket>.<oss_host>/<path>"),
        ("model_path", "a\0b", "a path cannot contain a NUL character"),
        ("model_path", "", "expected text that is not empty"),
        ("model_type", "clasifier", "did you mean classifier?"),
    ],
)
def test_a_malformed_name_is_refused(tmp_path: Path, name: str, value: str, message: str) -> None:
    (found,) = problems(tmp_path, {**LEAST, name: value})

    assert message in found


def test_a_control_character_cannot_reach_the_terminal(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, {**LEAST, "image_type": "\x1b[31mred\nline\u202e"})

    assert found.isprintable()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"input_oss_file": "x"},
            "input_table: set together with input_oss_file, expected exactly",
        ),
        ({"output_oss_file": "x"}, "output_table: set together with output_oss_file, expected ex"),
        ({"input_table": ""}, "input_table: required but missing, expected input_table or input_o"),
        ({"output_table": "in.parquet"}, "output_table: the same as input_table, expected another"),
        ({"batch_size": 9, "queue_size": 8}, "queue_size: got 8, expected at least batch_size, wh"),
        ({"reserved_columns": "a,b,a"}, 'reserved_columns: "a" is listed twice'),
        ({"reserved_columns": ["prediction_result"]}, 'result_column: "prediction_result" is also'),
        ({"ossHost": 1}, "ossHost: got 1, expected text"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    (found,) = problems(tmp_path, {**LEAST, **values})

    assert message in found


def test_results_cannot_take_the_name_of_the_input_in_a_file(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, {**FILES, "result_column": "image"})

    assert 'result_column: got "image", which output_oss_file uses for the input' in found


def test_an_output_cannot_replace_its_own_input(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, {**FILES, "output_oss_file": "in.txt"})

    assert "output_oss_file: the same as input_oss_file, expected another" in found


def test_everything_wrong_is_said_at_once_and_in_order(tmp_path: Path) -> None:
    text = """\
model_path: model
batch_sise: 8
batch_size: 0
queue_size: 1
input_table: in.parquet
input_oss_file: in.txt
image_col: a
image_col: b
result_column: a
reserved_columns: [a]
"""
    found = problems(tmp_path, text, "num_worker=0", "lifecicle=1", "keep_staging")

    assert [problem.split(": ")[0] for problem in found] == [
        "job.yaml:2",
        "job.yaml:3",
        "job.yaml:5",
        "job.yaml:8",
        "job.yaml:9",
        "job.yaml",
        "job.yaml",
        "-Dlifecicle",
        "-Dkeep_staging",
        "-Dnum_worker",
    ]
    assert "job.yaml: model_type: required but missing, expected what the model does" in found[5]
    assert "job.yaml: output_table: required but missing" in found[6]


def test_a_rule_over_a_wrong_key_keeps_silent(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, {**LEAST, "queue_size": 2, "batch_size": "x"})

    assert "batch_size" in found


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("batch_size=8", "batch_size", 8),
        ("sample_fps=5", "sample_fps", 5.0),
        ("max_error_fraction=1e-3", "max_error_fraction", 0.001),
        ("keep_staging=true", "keep_staging", True),
        ("fast_decode=True", "fast_decode", True),
        ("reserved_columns=id,name", "reserved_columns", ("id", "name")),
        ("reserved_columns=[id, name]", "reserved_columns", ("id", "name")),
        ("reserved_columns=5", "reserved_columns", ("5",)),
        ("reserved_columns=", "reserved_columns", ()),
        ("image_col=5", "image_col", "5"),
        ("image_col=a: b #c", "image_col", "a: b #c"),
        ("image_col=a=b", "image_col", "a=b"),
        ("model_path=[x", "model_path", "[x"),
        ("device=cuda", "device", "cuda"),
    ],
)
def test_an_override_is_read_as_its_key_wants_it(
    tmp_path: Path, override: str, name: str, value: object
) -> None:
    job = load(tmp_path, LEAST, override)

    assert getattr(job, name) == value


def test_an_override_replaces_a_wrong_value_and_the_last_one_counts(tmp_path: Path) -> None:
    job = load(tmp_path, {**LEAST, "batch_size": "x"}, "batch_size=2", "batch_size=3")

    assert job.batch_size == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_sise=8", "-Dbatch_sise: unknown key, did you mean batch_size?"),
        ("batch_size=0", "-Dbatch_size: got 0, expected an integer from 1 to 65536"),
        ("batch_size=[", '-Dbatch_size: got "[", expected an integer from 1 to 65536'),
        ("reserved_columns=[id", '-Dreserved_columns: got "[id", not YAML: expected'),
        ("batch_size=", "-Dbatch_size: got nothing, expected an integer from 1 to 65536"),
        ("batch_size", "-Dbatch_size: expected -Dkey=value"),
        ("=8", "-D=8: expected -Dkey=value"),
        ("image_col=\udcff", "-Dimage_col: not UTF-8"),
        ("model_type=x", '-Dmodel_type: got "x", expected feature_extractor, classifier, multi'),
        ("queue_size=2", "-Dqueue_size: got 2, expected at least batch_size, which is 4"),
    ],
)
def test_a_wrong_override_names_itself(tmp_path: Path, override: str, message: str) -> None:
    (found,) = problems(tmp_path, {**LEAST, "batch_size": 4}, override)

    assert found.startswith(message)


def test_numbers_and_truths_may_be_quoted(tmp_path: Path) -> None:
    job = load(tmp_path, {**LEAST, "batch_size": "8", "top_k": "3", "keep_staging": "true"})

    assert (job.batch_size, job.top_k, job.keep_staging) == (8, 3, True)


PROCESS = {"job_name": "crop", "user_process_cls": "m.Crop", "num_threads": 2, "margin": 0.1}


@pytest.mark.parametrize("value", [PROCESS, [PROCESS], json.dumps(PROCESS), json.dumps([PROCESS])])
def test_processes_may_be_json_or_yaml_one_or_many(tmp_path: Path, value: object) -> None:
    (process,) = load(tmp_path, {**LEAST, "user_process_config": value}).user_process_config

    assert (process.user_process_cls, process.num_threads) == ("m.Crop", 2)
    assert process.model_extra == {"margin": 0.1}


def test_job_may_go_on_with_more_copies_of_a_process(tmp_path: Path) -> None:
    jobs = [
        load(tmp_path, {**LEAST, "user_process_config": {**PROCESS, **changed}})
        for changed in ({}, {"num_threads": 7, "job_name": "x"}, {"margin": 0.2})
    ]

    prints = [job.fingerprint() for job in jobs]

    assert prints[0] == prints[1] != prints[2]


def test_secrets_in_the_config_of_a_predictor_are_masked(tmp_path: Path) -> None:
    custom = {"model_type": "self_define", "user_predictor_cls": "m.Net"}
    config = {"api_token": "s3cr3t", "scale": 2}

    job = load(tmp_path, {**LEAST, **custom, "user_predictor_config": json.dumps(config)})

    assert job.describe()["user_predictor_config"] == {"api_token": "***", "scale": 2}


@pytest.mark.parametrize("value", ['{"scale": 2}', {"scale": 2}])
def test_config_of_a_predictor_may_be_json_or_yaml(tmp_path: Path, value: object) -> None:
    custom = {"model_type": "self_define", "user_predictor_cls": "m.Net"}

    job = load(tmp_path, {**LEAST, **custom, "user_predictor_config": value})

    assert json.loads(job.user_predictor_config) == {"scale": 2}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output_dir": "s3://b.h/x"}, "output_dir: s3:// is not available in this version"),
        (
            {"user_resource": "memory://h/x.zip", "user_process_config": PROCESS},
            "user_resource: memory:// is not available in this version",
        ),
        ({"model_path": "ODPS://b.h/x"}, "model_path: odps:// is not available in this version"),
        ({"input_table": "s3://b/x"}, "input_table: s3:// is not available in this version"),
        ({"output_table": "s3://b/x"}, "output_table: s3:// is not available in this version"),
    ],
)
def test_what_this_version_cannot_do_is_said(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    (found,) = problems(tmp_path, {**LEAST, **values})

    assert message in found


def test_a_key_of_a_later_version_at_its_default_is_accepted(tmp_path: Path) -> None:
    assert load(tmp_path, {**LEAST, "is_input_video": False, "sample_fps": 5}).sample_fps == 5


def test_credentials_keys_are_accepted_where_nothing_is_in_the_cloud(tmp_path: Path) -> None:
    job = load(
        tmp_path, {**LEAST, "buckets": "oss://a.h/,oss://b.h/x/", "arn": "acs:ram::1:role/a"}
    )

    assert job.buckets == ("oss://a.h/", "oss://b.h/x/")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"enableDynamicCluster": True}, "expected useSparseClusterSchema: true as well"),
        ({"model_type": "feature_extractor"}, "required with model_type feature_extractor"),
        ({"model_type": "self_define"}, "required with model_type self_define"),
        ({"user_predictor_cls": "a.B"}, "expected only with self_define"),
        ({"feature_name": "logits"}, "expected only with feature_extractor"),
        ({"multilabel_threshold": 0.3}, "expected only with multilabel_classifier"),
        ({"segmentation_output": "preds"}, "expected only with segmentor"),
        ({"model_type": "detector", "top_k": 3}, "expected only with classifier"),
        ({"model_type": "segmentor", "segmentation_output": "png"}, "output_dir: required with"),
        ({"user_resource": "x.zip"}, "set without user_predictor_cls or user_process_config"),
        ({"user_predictor_config": {"a": 1}}, "expected only with self_define"),
        ({"user_process_config": [PROCESS] * 17}, "got 17, expected at most 16 processes"),
        (
            {"batch_size": 64, "user_process_config": {**PROCESS, "batch_size": 33}},
            "got 1024, expected at least 2112, the least common multiple of batch_size and the",
        ),
        ({"decode_keep_size": 10}, "expected less than decode_batch_size, which is 10"),
    ],
)
def test_rules_over_keys_of_later_versions_hold_already(
    tmp_path: Path, values: dict[str, Any], expected: str
) -> None:
    assert any(expected in problem for problem in problems(tmp_path, {**LEAST, **values}))


def test_the_fingerprint_has_what_results_depend_on_and_no_more(tmp_path: Path) -> None:
    plain = load(tmp_path, LEAST).fingerprint()

    faster = load(tmp_path, {**LEAST, "batch_size": 8, "num_worker": 5, "model_path": "copy"})
    other = load(tmp_path, {**LEAST, "top_k": 3})

    assert faster.fingerprint() == plain
    assert {k for k, v in other.fingerprint().items() if v != plain[k]} == {"top_k"}
    assert json.loads(json.dumps(plain)) == plain


def test_whatever_stands_before_a_host_is_hidden() -> None:
    for user in ("token", "me:", "me:pass", "me:p@ss", ":@"):
        assert mask(f"https://{user}@host:80/a@b") == "https://***@host:80/a@b"
    assert mask("https://host/a@b:c@d") == "https://host/a@b:c@d"


def test_the_description_hides_credentials() -> None:
    job = Job.model_construct(
        model_path="https://me:pass@host/m?Signature=abc&x=1", output_dir="oss://b.h/a@b", arn=""
    )

    assert job.describe()["model_path"] == "https://***@host/m?Signature=***&x=***"
    assert job.describe()["output_dir"] == "oss://b.h/a@b"


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(sorted(Job.model_fields)),
        st.none()
        | st.booleans()
        | st.integers(-2, 2**70)
        | st.floats()
        | st.text(max_size=5)
        | st.lists(st.text(max_size=3) | st.integers(), max_size=3)
        | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
        max_size=8,
    )
)
def test_any_values_make_a_job_or_a_config_error(tmp_path: Path, values: dict[str, Any]) -> None:
    try:
        load(tmp_path, {**LEAST, **values})
    except ConfigError as error:
        assert all(problem.message and problem.file for problem in error.problems)
