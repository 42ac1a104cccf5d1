"""A credential that the platform injects: free fields, known by their names and not by the credential's type."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_dropin.model.secret import Secret

# What in a credential is worth hiding wherever it turns up; a user name or a region is not.
_SECRET_FIELD = re.compile(r"key|token|secret|pass|connection|private", re.IGNORECASE)

# Whole words at the end: TOKENIZERS_PARALLELISM=true must not make every "true" a secret.
_SECRET_VARIABLE = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CONNECTION_STRING)$", re.IGNORECASE)
_SECRET_LINE = 16  # a shorter line could be an ordinary word


def is_secret_name(variable: str) -> bool:
    """Whether an environment variable of this name holds what must not be shown."""
    return _SECRET_VARIABLE.search(variable) is not None


class Credential:
    """The fields of one credential. Prints as `***`; `token()` and `reveal()` give what is inside."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = dict(fields)

    def token(self) -> Secret | None:
        """The API token: the field `apiToken` (also `api_token`, `token`), whatever `credentialType` says."""
        for name in ("apiToken", "api_token", "token"):
            value = self._fields.get(name)
            if isinstance(value, str) and value.strip():
                return Secret(value.strip())
        return None

    def reveal(self) -> dict[str, Any]:
        """The fields, for the hook's environment."""
        return dict(self._fields)

    def field_names(self) -> tuple[str, ...]:
        return tuple(self._fields)

    def secrets(self) -> Iterator[str]:
        """The texts in it that must not be shown in any log."""
        yield from _leaves(self._fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Credential) and self._fields == other._fields

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format("***", spec)


def _leaves(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, value in fields.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                yield from _leaves(item)
            elif isinstance(item, str) and item and name != "credentialType" and _SECRET_FIELD.search(name):
                yield item
                yield from _lines(item)


def _lines(text: str) -> Iterator[str]:
    """The lines of a private key: logs are hidden line by line, so the whole would not be found in them."""
    lines = text.splitlines()
    if len(lines) > 1:
        yield from (line for line in lines if len(line) >= _SECRET_LINE and not line.startswith("-----"))
