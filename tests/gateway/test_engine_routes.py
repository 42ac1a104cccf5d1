"""Every route that the installed vLLM knows, asked through the gateway: only those of the allow-list reach the engine.

The list is read from vLLM's own files: each text there that looks like a path, whether this model and this
configuration serve it or not. A route that the next vLLM brings is on it.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from tests.conftest import GatewayProcess, Stage
from tests.gateway.test_doors import DOORS, Line
from vllm_dropin.gateway.openai import INFERENCE_ROUTES

_PATH = re.compile(r"/[A-Za-z_][\w{}:.-]*(/[\w{}:.-]+)*")
_FIND = "import importlib.util; print(importlib.util.find_spec('vllm').submodule_search_locations[0])"
ALLOWED = {*INFERENCE_ROUTES, "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"}
FROM_FASTAPI = {"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
AUTHORIZED = ("Host: x", "Authorization: Bearer the-key")


def engine_paths() -> set[str]:
    """Skips where there is no vLLM."""
    python = os.environ.get("VLLM_DROPIN_ENGINE_PYTHON")
    if not python:
        pytest.skip("VLLM_DROPIN_ENGINE_PYTHON does not name a Python with vLLM")
    found = subprocess.run([python, "-I", "-c", _FIND], capture_output=True, text=True, timeout=60, check=True).stdout
    paths = set(FROM_FASTAPI)
    for file in (Path(found.strip()) / "entrypoints").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _PATH.fullmatch(node.value):
                paths.add(node.value)
    return paths


@pytest.fixture(scope="module")
def paths() -> set[str]:
    return engine_paths()


def concrete(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "resp_1", path)


@pytest.fixture(scope="module")
def guarded() -> Iterator[GatewayProcess]:
    made = Stage()
    yield made.gateway(api_keys=["the-key"])
    made.close()


@pytest.fixture
def line(guarded: GatewayProcess) -> Iterator[Line]:
    made = Line(guarded.port)
    yield made
    made.close()


def test_the_list_is_vllms(paths: set[str]) -> None:
    """The reading finds what is known to be there, and the allow-list names nothing that vLLM has not."""
    known = {"/pause", "/update_weights", "/collective_rpc", "/sleep", "/scale_elastic_ep", "/v1/load_lora_adapter"}
    assert known | {"/metrics", "/v1/responses/{response_id}/cancel"} <= paths
    assert set(INFERENCE_ROUTES) - paths <= {"/v1/audio/speech"}  # vLLM's plug-in for audio models has it
    assert len(paths) > 60


def test_no_other_route_reaches_the_engine(guarded: GatewayProcess, line: Line, paths: set[str]) -> None:
    before = len(guarded.engine.requests())
    wrong = []
    for path in sorted(map(concrete, paths - ALLOWED)):
        doors = ["/directAccess", "/nim"] if path in DOORS else ["", "/directAccess", "/nim"]
        for door, method in product(doors, ("GET", "POST", "PUT", "DELETE", "PATCH")):
            status = line.ask(method, door + path, *AUTHORIZED)
            if status != 404:
                wrong.append((method, door + path, status))
    assert wrong == []
    assert len(guarded.engine.requests()) == before


def test_each_is_401_without_a_key(guarded: GatewayProcess, line: Line, paths: set[str]) -> None:
    open_doors = {"/health", "/ping", "/readyz"}
    for path in sorted(map(concrete, paths - open_doors)):
        for door in ("", "/directAccess", "/nim"):
            assert line.ask("POST", door + path) == line.ask("GET", door + path) == 401, door + path
