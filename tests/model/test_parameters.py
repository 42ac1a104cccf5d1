import json
from pathlib import Path

import pytest

from tests.folders import README_METADATA, definitions, envelope, make_folder
from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.contract import CONTRACT
from vllm_dropin.model.credential import Credential
from vllm_dropin.model.metadata import Metadata, read_metadata
from vllm_dropin.model.parameters import ENVELOPE_PREFIX, ParameterValues, exported, read_parameters

CANARY = "hf_canary0123456789"


def metadata(tmp_path: Path, text: str) -> Metadata:
    return read_metadata(make_folder(tmp_path, {"model-metadata.yaml": text}) / "model-metadata.yaml")[0]


def envelopes(**values: str) -> dict[str, str]:
    return {f"{ENVELOPE_PREFIX}{name}": text for name, text in values.items()}


def from_envelope(name: str, kind: str, payload: object) -> object:
    return read_parameters(None, envelopes(**{name: envelope(kind, payload)})).get(name).value


def test_our_defaults(tmp_path: Path) -> None:
    values = read_parameters(None, {})
    assert {value.source for value in values.by_name.values()} == {"default"}
    assert values.text("served_model_name") == "datarobot-deployed-llm"
    assert values.text("prompt_column_name") == "promptText"
    assert values.whole("max_watchdog_restarts") == 10
    assert values.number("max_watchdog_backoff_sec") == 300
    assert values.truth("verifySSL")
    assert values.truth("chat_defaults")
    assert not values.truth("trust_remote_code")
    assert [values.get(name).value for name in ("model", "max_tokens", "n", "temperature", "max_model_len")] == [
        None
    ] * 5


def test_the_defaults_of_the_published_example(tmp_path: Path) -> None:
    values = read_parameters(metadata(tmp_path, README_METADATA), {})
    assert values.whole("max_tokens") == 1024
    assert values.get("max_tokens").source == "model-metadata.yaml default"
    assert values.text(
        "system_prompt",
    ) == ("You are a helpful AI assistant. Keep short answers of no more than 2 sentences.")
    assert values.warnings == ()


def test_the_strongest_source_wins_and_knows_what_it_beat(tmp_path: Path) -> None:
    declared = metadata(tmp_path, definitions("fieldName: max_tokens, type: numeric, defaultValue: 1"))
    file = tmp_path / "values.yaml"
    file.write_text("max_tokens: 3\n")
    values = read_parameters(
        declared, envelopes(max_tokens=envelope("numeric", 2)), file, ["max_tokens=4", "max_tokens=5"]
    )
    found = values.get("max_tokens")
    assert (found.value, found.source) == (5, "--param")
    assert found.overrode == (
        "3 (values.yaml, line 1)",
        "2 (MLOPS_RUNTIME_PARAM_max_tokens)",
        "1 (model-metadata.yaml default)",
    )


def test_a_bare_variable_is_never_read() -> None:
    values = read_parameters(None, {"model": "evil/model", "n": "5", "temperature": "1", "HuggingFaceToken": "x"})
    assert not any(value.given for value in values.by_name.values())


def test_null_says_nothing_whatever_the_type(tmp_path: Path) -> None:
    """The incumbent crashes on a null max_tokens, n or served_model_name (contract, section 2, bugs 5 and 6)."""
    environ = envelopes(**{item.name: envelope(item.type, None) for item in CONTRACT})
    values = read_parameters(metadata(tmp_path, README_METADATA), environ)
    assert values.whole("max_tokens") == 1024
    assert values.text("served_model_name") == "datarobot-deployed-llm"
    assert values.get("n").value is None


@pytest.mark.parametrize("name", ["max_model_len", "gpu_memory_utilization", "max_tokens", "n"])
@pytest.mark.parametrize("zero", [0, 0.0, "0"])
def test_zero_is_unset(name: str, zero: object) -> None:
    assert from_envelope(name, "numeric", zero) is None


@pytest.mark.parametrize("zero", [0, 0.0, "0", "0.0"])
def test_zero_is_a_temperature(zero: object) -> None:
    """Bug 6: the incumbent drops it."""
    value = from_envelope("temperature", "numeric", zero)
    assert value == 0
    assert value is not None


def test_zero_beats_a_weaker_source(tmp_path: Path) -> None:
    values = read_parameters(metadata(tmp_path, README_METADATA), envelopes(max_tokens=envelope("numeric", 0)))
    assert values.get("max_tokens").value is None


