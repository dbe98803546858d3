"""The example jobs, the JSON schemas and the reference tables are what the code says they are."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import evmp
from evmp.job import Job, load_job

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "config").glob("*.yaml"))

SCRIPTS = ["array-gpu", "array-cpu", "tasks-cpu", "report"]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_can_be_loaded(name: str) -> None:
    assert isinstance(load_job(ROOT / "config" / name), Job)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_names_the_schema_for_editors(name: str) -> None:
    first, _, _ = (ROOT / "config" / name).read_text("utf-8").partition("\n")

    prefix, _, schema = first.partition("$schema=")
    assert prefix == "# yaml-language-server: "
    assert (ROOT / "config" / schema).resolve() == ROOT / "evmp" / "job.schema.json"


def test_the_schemas_are_installed_with_the_package() -> None:
    folder = Path(evmp.__file__).parent

    for name in ("job.schema.json", "model.schema.json"):
        assert json.loads((folder / name).read_text("utf-8"))["type"] == "object"


def test_the_example_of_the_model_package_can_be_loaded(tmp_path: Path) -> None:
    from evmp.model.package import load_package

    text = (ROOT / "docs" / "model-package.md").read_text("utf-8")
    example = text.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "model.yaml").write_text(example, "utf-8")
    (tmp_path / "model.pt").touch()

    package = load_package(tmp_path)

    assert package.class_names(3) == tuple(yaml.safe_load(example)["output"]["labels"])


@pytest.mark.parametrize(
    "path",
    [
        "evmp/job.schema.json",
        "evmp/model.schema.json",
        "docs/model-package.md",
        "README.md",
        *(f"config/slurm/{name}.sbatch" for name in SCRIPTS),
    ],
)
def test_a_generated_text_is_up_to_date(reference: ModuleType, path: str) -> None:
    assert set(reference.GENERATED) >= {path}
    if path == "README.md" and not (ROOT / path).exists():
        pytest.skip("there is no README.md")
    text = (ROOT / path).read_text("utf-8")

    assert reference.renew(path, text) == text, "run python docs/reference.py"


@pytest.mark.parametrize(
    "text", ["", "<!-- parameters: start -->", "<!-- parameters: end --><!-- parameters: start -->"]
)
def test_a_text_without_its_markers_is_refused(reference: ModuleType, text: str) -> None:
    with pytest.raises(reference.MarkerError, match=r"README.md: expected the lines <!-- param"):
        reference.renew("README.md", text)


def test_a_table_names_every_key_once(reference: ModuleType) -> None:
    table = reference.job_table()

    assert [name for name in Job.model_fields if table.count(f"\n| `{name}`") != 1] == []
