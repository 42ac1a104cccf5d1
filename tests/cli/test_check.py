"""The command as users run it: the console script, in a process of its own."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.folders import (
    README_ENGINE_CONFIG,
    README_METADATA,
    engine_config,
    engine_environ,
    envelope,
    make_folder,
)
from tests.model.test_manifest import manifest_of

SCRIPT = Path(sys.executable).with_name("vllm-dropin")
CANARY = "hf_canary0123456789"
README = {"model-metadata.yaml": README_METADATA, "engine_config.json": README_ENGINE_CONFIG}


def run(tmp_path: Path, *words: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    env = {**engine_environ(tmp_path / "python"), **(environ or {})}
    return subprocess.run([SCRIPT, *words], env=env, capture_output=True, text=True, timeout=60)


def safetensors(size: int = 8) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * size


def test_a_good_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", README)
    environ = {
        "MLOPS_RUNTIME_PARAM_HuggingFaceToken": envelope("credential", {"apiToken": CANARY}),
        "DATAROBOT_API_TOKEN": "platform-canary",
    }
    done = run(
        tmp_path, "check", str(folder), "--param", "model=org/other", "--", "--max_model_len", "2k", environ=environ
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert CANARY not in done.stdout
    assert "platform-canary" not in done.stdout
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "model tiiuae/falcon-7b-instruct engine_config.json instead of org/other (--param)" in lines
    assert "max_model_len 2k the command line" in lines
    assert "HuggingFaceToken *** MLOPS_RUNTIME_PARAM_HuggingFaceToken" in lines
    assert "--enforce-eager true default (CPU)" in lines
    assert "--max_model_len 2k" in lines
    assert "HF_TOKEN *** HuggingFaceToken" in lines
    assert any(line.startswith("DATAROBOT_API_TOKEN, MLOPS_RUNTIME_PARAM_HuggingFaceToken") for line in lines)
    assert "- --param model has no effect: tiiuae/falcon-7b-instruct from engine_config.json wins" in lines


def test_json(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {**README, "custom.py": "def load_model(code_dir): pass\n"})
    environ = {"MLOPS_RUNTIME_PARAM_HuggingFaceToken": envelope("credential", {"apiToken": CANARY})}
    done = run(tmp_path, "check", str(folder), "--json", environ=environ)
    assert done.returncode == 0
    assert CANARY not in done.stdout
    report = json.loads(done.stdout)
    assert set(report) == {
        "ok", "error", "folder", "engine", "upstream", "hook", "weights", "settings", "command", "environment",
        "warnings",
    }  # fmt: skip
    assert report["ok"] is True
    assert report["engine"]["version"] == "0.32.0"
    assert report["engine"]["cpu"] is True
    assert report["hook"] == {"file": str(folder / "custom.py"), "init": False, "load_model": True}
    assert all(set(setting) == {"name", "value", "source", "overrode"} for setting in report["settings"])
    values = {setting["name"]: setting["value"] for setting in report["settings"]}
    assert (values["max_tokens"], values["HuggingFaceToken"]) == (1024, "***")
    assert report["command"][1:5] == [
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        "tiiuae/falcon-7b-instruct",
    ]
    assert {"name": "HF_TOKEN", "value": "***", "source": "HuggingFaceToken"} in report["environment"]["added"]


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("secret", ['one"two\\three', "one'two", "one\ntwo", "one" + "two" * 30])
def test_a_secret_is_hidden_however_it_would_be_spelled(tmp_path: Path, form: list[str], secret: str) -> None:
    folder = make_folder(tmp_path / "m", {"engine_config.json": engine_config("--model", "o/m", "--revision", secret)})
    environ = {"MLOPS_RUNTIME_PARAM_HuggingFaceToken": envelope("credential", {"apiToken": secret})}
    done = run(tmp_path, "check", str(folder), *form, environ=environ)
    assert done.returncode == 0, done.stderr
    assert "--revision" in done.stdout
    assert "two" not in done.stdout


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["no model to serve", "vllm/"]),
        ({"engine_config.json": '{"args": ['}, ["engine_config.json, line 1, column 11"]),
        ({"engine_config.json": engine_config("--modle", "x")}, ["--modle", "args[0]", "--model"]),
        ({"engine_config.json": engine_config("--model", "x", "--port", "1")}, ["--port", "--address"]),
        ({"model-metadata.yaml": "name: m\nname: m\n"}, ["model-metadata.yaml, line 2", "duplicate"]),
        ({"a/custom.py": "", "custom.py": ""}, ["2 files", "a/custom.py, custom.py"]),
        ({"custom.py": "def :"}, ["custom.py, line 1"]),
    ],
)
def test_a_bad_folder_exits_78_and_says_why(tmp_path: Path, files: dict[str, str], words: list[str]) -> None:
    folder = make_folder(tmp_path / "m", files)
    done = run(tmp_path, "check", str(folder))
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith("error: ")
    assert [word for word in words if word not in done.stderr] == []
    assert "Traceback" not in done.stderr


def test_an_error_is_json_too(tmp_path: Path) -> None:
    done = run(tmp_path, "check", str(make_folder(tmp_path / "m", {})), "--json")
    assert done.returncode == 78
    report = json.loads(done.stdout)
    assert set(report) == {"ok", "error"}
    assert report["ok"] is False
    assert report["error"]["code"] == "model"
    assert report["error"]["message"] in done.stderr


@pytest.mark.parametrize(("size", "code"), [(8, 0), (3, 78)])
def test_weights_are_checked(tmp_path: Path, size: int, code: int) -> None:
    files = {"vllm/config.json": "{}", "vllm/model.safetensors": safetensors(size)}
    done = run(tmp_path, "check", str(make_folder(tmp_path / "m", files)))
    assert done.returncode == code
    assert ("whole" in done.stdout) == (code == 0)
    assert ("model.safetensors" in done.stderr) == (code == 78)
    assert "Engine command" in done.stdout


def test_weights_that_a_hook_may_repair_are_a_warning(tmp_path: Path) -> None:
    files = {
        "vllm/config.json": "{}",
        "vllm/model.safetensors": safetensors(3),
        "custom.py": "def load_model(code_dir): pass\n",
    }
    done = run(tmp_path, "check", str(make_folder(tmp_path / "m", files)))
    assert done.returncode == 0
    assert "custom.py runs first and may repair it" in done.stdout


def bundled(tmp_path: Path, **more: str) -> Path:
    """A model folder whose weights have a manifest."""
    weights = {"config.json": b"{}", "model.safetensors": safetensors()}
    files = {f"vllm/{name}": data for name, data in weights.items()}
    text = manifest_of(weights).render()
    folder = make_folder(tmp_path / "m", {**files, "vllm/bundle-manifest.json": text, **more})
    time.sleep(0.12)  # younger files are hashed each time
    return folder


def test_a_manifest_is_verified_once_for_each_state_of_a_file(tmp_path: Path) -> None:
    folder = bundled(tmp_path)
    done = run(tmp_path, "check", str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "Manifest verified: 2 file(s), 0 MiB, from org/llama (hub, commit c0ffee)" in lines
    assert "HF_HUB_OFFLINE 1 the model is complete on this machine" in lines
    report = json.loads(run(tmp_path, "check", str(folder), "--json").stdout)
    assert report["weights"]["manifest"] == {
        "source": {"kind": "hub", "name": "org/llama", "revision": "c0ffee"},
        "licence": None,
        "files": 2,
        "bytes": 2 + len(safetensors()),
        "computed": 0,
    }


def test_a_flag_that_names_a_hub_keeps_the_engine_online(tmp_path: Path) -> None:
    folder = bundled(tmp_path, **{"engine_config.json": engine_config("--tokenizer", "org/other")})
    report = json.loads(run(tmp_path, "check", str(folder), "--json").stdout)
    assert report["weights"]["manifest"] is not None
    assert "HF_HUB_OFFLINE" not in [variable["name"] for variable in report["environment"]["added"]]


def test_weights_that_are_not_what_the_manifest_says(tmp_path: Path) -> None:
    folder = bundled(tmp_path)
    (folder / "vllm" / "model.safetensors").write_bytes(safetensors()[:-1] + b"\1")
    done = run(tmp_path, "check", str(folder), "--json")
    assert done.returncode == 78
    report = json.loads(done.stdout)
    assert (report["ok"], report["error"]["code"], report["weights"]) == (False, "model", None)
    assert "model.safetensors has not the content that bundle-manifest.json says" in report["error"]["message"]
    assert report["error"]["message"] in done.stderr


def test_a_model_that_only_the_hook_knows(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {"custom.py": "def load_model(code_dir): pass\n"})
    done = run(tmp_path, "check", str(folder))
    assert done.returncode == 0
    assert "known once custom.py has written vllm/" in done.stdout
    assert json.loads(run(tmp_path, "check", str(folder), "--json").stdout)["command"] is None


def test_an_upstream_needs_no_vllm(tmp_path: Path) -> None:
    done = subprocess.run(
        [SCRIPT, "check", make_folder(tmp_path / "m", {}), "--upstream", "http://localhost:1"],
        env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    assert "Upstream      http://localhost:1" in done.stdout


def test_without_vllm_it_says_how_to_get_one(tmp_path: Path) -> None:
    environ = {"PYTHONPATH": ""}
    done = run(tmp_path, "check", str(make_folder(tmp_path / "m", README)), environ=environ)
    assert done.returncode == 78
    assert "pip install vllm" in done.stderr