@pytest.mark.parametrize(
    ("kind", "payload", "value"),
    [
        *(
            (kind, *pair)
            for kind in ("string", "numeric")
            for pair in (
                ("4096", 4096),
                (4096, 4096),
                (4096.0, 4096),
                ("4096.0", 4096),
                ("", None),
                (" 8 ", 8),
                ("0", None),
                (0, None),
            )
        ),
        ("string", "16k", "16k"),
        ("string", "auto", "auto"),
        ("string", "-1", -1),
    ],
)
def test_max_model_len_may_be_text_or_a_number(tmp_path: Path, kind: str, payload: object, value: object) -> None:
    declared = metadata(tmp_path, definitions(f"fieldName: max_model_len, type: {kind}"))
    environ = envelopes(max_model_len=envelope(kind, payload))
    assert read_parameters(declared, environ).get("max_model_len").value == value
    assert read_parameters(None, environ).get("max_model_len").value == value


@pytest.mark.parametrize(
    ("name", "payload", "value"),
    [
        ("max_tokens", "5", 5),
        ("max_tokens", 5.0, 5),
        ("temperature", "0.7", 0.7),
        ("trust_remote_code", "true", True),
        ("trust_remote_code", 1, True),
        ("trust_remote_code", "False", False),
        ("verifySSL", False, False),
        ("default_parallelism", "pp", "pp"),
        ("system_prompt", "", ""),
    ],
)
def test_payloads_are_typed(name: str, payload: object, value: object) -> None:
    assert from_envelope(name, "anything", payload) == value


