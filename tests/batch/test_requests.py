from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dropin.batch.kinds import Format
from vllm_dropin.batch.parameters import parse_params
from vllm_dropin.batch.records import Record
from vllm_dropin.batch.requests import Composed, Composer, RequestOptions, read_response_format
from vllm_dropin.batch.templates import PromptTemplate, read_template
from vllm_dropin.batch.values import ArrowRow
from vllm_dropin.errors import ConfigurationError
from vllm_dropin.scoring.prompts import GenerationDefaults, chat_body

COLUMNS = ("promptText", "text", "messages", "temperature", "max_tokens")


def composer(
    defaults: GenerationDefaults | None = None, model: str | None = "m", format: Format = "csv", **options: Any
) -> Composer:
    return Composer(RequestOptions(**options), defaults or GenerationDefaults(), model, format)


def compose(by: Composer, values: Mapping[str, object], error: str | None = None) -> Composed:
    return by.compose(Record(0, "a.csv, line 2", values, error))


def body(by: Composer, values: Mapping[str, object]) -> dict[str, Any]:
    made = compose(by, values)
    assert made.error is None
    parsed: dict[str, Any] = json.loads(made.body)
    return parsed


def said(by: Composer, values: Mapping[str, object]) -> list[tuple[str, Any]]:
    return [(message["role"], message["content"]) for message in body(by, values)["messages"]]


def fault(by: Composer, values: Mapping[str, object]) -> str:
    made = compose(by, values)
    assert made.body == b""
    return made.error or ""


@given(st.text(min_size=1).filter(lambda text: not text.isspace()), st.sampled_from([None, "Be brief."]))
def test_a_prompt_column_asks_what_http_rows_ask(prompt: str, system: str | None) -> None:
    defaults = GenerationDefaults(system_prompt=system, max_tokens=5, n=2, temperature=0.5)
    made = compose(composer(defaults), {"promptText": prompt})
    assert json.loads(made.body) == json.loads(chat_body(prompt, defaults, "m"))
    assert made.text == prompt


def test_another_prompt_column() -> None:
    assert said(composer(prompt_column="text"), {"text": "a"}) == [("user", "a")]
    assert said(composer(GenerationDefaults(prompt_column_name="text")), {"text": "a"}) == [("user", "a")]


def test_no_model_is_named_where_there_is_none() -> None:
    assert "model" not in body(composer(model=None), {"promptText": "a"})


@pytest.mark.parametrize(("value", "text"), [(5, "5"), (1.5, "1.5"), (True, "true")])
def test_values_that_are_no_text_become_it(value: object, text: str) -> None:
    assert said(composer(), {"promptText": value}) == [("user", text)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"promptText": ""}, "the prompt is empty"),
        ({"promptText": " \n"}, "the prompt is empty"),
        ({"promptText": None}, "the prompt is empty"),
        ({"text": "a"}, "the row has no 'promptText'"),
        ({"promptText": ["a"]}, "'promptText' is no text"),
    ],
)
def test_a_row_without_a_prompt_is_at_fault(values: dict[str, object], words: str) -> None:
    assert fault(composer(), values) == words


def test_the_readers_error_is_kept() -> None:
    assert compose(composer(), {}, "line 2 is no JSON object").error == "line 2 is no JSON object"


def test_a_missing_column_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigurationError, match=r"no column 'promptText'; it has 'a', 'b'") as caught:
        composer().check(("a", "b"))
    assert "--prompt-column" in caught.value.remedy
    with pytest.raises(ConfigurationError, match="no column 'chat'"):
        composer(messages_column="chat").check(("a", "messages"))
    with pytest.raises(ConfigurationError, match=r"--row-params: .*'seed'"):
        composer(row_params=("seed",)).check(("promptText",))
    composer(row_params=("seed",)).check(None)


# Messages


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


@pytest.mark.parametrize("value", [CHAT, json.dumps(CHAT)])
def test_a_chat_is_a_list_or_its_json_text(value: object) -> None:
    made = compose(composer(messages_column="messages"), {"messages": value})
    assert json.loads(made.body)["messages"] == CHAT
    assert made.text == "a\nb\nc"


def test_the_column_messages_is_taken_where_there_is_no_prompt() -> None:
    by = composer()
    by.check(("id", "messages"))
    assert body(by, {"id": 1, "messages": CHAT})["messages"] == CHAT
    assert by.fingerprint() == {"messages column": "messages", "model": "m"}
    assert body(composer(format="jsonl"), {"messages": CHAT})["messages"] == CHAT
    assert said(composer(format="jsonl"), {"messages": CHAT, "promptText": "p"}) == [("user", "p")]


