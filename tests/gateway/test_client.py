"""The official client, unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import APIError, APIStatusError, NotFoundError, OpenAI, RateLimitError

from tests.conftest import GatewayProcess, Stage


@pytest.fixture
def client(gateway: GatewayProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="datarobot-deployed-llm", messages=[{"role": "user", "content": "hi"}]
    )
    assert answer.choices[0].message.content == "hi hi hi hi hi"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


def test_stream(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="", messages=[{"role": "user", "content": "hi there tokens=4"}], stream=True
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(parts).split() == ["hi", "there", "tokens=4", "hi"]


def test_models_completions_and_embeddings(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["datarobot-deployed-llm"]
    completion = client.completions.create(model="datarobot-deployed-llm", prompt="hi", max_tokens=2)
    assert completion.choices[0].text == "hi hi"
    assert len(client.embeddings.create(model="datarobot-deployed-llm", input=["a", "b"]).data) == 2


def test_errors_have_their_types(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.body == {
        "message": "The model `nope` does not exist.",
        "type": "NotFoundError",
        "param": None,
        "code": 404,
    }
    with pytest.raises(RateLimitError):
        client.chat.completions.create(model="", messages=[{"role": "user", "content": "status=429"}])


def test_a_broken_stream_raises(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="", messages=[{"role": "user", "content": "core_dies=2 tokens=9"}], stream=True
    )
    with pytest.raises(APIError, match="EngineCore encountered an issue"):
        list(stream)


def test_the_key_is_asked_for(stage: Stage) -> None:
    gateway = stage.gateway(api_keys=["secret-key"])
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="secret-key", max_retries=0) as client:
        assert client.models.list().data
    with (
        OpenAI(base_url=f"{gateway.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(APIStatusError) as caught,
    ):
        client.models.list()
    assert caught.value.status_code == 401
