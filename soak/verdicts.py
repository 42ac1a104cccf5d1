"""Whether an answer is what it has to be: whole, or an explicit failure, and the one that belongs to its question."""

from __future__ import annotations

import csv
import enum
import io
import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from soak.requests import Chat, Request, Table

EXPLICIT = frozenset({429, 500, 502, 503, 504})
"""Statuses that a sound request may get: too much at once, or the engine is away."""


class Outcome(enum.StrEnum):
    """How a request ended for its client."""

    ANSWERED = "answered"
    FAILED = "failed"
    """Explicitly: an error frame at the end of a stream, or a 5xx with a body of ours."""
    REFUSED = "refused"
    """429 with a body of ours."""
    LEFT = "left"
    """The client went away, as it meant to."""
    CUT = "cut"
    """The connection ended without a word."""
    WRONG = "wrong"


@dataclass(frozen=True)
class Reply:
    """What a client has read. `error`: how the connection ended, if it did not end well."""

    status: int | None
    body: bytes = b""
    headers: Mapping[str, str] | None = None
    error: str = ""


@dataclass(frozen=True)
class Verdict:
    """`failed_rows`: sound rows with an error; `broken_rows`: broken ones, which have to have one.

    `named` and `unnamed` count completions that say their own number, and those that say none.
    """

    outcome: Outcome
    problem: str = ""
    rows: int = 0
    failed_rows: int = 0
    broken_rows: int = 0
    named: int = 0
    unnamed: int = 0


def judge(request: Request, reply: Reply) -> Verdict:
    """Hold a reply against its request."""
    if reply.status is None:
        return Verdict(Outcome.CUT, reply.error)
    if reply.status != 200:
        return _refusal(request, reply)
    if isinstance(request, Table):
        return Verdict(Outcome.CUT, reply.error) if reply.error else _rows(request, reply)
    if request.stream:
        return _stream(request, reply)
    return Verdict(Outcome.CUT, reply.error) if reply.error else _chat(request, reply)


def _wrong(problem: str) -> Verdict:
    return Verdict(Outcome.WRONG, problem)


def _refusal(request: Request, reply: Reply) -> Verdict:
    payload = _json(reply.body)
    told = payload.get("message") if isinstance(request, Table) else _error_message(payload)
    if reply.error or not isinstance(told, str) or not told:
        return _wrong(f"status {reply.status} without a body of ours: {reply.error or reply.body[:200]!r}")
    if reply.status not in EXPLICIT:
        return _wrong(f"status {reply.status}: {told[:200]}")
    return Verdict(Outcome.REFUSED if reply.status == 429 else Outcome.FAILED, f"{reply.status}: {told[:200]}")


def _chat(request: Chat, reply: Reply) -> Verdict:
    payload = _json(reply.body)
    if payload.get("datarobot_association_id") != request.association_id:
        return _wrong(f"the association id is not {request.association_id}: {reply.body[:200]!r}")
    try:
        text = payload["choices"][0]["message"]["content"] or ""
        tokens = payload["usage"]["completion_tokens"]
    except (LookupError, TypeError):
        return _wrong(f"no completion: {reply.body[:200]!r}")
    return _completion(request, text, tokens)


def _completion(request: Chat, text: str, tokens: int | None) -> Verdict:
    if tokens != request.tokens:
        return _wrong(f"{tokens} tokens of {request.tokens}")
    named = str(request.number) in text
    return Verdict(Outcome.ANSWERED, named=int(named), unnamed=int(not named))


def _stream(request: Chat, reply: Reply) -> Verdict:
    """Ends with [DONE] or with an error frame, never with both; with neither, it was cut."""
    frames = [line.removeprefix(b"data:").strip() for line in reply.body.splitlines() if line.startswith(b"data:")]
    chunks = [_json(frame) for frame in frames if frame != b"[DONE]"]
    errors = [chunk for chunk in chunks if "error" in chunk]
    done = len(frames) - len(chunks)
    if errors and done:
        return _wrong("a stream with an error and with [DONE]")
    if errors:
        whole = len(errors) == 1 and "error" in chunks[-1] and _error_message(errors[0])
        return Verdict(Outcome.FAILED, f"stream: {_error_message(errors[0])}") if whole else _wrong("a broken error")
    if not done:
        return Verdict(Outcome.CUT, reply.error or "the stream ended without a word")
    if done > 1 or frames[-1] != b"[DONE]":
        return _wrong("[DONE] is not the one last frame")
    if any(chunk.get("datarobot_association_id") != request.association_id for chunk in chunks):
        return _wrong(f"a chunk without the association id {request.association_id}")
    text = "".join(
        choice.get("delta", {}).get("content") or "" for chunk in chunks for choice in chunk.get("choices", ())
    )
    tokens = next((chunk["usage"]["completion_tokens"] for chunk in reversed(chunks) if chunk.get("usage")), None)
    return _completion(request, text, tokens)


