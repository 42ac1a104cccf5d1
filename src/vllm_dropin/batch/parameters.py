"""Parameters of a request (temperature, max_tokens, stop, …): fixed for all rows, or from a column for each."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.nearest import nearest

Kind = Literal["number", "integer", "boolean", "text", "texts", "json", "any"]

_KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        (
            "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
            "length_penalty",
        ),
        "number",
    ),
    **dict.fromkeys(
        (
            "max_tokens", "max_completion_tokens", "min_tokens", "n", "seed", "top_k", "top_logprobs",
            "truncate_prompt_tokens", "priority",
        ),
        "integer",
    ),
    **dict.fromkeys(
        (
            "logprobs", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens",
            "include_stop_str_in_output", "add_generation_prompt", "continue_final_message", "include_reasoning",
            "parallel_tool_calls", "use_beam_search",
        ),
        "boolean",
    ),
    **dict.fromkeys(("user", "reasoning_effort", "service_tier", "cache_salt", "chat_template"), "text"),
    **dict.fromkeys(("stop", "bad_words"), "texts"),
    "tool_choice": "any",
    **dict.fromkeys(
        (
            "stop_token_ids", "allowed_token_ids", "logit_bias", "tools", "response_format", "metadata",
            "chat_template_kwargs", "structured_outputs", "documents", "vllm_xargs", "mm_processor_kwargs",
        ),
        "json",
    ),
}  # fmt: skip
"""What a value must be. Other names go through as they are: engines learn new ones with every release."""
_OURS = {
    "messages": "it is made of the row",
    "prompt": "it is made of the row",
    "model": "the served model is asked",
    "stream": "answers are read as a whole",
    "stream_options": "answers are read as a whole",
}
_AT_LEAST = {"temperature": 0, "max_tokens": 1, "max_completion_tokens": 1, "n": 1, "min_tokens": 0}


class WrongValue(ValueError):
    """A value that this parameter can't have; its text says what it must be."""


def parse_params(given: Iterable[str]) -> dict[str, Any]:
    """What `--params` says: each a JSON object, the path of a file that holds one, or NAME=VALUE.

    A later one wins. Raises ConfigurationError.
    """
    found: dict[str, Any] = {}
    for text in given:
        name = re.match(r"\s*([A-Za-z_]\w*)\s*=", text)
        if name:
            found[name[1]] = text[name.end() :].strip()
        elif text.lstrip().startswith("{"):
            found.update(json_object(text, "--params"))
        else:
            found.update(read_object(Path(text), "--params"))
    return checked_params(found)


def checked_params(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fixed parameters with values of the right kind. Raises ConfigurationError."""
    checked: dict[str, Any] = {}
    for name, value in given.items():
        check_name(name)
        try:
            checked[name] = parsed(name, value)
        except WrongValue as error:
            raise ConfigurationError(f"the parameter {name} {error}: it is {_shown(value)}") from error
    return checked


def check_name(name: str) -> None:
    """Refuse what is ours, and what is a known name but for a letter. Raises ConfigurationError."""
    if name in _OURS:
        raise ConfigurationError(f"the parameter {name} can't be set: {_OURS[name]}", "Leave it out.")
    if name not in _KINDS:
        meant = nearest(name, _KINDS)
        if meant and _close(name, meant):
            raise ConfigurationError(f"the parameter {name!r} is unknown", f"Did you mean {meant!r}?")


def parsed(name: str, value: object) -> Any:
    """A value, or the text of one, as the parameter's kind. Raises WrongValue."""
    kind = _KINDS.get(name)
    result = _PARSERS[kind or "any"](value)
    least = _AT_LEAST.get(name)
    if least is not None and result < least:
        raise WrongValue(f"must be at least {least}")
    return result


def is_unset(value: object) -> bool:
    """Whether a row's cell leaves the parameter to its fixed value."""
    return value is None or (isinstance(value, str) and not value.strip())


def read_object(path: Path, option: str) -> dict[str, Any]:
    """The JSON object in a file that an option names. Raises ConfigurationError."""
    return json_object(read_text(path, option), f"{option} {path}")


def read_text(path: Path, option: str) -> str:
    """The text of a file that an option names. Raises ConfigurationError."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"{option}: {path} can't be read: {error.strerror}", "Check the path.") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{option}: {path} is not UTF-8 text (byte {error.start})", "Save it as UTF-8."
        ) from error


def json_object(text: str, where: str) -> dict[str, Any]:
    """Raises ConfigurationError when the text is no JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        at = (
            f", line {error.lineno} column {error.colno}: {error.msg}"
            if isinstance(error, json.JSONDecodeError)
            else ""
        )
        raise ConfigurationError(f"{where} is not valid JSON{at}", "Write a JSON object: {…}.") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{where} is no JSON object", "Write a JSON object: {…}.")
    return value


def _close(name: str, known: str) -> bool:
    return abs(len(name) - len(known)) <= 2 and name[:3].lower() == known[:3]


def _number(value: object) -> float:
    number = _lenient(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise WrongValue("must be a number")
    return number


def _integer(value: object) -> int:
    try:
        number = _number(value)
        if number == int(number):
            return int(number)
    except WrongValue:
        pass
    raise WrongValue("must be a whole number")


def _boolean(value: object) -> bool:
    flag = _lenient(value.strip().lower() if isinstance(value, str) else value)
    if not isinstance(flag, bool):
        raise WrongValue("must be true or false")
    return flag


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise WrongValue("must be text")
    return value


def _texts(value: object) -> str | Sequence[str]:
    found = _lenient(value) if isinstance(value, str) and value.lstrip().startswith(("[", '"')) else value
    if isinstance(found, str):
        return found
    if isinstance(found, list) and all(isinstance(item, str) for item in found):
        return found
    raise WrongValue("must be text or a list of texts")


def _structure(value: object) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise WrongValue("must be JSON") from None


def _lenient(value: object) -> Any:
    """JSON where it is, else the text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _shown(value: object) -> str:
    return repr(value)[:60]


_PARSERS: dict[Kind, Callable[[object], Any]] = {
    "number": _number,
    "integer": _integer,
    "boolean": _boolean,
    "text": _text,
    "texts": _texts,
    "json": _structure,
    "any": _lenient,
}