def test_a_system_prompt_goes_before_a_chat_that_has_none() -> None:
    by = composer(GenerationDefaults(system_prompt="Be brief."), messages_column="messages")
    assert said(by, {"messages": CHAT})[0] == ("system", "Be brief.")
    own = [{"role": "system", "content": "Be long."}, *CHAT]
    assert said(by, {"messages": own})[0] == ("system", "Be long.")


def test_the_text_of_a_chat_with_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    made = compose(composer(messages_column="messages"), {"messages": [{"role": "user", "content": parts}]})
    assert made.text == "a"
    assert json.loads(made.body)["messages"][0]["content"] == parts


def test_a_chat_in_parquet_loses_the_fields_that_it_does_not_have() -> None:
    chat = [{"role": "user", "content": "a", "name": None}, {"role": "tool", "content": None, "name": "f"}]
    row = ArrowRow(pa.RecordBatch.from_pylist([{"messages": chat}]), 0)
    assert body(composer(messages_column="messages"), row)["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "tool", "content": None, "name": "f"},
    ]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{", "not valid JSON"),
        ("{}", "no list of messages"),
        ("5", "no list of messages"),
        ("[]", "the prompt is empty"),
        ("", "the prompt is empty"),
        (None, "the prompt is empty"),
        ('["a"]', "message 0 is no object with a role"),
        ('[{"content": "a"}]', "message 0 is no object with a role"),
        ("[" * 5000, "not valid JSON"),
        ('[{"role": "user", "content": ' + "[" * 900 + "]" * 900 + "}]", "deeply"),
    ],
)
def test_what_is_no_chat_is_the_rows_fault(value: object, words: str) -> None:
    assert words in fault(composer(messages_column="messages"), {"messages": value})


# Templates


def test_a_template_says_the_user_part_and_perhaps_the_system_part() -> None:
    text = "{% block system %}\nYou speak {{ language }}.\n{% endblock %}\n\nSay: {{ row['a word'] }}\n"
    by = composer(template=PromptTemplate(text, "t.j2"))
    values = {"language": "German", "a word": "dog"}
    assert said(by, values) == [("system", "You speak German."), ("user", "Say: dog")]
    assert compose(by, values).text == "You speak German.\nSay: dog"
    defaults = GenerationDefaults(system_prompt="Default.")
    assert said(composer(defaults, template=PromptTemplate(text, "t.j2")), values)[0] == ("system", "You speak German.")
    alone = PromptTemplate("{{ language }}", "t.j2")
    assert said(composer(defaults, template=alone), values) == [("system", "Default."), ("user", "German")]


def test_a_template_can_loop_and_write_json() -> None:
    text = "{% for item in items if item %}\n- {{ item }}\n{% endfor %}\n{{ items | tojson }}"
    by = composer(template=PromptTemplate(text, "t.j2"))
    assert said(by, {"items": ["<a>", "", "ä"]}) == [("user", '- <a>\n- ä\n["<a>", "", "ä"]')]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\n{{ b", "t.j2, line 2: unexpected end"),
        ("{{ a|nothing }}", "line 1: No filter named 'nothing'"),
        ("a\n{% if %}", "line 2"),
        ("{% include 'x' %}", "another template"),
        ("{% extends 'x' %}", "another template"),
    ],
)
def test_a_wrong_template_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        PromptTemplate(text, "t.j2")


def test_a_template_that_uses_no_column_is_refused_with_those_there_are() -> None:
    by = composer(template=PromptTemplate("{{ txt }}{% if maybe is defined %}{{ maybe }}{% endif %}", "t.j2"))
    with pytest.raises(ConfigurationError, match=r"uses 'txt', which is no column; there are 'text', 'id'"):
        by.check(("text", "id"))
    by.check(("txt",))
    composer(template=PromptTemplate("{{ a | default('x') }}{{ row.b }}{{ range(2) }}", "t.j2")).check(("c",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\n\n{{ b }}", "line 3 of t.j2: 'b' is undefined"),
        ("a\n{{ a + 1 }}", "line 2 of t.j2: can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for x in range(10000000) %}{% endfor %}", "Range too big"),
        ("{{ '' }}", "the prompt is empty"),
    ],
)
def test_a_template_that_fails_on_a_row_is_the_rows_fault(text: str, words: str) -> None:
    assert words in fault(composer(template=PromptTemplate(text, "t.j2")), {"a": "x"})


