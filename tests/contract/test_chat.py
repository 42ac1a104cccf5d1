"""Contract, section 3: chat, as the official client and as a raw client see it."""

from __future__ import annotations

import json
import uuid
from typing import Any

import openai
import pytest

from tests.contract.conftest import Start
from tests.contract.drivers import Service

ASSOCIATION = "datarobot_association_id"


def chat(prompt: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "max_tokens": 8, **fields}


def client_of(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=service.url, api_key="none", timeout=120, max_retries=0)


def events(text: str) -> list[str]:
    """The data lines of an event stream, whose form is checked on the way."""
    assert text.endswith("\n\n")
    lines = text[:-2].split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def test_official_client(service: Service) -> None:
    """3: the official client chats."""
    with client_of(service) as client:
        answer = client.chat.completions.create(model="datarobot-deployed-llm", **chat())
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert isinstance(answer.choices[0].message.content, str)
    assert answer.usage and answer.usage.total_tokens > 0


def test_official_client_streams(service: Service) -> None:
    """3: the official client streams, and reads the association id of each chunk."""
    with client_of(service) as client:
        chunks = list(client.chat.completions.create(model="datarobot-deployed-llm", stream=True, **chat()))
    assert len(chunks) > 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({getattr(chunk, ASSOCIATION) for chunk in chunks}) == 1


def test_official_client_lists_models(service: Service) -> None:
    """3: the official client lists the models."""
    with client_of(service) as client:
        assert [model.object for model in client.models.list()] == ["model"]


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"model": None}, {"model": ""}, {"model": "datarobot-deployed-llm"}],
    ids=["absent", "null", "empty", "alias"],
)
def test_model_names(service: Service, path: str, fields: dict[str, Any]) -> None:
    """3: a model that is absent, null, empty or datarobot-deployed-llm means the served one."""
    with service.client(120) as client:
        assert client.post(path, json=chat(**fields)).status_code == 200


def test_another_served_name(launch: Start) -> None:
    """3: with another served_model_name, datarobot-deployed-llm and no name still mean the served model."""
    service = launch(ready=True, parameters={"served_model_name": ("string", "falcon")})
    with service.client() as client:
        for fields in ({"model": "falcon"}, {"model": "datarobot-deployed-llm"}, {}):
            answer = client.post("/chat/completions", json=chat("named", **fields))
            assert (answer.status_code, answer.json()["model"]) == (200, "falcon")


def test_other_names_pass_through(controlled: Service) -> None:
    """3: any other model name reaches the engine as it is."""
    with controlled.client() as client:
        client.post("/chat/completions", json=chat("pass my name", model="somebody-else"))
    assert json.loads(controlled.asked("pass my name")[-1]["body"])["model"] == "somebody-else"


def test_unknown_model(service: Service) -> None:
    """3: an unknown model is 404 in OpenAI's shape, so that clients raise NotFoundError."""
    with client_of(service) as client, pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", **chat())


def test_bad_request(service: Service) -> None:
    """3: what the engine refuses with 400 is 400 in OpenAI's shape, so that clients raise BadRequestError."""
    with client_of(service) as client, pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="datarobot-deployed-llm", messages="no list")  # type: ignore[arg-type]


def test_engine_error_keeps_its_status(controlled: Service) -> None:
    """3: an engine's 503 is a 503."""
    with controlled.client() as client:
        assert client.post("/chat/completions", json=chat("[[status 503]]")).status_code == 503


def test_errors_in_the_form_of_drum(launch: Start) -> None:
    """3: with the parameter error_status=drum an engine's error is the 500 that DRUM's own clients expect."""
    service = launch(ready=True, parameters={"error_status": ("string", "drum")})
    with service.client() as client:
        answer = client.post("/chat/completions", json=chat(model="nobody"))
    assert answer.status_code == 500
    assert answer.json()["message"].startswith("ERROR: Error code: 404 - ")


def test_association_id_of_the_request(service: Service) -> None:
    """3: the request's datarobot_association_id comes back in the response."""
    with service.client(120) as client:
        answer = client.post("/chat/completions", json=chat(**{ASSOCIATION: "my-id"})).json()
    assert answer[ASSOCIATION] == "my-id"


def test_association_id_is_made(service: Service) -> None:
    """3: a request without an association id gets a uuid4."""
    with service.client(120) as client:
        answer = client.post("/v1/chat/completions", json=chat()).json()
    assert uuid.UUID(answer[ASSOCIATION]).version == 4


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions"])
def test_stream(service: Service, path: str) -> None:
    """3: a stream is `data: {json}` events with the association id in each, and ends in [DONE]."""
    with service.client(120) as client:
        answer = client.post(path, json=chat(stream=True, **{ASSOCIATION: "my-id"}))
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert {chunk["object"] for chunk in parsed} == {"chat.completion.chunk"}
    assert {chunk[ASSOCIATION] for chunk in parsed} == {"my-id"}
    assert parsed[-1]["choices"][0]["finish_reason"] in ("stop", "length")


def test_unknown_fields_reach_the_engine(controlled: Service) -> None:
    """3: fields that OpenAI does not have are forwarded."""
    fields = {"top_k": 3, "min_tokens": 1, "a_field_of_mine": {"x": [1]}}
    with controlled.client() as client:
        client.post("/chat/completions", json=chat("unknown fields", **fields))
    asked = json.loads(controlled.asked("unknown fields")[-1]["body"])
    assert {name: asked.get(name) for name in fields} == fields


def test_several_choices(service: Service) -> None:
    """3: n gives that many choices."""
    with service.client(120) as client:
        answer = client.post("/chat/completions", json=chat(n=2, temperature=0.8)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]


def test_defaults_of_the_folder(launch: Start) -> None:
    """1: system_prompt, max_tokens and temperature apply to a chat that leaves them out, and only then."""
    parameters = {
        "system_prompt": ("string", "Be brief."),
        "max_tokens": ("numeric", 7),
        "temperature": ("numeric", 0),
    }
    service = launch(ready=True, parameters=parameters)
    own = {"messages": [{"role": "system", "content": "Mine."}, {"role": "user", "content": "own words"}]}
    with service.client() as client:
        client.post("/chat/completions", json={"messages": [{"role": "user", "content": "bare chat"}]})
        client.post("/chat/completions", json={**own, "max_tokens": 3, "temperature": 1})
    bare = json.loads(service.asked("bare chat")[-1]["body"])
    assert bare["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (bare["max_tokens"], bare["temperature"]) == (7, 0)
    kept = json.loads(service.asked("own words")[-1]["body"])
    assert kept["messages"] == own["messages"]
    assert (kept["max_tokens"], kept["temperature"]) == (3, 1)
