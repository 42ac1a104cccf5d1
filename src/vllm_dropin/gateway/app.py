"""The gateway's ASGI application: who may ask, which route, and one place where errors become responses.

request ── headers ≤ 64 KiB ── key ── route ── method ── handler
                                                 ├─ platform    probes, information, /status, /metrics
                                                 ├─ openai      the engine's inference routes, bytes through
                                                 └─ predictions rows
"""

from __future__ import annotations

import errno
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from vllm_dropin import logging
from vllm_dropin.gateway.access import Access
from vllm_dropin.gateway.config import GatewayConfig
from vllm_dropin.gateway.engine_client import EngineClient
from vllm_dropin.gateway.errors import ClientGone, HttpError, Receive, Scope, Send, retry_after, send_json
from vllm_dropin.gateway.limits import Admission, Hold
from vllm_dropin.gateway.openai import INFERENCE_ROUTES, RESPONSE_ROUTES, Forwarder, inference_methods
from vllm_dropin.gateway.platform import Platform
from vllm_dropin.gateway.predictions import Predictions
from vllm_dropin.gateway.request import HEADER_BYTES, Request
from vllm_dropin.gateway.served import ServedModel
from vllm_dropin.gateway.state import SharedState

_log = logging.get("gateway")

# What a full or broken disk says to a body or an answer that waits there.
_DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
_READ = frozenset({"GET", "HEAD"})
_WRITE = frozenset({"POST"})
_DIRECT = frozenset({"GET", "POST", "PUT"})
_DIRECT_PREFIXES = ("/directAccess", "/nim")
# The contract has these without /v1; the engine does not.
_SHORT_NAMES = {"/chat/completions": "/v1/chat/completions", "/models": "/v1/models"}
_CHAT = frozenset({"/chat/completions", "/v1/chat/completions"})


@dataclass(frozen=True)
class Route:
    """What a path leads to. `openai` is the shape of its errors."""

    methods: frozenset[str]
    handle: Callable[[Request], Awaitable[None]]
    openai: bool = False