def _rows(request: Table, reply: Reply) -> Verdict:
    """N rows in, N rows out, in order, each with its completion or an error."""
    payload = _json(reply.body)
    predictions = payload.get("predictions")
    count = len(request.rows)
    if not isinstance(predictions, list) or len(predictions) != count:
        got = len(predictions) if isinstance(predictions, list) else "no"
        return _wrong(f"{count} rows asked, {got} rows answered")
    extra = payload.get("extraModelOutput") or {
        "columns": ["error"],
        "index": [*range(count)],
        "data": [[None]] * count,
    }
    if extra.get("index") != [*range(count)] or len(extra.get("data", ())) != count:
        return _wrong("the errors are not those of the rows")
    errors = [cells[extra["columns"].index("error")] for cells in extra["data"]]
    owners = {str(row.number): index for index, row in enumerate(request.rows)}
    named = 0
    for index, (row, text, error) in enumerate(zip(request.rows, predictions, errors, strict=True)):
        if bool(text) == bool(error):
            return _wrong(f"row {index} has {'both a completion and an error' if text else 'neither'}")
        if row.broken and not error:
            return _wrong(f"row {index} is broken and has a completion: another row's")
        named += str(row.number) in text
        others = [owner for name, owner in owners.items() if owner != index and name in text]
        if others:
            return _wrong(f"row {index} has the answer of row {others[0]}")
    failed = sum(map(bool, errors))
    if str(failed) != (reply.headers or {}).get("X-Row-Errors", "0"):
        return _wrong(f"{failed} rows failed, the header says otherwise")
    broken = sum(row.broken for row in request.rows)
    reasons = "; ".join(
        f"row {index}: {error}"[:200]
        for index, (row, error) in enumerate(zip(request.rows, errors, strict=True))
        if error and not row.broken
    )
    return Verdict(Outcome.ANSWERED, reasons, count, failed - broken, broken, named, count - failed - named)


def judge_file(request: Table, text: str) -> Verdict:
    """The same of a CSV that `vllm-dropin score` has written."""
    lines = list(csv.DictReader(io.StringIO(text)))
    if [line["id"] for line in lines] != [str(row.number) for row in request.rows]:
        return _wrong(f"{len(request.rows)} rows asked, {len(lines)} rows answered, or in another order")
    for index, line in enumerate(lines):
        if bool(line["completion"]) == bool(line["error"]):
            return _wrong(f"row {index} has {'both a completion and an error' if line['error'] else 'neither'}")
    failed = sum(bool(line["error"]) for line in lines)
    named = sum(line["id"] in line["completion"] for line in lines)
    foreign = [index for index, line in enumerate(lines) if _says_another(line, {other["id"] for other in lines})]
    if foreign:
        return _wrong(f"row {foreign[0]} has the answer of another")
    reasons = "; ".join(f"row {index}: {line['error']}"[:200] for index, line in enumerate(lines) if line["error"])
    return Verdict(Outcome.ANSWERED, reasons, len(lines), failed, 0, named, len(lines) - failed - named)


def _says_another(line: Mapping[str, str], names: Set[str]) -> bool:
    return any(name in line["completion"] for name in names - {line["id"]})


def _json(body: bytes) -> dict[str, Any]:
    try:
        payload = json.loads(body)
    except ValueError:
        return {}
    return payload if isinstance(payload, dict) else {}


def _error_message(payload: Mapping[str, Any]) -> str | None:
    error = payload.get("error")
    return error.get("message") if isinstance(error, dict) else None
