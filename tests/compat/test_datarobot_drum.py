"""The clean-room `datarobot_drum`, imported the way a hook does: by name, from its folder on the path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from vllm_dropin.supervisor.hook import SHIM

MANY = {
    "text": {"type": "string", "payload": "hello"},
    "whole": {"type": "numeric", "payload": 5},
    "part": {"type": "numeric", "payload": 0.5},
    "whole_text": {"type": "numeric", "payload": "5"},
    "part_text": {"type": "numeric", "payload": "0.5"},
    "yes": {"type": "boolean", "payload": True},
    "key": {"type": "credential", "payload": {"credentialType": "api_token", "apiToken": "t"}},
    "other_key": {"type": "credential", "payload": {"user": "u", "password": "p"}},
    "deployment": {"type": "deployment", "payload": "65f0"},
    "nothing": {"type": "credential", "payload": None},
}
CANARY = "canary-in-a-payload"


def python(program: str, **parameters: str) -> str:
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SHIM)}
    environ |= {f"MLOPS_RUNTIME_PARAM_{name}": value for name, value in parameters.items()}
    completed = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True, timeout=20
    )
    return completed.stdout


@pytest.mark.parametrize("module", ["", ".runtime_parameters", ".runtime_parameters.runtime_parameters"])
def test_every_way_to_import_it(module: str) -> None:
    assert python(f"from datarobot_drum{module} import RuntimeParameters as R\nprint(R.has('x'))") == "False\n"


def test_each_type_comes_as_its_python_value() -> None:
    program = (
        "import json, sys\nfrom datarobot_drum import RuntimeParameters as R\n"
        f"print(json.dumps({{name: R.get(name) for name in {list(MANY)}}}))"
    )
    got: dict[str, Any] = json.loads(python(program, **{name: json.dumps(given) for name, given in MANY.items()}))
    expected = {name: given["payload"] for name, given in MANY.items()} | {"whole_text": 5, "part_text": 0.5}
    assert got == expected
    assert type(got["whole"]) is int


def test_has_is_true_for_null_and_names_are_case_sensitive() -> None:
    program = "from datarobot_drum import RuntimeParameters as R\nprint(R.has('n'), R.get('n'), R.has('N'))"
    assert python(program, n='{"type": "string", "payload": null}') == "True None False\n"


def test_a_missing_one_is_a_value_error_that_names_it() -> None:
    program = (
        "from datarobot_drum import RuntimeParameters as R\n"
        "try: R.get('absent')\nexcept ValueError as error: print(error)"
    )
    assert "'absent'" in python(program)


@pytest.mark.parametrize(
    ("envelope", "error"),
    [
        (CANARY, "InvalidJsonException"),
        ("", "InvalidJsonException"),
        (f'"{CANARY}"', "InvalidRuntimeParam"),
        (f'{{"payload": "{CANARY}"}}', "InvalidRuntimeParam"),
        (f'{{"type": "mystery", "payload": "{CANARY}"}}', "InvalidRuntimeParam"),
        (f'{{"type": ["string"], "payload": "{CANARY}"}}', "InvalidRuntimeParam"),
        (f'{{"type": "numeric", "payload": "{CANARY}"}}', "InvalidRuntimeParam"),
        ('{"type": "numeric", "payload": true}', "InvalidRuntimeParam"),
        (f'{{"type": "boolean", "payload": "{CANARY}"}}', "InvalidRuntimeParam"),
        (f'{{"type": "credential", "payload": "{CANARY}"}}', "InvalidRuntimeParam"),
        ('{"type": "string", "payload": 5}', "InvalidRuntimeParam"),
    ],
)
def test_a_malformed_one_is_told_without_its_value(envelope: str, error: str) -> None:
    program = (
        "import traceback\n"
        "from datarobot_drum import RuntimeParameters as R\n"
        "from datarobot_drum.runtime_parameters.exceptions import RuntimeParameterException\n"
        "try: R.get('p')\nexcept RuntimeParameterException as error: print(traceback.format_exc())"
    )
    said = python(program, p=envelope)
    assert error in said
    assert "'p'" in said
    assert CANARY not in said
