from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_dropin.gateway.chat import prepare_chat
from vllm_dropin.gateway.config import GatewayConfig
from vllm_dropin.gateway.errors import ERROR_BYTES, HttpError, readable_error
from vllm_dropin.gateway.openai import inference_methods
from vllm_dropin.scoring.prompts import GenerationDefaults

USER = {"role": "user", "content": "hi"}


def config(**values: Any) -> GatewayConfig:
    return GatewayConfig.model_validate({"code_dir": "/m", "served_model": "served", **values})


def prepared(body: dict[str, Any], max_model_len: int | None = None, **values: Any) -> dict[str, Any]:
    raw = json.dumps({"model": "served", **body}).encode()
    result: dict[str, Any] = json.loads(prepare_chat(raw, config(**values), "served", max_model_len).body)
    return result


def test_a_body_that_needs_no_change_keeps_its_bytes() -> None:
    raw = b'{ "model": "served",  "messages": [], "x": 1.0e0, "unknown": {"a": null} }'
    assert prepare_chat(raw, config(), "served", None).body == raw


@pytest.mark.parametrize(
    ("given", "sent"),
    [(None, "served"), ("", "served"), ("datarobot-deployed-llm", "served"), ("other", "other"), (7, 7)],
)
def test_model_aliases(given: object, sent: object) -> None:
    assert prepared({"model": given, "messages": [USER]})["model"] == sent


def test_absent_model_is_the_served_one() -> None:
    assert json.loads(prepare_chat(b'{"messages":[]}', config(), "served", None).body)["model"] == "served"


def test_an_upstream_without_a_name_keeps_what_it_is_given() -> None:
    raw = b'{"model":null,"messages":[]}'
    assert prepare_chat(raw, config(served_model=None), None, None).body == raw


def test_defaults_fill_what_is_unset_or_null() -> None:
    defaults = GenerationDefaults(system_prompt="be nice", max_tokens=64, n=2, temperature=0)
    body = prepared({"messages": [USER], "n": None}, generation=defaults)
    assert body["messages"] == [{"role": "system", "content": "be nice"}, USER]
    assert (body["max_tokens"], body["n"], body["temperature"]) == (64, 2, 0)


def test_the_request_wins_over_the_defaults() -> None:
    defaults = GenerationDefaults(system_prompt="be nice", max_tokens=64, n=2, temperature=0.5)
    given = {"messages": [{"role": "developer", "content": "d"}, USER], "max_tokens": 3, "n": 1, "temperature": 0}
    assert prepared(given, generation=defaults) == {"model": "served", **given}


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 1e-6, "n": None}, {"temperature": 1e-6, "n": None}),
        ({"temperature": 0.7}, {"temperature": 0.7, "n": 2}),
        ({"temperature": "0"}, {"temperature": "0", "n": 2}),
        ({}, {"n": 2}),
    ],
)
def test_a_default_n_gives_way_to_a_greedy_request(given: dict[str, Any], sent: dict[str, Any]) -> None:
    body = prepared({"messages": [USER], **given}, generation=GenerationDefaults(n=2))
    assert body == {"model": "served", "messages": [USER], **sent}


@pytest.mark.parametrize(("given", "sent"), [({"n": 3}, {"n": 3}), ({"n": 1}, {"n": 1, "temperature": 0})])
def test_a_default_temperature_of_0_gives_way_to_several_completions(
    given: dict[str, Any], sent: dict[str, Any]
) -> None:
    body = prepared({"messages": [USER], **given}, generation=GenerationDefaults(temperature=0))
    assert body == {"model": "served", "messages": [USER], **sent}


def test_chat_defaults_can_be_turned_off() -> None:
    defaults = GenerationDefaults(system_prompt="be nice", max_tokens=64)
    given = {"messages": [USER]}
    assert prepared(given, generation=defaults, chat_defaults=False) == {"model": "served", **given}


@pytest.mark.parametrize(("length", "sent"), [(None, 100), (2048, 100), (50, 49), (1, 1)])
def test_default_max_tokens_is_capped(length: int | None, sent: int) -> None:
    body = prepared({"messages": [USER]}, length, generation=GenerationDefaults(max_tokens=100))
    assert body["max_tokens"] == sent


