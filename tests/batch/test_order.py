from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest

from vllm_dropin.batch.order import arrange


@dataclass(frozen=True)
class Row:
    prompt: str


def rows(*prompts: str) -> list[Row]:
    return [Row(prompt) for prompt in prompts]


DOCUMENTS = ["".join(f"{name}{place} " for place in range(200)) for name in "abc"]
MIXED = rows(*(f"{document} question {number}" for number in range(5) for document in DOCUMENTS))


def switches(sent: list[Row]) -> int:
    """How often the document changes from one row to the next."""
    return sum(first.prompt[0] != second.prompt[0] for first, second in pairwise(sent))


@pytest.mark.parametrize(("order", "expected"), [("input", 14), ("prefix", 2), ("auto", 2)])
def test_rows_that_share_a_beginning_are_put_together(order, expected):
    sent = arrange(MIXED, order, last=False)
    assert switches(sent) == expected
    assert sorted(row.prompt for row in sent) == sorted(row.prompt for row in MIXED)


def test_auto_leaves_rows_alone_that_share_nothing():
    window = rows("zebra", "apple", "mango" * 50, "pear")
    assert arrange(window, "auto", last=False) == window


def test_auto_leaves_rows_alone_that_all_share_the_same():
    window = rows(*(f"{DOCUMENTS[0]} {number}" for number in (3, 1, 2)))
    assert arrange(window, "auto", last=False) == window


def test_the_last_window_is_sent_longest_first():
    window = rows("a", "ccc", "bb")
    assert arrange(window, "auto", last=True) == rows("ccc", "bb", "a")
    assert arrange(window, "input", last=True) == window


@pytest.mark.parametrize("order", ["input", "prefix", "auto"])
def test_small_windows(order):
    assert arrange([], order, last=True) == []
    assert arrange(rows("only"), order, last=True) == rows("only")
