"""engine_config.json: arguments for the engine, stronger than runtime parameters. Its schema ships beside this."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.nearest import did_you_mean

FILE_NAME = "engine_config.json"
SCHEMA_FILE = Path(__file__).with_name("engine_config.schema.json")
MAX_BYTES = 1 << 20

_EXAMPLE = 'it looks like {"args": ["--max-model-len", "4096"]}'


@dataclass(frozen=True)
class EngineConfig:
    """The file. `args` are as written: strings, and numbers that the flag table turns into text."""

    args: tuple[object, ...] = field(default=(), repr=False)  # a --hf-token may be among them


class _DuplicateKeyError(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(key)
        result[key] = value
    return result


def read_engine_config(path: Path) -> EngineConfig:
    """Read the file. Raises ConfigurationError with line and column of a syntax error, or the key that is wrong."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigurationError(f"{FILE_NAME} is larger than 1 MiB")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{FILE_NAME} is not UTF-8 (byte {error.start})", "save it as UTF-8") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigurationError(
            f"{FILE_NAME}, line {error.lineno}, column {error.colno}: {error.msg}", _EXAMPLE
        ) from None
    except _DuplicateKeyError as error:
        raise ConfigurationError(
            f"{FILE_NAME}{_last_place(text, str(error))}: key '{error}' is there twice", "keep one of them"
        ) from None
    except RecursionError:
        raise ConfigurationError(f"{FILE_NAME} is nested too deeply", _EXAMPLE) from None
    except ValueError:  # the one that is left: Python reads no number of more than 4,300 digits
        raise ConfigurationError(f"{FILE_NAME} has a number that is too long to be read", _EXAMPLE) from None
    return EngineConfig(_args(text, data))


def render(args: Sequence[str]) -> str:
    """A file with these arguments."""
    return json.dumps({"args": list(args)}, indent=2, ensure_ascii=False) + "\n"


def _args(text: str, data: Any) -> tuple[object, ...]:
    if not isinstance(data, dict):
        raise ConfigurationError(f"{FILE_NAME} has to be a JSON object", _EXAMPLE)
    for key in data:
        if key not in ("args", "$schema"):
            place = _last_place(text, key)
            raise ConfigurationError(
                f"{FILE_NAME}{place}: unknown key '{key}'{did_you_mean(key, ['args'])}",
                "the only key is args, a list of command-line flags",
            )
    args = data.get("args", [])
    if not isinstance(args, list):
        place = _last_place(text, "args")
        raise ConfigurationError(f"{FILE_NAME}{place}: args has to be a list, not {_kind(args)}", _EXAMPLE)
    return tuple(args)


def _kind(value: object) -> str:
    names = {str: "a string", dict: "an object", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _last_place(text: str, key: str) -> str:
    """`, line 3` of the last time that `key` is written as a key; nothing when it is written with escapes."""
    position = text.rfind(json.dumps(key, ensure_ascii=False))
    return f", line {text.count(chr(10), 0, position) + 1}" if position >= 0 else ""
