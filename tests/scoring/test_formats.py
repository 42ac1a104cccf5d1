from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dropin.scoring.formats import Spool, deployment, predictions
from vllm_dropin.scoring.results import Fault, RowResult

AWKWARD = 'a "quoted"\ttab\nline\u2028end\x00 ä \U0001f600 \ud83d'


def good(*texts: str) -> RowResult:
    return RowResult(0, 0, completions=texts)


def bad(error: str) -> RowResult:
    return RowResult(0, 0, error=error, fault=Fault.INPUT)


def both(results: list[RowResult], n: int = 1) -> tuple[Any, Any]:
    with closing(Spool(n, memory=64)) as spool:
        for result in results:
            spool.add(result)
        return json.loads(b"".join(predictions(spool))), json.loads(b"".join(deployment(spool, "target")))


def test_answers_alone_have_no_extra_columns() -> None:
    plain, deployed = both([good("a"), good("b")])
    assert plain == {"predictions": ["a", "b"]}
    assert deployed == {
        "data": [
            {"prediction": "a", "predictionValues": [{"label": "target", "value": "a"}], "rowId": 0},
            {"prediction": "b", "predictionValues": [{"label": "target", "value": "b"}], "rowId": 1},
        ]
    }


def test_no_rows() -> None:
    assert both([]) == ({"predictions": []}, {"data": []})


def test_an_error_brings_its_column_for_every_row() -> None:
    plain, deployed = both([good("a"), bad("why"), good("c")])
    assert plain == {
        "predictions": ["a", "", "c"],
        "extraModelOutput": {"columns": ["error"], "index": [0, 1, 2], "data": [[None], ["why"], [None]]},
    }
    assert [record["extraModelOutput"] for record in deployed["data"]] == [
        {"error": None},
        {"error": "why"},
        {"error": None},
    ]


def test_further_completions_are_columns_and_never_rows() -> None:
    plain, deployed = both([good("a", "b", "c"), good("d")], n=3)
    assert plain == {
        "predictions": ["a", "d"],
        "extraModelOutput": {
            "columns": ["completion_2", "completion_3"],
            "index": [0, 1],
            "data": [["b", "c"], [None, None]],
        },
    }
    assert deployed["data"][0]["extraModelOutput"] == {"completion_2": "b", "completion_3": "c"}


def test_errors_and_completions_together() -> None:
    plain, deployed = both([bad("why"), good("a", "b")], n=2)
    assert plain["extraModelOutput"]["columns"] == ["error", "completion_2"]
    assert plain["extraModelOutput"]["data"] == [["why", None], [None, "b"]]
    assert deployed["data"][0]["extraModelOutput"] == {"error": "why", "completion_2": None}


def test_a_completion_too_many_is_left_out() -> None:
    assert both([good("a", "b")])[0] == {"predictions": ["a"]}


@pytest.mark.parametrize("text", [AWKWARD, "\r\n", "\x85", ""])
def test_awkward_text_comes_back(text: str) -> None:
    plain, deployed = both([good(text), bad(text or "e")])
    assert plain["predictions"][0] == deployed["data"][0]["prediction"] == text


@given(st.lists(st.tuples(st.text(), st.none() | st.text(min_size=1))))
def test_any_answer_is_whole_json(answers: list[tuple[str, str | None]]) -> None:
    plain, _ = both([good(text) if error is None else bad(error) for text, error in answers])
    assert plain["predictions"] == [text if error is None else "" for text, error in answers]


def test_one_long_answer_among_many_rows_costs_its_own_length() -> None:
    def pieces() -> Iterator[int]:
        with closing(Spool()) as spool:
            for place in range(5001):
                spool.add(good("x" * 60_000 if place == 17 else "short"))
            for piece in predictions(spool):
                yield len(piece)

    tracemalloc.start()
    try:
        sizes = list(pieces())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(sizes) == len(b'{"predictions":[]}') + 5001 * len(b'"short",') - 1 + 60_000 - len(b"short")
    assert peak < 4 << 20
