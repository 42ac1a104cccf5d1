"""What was tried, counted, and how often: `make test` tries a few inputs, `make fuzz` as many as it is told.

FUZZ_EXAMPLES: how many examples each test tries (unset: its own small number, the same ones each time).
FUZZ_SECONDS: how long the fuzzer that follows coverage runs (unset: one second).
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES") or 0)
SECONDS = int(os.environ.get("FUZZ_SECONDS") or 1)

COUNTS: defaultdict[str, Counter[str]] = defaultdict(Counter)
"""By subject: how often each outcome was seen."""


def tries(few: int, times: float = 1) -> settings:
    """Settings of one property: `few` examples, the same ones each time; in `make fuzz` `times` FUZZ_EXAMPLES, by seed.

    No example is kept for the next run: what was found becomes a test of its own.
    """
    return settings(
        max_examples=int(EXAMPLES * times) or few,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def count(subject: str, outcome: object) -> None:
    """One example of `subject` ended so."""
    COUNTS[subject][str(outcome)] += 1


def lines() -> list[str]:
    """The counts as a table, a subject a line."""
    if not COUNTS:
        return []
    width = max(len(subject) for subject in COUNTS)
    table = [f"{'subject':{width}}  examples  outcomes"]
    for subject, outcomes in COUNTS.items():
        told = ", ".join(f"{outcome}: {number}" for outcome, number in sorted(outcomes.items()))
        table.append(f"{subject:{width}}  {outcomes.total():8}  {told}")
    return table
