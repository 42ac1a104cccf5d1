"""Notices an engine that is alive, says that it is healthy, and does nothing (decision 8)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from vllm_dropin.gateway.state import SharedState

Counters = Mapping[str, float]


class HangWatch:
    """Suspects an engine only while requests wait to read from it, and only when nothing at all moves.

    `/health` stays 200 when a worker is stopped, and a busy engine may answer a probe late, so neither counts. Progress
    is any byte read from the engine, or a change of its own counters: a long prefill sends no byte but moves them.
    `counters` asks the engine for them; None when it does not answer, which is no progress either.
    """

    def __init__(self, timeout: float, state: SharedState, counters: Callable[[], Awaitable[Counters | None]]) -> None:
        self._timeout = timeout
        self._state = state
        self._ask = counters
        self._chunks = -1
        self._counters: Counters | None = None
        self._moved: float | None = None
        self._asked = 0.0

    async def hangs(self, now: float) -> bool:
        """Whether nothing has moved for `timeout` seconds. Call it about once a second; `now` is monotonic."""
        chunks = self._state.total("chunks")
        if self._state.total("waiting") == 0 or chunks != self._chunks or self._moved is None:
            self._chunks, self._moved, self._asked = chunks, now, now
            return False
        if now - self._asked < self._timeout / 4:
            return False
        self._asked = now
        counters = await self._ask()
        if counters is not None and counters != self._counters:
            self._counters, self._moved = counters, now
            return False
        return now - self._moved >= self._timeout
