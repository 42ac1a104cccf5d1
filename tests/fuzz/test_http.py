"""Requests from our own OpenAPI document, right and wrong ones: a real gateway answers each as the document says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import GatewayProcess
from tests.fuzz.report import count, tries
from tests.fuzz.tables import near_tables

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is in .venv-fuzz: make fuzz")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.allow_header_conformance,
]
DIRECT = ("/directAccess", "/nim")
"""What is below them is the engine's, all of it described by one path item."""

QUERY = st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3)
HEADERS = st.dictionaries(
    st.sampled_from(["accept", "accept-encoding", "content-encoding", "cookie", "expect-nothing", "range",
                     "traceparent", "x-request-id", "x-forwarded-for", "x-datarobot-association-id", "te"]),
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=30).map(str.strip),
    max_size=2,
)  # fmt: skip


def operations(gateway: GatewayProcess) -> list[tuple[tuple[str, str], list[Any]]]:
    """Each operation of the document; of the direct paths, which are alike, one of each method, at changing paths."""
    document = json.loads(gateway.get("/openapi.json")[1])
    found = [operation.ok() for operation in schemathesis.openapi.from_dict(document).get_all_operations()]
    kept: dict[tuple[str, str], list[Any]] = {}
    for operation in found:
        prefix = next((prefix for prefix in DIRECT if operation.path.startswith(prefix)), None)
        kept.setdefault((operation.method.upper(), f"{prefix}/…" if prefix else operation.path), []).append(operation)
    return sorted(kept.items())


def cases(alike: list[Any]) -> st.SearchStrategy[Any]:
    """Requests that fit an operation and requests that do not, where it takes anything that could be wrong."""
    modes = schemathesis.GenerationMode
    wrong = bool(alike[0].body) or bool(alike[0].path_parameters)
    return st.one_of(
        operation.as_strategy(generation_mode=mode)
        for operation in alike
        for mode in ((modes.POSITIVE, modes.NEGATIVE) if wrong else (modes.POSITIVE,))
    )


def try_operation(subject: str, alike: list[Any], gateway: GatewayProcess, session: requests.Session) -> None:
    """Raises what is wrong with the first answer that is not as the document says."""

    @tries(few=2)
    @given(cases(alike), QUERY, HEADERS)
    def answers(case: Any, query: dict[str, str], headers: dict[str, str]) -> None:
        case.query = query
        case.headers.update(headers)
        response = case.call(base_url=gateway.root, session=session, timeout=30)
        count(subject, response.status_code)
        assert response.status_code < 500, (response.status_code, response.text, case.as_curl_command())
        if case.method != "HEAD":
            case.validate_response(response, checks=CHECKS)

    answers()


def test_every_answer_is_as_the_document_says(fuzzed: GatewayProcess) -> None:
    schemathesis.openapi.media_type("text/csv", near_tables())
    faults = []
    with requests.Session() as session:
        session.trust_env = False
        for (method, path), alike in operations(fuzzed):
            subject = f"{method} {path}"
            try:
                try_operation(subject, alike, fuzzed, session)
            except (Exception, ExceptionGroup) as fault:
                faults.append(f"{subject}: {fault}"[:2000])
    assert all(worker.poll() is None for worker in fuzzed.workers), "a worker died"
    assert faults == [], "\n\n".join(faults)
