"""The commented model-metadata.yaml of a new folder.

Block style and no empty lists throughout: the platform's own parser takes no other.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from vllm_dropin.model.contract import CONTRACT, Parameter

PUBLISHED = (
    "model", "HuggingFaceToken", "max_model_len", "gpu_memory_utilization", "trust_remote_code", "system_prompt",
    "prompt_column_name", "max_tokens", "n", "temperature", "verifySSL",
)  # fmt: skip
"""The parameters that the environment's published documentation lists. The others are there as comments."""

_HEAD = """\
# yaml-language-server: $schema={schema}
# What the platform and vllm-dropin know about this model. `vllm-dropin check` says what they make of it.
name: {name}
type: inference
targetType: textgeneration
inferenceModel:
  targetName: resultText

# Each entry is a value that a deployment can set without touching this folder; defaultValue is used where it does not.
# engine_config.json wins over them. Remove what nobody should set.
runtimeParameterDefinitions:
"""
_MORE = """
  # Further ones, off by default: take the # away to offer them.
"""
_OWN = """
  # For custom.py.
"""


def render(schema: str, name: str, defaults: Mapping[str, str], own: Sequence[Parameter] = ()) -> str:
    """The file's text. `defaults` are values by parameter; `own` are parameters that only the hook reads."""
    known = {parameter.name: parameter for parameter in CONTRACT}
    parts = [_HEAD.format(schema=schema, name=json.dumps(name, ensure_ascii=False))]
    parts.append("\n".join(_entry(known[each], defaults) for each in PUBLISHED))
    if own:
        parts += [_OWN, "\n".join(_entry(parameter, defaults) for parameter in own)]
    others = [_entry(parameter, defaults) for parameter in CONTRACT if parameter.name not in PUBLISHED]
    parts += [_MORE, "\n".join(_commented(entry) for entry in others)]
    return "".join(parts)


CREDENTIAL_TYPES = {
    "HuggingFaceToken": "api_token", "s3_credential": "s3", "azure_credential": "azure", "gcp_credential": "gcp",
}  # fmt: skip


def _entry(parameter: Parameter, defaults: Mapping[str, str]) -> str:
    lines = [f"  - fieldName: {parameter.name}", f"    type: {parameter.type}"]
    if parameter.type == "credential":
        lines.append(f"    credentialType: {CREDENTIAL_TYPES[parameter.name]}")
    default = defaults.get(parameter.name, parameter.default)
    if default is not None:
        lines.append(f"    defaultValue: {json.dumps(default, ensure_ascii=False)}")
    # 0 stands for "not set" in these: a minimum would forbid it.
    for key, limit in (("minValue", parameter.minimum), ("maxValue", parameter.maximum)):
        if limit is not None:
            lines.append(f"    {key}: {0 if parameter.zero_unset and key == 'minValue' else limit:g}")
    lines.append("    description: |-")
    lines += _wrapped(parameter.meaning)
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _commented(entry: str) -> str:
    return "".join(f"  # {line.removeprefix('  ')}\n" for line in entry.splitlines())
