"""In which order rows are sent: within a window, so that memory stays flat and any order can be undone."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

Order = Literal["input", "prefix", "auto"]

WINDOW_ROWS = 8192
WINDOW_BYTES = 64 << 20
"""What one window holds at most: enough rows to find those that share a beginning."""
_WORTH_SHARING = 128
"""Characters that a row must share on average, more than in input order, for grouping to pay: two blocks of vLLM's
prefix cache (16 tokens each) and a margin."""
_SAMPLE = 1024  # rows of a window that are compared
_COMPARED = 4096  # characters of each


class Prompted(Protocol):
    """A row whose prompt is known."""

    @property
    def prompt(self) -> str: ...


P = TypeVar("P", bound=Prompted)


def arrange(window: Sequence[P], order: Order, *, last: bool) -> list[P]:
    """The rows of a window in the order in which they are sent.

    `prefix` puts rows with the same beginning next to each other: the engine then computes that beginning once, while
    mixed ones push each other out of its cache. `auto` does so where it saves something. The `last` window is otherwise
    sent longest first, so that no long row is left to run alone at the end.
    """
    rows = list(window)
    if order == "input":
        return rows
    if order == "prefix" or _sharing_gain(rows) >= _WORTH_SHARING:
        return sorted(rows, key=lambda row: row.prompt)
    if last:
        return sorted(rows, key=lambda row: len(row.prompt), reverse=True)
    return rows


def _sharing_gain(rows: Sequence[Prompted]) -> float:
    """How many characters more a row shares with the one before it when sorted, on average over a sample."""
    step = max(1, len(rows) // _SAMPLE)
    texts = [row.prompt[:_COMPARED] for row in rows[::step]]
    if len(texts) < 2:
        return 0.0
    return _shared(sorted(texts)) - _shared(texts)


def _shared(texts: Sequence[str]) -> float:
    pairs = itertools.pairwise(texts)
    return sum(len(os.path.commonprefix(pair)) for pair in pairs) / (len(texts) - 1)  # noqa: RUF071 (no paths)
