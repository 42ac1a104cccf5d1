from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_dropin.scoring.results import Fault, RowResult, failure, from_answer
from vllm_dropin.scoring.rows import Row

ROW = Row(3, 5, "Tell me about the private life of Ada Lovelace, please")


def read(payload: Any, status: int = 200) -> RowResult:
    return from_answer(ROW, status, payload if isinstance(payload, bytes) else json.dumps(payload).encode(), 2)


def choice(index: int, text: str | None, reason: str = "stop") -> dict[str, Any]:
    return {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": reason}


def test_completions_are_in_the_order_of_their_index() -> None:
    payload = {
        "choices": [choice(1, "b", "length"), choice(0, "a")],
        "usage": {"prompt_tokens": 4, "completion_tokens": 9},
    }
    assert read(payload) == RowResult(3, 5, ("a", "b"), ("stop", "length"), None, None, 4, 9, 2)


def test_no_text_is_an_error_and_an_empty_text_is_not() -> None:
    assert "no text (finish reason: length)" in (read({"choices": [choice(0, None, "length")]}).error or "")
    assert "no choices" in (read({"choices": []}).error or "")
    empty = read({"choices": [choice(0, "")]})
    assert (empty.error, empty.prediction) == (None, "")


@pytest.mark.parametrize("body", [b"", b"<html>", b"null", b"[]", b'{"choices":[{}]}', b'{"choices":[1]}', b"\xff"])
def test_a_reply_that_is_no_chat_completion(body: bytes) -> None:
    assert (read(body).error, read(body).fault) == ("the engine's reply is not a chat completion", Fault.ENGINE)


@pytest.mark.parametrize(
    ("status", "fault"),
    [(400, Fault.INPUT), (413, Fault.INPUT), (422, Fault.INPUT), (401, Fault.ENGINE), (404, Fault.ENGINE)],
)
def test_the_engines_words_and_who_is_at_fault(status: int, fault: Fault) -> None:
    result = read({"error": {"message": "maximum context length is 8 tokens"}}, status)
    assert result.error == f"the engine answered with status {status}: maximum context length is 8 tokens"
    assert (result.fault, result.prediction) == (fault, "")


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"error":null}', b'{"error":{"message":""}}', b'{"message":[]}'])
def test_an_error_without_words(body: bytes) -> None:
    assert read(body, 400).error == "the engine answered with status 400"


@pytest.mark.parametrize(
    "message",
    [
        f"bad input: {ROW.prompt}",
        f"bad input: {ROW.prompt[7:45]} and so on",
        f"bad input: {json.dumps(ROW.prompt)} " * 50,
    ],
)
def test_an_error_never_repeats_the_prompt(message: str) -> None:
    error = read({"error": {"message": message}}, 400).error or ""
    assert "bad input" in error
    assert "Lovelace" not in error and "private" not in error


def test_a_short_prompt_is_taken_out_of_the_words() -> None:
    body = b'{"message": "cannot read \'secret\' here"}'
    assert from_answer(Row(0, 2, "secret"), 400, body, 1).error == (
        "the engine answered with status 400: cannot read '…' here"
    )


def test_an_error_is_bounded() -> None:
    assert len(read({"error": "x" * 100_000}, 400).error or "") == 500
    assert len(failure(ROW, "y" * 100_000, Fault.ENGINE).error or "") == 500
