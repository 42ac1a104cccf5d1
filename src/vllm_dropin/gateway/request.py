"""One HTTP exchange as the routes see it: decided path, headers, and a sender that stamps every response."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from vllm_dropin.gateway.errors import (
    ClientGone,
    Header,
    HttpError,
    Message,
    Receive,
    Scope,
    Send,
    bounded,
    message_error,
    openai_error,
    send_json,
)

# The version that tells the platform not to expect the model's own statistics (contract, section 3).
DRUM_VERSION = "1.17.20"
HEADER_BYTES = 64 << 10
DISCARD_BYTES = 1 << 20  # the largest body that is read and thrown away before its request is refused
DISCARD_SECONDS = 0.05
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,256}")
# Two readings of one path are how access rules are passed by (CVE-2026-48746): such a path names nothing.
_AMBIGUOUS = re.compile(rb"//|\\|%(?:2f|5c|2e|25|7f|[01][0-9a-f])|/\.\.?(?:/|$)", re.IGNORECASE)


class Request:
    """One exchange. `send` stamps the contract's headers on the response and remembers whether it has started.

    The HTTP server below us closes a connection whose request was answered before all of it was read. A client that is
    not told sends its next request there and is answered by nothing, so the response says that the connection closes.
    """

    __slots__ = (
        "_receive", "_send", "_unread", "headers", "id", "method", "openai", "path", "query", "scope", "started",
    )  # fmt: skip

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.query: bytes = scope["query_string"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.path = canonical_path(scope)
        self.openai = False
        self.started: int | None = None
        self._receive = receive
        self._send = send
        self._unread = self.headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in self.headers
        given = self.headers.get(b"x-request-id", b"")
        self.id = given if _REQUEST_ID.fullmatch(given) else str(uuid.uuid4()).encode()

    @property
    def header_bytes(self) -> int:
        """Size of the header section, about: names, values and their separators."""
        return sum(len(name) + len(value) + 4 for name, value in self.scope["headers"])

    async def receive(self) -> Message:
        message = await self._receive()
        self._unread = bool(message.get("more_body", False))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = message["status"]
            stamp: list[Header] = [
                (b"x_request_id", self.id),
                (b"x-drum-version", DRUM_VERSION.encode()),
            ]
            if self._unread:
                stamp.append((b"connection", b"close"))
            message["headers"] = [*message["headers"], *stamp]
        await self._send(message)

    async def fail(self, error: HttpError) -> None:
        """Answer with the error, in the shape of the route."""
        await self._discard()
        message = bounded(error.message)
        shape = openai_error(error.status, message) if self.openai else message_error(message)
        await send_json(self.send, error.status, shape, error.headers)

    async def _discard(self) -> None:
        """Read the rest of a body that is not large and is here already: the client keeps its connection."""
        announced = self.headers.get(b"content-length", b"")
        if announced.isdigit() and int(announced) <= DISCARD_BYTES and b"expect" not in self.headers:
            with suppress(TimeoutError):
                async with asyncio.timeout(DISCARD_SECONDS):
                    while self._unread:
                        await self.receive()


def canonical_path(scope: Scope) -> str | None:
    """The decoded path without a trailing slash (`/` stays). None: it can be read in two ways, so it names nothing."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    if not raw.startswith(b"/") or _AMBIGUOUS.search(raw):
        return None
    path: str = scope["path"]
    return path[:-1] if path.endswith("/") and path != "/" else path


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work; cancel it as soon as the client leaves (ClientGone). The request's body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        await task
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        del task  # its error refers to this frame: they would keep each other, and all that the work had, for long


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
