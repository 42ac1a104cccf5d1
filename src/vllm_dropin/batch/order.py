"""In which order rows are sent: within a window, so that memory stays flat and any order can be undone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import AnyStr, Literal, Protocol, TypeVar

Order = Literal["input", "prefix", "auto"]

WINDOW_ROWS = 8192
WINDOW_BYTES = 64 << 20
"""What one window holds at most: enough rows to find those that share a beginning."""
_WORTH_SHARING = 128
"""Characters that a row must share on average, more than in input order, for grouping to pay: two blocks of vLLM's
prefix cache (16 tokens each) and a margin."""
_ABREAST = 16
"""Groups whose first rows go ahead together. Rows of one step of the engine do not find each other's beginning in its
cache, so the others of a group have to come a little later; and not much, for the cache must hold all of these."""
_SAMPLE = 1024  # rows of a window that are compared
_COMPARED = 1 << 16  # characters of each


class Prompted(Protocol):
    """A row whose prompt is known."""

    @property
    def prompt(self) -> str: ...


P = TypeVar("P", bound=Prompted)


def arrange(window: Sequence[P], order: Order, *, last: bool) -> list[P]:
    """The rows of a window in the order in which they are sent.

    `prefix` brings rows with the same beginning together: the engine then computes that beginning once, while mixed
    ones push each other out of its cache. `auto` does so where it saves something. The `last` window is otherwise sent
    longest first, so that no long row is left to run alone at the end.
    """
    rows = list(window)
    if order == "input" or not rows:
        return rows
    if order == "prefix" or _sharing_gain(rows) >= _WORTH_SHARING:
        return _grouped(rows)
    if last:
        return sorted(rows, key=lambda row: len(row.prompt), reverse=True)
    return rows


def common(first: AnyStr, second: AnyStr) -> int:
    """How many characters two texts begin with, found by halving: prompts may be long."""
    low, high = 0, min(len(first), len(second), _COMPARED)
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _grouped(rows: Sequence[P]) -> list[P]:
    """Group after group, by their beginning; of a few groups at a time the first row of each, then the others."""
    ordered = sorted(rows, key=lambda row: row.prompt)
    apart = common(ordered[0].prompt, ordered[-1].prompt) + _WORTH_SHARING
    groups: list[list[P]] = []
    for row in ordered:
        if groups and common(groups[-1][-1].prompt, row.prompt) >= apart:
            groups[-1].append(row)
        else:
            groups.append([row])
    sent: list[P] = []
    for first in range(0, len(groups), _ABREAST):
        abreast = groups[first : first + _ABREAST]
        sent += [group[0] for group in abreast]
        sent += [row for group in abreast for row in group[1:]]
    return sent


def _sharing_gain(rows: Sequence[Prompted]) -> float:
    """How many characters more a row shares with the one before it when sorted, on average over a sample."""
    step = max(1, len(rows) // _SAMPLE)
    texts = [row.prompt for row in rows[::step]]
    if len(texts) < 2:
        return 0.0
    return _shared(sorted(texts)) - _shared(texts)


def _shared(texts: Sequence[str]) -> float:
    return sum(common(first, second) for first, second in itertools.pairwise(texts)) / (len(texts) - 1)
