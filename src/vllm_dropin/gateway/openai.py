"""The engine's inference routes: gate, limits, defaults of a chat, and bytes through."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_dropin.gateway.chat import Chat, prepare_chat, read_request
from vllm_dropin.gateway.config import GatewayConfig
from vllm_dropin.gateway.engine_client import EngineClient
from vllm_dropin.gateway.errors import (
    EngineUnavailable,
    Header,
    HttpError,
    bounded,
    message_error,
    readable_error,
    retry_after,
    send_json,
)
from vllm_dropin.gateway.limits import Admission, Body, Hold, read_body
from vllm_dropin.gateway.request import Request, while_connected
from vllm_dropin.gateway.served import ServedModel
from vllm_dropin.gateway.splice import EventStream, error_frame, splice_object
from vllm_dropin.gateway.state import Phase, SharedState, Slot

if TYPE_CHECKING:
    from vllm_dropin.gateway.transport import Response

ERROR_READ = 1 << 20
WHOLE_BYTES = 256 << 10  # answers up to this size are read to their end before the first byte is sent on

# Deny by default: what is not here does not reach the engine (failure mode 30). Keys are the engine's own paths.
INFERENCE_ROUTES: dict[str, frozenset[str]] = {
    "/v1/models": frozenset({"GET"}),
    "/v1/chat/completions": frozenset({"POST"}),
    "/v1/completions": frozenset({"POST"}),
    "/v1/embeddings": frozenset({"POST"}),
    "/v1/responses": frozenset({"POST"}),
    "/v1/messages": frozenset({"POST"}),
    "/v1/messages/count_tokens": frozenset({"POST"}),
    "/v1/audio/transcriptions": frozenset({"POST"}),
    "/v1/audio/translations": frozenset({"POST"}),
    "/v1/audio/speech": frozenset({"POST"}),
    "/tokenize": frozenset({"POST"}),
    "/detokenize": frozenset({"POST"}),
    "/rerank": frozenset({"POST"}),
    "/v1/rerank": frozenset({"POST"}),
    "/v2/rerank": frozenset({"POST"}),
    "/score": frozenset({"POST"}),
    "/v1/score": frozenset({"POST"}),
}
# The same for paths with a part of the client's choosing, as the documents write them.
RESPONSE_ROUTES: dict[str, frozenset[str]] = {
    "/v1/responses/{id}": frozenset({"GET"}),
    "/v1/responses/{id}/cancel": frozenset({"POST"}),
}
_RESPONSE = re.compile(r"/v1/responses/resp[A-Za-z0-9_-]{1,128}(/cancel)?")  # `render` is a route of vLLM, no id
CHAT_PATH = "/v1/chat/completions"
# Those whose bodies are read for their bounds. Audio requests have `n` in their form, where the engine bounds it itself
# (supervisor).
_BOUNDED = frozenset({CHAT_PATH, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"})

_REQUEST_HEADERS = (
    "content-type", "accept", "traceparent", "tracestate", "anthropic-version", "anthropic-beta",
)  # fmt: skip
_HOP_HEADERS = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
        b"date", b"server", b"x-request-id",
    }
)  # fmt: skip


def inference_methods(path: str) -> frozenset[str] | None:
    """The methods of an allow-listed engine path; None for every other path."""
    methods = INFERENCE_ROUTES.get(path)
    if methods is None and (match := _RESPONSE.fullmatch(path)):
        return RESPONSE_ROUTES[f"/v1/responses/{{id}}{match[1] or ''}"]
    return methods


@dataclass(frozen=True, slots=True)
class Passage:
    """Where a request goes on to, in how many seconds the engine must begin to answer, and by which of our doors."""

    path: str
    timeout: float
    chat: bool = False
    direct: bool = False


class Forwarder:
    """Sends requests on to the engine, within the limits, and its answers back."""

    def __init__(
        self,
        config: GatewayConfig,
        state: SharedState,
        slot: Slot,
        engine: EngineClient,
        served: ServedModel,
        admission: Admission,
        hold: Hold,
    ) -> None:
        self._config = config
        self._state = state
        self._slot = slot
        self._engine = engine
        self._served = served
        self._admission = admission
        self._hold = hold

    async def chat(self, request: Request) -> None:
        """The edited route: defaults in, association id out (decision 5)."""
        await self._forward(request, Passage(CHAT_PATH, self._config.limits.request_timeout, chat=True))

    async def forward(self, request: Request, path: str) -> None:
        """Any other allow-listed path of the engine: identical bytes both ways."""
        await self._forward(request, Passage(path, self._config.limits.request_timeout))

    async def direct(self, request: Request, path: str) -> None:
        """The same by the contract's direct access, which has a deadline of its own."""
        await self._forward(request, Passage(path, self._config.limits.direct_timeout, direct=True))

    async def _forward(self, request: Request, to: Passage) -> None:
        self._require_engine()
        generates = request.method != "GET"
        if generates:
            self._admission.check()
        limits = self._config.limits
        audio = to.path.startswith("/v1/audio/")
        with await read_body(
            request.receive,
            request.headers,
            limits.row_body if audio else limits.json_body,
            spool_above=limits.spool_above,
            grace=limits.body_grace,
            hold=self._hold,
        ) as body:
            chat = None
            if to.chat:
                chat = prepare_chat(body.read(), self._config, await self._served.name(), self._max_model_len())
            elif request.method == "POST" and to.path in _BOUNDED:
                read_request(body.read(), limits.max_n)
            work = self._admitted(request, to, body, chat) if generates else self._exchange(request, to, None, None)
            await while_connected(request.receive, work)

    def _max_model_len(self) -> int | None:
        return self._state.max_model_len or self._config.max_model_len

    def _require_engine(self) -> None:
        """Raises HttpError 503 unless the engine can be asked now."""
        if self._state.draining:
            raise HttpError(503, "the server is shutting down", [retry_after(5)])
        phase = self._state.phase
        if phase is Phase.READY:
            return
        if phase.final:
            raise HttpError(
                503, f"the engine has {phase.label}" if phase is Phase.FAILED else "the server is shutting down"
            )
        raise HttpError(503, f"the engine is not ready: {phase.label}", [retry_after(5)])

    async def _admitted(self, request: Request, to: Passage, body: Body, chat: Chat | None) -> None:
        async with self._admission.admitted():
            # What was accepted before a drain began is still answered; an engine that died meanwhile is not asked.
            if self._state.phase not in (Phase.READY, Phase.DRAINING):
                self._require_engine()
            await self._exchange(request, to, body, chat)

    async def _exchange(self, request: Request, to: Passage, body: Body | None, chat: Chat | None) -> None:
        data: bytes | Body | None = chat.body if chat else body
        if isinstance(data, Body) and not data.spooled:
            data = data.read()
        try:
            async with self._engine.request(
                request.method,
                to.path,
                query=request.query,
                headers=self._headers(request),
                body=data,
                timeout=to.timeout,
            ) as response:
                if response.status >= 400:
                    await self._pass_error(request, to, response)
                elif response.content_type == "text/event-stream":
                    await self._pass_events(request, to.path, response, chat.member if chat else b"")
                else:
                    splice = chat.member if chat and response.status == 200 and _is_json(response) else b""
                    await self._pass_body(request, response, splice)
        except TimeoutError:
            raise HttpError(504, "the engine did not answer within the request deadline") from None
        except EngineUnavailable as error:
            raise HttpError(503, str(error), [retry_after(5)]) from error

    def _headers(self, request: Request) -> list[tuple[str, str]]:
        given = request.headers
        passed = [(name, value.decode("latin-1")) for name in _REQUEST_HEADERS if (value := given.get(name.encode()))]
        passed.append(("x-request-id", request.id.decode("latin-1")))
        ours = self._config.api_keys or self._config.engine_key
        if self._config.engine_url and not ours and b"authorization" in given:
            # Meant for the upstream, unless we have a key for clients or one for the upstream: then it stays here.
            passed.append(("authorization", given[b"authorization"].decode("latin-1")))
        return passed

    async def _pass_error(self, request: Request, to: Passage, response: Response) -> None:
        """The engine's error with its true status, bounded and in OpenAI's shape, or in the incumbent's form."""
        status = response.status
        payload = readable_error(status, await response.read(ERROR_READ))
        kept = [header for header in _response_headers(response) if header[0] in (b"retry-after", b"allow")]
        # The incumbent's own form is that of its own routes; by direct access the engine's status passes there too.
        if self._config.error_status == "drum" and not to.direct and to.path in (CHAT_PATH, "/v1/models"):
            text = f"ERROR: Error code: {status} - {payload!r}"
            await send_json(request.send, 500, message_error(bounded(text)), kept)
            return
        await send_json(request.send, status, payload, kept)

    async def _pass_events(self, request: Request, path: str, response: Response, member: bytes) -> None:
        headers = [header for header in _response_headers(response) if header[0] != b"content-length"]
        await request.send({"type": "http.response.start", "status": response.status, "headers": headers})
        events = EventStream(member)
        try:
            async for chunk in response.chunks():
                if passed := events.feed(chunk):
                    await request.send({"type": "http.response.body", "body": passed, "more_body": True})
            last = events.finish()
        except EngineUnavailable as error:
            self._slot.add("errors")
            last = events.break_off(error_frame(str(error), path))
        await request.send({"type": "http.response.body", "body": last})

    async def _pass_body(self, request: Request, response: Response, member: bytes) -> None:
        """A short answer is read whole first, so that an engine's death is still a clean 503."""
        chunks = response.chunks()
        first, ended = await _first_bytes(chunks, WHOLE_BYTES)
        spliced = splice_object(first, member) if member else first
        headers = [header for header in _response_headers(response) if header[0] != b"content-length"]
        length = len(spliced) if ended else response.content_length
        if length is not None:
            if not ended:
                length += len(spliced) - len(first)
            headers.append((b"content-length", str(length).encode()))
        await request.send({"type": "http.response.start", "status": response.status, "headers": headers})
        await request.send({"type": "http.response.body", "body": spliced, "more_body": not ended})
        if not ended:
            async for chunk in chunks:
                await request.send({"type": "http.response.body", "body": chunk, "more_body": True})
            await request.send({"type": "http.response.body", "body": b""})


async def _first_bytes(chunks: AsyncIterator[bytes], size: int) -> tuple[bytes, bool]:
    """At least `size` bytes, or all there are; whether that was the end."""
    parts: list[bytes] = []
    held = 0
    async for chunk in chunks:
        parts.append(chunk)
        held += len(chunk)
        if held >= size:
            return b"".join(parts), False
    return b"".join(parts), True


def _is_json(response: Response) -> bool:
    return response.content_type == "application/json"


def _response_headers(response: Response) -> list[Header]:
    return [header for header in response.headers if header[0] not in _HOP_HEADERS]
