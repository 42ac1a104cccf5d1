"""Values of runtime parameters by their type (contract, section 1)."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.credential import Credential
from vllm_dropin.model.metadata import ParameterType

Payload = str | bool | int | float | Credential | None

_LARGEST = sys.float_info.max
_TRUTHS = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}


def coerce(payload: object, kind: ParameterType, place: str, loose: bool = False) -> Payload:
    """Read a payload as a type; None stays None, and so does empty text where text is not the type.

    Numbers may be written as text. `loose` takes a number for a string as the number it is. Raises
    ConfigurationError, which starts with `place` and does not repeat a credential.
    """
    if payload is None:
        return None
    match kind:
        case "string" | "deployment":
            return _string(payload, place, loose)
        case "numeric":
            return _number(payload, place)
        case "boolean":
            return _boolean(payload, place)
        case "credential":
            return _credential(payload, place)


def _string(payload: object, place: str, loose: bool) -> Payload:
    if isinstance(payload, str):
        return payload
    if isinstance(payload, bool):
        return str(payload).lower()
    if isinstance(payload, int | float):
        return payload if loose else str(payload)
    raise ConfigurationError(f"{place}: this has to be text, not {_kind(payload)}")


def _number(payload: object, place: str) -> Payload:
    if isinstance(payload, str):
        text = payload.strip()
        if not text:
            return None
        try:
            number: int | float = int(text) if text.lstrip("+-").isdigit() else float(text)
        except ValueError:
            raise ConfigurationError(f"{place}: '{text[:40]}' is not a number") from None
    elif isinstance(payload, int | float) and not isinstance(payload, bool):
        number = payload
    else:
        raise ConfigurationError(f"{place}: this has to be a number, not {_kind(payload)}")
    if not -_LARGEST <= number <= _LARGEST:  # also false for NaN
        shown = number if isinstance(number, float) else "this"
        raise ConfigurationError(f"{place}: {shown} is not a finite number")
    return number


def _boolean(payload: object, place: str) -> Payload:
    if isinstance(payload, bool):
        return payload
    text = str(payload).strip().lower() if isinstance(payload, str | int | float) else ""
    if text == "" and isinstance(payload, str):
        return None
    if text not in _TRUTHS:
        shown = f"'{payload[:40]}'" if isinstance(payload, str) else _kind(payload)
        raise ConfigurationError(f"{place}: this has to be true or false, not {shown}")
    return _TRUTHS[text]


def _credential(payload: object, place: str) -> Payload:
    if payload == "":
        return None
    if isinstance(payload, Credential):
        return payload
    if not isinstance(payload, Mapping):
        raise ConfigurationError(
            f"{place}: a credential has to be a map of fields, not {_kind(payload)}", 'for example {"apiToken": "…"}'
        )
    return Credential({str(name): value for name, value in payload.items()})


def _kind(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return "text"
        case int() | float():
            return f"the number {value}"
        case Mapping():
            return "a map"
        case _:
            return "a list"
