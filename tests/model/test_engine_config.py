import json
from pathlib import Path

import pytest

from tests.folders import README_ENGINE_CONFIG, make_folder
from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.engine_config import SCHEMA_FILE, read_engine_config


def read(tmp_path: Path, text: str | bytes) -> tuple[object, ...]:
    return read_engine_config(make_folder(tmp_path, {"engine_config.json": text}) / "engine_config.json").args


def test_the_published_example_loads_as_it_is(tmp_path: Path) -> None:
    assert read(tmp_path, README_ENGINE_CONFIG) == (
        "--model", "tiiuae/falcon-7b-instruct", "--chat-template", "/opt/code/template_falcon.jinja",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "args"),
    [
        ("{}", ()),
        ('{"args": []}', ()),
        ('\ufeff{"args": ["--max-model-len", 4096, 0.5, true]}', ("--max-model-len", 4096, 0.5, True)),
        ('{"$schema": "engine_config.schema.json", "args": ["-tp", "2"]}', ("-tp", "2")),
    ],
)
def test_args_are_kept_as_written(tmp_path: Path, text: str, args: tuple[object, ...]) -> None:
    assert read(tmp_path, text) == args


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "args": ["--a",]\n}', r"line 2, column \d+"),
        ('{"args": [1}', "line 1, column 12"),
        ("", "line 1, column 1"),
        ('{"args": [],\n "args": ["-tp", "2"]}', "line 2: key 'args' is there twice"),
        ('{\n"arg": []}', "line 2: unknown key 'arg'; did you mean 'args'?"),
        ('{"args": [], "model": "x"}', "unknown key 'model'"),
        ('{"args": "--max-model-len 5"}', "args has to be a list, not a string"),
        ('{"args": null}', "args has to be a list, not null"),
        ('{"args": {}}', "args has to be a list, not an object"),
        ("[]", "has to be a JSON object"),
        (b"\xff\xfe{", "not UTF-8"),
        ('{"args": ' + "[" * 100_000, "nested too deeply"),
        ('{"args": [1' + "0" * 5000 + "]}", "a number that is too long"),
        ('{"args": ["' + "x" * (1 << 20) + '"]}', "larger than 1 MiB"),
    ],
)
def test_errors_name_the_place(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        read(tmp_path, text)
    assert caught.value.message.startswith("engine_config.json")
    assert caught.value.exit_code == 78


def test_the_schema_for_editors_ships_and_says_the_same() -> None:
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {"args", "$schema"}
    assert schema["properties"]["args"]["type"] == "array"
