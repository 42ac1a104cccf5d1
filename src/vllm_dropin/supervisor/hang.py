"""Notices an engine that is alive, says that it is healthy, and does nothing (decision 8)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from vllm_dropin.gateway.state import SharedState

Counters = Mapping[str, float]

LONG = 2.0
"""Seconds that somebody must have waited for the engine for the time to count. vLLM's front end answers by itself what
needs no engine, errors and tokens of a text among them, and sooner: a flood of that is no hang."""


class HangWatch:
    """Suspects an engine only while somebody waits for it, and only when none of its own counters moves.

    `/health` stays 200 when a worker is stopped, and a busy engine may answer a probe late, so neither counts. Nor do
    bytes: the front end goes on to send errors and metrics. The engine's counters move with each of its steps, those of
    a long prefill included; `counters` asks for them. Where it has none (`--disable-log-stats`) or does not answer
    (None), the pieces of completions count instead.

    Time in which nobody waits neither counts nor forgives: clients that give up and come back, as those of a platform
    with a deadline of a minute do, leave moments in which a hanging engine looks idle.
    """

    def __init__(self, timeout: float, state: SharedState, counters: Callable[[], Awaitable[Counters | None]]) -> None:
        self._timeout = timeout
        self._state = state
        self._ask = counters
        self._long = min(LONG, timeout / 4)
        self._counters: Counters = {}
        self._chunks = -1
        self._stalled = 0.0
        self._looked: float | None = None
        self._asked = float("-inf")

    async def hangs(self, now: float) -> bool:
        """Whether somebody has waited for `timeout` seconds, and nothing moved. Call it about once a second.

        `now` is monotonic, in seconds.
        """
        passed, self._looked = now - (now if self._looked is None else self._looked), now
        since = self._state.oldest_wait
        if since is None or now - since < self._long:
            return False
        self._stalled += min(passed, now - since)
        if now - self._asked < self._timeout / 4:
            return False
        self._asked = now
        if await self._moves():
            self._stalled = 0.0
        return self._stalled >= self._timeout

    async def _moves(self) -> bool:
        """Whether there was progress since the last time."""
        counters = await self._ask()
        chunks, before = self._state.total("chunks"), self._chunks
        self._chunks = chunks
        if not counters:
            return chunks != before
        moved, self._counters = counters != self._counters, counters
        return moved
