"""Errors on their way from a node of the cluster to the driver."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from vllm_dropin import errors
from vllm_dropin.errors import DropinError, EngineError

_LONGEST = 300


@dataclass(frozen=True)
class Told:
    """An error of ours as plain text: an exception of two arguments does not survive being pickled."""

    kind: str
    message: str
    remedy: str = ""

    @classmethod
    def of(cls, error: DropinError) -> Told:
        return cls(type(error).__name__, error.message, error.remedy)

    def error(self, where: str = "") -> DropinError:
        """The error again, of its own class; `where` says in which place it happened."""
        kind = getattr(errors, self.kind, EngineError)
        message = f"{where}: {self.message}" if where else self.message
        error: DropinError = kind(message, self.remedy)
        return error

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Told:
        return cls(**json.loads(text))


def in_short(error: BaseException) -> str:
    """The one line of an exception of Ray's that says what happened: most of them carry a page."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:_LONGEST]}" if text else type(error).__name__
