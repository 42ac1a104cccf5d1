"""A value, where it came from, and what it won against."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One resolved value. `source` and each of `overrode` are words for people; a secret value prints as `***`."""

    name: str
    value: Any
    source: str
    overrode: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A value that one source proposes for a setting."""

    value: Any
    source: str

    def __str__(self) -> str:
        return f"{self.value} ({self.source})"


def settle(name: str, candidates: Iterable[Candidate | None]) -> Setting:
    """Take the first candidate; the others lost to it. The strongest source comes first (decision 9).

    The last candidate is the default: it is never None, and never listed among the losers.
    """
    winner, *losers = [candidate for candidate in candidates if candidate is not None]
    return Setting(name, winner.value, winner.source, tuple(str(loser) for loser in losers[:-1]))
