"""The published README of the environment, step by step and word for word, with our folder in place of theirs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.airgap.contexts import table, verify
from tests.airgap.test_verify import weights
from tests.contract.drivers import Engine, envelopes
from tests.folders import MINIMAL_METADATA, README_ENGINE_CONFIG, README_METADATA, make_folder
from vllm_dropin.platforms.datarobot.contents import read_context

ROOT = Path(__file__).parents[2]
STEP = "tar -czvf vllm_dropin.tar.gz -C /path/to/public_dropin_environments/vllm/ ."
PARAMETERS: dict[str, tuple[str, Any]] = {
    "model": ("string", "org/name"),
    "HuggingFaceToken": ("credential", {"credentialType": "api_token", "apiToken": "hf_of_the_example"}),
    "max_model_len": ("string", "2048"),
    "gpu_memory_utilization": ("numeric", 0.5),
    "trust_remote_code": ("boolean", True),
    "system_prompt": ("string", "Be brief."),
    "prompt_column_name": ("string", "question"),
    "max_tokens": ("numeric", 64),
    "n": ("numeric", 2),
    "temperature": ("numeric", 0.2),
    "verifySSL": ("boolean", True),
}
"""The table "Supported Runtime Parameters", with a value of the kind that its row describes."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.stub(tmp_path_factory.mktemp("engine") / "venv")


def check(folder: Path, engine: Engine, environ: dict[str, str] | None = None) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "vllm_dropin.cli.main",
        "check",
        folder,
        "--json",
        "--engine-python",
        engine.python,
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MLOPS_", "VLLM_DROPIN_"))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env={**clean, **(environ or {})})
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_step_one_makes_an_archive_that_a_platform_takes(tmp_path):
    words = shlex.split(STEP.replace("/path/to/public_dropin_environments/vllm/", f"{ROOT}/environment/"))
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "./Dockerfile" in done.stdout.splitlines()
    archive = tmp_path / "vllm_dropin.tar.gz"
    proof = verify(archive)
    assert proof.returncode == 0, proof.stderr
    assert {name for name, verdict in table(proof).items() if verdict == "ok"} == {
        "unpack", "contents", "dockerfile", "base", "requirements",
    }  # fmt: skip
    context = read_context(archive)  # as `push environment` reads it: step two
    assert context.text("name") == "vLLM drop-in (GPU)"
    assert context.info["useCases"] == ["customModel"]


def test_our_own_page_has_the_same_step():
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert STEP.replace("/path/to/public_dropin_environments/vllm/", "environment") in page


def test_every_supported_parameter_is_taken(tmp_path, engine):
    definitions = "".join(
        f"  - {{fieldName: {name}, type: {kind}{', credentialType: api_token' if kind == 'credential' else ''}}}\n"
        for name, (kind, _) in PARAMETERS.items()
    )
    folder = make_folder(
        tmp_path / "model", {"model-metadata.yaml": f"{MINIMAL_METADATA}runtimeParameterDefinitions:\n{definitions}"}
    )
    found = check(folder, engine, envelopes(PARAMETERS))
    settings = {item["name"]: item for item in found["settings"]}
    for name, (kind, value) in PARAMETERS.items():
        assert settings[name]["source"] == f"MLOPS_RUNTIME_PARAM_{name}"
        if kind != "credential":
            assert str(settings[name]["value"]) == str(value), name
    assert "hf_of_the_example" not in json.dumps(found)
    command = " ".join(found["command"])
    for flag in ("--model org/name", "--max-model-len 2048", "--gpu-memory-utilization 0.5", "--trust-remote-code"):
        assert flag in command


def test_the_example_files_are_taken_as_they_are(tmp_path, engine):
    files = {"model-metadata.yaml": README_METADATA, "engine_config.json": README_ENGINE_CONFIG}
    found = check(make_folder(tmp_path / "model", files), engine, envelopes({"model": ("string", "org/other")}))
    settings = {item["name"]: item for item in found["settings"]}
    assert (settings["max_tokens"]["value"], settings["prompt_column_name"]["value"]) == (1024, "promptText")
    assert settings["system_prompt"]["value"].startswith("You are a helpful AI assistant.")
    command = " ".join(found["command"])
    assert "--model tiiuae/falcon-7b-instruct" in command  # what stands in the file takes precedence
    assert "org/other" not in command
    assert "--chat-template /opt/code/template_falcon.jinja" in command


HOOK = """\
import os
import shutil


def load_model(code_dir):
    shutil.copytree("storage", os.path.join(os.environ["CODE_DIR"], "vllm"))
"""


def test_air_gapped_deployment(tmp_path, engine):
    """A load_model hook that saves its artifacts to ${CODE_DIR}/vllm/: the server loads those, and asks nobody."""
    storage = {name.replace("vllm/", "storage/"): content for name, content in weights().items()}
    files = {"model-metadata.yaml": README_METADATA, "custom.py": HOOK, **storage}
    folder = make_folder(tmp_path / "model", files)
    done = verify(ROOT / "environment", folder, "--engine-python", engine.python, "--json")
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)["steps"][-1]
    assert run["facts"]["prediction"] == "echo: What is the capital of France?"
    assert run["facts"]["wanted"] == []
