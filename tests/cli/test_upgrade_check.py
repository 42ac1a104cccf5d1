"""`vllm-dropin upgrade-check` as users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.folders import README_ENGINE_CONFIG, README_METADATA, definitions, engine_config, engine_environ, make_folder

SCRIPT = Path(sys.executable).with_name("vllm-dropin")
README = {"model-metadata.yaml": README_METADATA, "engine_config.json": README_ENGINE_CONFIG}
BARE = {"PATH": "/usr/bin:/bin"}
GONE = {"engine_config.json": engine_config("--model", "o/m", "--max-num-partial-prefills", 2, "--hf-token=hf_canary")}


def run(*words: str, environ: Mapping[str, str] = BARE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, "upgrade-check", *words], env=dict(environ), capture_output=True, text=True, timeout=60
    )


def test_the_readme_folder_needs_no_change_and_no_engine(tmp_path: Path) -> None:
    done = run(str(make_folder(tmp_path, README)), "--to", "0.33")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("vLLM 0.26.0 to 0.33.0: every flag of the folder is taken as it is\n")
    assert "--disable-cascade-attn" in done.stdout  # a default that nobody wrote down


def test_a_flag_that_is_gone(tmp_path: Path) -> None:
    done = run(str(make_folder(tmp_path, GONE)), "--to", "0.32.0")
    assert done.returncode == 78
    assert "--max-num-partial-prefills  removed, engine_config.json (args[2])" in done.stdout
    assert "Remove --max-num-partial-prefills and its value" in done.stdout
    assert "error: vLLM 0.32.0 would refuse this folder: --max-num-partial-prefills" in done.stderr
    assert "hf_canary" not in done.stdout + done.stderr


def test_json(tmp_path: Path) -> None:
    done = run(str(make_folder(tmp_path, GONE)), "--to", "0.32.0", "--from", "0.26.0", "--json")
    assert done.returncode == 78
    report = json.loads(done.stdout)
    assert set(report) == {"ok", "from", "to", "notes", "changes", "defaults"}
    assert (report["ok"], report["from"], report["to"], report["notes"]) == (False, "0.26.0", "0.32.0", [])
    (change,) = report["changes"]
    assert (change["kind"], change["flag"], change["blocking"]) == ("removed", "--max-num-partial-prefills", True)
    assert {"--dcp-comm-backend"} <= {item["flag"] for item in report["defaults"]}


def test_the_installed_engine_is_the_start(tmp_path: Path) -> None:
    environ = engine_environ(tmp_path / "python", version="0.31.0")
    folder = make_folder(tmp_path / "m", {"engine_config.json": engine_config("--mamba-cache-mode", "all")})
    done = run(str(folder), "--to", "0.32", environ=environ)
    assert done.returncode == 78
    assert done.stdout.startswith("vLLM 0.31.0 to 0.32.0: 1 flag needs a change")
    assert "Choose one of" in done.stdout


def test_parameters_are_flags_too(tmp_path: Path) -> None:
    metadata = definitions("fieldName: max_model_len, type: string, defaultValue: 4x")
    done = run(str(make_folder(tmp_path, {"model-metadata.yaml": metadata})), "--to", "0.33")
    assert done.returncode == 78
    assert "parameter max_model_len (model-metadata.yaml)" in done.stdout


def test_a_config_file_and_the_command_line_are_looked_at(tmp_path: Path) -> None:
    files = {"engine_config.json": engine_config("--config", "more.yaml"), "more.yaml": "calculate-kv-scales: true\n"}
    done = run(str(make_folder(tmp_path, files)), "--to", "0.33", "--", "--override-attention-dtype", "x")
    assert done.returncode == 78
    assert "--calculate-kv-scales  removed, more.yaml (--config in engine_config.json)" in done.stdout
    assert "--override-attention-dtype  removed, the command line (args[0])" in done.stdout


@pytest.mark.parametrize(
    ("files", "words", "expected"),
    [
        (README, ["--to", "0.99"], "no flag table for vLLM 0.99; shipped: 0.26.0"),
        (README, ["--to", "latest"], "no flag table for vLLM latest"),
        (README, ["--to", "0.33", "--engine-python", "/nowhere/python"], "is not a program"),
        ({"engine_config.json": '{"args": ['}, ["--to", "0.33"], "engine_config.json, line 1"),
        ({"engine_config.json": engine_config("--modle", "x")}, ["--to", "0.33"], "--modle"),
    ],
)
def test_errors(tmp_path: Path, files: dict[str, str], words: list[str], expected: str) -> None:
    done = run(str(make_folder(tmp_path, files)), *words, "--json")
    assert done.returncode == 78
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert json.loads(done.stdout)["ok"] is False
