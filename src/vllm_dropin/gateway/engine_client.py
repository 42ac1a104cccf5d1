"""The only way to the engine: its unix socket or address, through a pool that is renewed with each engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_dropin.gateway.config import GatewayConfig
from vllm_dropin.gateway.errors import EngineUnavailable
from vllm_dropin.gateway.limits import Body
from vllm_dropin.gateway.state import Phase, SharedState, Slot

if TYPE_CHECKING:
    from vllm_dropin.gateway.transport import Pool, Response

__all__ = ["EngineAnswer", "EngineClient", "EngineUnavailable"]

READY_POLL = 0.05
# vLLM's front end answers 500 with this text while its core is dead and before it exits itself.
_DEAD_CORE = b"EngineCore encountered an issue"


@dataclass(frozen=True)
class EngineAnswer:
    """One whole answer of the engine."""

    status: int
    body: bytes


class EngineClient:
    """Asks the engine, with its `key` where it has one. Use inside a running event loop; `close` at the end."""

    def __init__(self, config: GatewayConfig, state: SharedState, slot: Slot) -> None:
        self._config = config
        self._state = state
        self._slot = slot
        self._base = (config.engine_url or "http://engine").rstrip("/")
        self.key = config.engine_key
        self._pool: Pool | None = None

    @property
    def generation(self) -> int:
        """How many engines have been started so far."""
        return self._state.generation

    async def close(self) -> None:
        """Close the connections, once their requests have ended."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.retire()

    @asynccontextmanager
    async def request(
        self,
        method: str,
        path: str,
        *,
        query: bytes = b"",
        headers: Iterable[tuple[str, str]] = (),
        body: bytes | Body | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[Response]:
        """Send one request and give its response when the headers have come.

        Leaving the block before the body is read to its end closes the connection, which makes the engine abort.
        `timeout` in seconds bounds the wait for the headers only (TimeoutError). Raises EngineUnavailable.
        """
        url = self._base + path + ("?" + query.decode("latin-1") if query else "")
        sent = {"Accept-Encoding": "identity", **dict(headers)}
        if isinstance(body, Body):
            sent["Content-Length"] = str(body.size)
        if self.key is not None:
            sent["Authorization"] = f"Bearer {self.key}"
        pool, response = await self._send(method, url, sent, body, timeout or self._config.limits.request_timeout)
        try:
            yield response
        finally:
            response.close()
            await pool.leave()

    async def _send(
        self, method: str, url: str, headers: dict[str, str], body: bytes | Body | None, timeout: float
    ) -> tuple[Pool, Response]:
        """Once more on a fresh connection, when a pooled one turns out to have been closed."""
        from vllm_dropin.gateway.transport import StaleConnection

        for last in (False, True):
            pool = await self._current()
            pool.enter()
            try:
                return pool, await pool.send(method, url, headers, body, timeout)
            except StaleConnection as error:
                await pool.leave()
                if last or pool.generation != self._state.generation:
                    raise EngineUnavailable("the connection to the engine broke off") from error
                self._slot.add("engine_retries")
                if self._pool is pool:
                    await self.close()
            except EngineUnavailable as error:
                await pool.leave()
                # A stale connection came first: the engine may have died of what it had read from it.
                error.sent = error.sent or last
                raise
            except BaseException:
                # A cancellation or the deadline: aiohttp has closed the connection already.
                await pool.leave()
                raise
        raise AssertionError("the second attempt returns or raises")

    async def _current(self) -> Pool:
        """The pool of the engine that runs now: a connection to an earlier one is dead."""
        from vllm_dropin.gateway.transport import Pool

        generation = self._state.generation
        if self._pool is not None and self._pool.generation != generation:
            await self.close()
        if self._pool is None:
            self._pool = Pool(self._config.engine_uds, generation, self._slot)
        return self._pool

    async def chat(self, body: bytes) -> EngineAnswer:
        """Ask for one chat completion and read the whole answer.

        Raises EngineUnavailable when the engine is not there, or died before the answer was complete.
        """
        headers = [("Content-Type", "application/json")]
        try:
            async with (
                asyncio.timeout(self._config.limits.request_timeout),
                self.request("POST", "/v1/chat/completions", headers=headers, body=body) as response,
            ):
                answer = EngineAnswer(response.status, await response.read())
        except TimeoutError as error:
            raise EngineUnavailable("the engine did not answer within the request deadline") from error
        if answer.status >= 500 and _DEAD_CORE in answer.body:
            raise EngineUnavailable("the engine's core died")
        return answer

    async def wait_ready(self, deadline: float) -> bool:
        """Wait until the engine can be asked. False: it never will be again, or `deadline` (monotonic) has passed."""
        while True:
            phase = self._state.phase
            if phase is Phase.READY:
                return True
            if phase.final or time.monotonic() >= deadline:
                return False
            await asyncio.sleep(READY_POLL)