class Gateway:
    """The application of one worker. Start it inside a running event loop and `close` it at the end."""

    def __init__(self, config: GatewayConfig, state: SharedState, slot_index: int) -> None:
        self._config = config
        self._slot = slot = state.slots[slot_index]
        self._prefix = config.url_prefix.strip("/")
        self._prefix = f"/{self._prefix}" if self._prefix else ""
        self._access = Access(config.api_keys)
        self._engine = EngineClient(config, state, slot)
        hold = Hold(state, slot, config.limits.held_bytes)
        admission = Admission(state, slot, config.limits)
        served = ServedModel(config, self._engine)
        self._forwarder = Forwarder(config, state, slot, self._engine, served, admission, hold)
        self._predictions = Predictions(config, state, slot, self._engine, served)
        self._platform = Platform(config, state, self._engine)
        operations = {**self._platform.operations, "/openapi.json": self._describe}
        self._root_routes = {path: Route(_READ, handle) for path, handle in operations.items()}
        self._routes = {**self._root_routes, **self._prefixed_routes()}

    @property
    def routes(self) -> Mapping[str, Route]:
        """Every path that has no part of its own choosing, without the prefix and a trailing slash."""
        return self._routes

    def _prefixed_routes(self) -> dict[str, Route]:
        routes = {path: Route(_READ, handle) for path, handle in self._platform.contract.items()}
        for path in ("/predict", "/predictions", "/invocations"):
            routes[path] = Route(_WRITE, self._predict)
        for path in ("/predictUnstructured", "/predictionsUnstructured", "/transform"):
            routes[path] = Route(_WRITE, self._platform.unstructured)
        for path, methods in INFERENCE_ROUTES.items():
            routes[path] = Route(methods, partial(self._forwarder.forward, path=path), openai=True)
        for short, path in _SHORT_NAMES.items():
            routes[short] = routes[path]
        for path in _CHAT:
            routes[path] = Route(_WRITE, self._forwarder.chat, openai=True)
        return routes

    def renew_keys(self, keys: Sequence[str], engine_key: str | None) -> None:
        """From the next request on accept these keys and no others, and show the engine that one.

        Raises ValueError when that would open a door that was guarded.
        """
        if not keys and self._config.api_keys:
            raise ValueError("a guarded gateway can't be left without keys")
        self._access.renew(keys)
        self._engine.key = engine_key

    async def close(self) -> None:
        await self._engine.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive, send)
        self._slot.add("requests")
        try:
            await self._answer(request)
        except ClientGone:
            return
        except HttpError as error:
            await self._refuse(request, error)
        except Exception as error:  # noqa: BLE001
            # The one boundary: whatever it is, the client gets a response and the log gets the reason.
            await self._refuse(request, _fault(request.id.decode("latin-1"), error))
        if (request.started or 500) >= 500:
            self._slot.add("errors")

    async def _refuse(self, request: Request, error: HttpError) -> None:
        """Answer with the error. Once the response has started the connection is cut instead, which a client sees."""
        if request.started is None:
            await request.fail(error)
        elif request.started < 500:
            self._slot.add("errors")

    async def _answer(self, request: Request) -> None:
        path = self._inner(request.path)
        request.openai = _openai_shaped(path or request.scope["path"].removeprefix(self._prefix))
        if request.header_bytes > HEADER_BYTES:
            raise HttpError(431, f"the request's headers are larger than {HEADER_BYTES} bytes")
        self._access.require(path, request.method, request.headers)
        route = self._find(request.path, path)
        if route is None:
            raise HttpError(404, "there is no such route")
        if request.method not in route.methods:
            allowed = ", ".join(sorted(route.methods)).encode()
            raise HttpError(405, f"the method {request.method} is not allowed here", [(b"allow", allowed)])
        await route.handle(request)

    def _inner(self, path: str | None) -> str | None:
        """The path without the prefix; operations answer at the root too. None: no path of ours."""
        if path is None or not self._prefix:
            return path
        if path == self._prefix:
            return "/"
        if path.startswith(f"{self._prefix}/"):
            return path[len(self._prefix) :]
        return path if path in self._root_routes else None

    def _find(self, outer: str | None, path: str | None) -> Route | None:
        if path is None:
            return None
        route = self._routes.get(path)
        if route is not None:
            return route
        for prefix in _DIRECT_PREFIXES:
            if path.startswith(f"{prefix}/"):
                return self._direct(path[len(prefix) :])
        methods = inference_methods(path)
        return Route(methods, partial(self._forwarder.forward, path=path), openai=True) if methods else None

    def _direct(self, path: str) -> Route | None:
        """The contract's direct access: the engine's own path, only where the allow-list has it."""
        if inference_methods(path) is None:
            return None
        return Route(_DIRECT, partial(self._forwarder.direct, path=path), openai=True)

    async def _describe(self, request: Request) -> None:
        """The routes as OpenAPI describes them."""
        from vllm_dropin.gateway.openapi import document  # few ask, and a worker starts sooner without it

        methods = {path: route.methods for path, route in self._routes.items()} | RESPONSE_ROUTES
        inner = (*INFERENCE_ROUTES, *RESPONSE_ROUTES)
        direct = [prefix + path for prefix in _DIRECT_PREFIXES for path in inner]
        await send_json(request.send, 200, document(methods, direct, self._config))

    async def _predict(self, request: Request) -> None:
        started = time.monotonic()
        await self._predictions(request.scope, request.receive, request.send)
        self._platform.row_times.add(time.monotonic() - started)


def _fault(name: str, error: Exception) -> HttpError:
    """What a client is told of a fault on our side."""
    if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
        _log.error("request %s can't be kept on disk: %s", name, error.strerror)
        return HttpError(503, "the server has no room on its disk for the request", [retry_after(5)])
    _log.error("request %s failed", name, exc_info=error)
    return HttpError(500, "internal error")


def _openai_shaped(path: str) -> bool:
    for prefix in _DIRECT_PREFIXES:
        path = path.removeprefix(prefix)
    return path.startswith("/v1/") or path in _SHORT_NAMES or path in INFERENCE_ROUTES


def create_app(config: GatewayConfig, state: SharedState, slot_index: int) -> Gateway:
    """The application for the worker that owns this slot."""
    return Gateway(config, state, slot_index)
