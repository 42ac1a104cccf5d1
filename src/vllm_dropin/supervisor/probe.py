"""Asks an engine, or an upstream server, whether it answers and what it serves."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

ANSWER_LIMIT = 1 << 20
PROGRESS = (
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:iteration_tokens_total_count",
    "vllm:kv_cache_usage_perc",
)
"""The engine's counters that move while it works on anything, a long prefill included."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass(frozen=True)
class ServedModels:
    """What `/v1/models` says: the names, and the context length in tokens where the server gives one."""

    names: tuple[str, ...]
    max_model_len: int | None


@dataclass(frozen=True)
class Probe:
    """GET requests to a unix socket or to an `http(s)://` address (a path in it is kept as a prefix).

    Each takes `timeout` seconds at most, whatever the server does. They run in threads of their own that nobody waits
    for: the threads of asyncio are joined at the end, and a name server or a trickle of bytes must not delay a stop.
    """

    target: Path | str
    key: str | None = None
    timeout: float = 5.0

    def _connection(self) -> http.client.HTTPConnection:
        if isinstance(self.target, Path):
            return _UnixConnection(self.target, self.timeout)
        parts = urlsplit(self.target)
        host = parts.hostname or "localhost"
        if parts.scheme == "https":
            return http.client.HTTPSConnection(
                host, parts.port, timeout=self.timeout, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(host, parts.port, timeout=self.timeout)

    async def _get(self, path: str, timeout: float | None = None) -> tuple[int, bytes] | None:
        connection = self._connection()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[tuple[int, bytes] | None] = loop.create_future()

        def settle(answer: tuple[int, bytes] | None) -> None:
            if not future.done():
                future.set_result(answer)

        def ask() -> None:
            answer = self._ask(connection, path)
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(settle, answer)

        threading.Thread(target=ask, name="probe", daemon=True).start()
        try:
            return await asyncio.wait_for(future, min(timeout or self.timeout, self.timeout))
        except TimeoutError:
            return None
        finally:
            with contextlib.suppress(OSError, AttributeError):  # it ends the thread, where that still runs
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _ask(self, connection: http.client.HTTPConnection, path: str) -> tuple[int, bytes] | None:
        prefix = "" if isinstance(self.target, Path) else urlsplit(self.target).path.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            connection.request("GET", prefix + path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read(ANSWER_LIMIT)
        except (OSError, ValueError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    async def health(self) -> int | None:
        """The status of `/health`; None when nothing answers within `timeout` seconds."""
        answer = await self._get("/health")
        return answer[0] if answer else None

    async def models(self) -> ServedModels | None:
        """What is served; None unless the server answers with a list of models."""
        answer = await self._get("/v1/models")
        if answer is None or answer[0] != 200:
            return None
        try:
            cards = [card for card in json.loads(answer[1])["data"] if isinstance(card, dict)]
        except (ValueError, KeyError, TypeError):
            return None
        lengths = [card["max_model_len"] for card in cards if isinstance(card.get("max_model_len"), int)]
        return ServedModels(tuple(str(card.get("id")) for card in cards), min(lengths, default=None))

    async def counters(self, timeout: float | None = None) -> Mapping[str, float] | None:
        """The engine's progress counters, summed over its labels; None when it does not answer in time."""
        answer = await self._get("/metrics", timeout)
        if answer is None or answer[0] != 200:
            return None
        sums: dict[str, float] = {}
        for line in answer[1].decode("utf-8", "replace").splitlines():
            name = line.partition("{")[0].partition(" ")[0]
            if name in PROGRESS:
                with contextlib.suppress(ValueError):
                    sums[name] = sums.get(name, 0.0) + float(line.rpartition(" ")[2])
        return sums
