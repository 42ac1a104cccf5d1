"""`init` as users run it, and `check` on what it made."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.folders import README_METADATA, engine_environ
from vllm_dropin.errors import InputOutputError
from vllm_dropin.model.contract import CONTRACT
from vllm_dropin.model.metadata import read_metadata
from vllm_dropin.scaffold import folder as scaffold
from vllm_dropin.scaffold import schema
from vllm_dropin.scaffold.folder import VARIANTS
from vllm_dropin.scaffold.metadata import PUBLISHED

SCRIPT = Path(sys.executable).with_name("vllm-dropin")
MODELS = {
    "none": "org/model", "hub": "org/model", "s3": "s3://b/p", "azure": "az://c/p", "gcs": "gs://b/p",
    "local": "/mnt/m",
}  # fmt: skip


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = engine_environ(tmp_path / "python")
    return subprocess.run([SCRIPT, *words], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("hook", VARIANTS)
@pytest.mark.parametrize("with_model", [True, False])
def test_check_says_what_is_right(tmp_path: Path, hook: str, with_model: bool) -> None:
    model = ["--model", MODELS[hook]] if with_model else []
    made = run(tmp_path, "init", "m", "--hook", hook, *model)
    assert (made.returncode, made.stderr) == (0, "")
    assert ("Next: set" in made.stdout) != with_model
    done = run(tmp_path, "check", "m")
    if hook == "none" and not with_model:
        assert done.returncode == 78
        assert "no model to serve" in done.stderr
        return
    assert (done.returncode, done.stderr) == (0, "")
    assert "Warnings" not in done.stdout
    assert ("Hook" in done.stdout) == (hook != "none")
    if hook in ("none", "hub") and with_model:
        assert "org/model" in done.stdout
    parameters = {
        item.fieldName for item in read_metadata(tmp_path / "m" / "model-metadata.yaml")[0].runtimeParameterDefinitions
    }
    assert set(PUBLISHED) <= parameters
    if (tmp_path / "m" / "custom.py").exists():
        compile((tmp_path / "m" / "custom.py").read_text(), "custom.py", "exec")


def test_what_is_commented_out_is_right_too(tmp_path: Path) -> None:
    run(tmp_path, "init", "m", "--model", "org/model")
    file = tmp_path / "m" / "model-metadata.yaml"
    head, _, tail = file.read_text().partition("# Further ones")
    tail = "\n".join(line.replace("  # ", "  ", 1) for line in tail.splitlines()[1:])
    file.write_text(head + "\n" + tail)
    metadata, _, warnings = read_metadata(file)
    assert warnings == ()
    assert {item.fieldName for item in metadata.runtimeParameterDefinitions} == {item.name for item in CONTRACT}
    assert run(tmp_path, "check", "m").returncode == 0


def test_editors_find_the_schemas_and_agree(tmp_path: Path) -> None:
    run(tmp_path, "init", "m", "--hook", "s3", "--model", "s3://b/p")
    folder = tmp_path / "m"
    first = (folder / "model-metadata.yaml").read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    rules = json.loads((folder / first.partition("=")[2]).read_text())
    jsonschema.validate(yaml.safe_load((folder / "model-metadata.yaml").read_text()), rules)
    config = json.loads((folder / "engine_config.json").read_text())
    jsonschema.validate(config, json.loads((folder / config["$schema"]).read_text()))


@pytest.mark.parametrize(
    "wrong", [{"nmae": "x"}, {"targetType": "binary"}, {"runtimeParameterDefinitions": [{"type": "x"}]}]
)
def test_the_schema_finds_mistakes(wrong: dict[str, object]) -> None:
    good = yaml.safe_load(README_METADATA)
    jsonschema.validate(good, schema.metadata_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**good, **wrong}, schema.metadata_schema())


def test_the_shipped_schema_is_current() -> None:
    assert schema.SCHEMA_FILE.read_text() == schema.render(), "run python -m vllm_dropin.scaffold.schema"


@pytest.mark.parametrize(
    "name", ["README.md", "engine_config.json", "model-metadata.yaml", "custom.py", "sub/custom.py"]
)
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    mine = tmp_path / "m" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("# mine")
    done = run(tmp_path, "init", "m", "--hook", "s3")
    assert done.returncode == 78
    assert name in done.stderr
    assert [path for path in (tmp_path / "m").rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "# mine"


def test_other_files_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "m" / "vllm").mkdir(parents=True)
    (tmp_path / "m" / "notes.txt").touch()
    assert run(tmp_path, "init", "m").returncode == 0
    assert run(tmp_path, "init", "m").returncode == 78


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "s3://b/p"], "Use --hook s3."),
        (["--hook", "s3", "--model", "org/model"], "begins with s3://"),
        (["--hook", "local", "--model", "relative"], "begins with /"),
        (["--model", " "], "--model is empty"),
    ],
)
def test_a_model_that_does_not_fit(tmp_path: Path, words: list[str], expected: str) -> None:
    done = run(tmp_path, "init", "m", *words)
    assert done.returncode == 78
    assert expected in done.stderr
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("place", ["file", "file/m"])
def test_a_file_is_no_place_for_a_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    done = run(tmp_path, "init", place)
    assert done.returncode == 78
    assert "file is there" in done.stderr


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    def full(path: Path, text: str) -> None:
        if path.name == "README.md":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        path.write_text(text)

    files = scaffold.plan(tmp_path / "a" / "m", None, "none")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputOutputError, match="No space left"):
        patch.setattr(scaffold, "_create", full)
        scaffold.write(tmp_path / "a" / "m", files)
    assert list(tmp_path.iterdir()) == []
