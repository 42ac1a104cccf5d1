"""The gateway's own refusals, in the two shapes that clients know: OpenAI's `error` object and DRUM's `message`."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

ERROR_BYTES = 16 << 10  # the longest error, ours or the engine's (failure mode 21)
PIPELINE_ERROR = 513  # DRUM's status for "crashed for good" (contract, section 3)

_MEMBERS = 6  # of an engine's error object that are passed on

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


# vLLM's validation errors repeat the input; the client has it already, and a log must not (failure mode 21).
_ECHO = re.compile(r"'input': .*?(?=, '(?:ctx|url)': |\}\s*$|\.\.\.\[truncated\])", re.DOTALL | re.MULTILINE)


class HttpError(Exception):
    """Ends a request with this status. The route that catches it chooses the shape of the body."""

    def __init__(self, status: int, message: str, headers: Iterable[Header] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = tuple(headers)


class ClientGone(Exception):
    """The client closed its connection: there is nobody to answer."""


class EngineUnavailable(Exception):
    """The engine could not be reached, or went away before its answer was complete.

    `sent` is False when it surely never saw the request: no connection came about.
    """

    def __init__(self, message: str, *, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


def retry_after(seconds: int) -> Header:
    """When to come back, in whole seconds (RFC 9110, section 10.2.3)."""
    return b"retry-after", str(seconds).encode()


def openai_error(status: int, message: str, type: str | None = None) -> dict[str, Any]:
    """The body of an error on the OpenAI routes; `code` is the status, as vLLM has it."""
    kind = type or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def message_error(message: str) -> dict[str, Any]:
    """The body of an error on every other route (contract, section 3)."""
    return {"message": message}


async def send_bytes(send: Send, status: int, body: bytes, content_type: bytes, headers: Iterable[Header] = ()) -> None:
    """One whole response with its length."""
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", content_type),
                (b"content-length", str(len(body)).encode()),
                *headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, status: int, payload: Any, headers: Iterable[Header] = ()) -> None:
    """One whole JSON response."""
    body = json.dumps(payload, ensure_ascii=False).encode("utf-8", "backslashreplace")
    await send_bytes(send, status, body, b"application/json", headers)


def phrase(status: int) -> str:
    """The reason phrase, for a client that sent nothing worth a sentence."""
    return HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Error"


def readable_error(status: int, body: bytes) -> dict[str, Any]:
    """An engine's error as OpenAI's `error` object of at most 16 KiB, without the input that vLLM repeats in it."""
    try:
        payload = json.loads(body)
    except ValueError:
        payload = None
    if not isinstance(payload, dict):
        return openai_error(status, phrase(status))
    error = payload.get("error")
    if not isinstance(error, dict):
        # Older engines answer flat, FastAPI with `detail`.
        text = payload.get("message") or payload.get("detail") or error or phrase(status)
        return openai_error(status, bounded(str(text)))
    message = bounded(str(error.get("message", "")))
    small = {key: value for key, value in list(error.items())[:_MEMBERS] if _short(key) and _short(value)}
    return {**_envelope(payload), "error": {**small, "message": message}}


def _short(value: object) -> bool:
    return value is None or isinstance(value, int) or (isinstance(value, str) and _json_size(value) <= 256)


def _envelope(payload: dict[str, Any]) -> dict[str, Any]:
    """What stands beside `error`, such as Anthropic's `type`."""
    return {key: value for key, value in payload.items() if key in ("type", "object") and _short(value)}


def bounded(text: str) -> str:
    """The text without the input that vLLM repeats, cut so that an error with it takes at most 16 KiB as JSON."""
    text = _ECHO.sub("'input': …", text)
    limit = ERROR_BYTES - 4096  # room for the rest of the object
    whole = size = _json_size(text)
    while size > limit:
        text = text[: len(text) * limit // size]
        size = _json_size(text)
    return text if size == whole else text + " … (cut)"


def _json_size(text: str) -> int:
    """Its bytes as JSON, where a control character takes six."""
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "backslashreplace"))
