from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest

from vllm_dropin.batch.order import arrange, common


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


@pytest.mark.parametrize(("order", "expected"), [("input", 14), ("prefix", 5), ("auto", 5)])
def test_rows_that_share_a_beginning_are_put_together(order, expected):
    sent = arrange(MIXED, order, last=False)
    assert switches(sent) == expected
    assert sorted(row.prompt for row in sent) == sorted(row.prompt for row in MIXED)


def test_the_first_rows_of_a_few_groups_go_ahead():
    """What they begin with is then in the engine's cache when the others come."""
    documents = ["".join(f"{name}{place} " for place in range(200)) for name in range(40)]
    header = "One header above all of them. " * 20
    window = rows(*(f"{header}{document} question {number}" for number in range(3) for document in documents))
    sent = [(row.prompt[len(header) :].split()[0], row.prompt[-1]) for row in arrange(window, "auto", last=False)]
    names = sorted({name for name, _ in sent})
    assert [name for name, _ in sent[:16]] == names[:16]
    assert [name for name, _ in sent[16:20]] == [names[0], names[0], names[1], names[1]]
    assert [name for name, _ in sent[48:64]] == names[16:32]
    assert len(set(sent)) == len(sent) == len(window)


def test_what_two_texts_begin_with():
    assert common("abcd", "abzz") == 2
    assert common("same", "same") == 4
    assert common(b"", b"bytes") == 0


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