def test_a_template_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.j2").write_text("\ufeffHello {{ name }}\n", "utf-8")
    assert said(composer(template=read_template(tmp_path / "t.j2")), {"name": "you"}) == [("user", "Hello you")]
    with pytest.raises(ConfigurationError, match=r"--template: .*none can't be read"):
        read_template(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        read_template(tmp_path / "bad")


# Parameters


def test_fixed_parameters_go_into_every_request() -> None:
    by = composer(GenerationDefaults(max_tokens=5, temperature=1), params={"temperature": 0, "stop": ["x"]})
    sent = body(by, {"promptText": "a"})
    assert (sent["max_tokens"], sent["temperature"], sent["stop"]) == (5, 0, ["x"])


def test_a_bound_by_its_newer_name_replaces_the_default() -> None:
    defaults = GenerationDefaults(max_tokens=5)
    assert "max_tokens" not in body(composer(defaults, params={"max_completion_tokens": 9}), {"promptText": "a"})
    by = composer(defaults, row_params=("max_completion_tokens",))
    assert "max_tokens" not in body(by, {"promptText": "a", "max_completion_tokens": "9"})
    assert body(by, {"promptText": "a", "max_completion_tokens": ""})["max_tokens"] == 5


@pytest.mark.parametrize(
    ("name", "cell", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("temperature", 1, 1),
        ("max_tokens", "7", 7),
        ("max_tokens", 7.0, 7),
        ("seed", "-3", -3),
        ("stop", "END", "END"),
        ("stop", '["a", "b"]', ["a", "b"]),
        ("stop", "5", "5"),
        ("ignore_eos", "TRUE", True),
        ("logit_bias", '{"5": 1}', {"5": 1}),
        ("tool_choice", "auto", "auto"),
        ("top_k", "", 1),
        ("top_k", None, 1),
        ("some_new_one", "2", 2),
        ("some_new_one", "text", "text"),
    ],
)
def test_a_column_overrides_a_parameter(name: str, cell: object, value: object) -> None:
    by = composer(params={"top_k": 1}, row_params=(name,))
    sent = body(by, {"promptText": "a", name: cell})
    assert sent[name] == value
    assert type(sent[name]) is type(value)


@pytest.mark.parametrize(
    ("name", "cell", "words"),
    [
        ("temperature", "hot", "must be a number: it is 'hot'"),
        ("temperature", "true", "must be a number"),
        ("temperature", "-1", "must be at least 0"),
        ("temperature", "NaN", "must be a number"),
        ("max_tokens", "1.5", "must be a whole number"),
        ("max_tokens", "0", "must be at least 1"),
        ("ignore_eos", "2", "must be true or false"),
        ("stop", "[1]", "must be text or a list of texts"),
        ("logit_bias", "{", "must be JSON"),
        ("user", 5, "must be text"),
    ],
)
def test_a_wrong_cell_is_the_rows_fault_and_names_the_column(name: str, cell: object, words: str) -> None:
    error = fault(composer(row_params=(name,)), {"promptText": "a", name: cell})
    assert error.startswith(f"the column {name!r} ")
    assert words in error


def test_parameters_are_read_from_objects_files_and_pairs(tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    path.write_text('{"seed": 1, "top_p": 0.9}')
    given = ['{"temperature": 0.2, "seed": 3}', str(path), "temperature=0", "stop=END", 'logit_bias={"5": 1}']
    assert parse_params(given) == {
        "temperature": 0, "seed": 1, "top_p": 0.9, "stop": "END", "logit_bias": {"5": 1}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{", "not valid JSON, line 1"),
        ("none.json", "can't be read"),
        ("temperature=hot", "the parameter temperature must be a number"),
        ("temprature=1", "Did you mean 'temperature'"),
        ("max_token=1", "Did you mean 'max_tokens'"),
        ("stream=true", "can't be set: answers are read as a whole"),
        ("messages=[]", "can't be set"),
        ('{"n": 0}', "at least 1"),
    ],
)
def test_a_wrong_parameter_is_refused(given: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        parse_params([given])


def test_several_completions_are_known_beforehand() -> None:
    assert not composer().many
    assert composer(GenerationDefaults(n=2)).many
    assert composer(params={"n": 3}).many
    assert not composer(GenerationDefaults(n=2), params={"n": 1}).many
    assert composer(row_params=("n",)).many


# Response format


def test_a_schema_becomes_a_response_format(tmp_path: Path) -> None:
    schema = {"title": "An answer!", "type": "object", "properties": {"a": {"type": "string"}}}
    path = tmp_path / "s.json"
    path.write_text(json.dumps(schema))
    made = read_response_format(path)
    assert made == {"type": "json_schema", "json_schema": {"name": "An_answer_", "schema": schema, "strict": True}}
    assert body(composer(response_format=made), {"promptText": "a"})["response_format"] == made
    path.write_text(json.dumps(made))
    assert read_response_format(path) == made
    path.write_text('{"type": "json_object"}')
    assert read_response_format(path) == {"type": "json_object"}


@pytest.mark.parametrize(("text", "words"), [("{\n x", "line 2 column 2"), ("[]", "no JSON object")])
def test_a_wrong_schema_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ConfigurationError, match=f"--response-format .*s.json is .*{words}"):
        read_response_format(tmp_path / "s.json")


# OpenAI Batch


def request(**fields: object) -> dict[str, object]:
    asked = {"messages": [{"role": "user", "content": "a"}], "model": "theirs", "temperature": 0.1}
    return {"custom_id": "r", "method": "POST", "url": "/v1/chat/completions", "body": asked, **fields}


def test_a_request_is_sent_as_it_is_to_the_served_model() -> None:
    defaults = GenerationDefaults(system_prompt="Be brief.", max_tokens=5)
    values = request()
    made = compose(composer(defaults, format="openai-batch"), values)
    assert json.loads(made.body) == {**values["body"], "model": "m"}  # type: ignore[dict-item]
    assert made.text == "a"
    assert values == request()  # the record goes into the output


def test_a_request_to_a_url_may_name_its_model() -> None:
    by = composer(format="openai-batch", keep_model=True)
    assert body(by, request())["model"] == "theirs"
    assert body(by, request(body={"messages": []}))["model"] == "m"
    assert body(composer(model=None, format="openai-batch", keep_model=True), request())["model"] == "theirs"


def test_a_request_for_a_stream_is_answered_as_a_whole() -> None:
    asked = {"messages": [], "stream": True, "stream_options": {}}
    assert body(composer(format="openai-batch"), request(body=asked)) == {"messages": [], "model": "m"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"url": "/v1/embeddings"}, "'/v1/embeddings'; only /v1/chat/completions is served"),
        ({"method": "GET"}, "the method is 'GET'"),
        ({"body": "x"}, "the body is no JSON object"),
    ],
)
def test_a_request_of_another_kind_is_the_rows_fault(fields: dict[str, object], words: str) -> None:
    assert words in fault(composer(format="openai-batch"), request(**fields))
    assert "no 'body'" in fault(composer(format="openai-batch"), {"custom_id": "r"})


