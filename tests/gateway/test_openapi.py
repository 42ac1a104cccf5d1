"""The document at /openapi.json says what there is, and what it says of the answers is true."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.conftest import GatewayProcess, Stage
from vllm_dropin.gateway.app import create_app
from vllm_dropin.gateway.config import GatewayConfig
from vllm_dropin.gateway.openai import INFERENCE_ROUTES, RESPONSE_ROUTES
from vllm_dropin.gateway.state import Phase, SharedState

METHODS = {"get", "head", "post", "put", "delete", "patch", "options", "trace"}
CSV = b"promptText\nhello\n,\nthere\n"
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def told(gateway: GatewayProcess, path: str = "/openapi.json", **headers: str) -> dict[str, Any]:
    status, body = gateway.get(path, headers=headers)
    assert status == 200
    document: dict[str, Any] = json.loads(body)
    return document


@pytest.fixture
def document(gateway: GatewayProcess) -> dict[str, Any]:
    return told(gateway)


def looked_up(document: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
    """What a reference means, or the thing itself."""
    while "$ref" in item:
        *folders, name = item["$ref"].removeprefix("#/").split("/")
        place = document
        for folder in (*folders, name):
            place = place[folder]
        item = place
    return item


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    """The schema with the document's components, to which its references lead."""
    return Draft202012Validator({**schema, "components": document["components"]})


def answer_schema(document: dict[str, Any], path: str, method: str, status: int) -> dict[str, Any]:
    responses = document["paths"][path][method]["responses"]
    response = looked_up(document, responses.get(str(status), responses["default"]))
    return response["content"]["application/json"]["schema"]


def described(document: dict[str, Any]) -> list[tuple[str, str]]:
    """The paths and methods whose answers are described: JSON of ours, and what is passed on from the engine."""
    unlike = ("/directAccess", "/nim", "/metrics")
    paths = {path: item for path, item in document["paths"].items() if not path.startswith(unlike)}
    return [(path, method) for path, item in paths.items() for method in ("get", "post") if method in item]


def sent(path: str, method: str) -> bytes | None:
    if method == "get":
        return None
    rows = path.startswith(("/predict", "/invocations", "/transform"))
    return CSV if rows else json.dumps({**CHAT, "prompt": "hi", "input": "hi"}).encode()


def test_it_lists_every_route_and_no_other(document: dict[str, Any], tmp_path: Any) -> None:
    state = SharedState.create(tmp_path / "state", 1)
    app = create_app(GatewayConfig(code_dir="/m", engine_uds="/e", served_model="m"), state, 0)
    inner = {**INFERENCE_ROUTES, **RESPONSE_ROUTES}
    routes = {path: set(route.methods) for path, route in app.routes.items()} | RESPONSE_ROUTES
    routes |= {prefix + path: {"GET", "POST", "PUT"} for prefix in ("/directAccess", "/nim") for path in inner}
    listed = {
        path: {method.upper() for method in looked_up(document, item) if method in METHODS}
        for path, item in document["paths"].items()
    }
    assert listed == routes


def test_it_is_well_formed(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split('"$ref": "')[1:]}:
        assert looked_up(document, {"$ref": name})
    for path, item in document["paths"].items():
        assert ("{id}" in path) is ("parameters" in looked_up(document, item)), path
        for method, operation in looked_up(document, item).items():
            assert method == "parameters" or method == "summary" or operation["responses"]["default"], path


@pytest.fixture(scope="module")
def phased() -> Iterator[GatewayProcess]:
    """One whose phase the test sets."""
    made = Stage()
    yield made.gateway(settings=[{"name": "n", "value": 1, "source": "default"}], model_metadata={"name": "m"})
    made.close()


@pytest.mark.parametrize("phase", [Phase.LOADING, Phase.READY, Phase.FAILED])
def test_answers_are_as_it_says(phased: GatewayProcess, phase: Phase) -> None:
    gateway = phased
    gateway.state.phase = phase
    document = told(gateway)
    seen = set()
    for path, method in described(document):
        status, _, body = gateway.ask(method.upper(), path.replace("{id}", "resp_1"), sent(path, method))
        seen.add(status)
        judge = validator(document, answer_schema(document, path, method, status))
        assert [error.message for error in judge.iter_errors(json.loads(body))] == [], (path, method, status)
    assert seen == {Phase.LOADING: {200, 422, 503}, Phase.READY: {200, 422}, Phase.FAILED: {200, 422, 503, 513}}[phase]


def test_the_form_of_a_deployment_is_described(stage: Stage, document: dict[str, Any]) -> None:
    gateway = stage.gateway(deployment={"target_name": "text"})
    _, _, body = gateway.ask("POST", "/predict/", CSV)
    assert validator(document, answer_schema(document, "/predict", "post", 200)).is_valid(json.loads(body))
    assert not validator(document, answer_schema(document, "/predict", "post", 200)).is_valid({"message": "no"})


def test_the_schemas_refuse_what_is_something_else(document: dict[str, Any]) -> None:
    """Else they would say nothing."""
    for name, wrong in {
        "Message": {"error": {}},
        "Status": {"phase": "ready"},
        "Info": {"codeDir": "/m"},
        "OpenAIError": {"message": "no"},
        "ChatRequest": {"messages": [], "n": 9},
    }.items():
        assert not validator(document, {"$ref": f"#/components/schemas/{name}"}).is_valid(wrong), name


def test_it_is_guarded_and_answers_at_the_root_and_under_the_prefix(stage: Stage) -> None:
    gateway = stage.gateway(api_keys=["key-one"], url_prefix="/deploy/a", limits={"max_n": 3})
    for path in ("/openapi.json", "/deploy/a/openapi.json"):
        assert gateway.get(path)[0] == 401
        document = told(gateway, path, Authorization="Bearer key-one")
        assert document["servers"] == [{"url": "/deploy/a"}]
        assert document["security"] == [{"key": []}]
    public = {path for path, item in document["paths"].items() if item.get("get", {}).get("security") == []}
    assert public == {"/", "/ping", "/health", "/livez", "/readyz", "/startupz"}
    assert document["components"]["schemas"]["ChatRequest"]["properties"]["n"]["maximum"] == 3
