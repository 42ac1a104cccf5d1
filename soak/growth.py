"""Growth of a process: the median of its last samples over the median of the first ones after its warm-up."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from soak.sampler import MEMORY_EVERY, Process

WARM_UP = 120.0
"""Seconds of a process' life that don't count: imports, first connections, caches."""
FEWEST = 20
"""Samples after the warm-up without which a life is too short to be judged."""
JUDGED_AFTER = WARM_UP + (FEWEST + 2) * MEMORY_EVERY
"""Seconds of load after which a process that lived all the time can be judged."""


@dataclass(frozen=True)
class Life:
    """One process from its first sample to its last. Memory in bytes; `grown` values None: too short to tell."""

    role: str
    pid: int
    seconds: float
    memory_first: int
    memory_last: int
    memory_peak: int
    memory: int | None
    descriptors: int | None
    threads: int | None


def lives(samples: Sequence[Process]) -> list[Life]:
    """Every process that was seen, by role and then in the order of their births."""
    by_process: dict[tuple[str, int], list[Process]] = {}
    for sample in samples:
        by_process.setdefault((sample.role, sample.pid), []).append(sample)
    return sorted(
        (_life(role, pid, found) for (role, pid), found in by_process.items()),
        key=lambda life: life.role,
    )


def _life(role: str, pid: int, samples: Sequence[Process]) -> Life:
    born = samples[0].at
    warm = [sample for sample in samples if sample.at - born >= WARM_UP]
    first, last = _ends([sample.memory for sample in warm or samples])
    judged = len(warm) >= FEWEST
    return Life(
        role,
        pid,
        samples[-1].at - born,
        round(first),
        round(last),
        max(sample.memory for sample in samples),
        round(last - first) if judged else None,
        _grown([sample.descriptors for sample in warm]) if judged else None,
        _grown([sample.threads for sample in warm]) if judged else None,
    )


def _grown(values: Sequence[int]) -> int:
    first, last = _ends(values)
    return round(last - first)


def _ends(values: Sequence[int]) -> tuple[float, float]:
    """Medians of the first and of the last tenth."""
    tenth = max(1, len(values) // 10)
    return statistics.median(values[:tenth]), statistics.median(values[-tenth:])
