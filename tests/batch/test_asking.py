"""The parts of an asking that a whole run of the command (test_run.py) does not show one by one."""

from __future__ import annotations

import json

from tests.batch.conftest import Scoring


def lengths_asked(quick: Scoring, *words: str) -> list[int]:
    """The max_tokens of each request of one run, in order of arrival."""
    before = len(chats(quick))
    quick.run("rows.csv", "-o", "out.csv", "--params", "max_tokens=7", *words)
    return [json.loads(body)["max_tokens"] for body in chats(quick)[before:]]


def chats(quick: Scoring) -> list[str]:
    return [str(request["body"]) for request in quick.engine.requests() if request["path"].endswith("/completions")]


def test_a_long_beginning_that_all_rows_share_is_computed_ahead(quick: Scoring) -> None:
    quick.write_csv("rows.csv", ["the same instruction " * 60 + str(place) for place in range(8)])
    assert lengths_asked(quick) == [1, *[7] * 8]


def test_a_short_one_is_not(quick: Scoring) -> None:
    quick.write_csv("rows.csv", [f"the same instruction {place}" for place in range(8)])
    assert lengths_asked(quick) == [7] * 8


def test_a_system_prompt_is_such_a_beginning(quick: Scoring) -> None:
    quick.write_csv("rows.csv", [f"row {place}" for place in range(8)])
    assert lengths_asked(quick, "--param", "system_prompt=" + "be kind " * 200) == [1, *[7] * 8]


def test_one_row_needs_no_help(quick: Scoring) -> None:
    quick.write_csv("rows.csv", ["long " * 400])
    assert lengths_asked(quick) == [7]
