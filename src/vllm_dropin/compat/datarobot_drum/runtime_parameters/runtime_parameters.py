"""`RuntimeParameters.get(name)` and `.has(name)` on the platform's envelopes.

A parameter is the environment variable `MLOPS_RUNTIME_PARAM_<name>`, whose value is
`{"type": string | boolean | numeric | credential | deployment, "payload": value or null}`.
"""

from __future__ import annotations

import json
import os
from typing import Any

from .exceptions import InvalidJsonException, InvalidRuntimeParam

_ALLOWED: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "numeric": (int, float),
    "credential": (dict,),
    "deployment": (str,),
}


class RuntimeParameters:
    """The parameters of this process. Error messages name the parameter, never its value: it may be a secret."""

    PARAM_PREFIX = "MLOPS_RUNTIME_PARAM"

    @classmethod
    def namespaced_param_name(cls, param_name: str) -> str:
        """The environment variable that holds a parameter."""
        return f"{cls.PARAM_PREFIX}_{param_name}"

    @classmethod
    def has(cls, param_name: str) -> bool:
        """Whether the parameter is defined, be it null."""
        return cls.namespaced_param_name(param_name) in os.environ

    @classmethod
    def get(cls, param_name: str) -> Any:
        """The value: str, bool, int, float, the credential's fields as a dict, or None for null.

        Raises ValueError when the parameter is not defined, and a RuntimeParameterException when its envelope is
        malformed. A number that travels as text is given as a number.
        """
        text = os.environ.get(cls.namespaced_param_name(param_name))
        if text is None:
            raise ValueError(f"Runtime parameter '{param_name}' is not defined")
        try:
            envelope = json.loads(text)
        except ValueError:
            # `from None`: the decoder's error holds the text itself.
            raise InvalidJsonException(f"Runtime parameter '{param_name}' does not hold JSON") from None
        if not isinstance(envelope, dict) or not {"type", "payload"} <= envelope.keys():
            raise InvalidRuntimeParam(f"Runtime parameter '{param_name}' needs the keys type and payload")
        kind, payload = envelope["type"], envelope["payload"]
        allowed = _ALLOWED.get(kind) if isinstance(kind, str) else None
        if allowed is None:
            raise InvalidRuntimeParam(
                f"Runtime parameter '{param_name}' has an unknown type; known: {', '.join(_ALLOWED)}"
            )
        if kind == "numeric" and isinstance(payload, str):
            payload = _number(payload)
        numeric_boolean = kind == "numeric" and isinstance(payload, bool)
        if payload is not None and (not isinstance(payload, allowed) or numeric_boolean):
            raise InvalidRuntimeParam(f"Runtime parameter '{param_name}' has a payload that is no {kind}")
        return payload


def _number(text: str) -> int | float | str:
    """The number that a text says, or the text."""
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text
