"""What a model folder and a platform say: what was written comes back, and anything else is said to be wrong.

Each reader gives its value or a ConfigurationError; a secret is in no message.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.folders import MINIMAL_METADATA
from tests.fuzz.report import count, tries
from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.contract import CONTRACT
from vllm_dropin.model.credential import Credential
from vllm_dropin.model.engine_config import read_engine_config, render
from vllm_dropin.model.metadata import Metadata, ParameterDefinition, read_metadata
from vllm_dropin.model.parameters import ENVELOPE_PREFIX, ParameterValues, exported, read_parameters
from vllm_dropin.model.yaml_file import read_yaml

T = TypeVar("T")
CANARY = "canary-4711-canary"

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=10
)
ODD_YAML = st.lists(
    st.sampled_from(
        ["a: ", "? ", "- ", "=", "\n", "  ", "&x ", "*x", "<<: ", "---", "...", "%YAML 1.1\n", "{", "}", "[", "]",
         "|\n", "> \n", "\t", "#", "'", '"', "\x00", "\x85", "\ufeff", "é",
         "!!int ", "!!bool ", "!!float ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!python/object:x ",
         "1", "0x1", "0o7", "1_0", "1:30", "2024-01-01", "~", "yes", ".inf", "9" * 5000,
         "name: m\n", "targetType: textgeneration\n", "type: inference\n", "runtimeParameterDefinitions:\n"]
    ),
    max_size=25,
).map("".join)  # fmt: skip
NAMES = st.sampled_from(
    [parameter.name for parameter in CONTRACT] + ["mine", "bucket", "Model", "MAX_TOKENS", "a b", ""]
)
TYPES = ["string", "boolean", "numeric", "credential", "deployment"]
CREDENTIALS = st.dictionaries(
    st.sampled_from(["apiToken", "password", "credentialType", "user", "a.b"]), JSON, max_size=3
)
PAYLOADS = st.one_of(SCALARS, JSON, CREDENTIALS, st.sampled_from(["1", "-1", "true", "16k", "auto", "tp", "", "1e400"]))
DEFINITIONS = st.fixed_dictionaries(
    {"fieldName": NAMES, "type": st.sampled_from([*TYPES, "String", "numeric "]) | TEXT},
    optional={"defaultValue": PAYLOADS, "minValue": SCALARS, "maxValue": SCALARS, "allowEmpty": SCALARS, "x": JSON},
)
METADATA = st.fixed_dictionaries(
    {"name": TEXT, "type": TEXT, "targetType": st.sampled_from(["textgeneration", "TextGeneration"])},
    optional={"runtimeParameterDefinitions": st.lists(DEFINITIONS, max_size=3), "modelID": JSON, "description": JSON},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folder")


def outcome(subject: str, read: Callable[[], T]) -> T | None:
    """What was read, or None where it was refused in so many words."""
    try:
        value = read()
    except ConfigurationError as error:
        assert error.message
        assert CANARY not in str(error)
        count(subject, "refused")
        return None
    count(subject, "read")
    return value


def saved(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_yaml_that_was_written_comes_back(folder: Path) -> None:
    @tries(few=60)
    @given(JSON, st.sampled_from([None, False, True]))
    def same(data: Any, flow: bool | None) -> None:
        text = yaml.safe_dump(data, default_flow_style=flow)
        document = outcome("YAML written and read", lambda: read_yaml(saved(folder / "values.yaml", text)))
        assert document is not None, text
        assert document.data == data

    same()


def test_any_yaml_is_read_or_refused(folder: Path) -> None:
    @tries(few=100)
    @given(ODD_YAML.map(str.encode) | st.binary(max_size=60) | TEXT.map(str.encode))
    def told(text: bytes) -> None:
        outcome("any bytes as YAML", lambda: read_yaml(saved(folder / "values.yaml", text)))

    told()


def test_metadata_is_read_or_refused(folder: Path) -> None:
    @tries(few=100)
    @given(
        METADATA.map(yaml.safe_dump) | ODD_YAML.map(MINIMAL_METADATA.__add__) | ODD_YAML, st.dictionaries(NAMES, JSON)
    )
    def told(text: str, values: dict[str, Any]) -> None:
        path = saved(folder / "model-metadata.yaml", text)
        found = outcome("metadata", lambda: read_metadata(path))
        if found is None:
            return
        metadata, plain, _ = found
        assert metadata == Metadata.model_validate(plain)
        json.dumps(plain, default=str)
        file = saved(folder / "values.yaml", yaml.safe_dump(values))
        outcome("parameter values of a file", lambda: read_parameters(metadata, {}, file))

    told()


def defined(definitions: list[dict[str, Any]]) -> Metadata | None:
    """Metadata with those definitions that are good, each name once."""
    good: dict[str, ParameterDefinition] = {}
    for definition in definitions:
        try:
            item = ParameterDefinition.model_validate(definition)
        except ValueError:
            continue
        good[item.fieldName] = item
    return Metadata(name="m", type="t", targetType="textgeneration", runtimeParameterDefinitions=tuple(good.values()))


def payloads(values: ParameterValues) -> dict[str, Any]:
    """The values that somebody gave, credentials as their fields."""
    told = {name: value.value for name, value in values.by_name.items() if value.given}
    return {name: value.reveal() if isinstance(value, Credential) else value for name, value in told.items()}


@tries(few=100)
@given(
    st.lists(DEFINITIONS, max_size=3), st.dictionaries(NAMES, st.tuples(st.sampled_from(TYPES), PAYLOADS), max_size=4)
)
def test_envelopes_for_the_hook_mean_the_same_when_read_again(
    definitions: list[dict[str, Any]], given_values: dict[str, tuple[str, Any]]
) -> None:
    metadata = defined(definitions)
    environ = {
        ENVELOPE_PREFIX + name: json.dumps({"type": kind, "payload": payload})
        for name, (kind, payload) in given_values.items()
    }
    values = outcome("envelopes", lambda: read_parameters(metadata, environ))
    if values is None:
        return
    again = read_parameters(metadata, exported(values))
    assert payloads(again) == payloads(values)


@tries(few=100)
@given(NAMES, TEXT | JSON.map(json.dumps) | st.sampled_from(["{", "[" * 9000, '{"payload": 1' + "0" * 5000 + "}"]))
def test_any_envelope_is_read_or_refused_without_its_text(name: str, text: str) -> None:
    for hidden in (text + CANARY, json.dumps({"type": "credential", "payload": text + CANARY})):
        outcome(
            "any text as an envelope", lambda hidden=hidden: read_parameters(None, {ENVELOPE_PREFIX + name: hidden})
        )


@tries(few=100)
@given(NAMES, st.sampled_from(TYPES), PAYLOADS | JSON)
def test_what_a_parameter_is_said_to_be_is_one_of_its_type(name: str, kind: str, payload: Any) -> None:
    metadata = defined([{"fieldName": name, "type": kind}])
    said = {ENVELOPE_PREFIX + name: json.dumps({"type": kind, "payload": payload})}
    values = outcome("payloads by type", lambda: read_parameters(metadata, said))
    if values is None or name not in values.by_name:
        return
    value = values.by_name[name].payload
    kinds: dict[str, tuple[type, ...]] = {"boolean": (bool,), "numeric": (int, float), "credential": (Credential,)}
    assert value is None or isinstance(value, kinds.get(kind, (str,)))
    assert not isinstance(value, float) or math.isfinite(value)


@tries(few=100)
@given(st.text(max_size=30) | st.builds("{}={}".format, NAMES, TEXT | JSON.map(json.dumps)))
def test_any_param_is_read_or_refused(param: str) -> None:
    outcome(
        "--param", lambda: read_parameters(defined([{"fieldName": "mine", "type": "credential"}]), {}, None, [param])
    )


def test_engine_config_that_was_written_comes_back(folder: Path) -> None:
    @tries(few=60)
    @given(st.lists(TEXT, max_size=6))
    def same(args: list[str]) -> None:
        path = saved(folder / "engine_config.json", render(args))
        config = outcome("engine_config written and read", lambda: read_engine_config(path))
        assert config is not None
        assert config.args == tuple(args)

    same()


def test_any_engine_config_is_read_or_refused(folder: Path) -> None:
    near = st.builds(
        lambda data, at, put: data[:at] + put + data[at:],
        (JSON | st.fixed_dictionaries({"args": JSON})).map(json.dumps).map(str.encode),
        st.integers(0, 40),
        st.sampled_from(
            [b"", b"\x00", b",", b'"', b"{", b"\xff", b"9" * 5000, b"[" * 5000, b"NaN", b"\xef\xbb\xbf", b"//x"]
        ),
    )

    @tries(few=100)
    @given(near | st.binary(max_size=60))
    def told(data: bytes) -> None:
        config = outcome(
            "any bytes as engine_config", lambda: read_engine_config(saved(folder / "engine_config.json", data))
        )
        assert config is None or isinstance(config.args, tuple)

    told()
