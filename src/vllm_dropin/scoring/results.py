"""What became of a row."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from typing import Any

from vllm_dropin.scoring.rows import Row

LONGEST_ERROR = 500  # characters
_ECHO = 16  # characters; a longer run that is in the prompt too counts as an echo of it
_OWN_FAULT = {400, 413, 422}  # the statuses by which the engine says that the request itself is wrong


class Fault(enum.Enum):
    """Who has to change something for a failed row to succeed."""

    INPUT = "input"  # the row
    ENGINE = "engine"  # the engine or its settings
    UNAVAILABLE = "unavailable"  # nobody: the engine is gone, later may do


@dataclass(frozen=True, slots=True)
class RowResult:
    """The answer to one row: either completions (one or more), or an error with who is at fault.

    `finish_reasons` goes with `completions`. `tries` counts the requests that were sent to the engine. Token counts
    are the engine's, 0 where it gives none. `reply` is its whole reply, where that was asked for.
    """

    index: int
    line: int
    completions: tuple[str, ...] = ()
    finish_reasons: tuple[str, ...] = ()
    error: str | None = None
    fault: Fault | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tries: int = 0
    reply: bytes | None = None

    @property
    def prediction(self) -> str:
        """The first completion; "" for a row that failed (contract, section 3)."""
        return self.completions[0] if self.completions else ""


def failure(row: Row, error: str, fault: Fault, tries: int = 0) -> RowResult:
    """A row that has no answer. The text is cut to 500 characters."""
    return RowResult(row.index, row.line, error=_bounded(error), fault=fault, tries=tries)


def from_answer(row: Row, status: int, body: bytes, tries: int, *, keep_reply: bool = False) -> RowResult:
    """Read one whole reply of `/v1/chat/completions`, a good one or an error.

    With `keep_reply` an answer without text, such as a tool call, is an answer: whoever reads the reply finds it there.
    """
    try:
        payload = json.loads(body)
    except ValueError:
        payload = None
    if status != 200:
        fault = Fault.INPUT if status in _OWN_FAULT else Fault.ENGINE
        return failure(row, _reason(status, payload, row.prompt), fault, tries)
    try:
        return _completed(row, payload, tries, body if keep_reply else None)
    except (AttributeError, KeyError, TypeError, ValueError):
        return failure(row, "the engine's reply is not a chat completion", Fault.ENGINE, tries)


def _completed(row: Row, payload: Any, tries: int, reply: bytes | None) -> RowResult:
    choices = sorted(payload["choices"], key=lambda choice: int(choice.get("index") or 0))
    texts = [choice["message"].get("content") for choice in choices]
    reasons = tuple(str(choice.get("finish_reason") or "") for choice in choices)
    if reply is None and all(text is None for text in texts):
        why = ", ".join(sorted(set(reasons))) or "no choices"
        return failure(row, f"the model gave no text (finish reason: {why})", Fault.ENGINE, tries)
    usage = payload.get("usage") or {}
    return RowResult(
        row.index,
        row.line,
        completions=tuple("" if text is None else str(text) for text in texts),
        finish_reasons=reasons,
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        completion_tokens=int(usage.get("completion_tokens") or 0),
        tries=tries,
        reply=reply,
    )


def _reason(status: int, payload: Any, prompt: str) -> str:
    """The engine's own words about a failure, without the prompt in them."""
    message: Any = None
    if isinstance(payload, dict):
        error = payload.get("error", payload)
        message = error.get("message") if isinstance(error, dict) else error
    if not isinstance(message, str) or not message:
        return f"the engine answered with status {status}"
    return f"the engine answered with status {status}: {_without_echo(message[:1000], prompt)}"


def _without_echo(message: str, prompt: str) -> str:
    """Cut the message where it starts to repeat the prompt: errors are logged and shown, prompts are private."""
    if 4 <= len(prompt) <= 2 * _ECHO:
        message = message.replace(prompt, "…")
    for at in range(0, len(message) - _ECHO + 1, _ECHO):
        if message[at : at + _ECHO] in prompt:
            while at and message[at - 1 : at - 1 + _ECHO] in prompt:
                at -= 1
            return message[:at] + "…"
    return message


def _bounded(text: str) -> str:
    return text if len(text) <= LONGEST_ERROR else text[: LONGEST_ERROR - 1] + "…"
