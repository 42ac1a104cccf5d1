"""What a client of the soak takes for whole, for an explicit failure, and for wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from soak.requests import Chat, Row, Table
from soak.verdicts import Outcome, Reply, judge, judge_file

CHAT = Chat(123456, tokens=2)
STREAM = Chat(123456, tokens=2, stream=True)
TABLE = Table(
    1,
    (
        Row(111111, ("111111", "Say the number 111111.")),
        Row(222222, ("222222",), broken=True),
        Row(333333, ("333333", "Say the number 333333.")),
        Row(444444, ("444444", "Say the number 444444.")),
    ),
)
TEXTS = ["It is 111111.", "", "It is 333333.", "It is 444444."]
ERRORS = [None, "a cell is missing", None, None]


def frame(payload: dict[str, Any] | str) -> str:
    return f"data: {payload if isinstance(payload, str) else json.dumps(payload)}\n\n"


def chunk(text: str = "", **fields: Any) -> str:
    choices = [{"delta": {"content": text}}] if text else []
    return frame({"datarobot_association_id": STREAM.association_id, "choices": choices, **fields})


USAGE = chunk(usage={"completion_tokens": 2})
ERROR = frame({"error": {"message": "the connection to the engine broke off", "code": 503}})
DONE = frame("[DONE]")


def stream(*frames: str, error: str = "") -> Outcome:
    return judge(STREAM, Reply(200, "".join(frames).encode(), error=error)).outcome


def rows(texts: list[str], errors: list[str | None], header: str = "1") -> tuple[Outcome, str]:
    index = [*range(len(texts))]
    extra = {"columns": ["error"], "index": index, "data": [[error] for error in errors]}
    body = json.dumps({"predictions": texts, "extraModelOutput": extra}).encode()
    verdict = judge(TABLE, Reply(200, body, {"X-Row-Errors": header}))
    return verdict.outcome, verdict.problem


@pytest.mark.parametrize(
    ("frames", "outcome"),
    [
        ((chunk("123"), chunk("456"), USAGE, DONE), Outcome.ANSWERED),
        ((chunk("123"), ERROR), Outcome.FAILED),
        ((chunk("123"), ERROR, DONE), Outcome.WRONG),
        ((chunk("123"), DONE, ERROR), Outcome.WRONG),
        ((chunk("123"), ERROR, chunk("456")), Outcome.WRONG),
        ((chunk("123"), ERROR, ERROR), Outcome.WRONG),
        ((chunk("123"), chunk("456"), USAGE), Outcome.CUT),
        ((chunk("123"), USAGE, DONE, DONE), Outcome.WRONG),
        ((chunk("123"), DONE, USAGE), Outcome.WRONG),
        ((chunk("123"), chunk(usage={"completion_tokens": 1}), DONE), Outcome.WRONG),
        ((chunk("123"), DONE), Outcome.WRONG),
        ((chunk("123"), chunk("456", datarobot_association_id="another"), USAGE, DONE), Outcome.WRONG),
    ],
)
def test_a_stream_ends_with_done_or_with_an_error(frames: tuple[str, ...], outcome: Outcome) -> None:
    assert stream(*frames) is outcome


def test_a_stream_whose_connection_broke_after_done_is_whole() -> None:
    assert stream(chunk("123456"), USAGE, DONE, error="ClientPayloadError") is Outcome.ANSWERED


def test_a_chat_is_its_own_answer() -> None:
    def answer(**fields: Any) -> Outcome:
        payload = {
            "datarobot_association_id": CHAT.association_id,
            "choices": [{"message": {"content": "123456"}}],
            "usage": {"completion_tokens": 2},
            **fields,
        }
        return judge(CHAT, Reply(200, json.dumps(payload).encode())).outcome

    assert answer() is Outcome.ANSWERED
    assert answer(datarobot_association_id="soak-654321") is Outcome.WRONG
    assert answer(usage={"completion_tokens": 1}) is Outcome.WRONG
    assert answer(choices=[]) is Outcome.WRONG


def test_rows_in_their_places() -> None:
    assert rows(TEXTS, ERRORS) == (Outcome.ANSWERED, "")
    verdict = judge(TABLE, Reply(200, json.dumps({"predictions": TEXTS}).encode()))
    assert verdict.outcome is Outcome.WRONG, "row 1 has neither a completion nor an error"


@pytest.mark.parametrize(
    ("texts", "errors", "problem"),
    [
        (TEXTS[:3], ERRORS[:3], "4 rows asked, 3 rows answered"),
        ([*TEXTS, TEXTS[3]], [*ERRORS, None], "4 rows asked, 5 rows answered"),
        ([TEXTS[0], "", TEXTS[3], TEXTS[2]], ERRORS, "row 2 has the answer of row 3"),
        ([TEXTS[0], "", TEXTS[2], TEXTS[2]], ERRORS, "row 3 has the answer of row 2"),
        ([TEXTS[0], TEXTS[2], "", TEXTS[3]], [None, None, "a cell is missing", None], "row 1 is broken and has"),
        ([TEXTS[0], "", "", TEXTS[3]], ERRORS, "row 2 has neither"),
        ([TEXTS[0], "", TEXTS[2], TEXTS[3]], [None, "missing", "busy", None], "row 2 has both"),
    ],
)
def test_a_row_that_is_lost_doubled_or_out_of_order(texts: list[str], errors: list[str | None], problem: str) -> None:
    outcome, found = rows(texts, errors)
    assert outcome is Outcome.WRONG
    assert problem in found


def test_the_header_counts_the_failed_rows() -> None:
    assert rows(TEXTS, ERRORS, header="2")[0] is Outcome.WRONG


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (429, '{"error": {"message": "too many"}}', Outcome.REFUSED),
        (503, '{"error": {"message": "the engine is not ready"}}', Outcome.FAILED),
        (503, '{"message": "the engine is not ready"}', Outcome.WRONG),
        (503, "", Outcome.WRONG),
        (401, '{"error": {"message": "a key is needed"}}', Outcome.WRONG),
    ],
)
def test_a_refusal_has_a_body_of_ours(status: int, body: str, outcome: Outcome) -> None:
    assert judge(CHAT, Reply(status, body.encode())).outcome is outcome


def test_a_connection_that_ends_without_a_word() -> None:
    assert judge(CHAT, Reply(None, error="ServerDisconnectedError")).outcome is Outcome.CUT
    assert judge(TABLE, Reply(200, b'{"predictions": [', error="ClientPayloadError")).outcome is Outcome.CUT


def scored(rows: list[tuple[int, str, str]]) -> Outcome:
    """What a file with these (id, completion, error) is worth, where SCORED was asked."""
    lines = [f"{name},Say the number {name}.,{completion},{error}" for name, completion, error in rows]
    text = "\n".join(["id,promptText,completion,error", *lines, ""])
    return judge_file(SCORED, text).outcome


SCORED = Table(1, tuple(row for row in TABLE.rows if not row.broken))
LINES = [(row.number, f"It is {row.number}.", "") for row in SCORED.rows]


def test_a_scored_file() -> None:
    assert scored(LINES) is Outcome.ANSWERED
    assert scored([LINES[0], (LINES[1][0], "", "the engine crashed on this row"), LINES[2]]) is Outcome.ANSWERED
    assert scored(LINES[:2]) is Outcome.WRONG
    assert scored([*LINES, LINES[2]]) is Outcome.WRONG
    assert scored([LINES[1], LINES[0], LINES[2]]) is Outcome.WRONG
    assert scored([LINES[0], (LINES[1][0], LINES[2][1], ""), LINES[2]]) is Outcome.WRONG
    assert scored([LINES[0], (LINES[1][0], "", ""), LINES[2]]) is Outcome.WRONG
