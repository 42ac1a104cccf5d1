"""Asks an engine, or an upstream server, whether it answers and what it serves."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import ssl
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
    """GET requests to a unix socket or to an `http(s)://` address (a path in it is kept as a prefix)."""

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

    def _get(self, path: str) -> tuple[int, bytes] | None:
        connection = self._connection()
        prefix = "" if isinstance(self.target, Path) else urlsplit(self.target).path.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            connection.request("GET", prefix + path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read(ANSWER_LIMIT)
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    async def health(self) -> int | None:
        """The status of `/health`; None when nothing answers within `timeout` seconds."""
        answer = await asyncio.to_thread(self._get, "/health")
        return answer[0] if answer else None

    async def models(self) -> ServedModels | None:
        """What is served; None unless the server answers with a list of models."""
        answer = await asyncio.to_thread(self._get, "/v1/models")
        if answer is None or answer[0] != 200:
            return None
        try:
            cards = [card for card in json.loads(answer[1])["data"] if isinstance(card, dict)]
        except (ValueError, KeyError, TypeError):
            return None
        lengths = [card["max_model_len"] for card in cards if isinstance(card.get("max_model_len"), int)]
        return ServedModels(tuple(str(card.get("id")) for card in cards), min(lengths, default=None))

    async def counters(self) -> Mapping[str, float] | None:
        """The engine's progress counters, summed over its labels; None when it does not answer."""
        answer = await asyncio.to_thread(self._get, "/metrics")
        if answer is None or answer[0] != 200:
            return None
        sums: dict[str, float] = {}
        for line in answer[1].decode("utf-8", "replace").splitlines():
            name = line.partition("{")[0].partition(" ")[0]
            if name in PROGRESS:
                sums[name] = sums.get(name, 0.0) + float(line.rpartition(" ")[2])
        return sums
