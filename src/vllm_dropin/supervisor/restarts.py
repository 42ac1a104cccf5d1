"""How often, and how soon, a crashed engine is started again."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

STABLE_AFTER = 300.0
"""Seconds of readiness after which the backoff begins anew."""


@dataclass
class RestartBudget:
    """At most `limit` restarts in any `window` seconds, each later than the one before.

    The incumbent counts restarts over the life of its process and then stays up without an engine; a service that
    crashes once a week must not die of it after ten weeks. `limit` and `max_backoff` (seconds) are the contract's
    `max_watchdog_restarts` and `max_watchdog_backoff_sec`.
    """

    limit: int = 10
    max_backoff: float = 300.0
    window: float = 3600.0
    _times: deque[float] = field(default_factory=deque)
    _streak: int = 0

    @property
    def used(self) -> int:
        """Restarts that count at present."""
        return len(self._times)

    def next_delay(self, now: float, ready_for: float) -> float | None:
        """Seconds to wait before the restart that a crash at `now` asks for; None when the budget is spent.

        `ready_for` is how long, in seconds, the crashed engine had been ready (0: never). The delays are 0.5, 1, 2, 4 …
        up to `max_backoff`, each up to a tenth longer so that replicas that crashed together do not load together.
        """
        while self._times and now - self._times[0] > self.window:
            self._times.popleft()
        if ready_for >= STABLE_AFTER:
            self._streak = 0
        if len(self._times) >= self.limit:
            return None
        self._times.append(now)
        delay = min(0.5 * 2.0**self._streak, self.max_backoff)
        self._streak += 1
        return delay * random.uniform(1.0, 1.1)  # noqa: S311 (spreads load, guards nothing)