@pytest.mark.parametrize(
    ("name", "payload", "words"),
    [
        ("max_tokens", "many", "'many' is not a number"),
        ("max_tokens", 1.5, "not a whole number"),
        ("max_tokens", -1, "below the minimum of 1"),
        ("max_tokens", True, "not true"),
        ("n", [1], "not a list"),
        ("temperature", -0.1, "below the minimum of 0"),
        ("temperature", 2.5, "above the maximum of 2"),
        ("temperature", "nan", "nan is not a finite number"),
        ("temperature", 10**400, "not a finite number"),
        ("max_model_len", -5, "-5 is not a length"),
        ("max_model_len", "-5", "-5 is not a length"),
        ("gpu_memory_utilization", 90, "above the maximum of 1"),
        ("trust_remote_code", "maybe", "true or false, not 'maybe'"),
        ("default_parallelism", "TP2", "'TP2' is not one of tp, pp; did you mean 'tp'"),
        ("row_errors", "ignore", "not one of report, fail"),
        ("model", {"a": 1}, "not a map"),
        ("HuggingFaceToken", "text", "has to be a map of fields"),
        ("max_watchdog_restarts", -1, "below"),
    ],
)
def test_a_wrong_value_names_parameter_and_source(name: str, payload: object, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        from_envelope(name, "x", payload)
    assert caught.value.message.startswith(f"parameter {name} (MLOPS_RUNTIME_PARAM_{name})")


@pytest.mark.parametrize("text", ["{", "5", "[]", '{"type": "string"}', '{"payload": 1' + "0" * 5000 + "}", CANARY])
def test_a_broken_envelope_is_named_and_not_shown(text: str) -> None:
    with pytest.raises(ConfigurationError, match="MLOPS_RUNTIME_PARAM_model is not an envelope") as caught:
        read_parameters(None, envelopes(model=text))
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("name", ["trust_remote_code", "max_tokens", "default_parallelism", "served_model_name"])
def test_a_credential_in_the_place_of_another_type_is_not_shown(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"MLOPS_RUNTIME_PARAM_{name} is a credential") as caught:
        read_parameters(None, envelopes(**{name: envelope("credential", CANARY)}))
    assert CANARY not in str(caught.value)


def test_broken_envelopes_of_unknown_parameters_do_not_matter() -> None:
    assert read_parameters(None, envelopes(something="{")).warnings == ()


def test_a_credential_that_the_folder_does_not_define_stays_hidden() -> None:
    values = read_parameters(None, envelopes(bucket=envelope("credential", {"password": CANARY})))
    assert values.secrets() == (CANARY,)
    assert CANARY not in repr(values)
    assert values.get("bucket").source == "MLOPS_RUNTIME_PARAM_bucket"


@pytest.mark.parametrize("name", ["maxTokens", "MAX_TOKENS", "maxtokens"])
def test_a_definition_that_is_nearly_a_parameter_of_ours_is_warned_of(tmp_path: Path, name: str) -> None:
    values = read_parameters(metadata(tmp_path, definitions(f"fieldName: {name}, type: numeric")), {})
    assert values.warnings == (
        f"parameter {name} of model-metadata.yaml is for custom.py only; did you mean 'max_tokens'?",
    )


def test_the_range_of_a_definition_is_enforced(tmp_path: Path) -> None:
    declared = metadata(tmp_path, definitions("fieldName: mine, type: numeric, minValue: 2, maxValue: 4"))
    assert read_parameters(declared, {}, None, ["mine=3"]).get("mine").value == 3
    for value, words in (("1", "below the minimum of 2"), ("5", "above the maximum of 4")):
        with pytest.raises(ConfigurationError, match=words):
            read_parameters(declared, {}, None, [f"mine={value}"])


def test_names_are_case_sensitive_and_a_near_miss_is_warned_of() -> None:
    values = read_parameters(None, envelopes(Model=envelope("string", "a/b")))
    assert values.get("model").value is None
    assert values.warnings == ("MLOPS_RUNTIME_PARAM_Model is not used; did you mean 'model'? (case counts)",)


def test_a_values_file(tmp_path: Path) -> None:
    declared = metadata(tmp_path, definitions("fieldName: mine, type: credential", "fieldName: flag, type: boolean"))
    file = tmp_path / "values.yaml"
    file.write_text(f"mine: {{user: a, password: {CANARY}}}\nflag: yes\ntemperatur: 1\nmodel:\n")
    values = read_parameters(declared, {}, file)
    assert values.credential("mine") == Credential({"user": "a", "password": CANARY})
    assert values.truth("flag")
    assert values.get("model").source == "default"
    assert len(values.warnings) == 1
    assert "line 3: parameter 'temperatur' is not defined, ignored; did you mean 'temperature'?" in values.warnings[0]
    assert values.secrets() == (CANARY,)


@pytest.mark.parametrize(
    ("param", "words"),
    [("max_tokens", "a value is missing"), ("=5", "a value is missing"), ("max_token=5", "did you mean 'max_tokens'")],
)
def test_a_wrong_param_is_an_error(param: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        read_parameters(None, {}, None, [param])


@pytest.mark.parametrize("text", [CANARY, json.dumps({"apiToken": CANARY})])
def test_a_credential_on_the_command_line(text: str) -> None:
    values = read_parameters(None, {}, None, [f"HuggingFaceToken={text}"])
    credential = values.credential("HuggingFaceToken")
    assert credential is not None
    token = credential.token()
    assert token is not None
    assert token.reveal() == CANARY
    assert CANARY not in repr(values)
    assert "command line" in values.warnings[0]


def decoded(values: ParameterValues) -> dict[str, object]:
    return {name: json.loads(text)["payload"] for name, text in exported(values).items()}


def test_the_hook_gets_every_defined_parameter_as_an_envelope(tmp_path: Path) -> None:
    declared = metadata(
        tmp_path,
        definitions(
            "fieldName: bucket, type: string",
            "fieldName: size, type: numeric, defaultValue: 3",
            "fieldName: secret, type: credential",
            "fieldName: max_model_len, type: string",
            "fieldName: max_tokens, type: numeric",
            "fieldName: served_model_name, type: string",
        ),
    )
    environ = envelopes(
        secret=envelope("credential", {"credentialType": "basic", "user": "u", "password": CANARY}),
        max_tokens=envelope("numeric", 0),
        max_model_len=envelope("string", "4096"),
    )
    found = decoded(read_parameters(declared, environ, None, ["temperature=0"]))
    assert found == {
        "MLOPS_RUNTIME_PARAM_bucket": None,
        "MLOPS_RUNTIME_PARAM_size": 3,
        "MLOPS_RUNTIME_PARAM_secret": {"credentialType": "basic", "user": "u", "password": CANARY},
        "MLOPS_RUNTIME_PARAM_max_model_len": "4096",
        "MLOPS_RUNTIME_PARAM_max_tokens": 0,
        "MLOPS_RUNTIME_PARAM_served_model_name": None,
        "MLOPS_RUNTIME_PARAM_temperature": 0,
    }


def test_a_parameter_that_must_not_be_empty_is_warned_of(tmp_path: Path) -> None:
    declared = metadata(tmp_path, definitions("fieldName: mine, type: string, allowEmpty: false"))
    assert read_parameters(declared, {}).warnings == (
        "parameter mine has no value, and model-metadata.yaml says that it needs one",
    )


def test_the_table_is_fit_for_documentation() -> None:
    assert len({item.name for item in CONTRACT}) == len(CONTRACT)
    assert all(item.meaning.endswith(".") for item in CONTRACT)
