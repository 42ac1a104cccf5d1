"""The official client against the real engine: structure, never the model's words (decision 20)."""

import json

import openai
import pytest

pytestmark = pytest.mark.e2e

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(real_service):
    with openai.OpenAI(base_url=f"{real_service.url}/v1", api_key="unused", timeout=120, max_retries=0) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list().data] == ["datarobot-deployed-llm"]


def test_chat(client):
    answer = client.chat.completions.create(model="datarobot-deployed-llm", messages=QUESTION, max_tokens=16)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert 0 < answer.usage.completion_tokens <= 16
    assert answer.datarobot_association_id


def test_the_system_prompt_of_the_folder_is_applied_unless_the_request_has_one(client):
    """The prompt's token count shows it: the folder's system prompt is longer than the request's."""
    with_ours = client.chat.completions.create(model="", messages=QUESTION, max_tokens=1)
    with_theirs = client.chat.completions.create(
        model="", messages=[{"role": "system", "content": "Hi"}, *QUESTION], max_tokens=1
    )
    assert with_ours.usage.prompt_tokens > with_theirs.usage.prompt_tokens


def test_max_tokens_of_the_folder_is_applied(client):
    answer = client.chat.completions.create(
        model="", messages=[{"role": "user", "content": "Count."}], extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 64
    assert answer.choices[0].finish_reason == "length"


def test_stream(client):
    chunks = list(
        client.chat.completions.create(
            model="datarobot-deployed-llm",
            messages=QUESTION,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert len({chunk.datarobot_association_id for chunk in chunks}) == 1
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage.completion_tokens == 12


def test_the_association_id_of_the_request_comes_back(client):
    answer = client.chat.completions.create(
        model="", messages=QUESTION, max_tokens=1, extra_body={"datarobot_association_id": "my-own-id"}
    )
    assert answer.datarobot_association_id == "my-own-id"


def test_stop(client):
    answer = client.chat.completions.create(
        model="", messages=[{"role": "user", "content": "Write the letters a to f."}], max_tokens=40, stop=["e", " "]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert not {"e", " "} & set(answer.choices[0].message.content or "")


def test_logprobs(client):
    answer = client.chat.completions.create(model="", messages=QUESTION, max_tokens=4, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert 1 <= len(tokens) <= 4
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)


def test_several_choices(client):
    answer = client.chat.completions.create(model="", messages=QUESTION, max_tokens=4, n=3, temperature=0.9)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_a_json_schema_is_obeyed(client):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "letters": {"type": "integer", "maximum": 99}},
        "required": ["city", "letters"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="",
        messages=QUESTION,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}},
    )
    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"city", "letters"}
    assert isinstance(found["letters"], int)


def test_a_named_tool_is_called(client):
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    answer = client.chat.completions.create(
        model="",
        messages=[{"role": "user", "content": "How is the weather in Paris?"}],
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=60,
    )
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "weather"
    json.loads(call.function.arguments)  # what is in it is the model's affair


def test_completions(client):
    answer = client.completions.create(model="datarobot-deployed-llm", prompt="Once upon a time", max_tokens=5)
    assert answer.choices[0].text
    assert answer.usage.completion_tokens <= 5


def test_an_unknown_model_is_404(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-17", messages=QUESTION, max_tokens=1)
    assert "gpt-17" in str(caught.value)


def test_a_prompt_that_is_too_long_is_400_in_openai_shape(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="", messages=[{"role": "user", "content": "word " * 5000}], max_tokens=1)
    assert caught.value.body["message"]
    assert len(caught.value.response.content) <= 16 << 10