# Contradictions and fingerprints


@pytest.mark.parametrize(
    ("options", "format", "words"),
    [
        ({"prompt_column": "a", "messages_column": "b"}, "csv", "--messages-column and --prompt-column both"),
        ({"params": {"seed": 1}}, "openai-batch", "--params has no effect on an OpenAI Batch"),
        ({"row_params": ("stream",)}, "csv", "stream can't be set"),
        ({"params": {"response_format": {}}, "response_format": {"type": "text"}}, "csv", "both set response_format"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], format: Format, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        composer(format=format, **options)


def test_a_fingerprint_names_what_shapes_requests() -> None:
    defaults = GenerationDefaults(system_prompt="s", max_tokens=5)
    made = composer(defaults, params={"temperature": 0.2}, row_params=("seed",)).fingerprint()
    assert made | {"system prompt": ""} == {
        "prompt column": "promptText",
        "model": "m",
        "system prompt": "",
        "max_tokens": "5",
        "temperature": "0.2",
        "row parameters": "seed",
    }
    assert made["system prompt"].startswith("blake2b:")
    assert composer(GenerationDefaults(system_prompt="t")).fingerprint()["system prompt"] != made["system prompt"]
    first, second = (composer(template=PromptTemplate(text, "t")).fingerprint() for text in ("a", "b"))
    assert first["template"] != second["template"]
    assert composer(format="openai-batch").fingerprint() == {"prompt": "OpenAI Batch", "model": "m"}
