from pathlib import Path

import pytest

from tests.folders import MINIMAL_METADATA, README_METADATA, make_folder
from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.metadata import Metadata, read_metadata


def read(tmp_path: Path, text: str | bytes) -> tuple[Metadata, tuple[str, ...]]:
    metadata, _, warnings = read_metadata(make_folder(tmp_path, {"model-metadata.yaml": text}) / "model-metadata.yaml")
    return metadata, warnings


def test_the_published_example_loads_as_it_is(tmp_path: Path) -> None:
    metadata, warnings = read(tmp_path, README_METADATA)
    assert warnings == ()
    assert [item.fieldName for item in metadata.runtimeParameterDefinitions] == [
        "model", "HuggingFaceToken", "max_model_len", "max_tokens", "system_prompt", "prompt_column_name",
    ]  # fmt: skip
    assert metadata.runtimeParameterDefinitions[3].defaultValue == 1024
    assert metadata.runtimeParameterDefinitions[3].minValue == 1


@pytest.mark.parametrize(
    "text",
    [
        "{name: m, type: inference, targetType: textgeneration}",
        '{"name": "m", "type": "inference", "targetType": "textgeneration", "runtimeParameterDefinitions": []}',
        "--- # a comment\nname: m\ntype: inference\ntargetType: textgeneration\nruntimeParameterDefinitions:\n...\n",
        "\ufeffname: m\r\ntype: inference\r\ntargetType: textgeneration\r\n",
        "name: m\ntype: inference\ntargetType: textgeneration\nmodelID: 5\nvalidation: x\nhyperparameters: {1: 2}\n",
        "name: !!str m\ntype: 'inference'\ntargetType: >-\n  textgeneration\n",
    ],
)
def test_any_style_of_valid_yaml_is_accepted(tmp_path: Path, text: str) -> None:
    metadata, warnings = read(tmp_path, text)
    assert (metadata.name, metadata.type, metadata.runtimeParameterDefinitions) == ("m", "inference", ())
    assert warnings == ()


@pytest.mark.parametrize("target", ["textgeneration", "textGeneration", "TextGeneration", "TEXTGENERATION"])
def test_the_target_type_may_be_in_any_case(tmp_path: Path, target: str) -> None:
    metadata, _ = read(tmp_path, f"name: m\ntype: inference\ntargetType: {target}\n")
    assert metadata.targetType == target


def test_another_target_type_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"line 3: targetType is 'regression'") as caught:
        read(tmp_path, "name: m\ntype: inference\ntargetType: regression\n")
    assert caught.value.exit_code == 78
    assert "textgeneration" in caught.value.remedy


def test_unknown_keys_warn_with_the_nearest_known_name(tmp_path: Path) -> None:
    text = MINIMAL_METADATA + (
        "runtimeParameterDefinition: []\nzzz: 1\n"
        "runtimeParameterDefinitions:\n- fieldName: a\n  type: string\n  defaultvalue: x\n"
    )
    _, warnings = read(tmp_path, text)
    assert len(warnings) == 3
    assert "line 4" in warnings[0]
    assert "did you mean 'runtimeParameterDefinitions'?" in warnings[0]
    assert "'zzz' is ignored" in warnings[1]
    assert "did you mean" not in warnings[1]
    assert "line 9" in warnings[2]
    assert "did you mean 'defaultValue'?" in warnings[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: m\ntype: inference\ntargettype: textgeneration\n",
            "'targetType' is missing; did you mean 'targettype'",
        ),
        ("name: a\nname: b\ntype: i\ntargetType: textgeneration\n", "line 2, column 1: duplicate key 'name'"),
        (MINIMAL_METADATA + "description: &x a\nmodelID: *x\n", "line 5, column 10: aliases"),
        ("name: [unclosed\n", "line 2"),
        ("- a\n- b\n", "mapping"),
        ("", "mapping"),
        (b"name: \xff\n", "not UTF-8 .byte 6"),
        (MINIMAL_METADATA + "x: !!python/object/apply:os.system [ls]\n", "line 4"),
        (MINIMAL_METADATA + "runtimeParameterDefinitions:\n- type: string\n", "line 5.*fieldName' is missing"),
        (
            MINIMAL_METADATA + "runtimeParameterDefinitions:\n- {fieldName: a, type: sting}\n",
            "line 5.*type: input should",
        ),
        (
            MINIMAL_METADATA + "runtimeParameterDefinitions:\n- {fieldName: a, type: string, minValue: low}\n",
            "line 5.*minValue",
        ),
        (
            MINIMAL_METADATA + "runtimeParameterDefinitions:\n"
            "- {fieldName: a, type: string}\n- {fieldName: a, type: string}\n",
            "line 6: parameter 'a' is defined twice",
        ),
        (MINIMAL_METADATA + "description: " + "x" * (1 << 20), "larger than 1 MiB"),
        (MINIMAL_METADATA + "runtimeParameterDefinitions: x\n", "line 4: runtimeParameterDefinitions has to be a list"),
        (MINIMAL_METADATA + "runtimeParameterDefinitions: [1]\n", "line 4: .* has to be a mapping"),
        ("name: [m]\ntype: inference\ntargetType: textgeneration\n", "line 1: name has to be text"),
        (MINIMAL_METADATA + "---\na: b\n", "line 4.*single document.*another document"),
        ("[" * 5000, "nested too deeply|line 1"),
    ],
)
def test_errors_name_the_file_the_key_and_the_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        read(tmp_path, text)
    assert caught.value.message.startswith("model-metadata.yaml")


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    levels = "".join(f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    with pytest.raises(ConfigurationError, match="aliases"):
        read(tmp_path, MINIMAL_METADATA + "k0: &a0 [lol]\n" + levels)


def test_a_date_stays_text(tmp_path: Path) -> None:
    text = MINIMAL_METADATA + "runtimeParameterDefinitions:\n- {fieldName: a, type: string, defaultValue: 2024-01-02}\n"
    metadata, _ = read(tmp_path, text)
    assert metadata.runtimeParameterDefinitions[0].defaultValue == "2024-01-02"


@pytest.mark.parametrize("value", ['!!int ""', "!!float x", "!!bool x", "!!timestamp x", "9" * 5000])
def test_a_value_that_is_not_of_its_tag_is_refused_with_its_line(tmp_path: Path, value: str) -> None:
    """PyYAML ends in an IndexError, a KeyError or an AttributeError there."""
    file = tmp_path / "model-metadata.yaml"
    file.write_text(MINIMAL_METADATA + f"modelID: {value}\n")
    with pytest.raises(ConfigurationError, match=r"model-metadata\.yaml, line 4, column 10: this is no \w+$"):
        read_metadata(file)
