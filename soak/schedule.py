"""Which faults, and when: drawn from a seed, so that a run can be had again."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator
from dataclasses import dataclass

GAP = (30.0, 60.0)
"""Seconds from one fault to the next."""
SETTLE = 15.0
"""Seconds of work between a recovery and the next fault, where the recovery has taken most of the gap."""


class Kind(enum.StrEnum):
    """What is done to the service."""

    KILL_FRONT_END = "SIGKILL of the engine's front end"
    KILL_CORE = "SIGKILL of the engine core"
    KILL_GUARDIAN = "SIGKILL of the engine's guardian"
    STOP_CORE = "SIGSTOP of the engine core"
    PLATFORM_AWAY = "SIGKILL of the engine core, the platform away"
    KILL_WORKER = "SIGKILL of a gateway worker"
    PAUSE_WORKER = "SIGSTOP of a gateway worker for 2 s"
    RENEW_KEYS = "two SIGHUPs: new keys"
    BURST = "a burst beyond capacity"
    HALF_REQUESTS = "a flood of half requests"

    @property
    def restarts(self) -> bool:
        """Whether it asks for a new engine."""
        return self in RESTARTING


RESTARTING = frozenset({Kind.KILL_FRONT_END, Kind.KILL_CORE, Kind.KILL_GUARDIAN, Kind.STOP_CORE, Kind.PLATFORM_AWAY})


@dataclass(frozen=True)
class Planned:
    """One fault. `gap`: seconds since the fault before, or since the load began."""

    kind: Kind
    gap: float


def plan(seed: int) -> Iterator[Planned]:
    """Faults without end, the same ones for the same seed. Each kind comes once before any comes again."""
    chance = random.Random(f"faults {seed}")
    kinds = list(Kind)
    while True:
        chance.shuffle(kinds)
        for kind in kinds:
            yield Planned(kind, chance.uniform(*GAP))