def test_max_completion_tokens_stands_alone() -> None:
    given = {"messages": [USER], "max_completion_tokens": 5}
    assert "max_tokens" not in prepared(given, generation=GenerationDefaults(max_tokens=100))


@pytest.mark.parametrize(("given", "answered"), [("mine", '"mine"'), (7, "7")])
def test_association_id_of_the_request(given: object, answered: str) -> None:
    raw = json.dumps({"messages": [], "datarobot_association_id": given}).encode()
    chat = prepare_chat(raw, config(), "served", None)
    assert chat.member == f'"datarobot_association_id":{answered},'.encode()
    assert "datarobot_association_id" not in json.loads(chat.body)


def test_association_ids_differ() -> None:
    raw = b'{"messages":[],"datarobot_association_id":null}'
    assert prepare_chat(raw, config(), "served", None).member != prepare_chat(raw, config(), "served", None).member


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b'"x"', b"\xff\xfe\x00", b"[" * 100_000, b'{"a":1}x', b'{"datarobot_association_id":{}}',
        b'{"datarobot_association_id":NaN}', b'{"datarobot_association_id":"%s"}' % (b"x" * 1025),
        b'{"datarobot_association_id":1%s}' % (b"0" * 2000),
    ],
)  # fmt: skip
def test_not_a_chat(raw: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        prepare_chat(raw, config(), "served", None)
    assert caught.value.status == 400


def test_messages_of_any_kind_pass() -> None:
    for messages in ("text", None, [1, "x", {"role": ["system"]}], {}):
        body = prepared({"messages": messages}, generation=GenerationDefaults(max_tokens=5))
        assert body["messages"] == messages


@pytest.mark.parametrize(
    "path",
    [
        "/pause", "/update_weights", "/scale_elastic_ep", "/collective_rpc", "/sleep", "/wake_up", "/invocations",
        "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/reset_prefix_cache", "/server_info", "/start_profile",
        "/v1/chat/completions/batch", "/v1/chat/completions/render", "/tokenizer_info", "/abort_requests", "/docs",
        "/openapi.json", "/inference/v1/generate", "/v1/responses/a/b", "/v1/responses/a/cancel/b", "/v1/responses/..",
        "/fault_tolerance/apply", "/health", "/load", "/ping", "/version", "/v1/models/x", "/pooling", "/classify",
    ],
)  # fmt: skip
def test_the_engines_other_routes_are_not_listed(path: str) -> None:
    assert inference_methods(path) is None


def test_errors_keep_their_shape() -> None:
    error = {"message": "no such model", "type": "NotFoundError", "param": "model", "code": 404}
    assert readable_error(404, json.dumps({"error": error}).encode()) == {"error": error}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"detail":"Method Not Allowed"}', "Method Not Allowed"),
        (b'{"object":"error","message":"flat"}', "flat"),
        (b"<html>", "Bad Request"),
        (b"", "Bad Request"),
        (b'{"error":"text"}', "text"),
    ],
)
def test_other_errors_become_openai_errors(body: bytes, message: str) -> None:
    error = readable_error(400, body)["error"]
    assert (error["message"], error["code"]) == (message, 400)


@pytest.mark.parametrize("text", ["x" * 1_000_000, "é" * 100_000, "\U0001f600" * 50_000])
def test_errors_are_bounded(text: str) -> None:
    error = {"message": text, "type": text, "param": {"deep": text}, "code": 400}
    payload = readable_error(400, json.dumps({"error": error, "other": text}).encode())
    assert len(json.dumps(payload, ensure_ascii=False).encode()) <= ERROR_BYTES
    assert payload["error"]["code"] == 400


def test_the_input_is_not_repeated() -> None:
    lines = [
        "2 validation errors:",
        "  {'type': 'missing', 'loc': 'messages', 'msg': 'Field required', 'input': {'a': 'my secret, 1'}}",
        "  {'type': 'x', 'loc': 'body', 'msg': 'Bad', 'input': 'my secret', 'ctx': {'error': 'why'}}",
        "  {'type': 'x', 'loc': 'body', 'msg': 'Bad', 'input': 'my secret...[truncated]'}",
    ]
    message = readable_error(400, json.dumps({"error": {"message": "\n".join(lines)}}).encode())["error"]["message"]
    assert "secret" not in message
    assert "Field required" in message
    assert "'ctx': {'error': 'why'}" in message
