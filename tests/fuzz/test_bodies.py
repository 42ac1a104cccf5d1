"""Requests that no document describes: near-JSON, wrong bytes, doubtful paths. Each gets an answer, and no 5xx."""

from __future__ import annotations

import http.client
import json

from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import GatewayProcess
from tests.fuzz.report import count, tries
from tests.fuzz.tables import TEXT, near_tables

PATHS = ["/v1/chat/completions", "/v1/completions", "/predict/", "/predictions", "/v1/embeddings", "/v1/responses",
         "/tokenize", "/score", "/directAccess/v1/chat/completions", "/nim/v1/completions", "/v1/audio/transcriptions",
         "/invocations", "/transform/", "/status", "/v1/responses/resp_x/cancel"]  # fmt: skip
TYPES = ["application/json", "text/csv", "text/csv; charset=utf-16", "text/csv; charset=iso2022_jp", "text/plain", "",
         "multipart/form-data; boundary=b", "multipart/form-data", "text/csv; charset=\"", "\xff",
         "application/x-ndjson", "text/csv;header=present;charset=hz", "application/json; charset=utf-16"]  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.sampled_from(["\x00", "\ud800", 10**400, -1, 0])
)
KEYS = st.sampled_from(["messages", "prompt", "n", "best_of", "max_tokens", "stream", "stream_options", "model", "role",
                        "content", "temperature", "datarobot_association_id", "input", "user", "max_completion_tokens",
                        "include_usage"])  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | TEXT, inner, max_size=4), max_leaves=12
)
DOCUMENTS = st.dictionaries(KEYS, VALUES, max_size=6).map(json.dumps).map(str.encode)
FORM = b'--b\r\nContent-Disposition: form-data; name="X"; filename="x.csv"\r\n\r\n%b\r\n--b--\r\n'
TARGET = st.sampled_from(
    ["/", "%00", "%2f", "%2e%2e", "..", ".", "//", "%", "%zz", "%ff", "?", "?a=%00", "v1", "predict", ";", "*"]
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A JSON document, a table or a form, perhaps with a few bytes cut out, put in or changed."""
    body = draw(st.one_of(DOCUMENTS, DOCUMENTS, near_tables(), near_tables().map(lambda table: FORM % table)))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(body)))
        cut = draw(st.sampled_from([0, 0, 1, 5]))
        put = draw(
            st.sampled_from([b"", b"\x00", b"\xff", b"{", b"]", b'"', b"\\", b"[" * 3000, b"9" * 5000, b"\\ud800"])
        )
        body = body[:place] + put + body[place + cut :]
    return body


def ask(gateway: GatewayProcess, method: str, target: str, body: bytes | None, kind: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    try:
        connection.request(method, target, body, {"Content-Type": kind} if kind else {})
        response = connection.getresponse()
        text = response.read()
        assert response.status < 500, (response.status, text)
        return response.status
    finally:
        connection.close()


def test_any_body_is_answered(fuzzed: GatewayProcess) -> None:
    @tries(few=60, times=3)
    @given(st.sampled_from(PATHS), bodies(), st.sampled_from(TYPES))
    def answered(path: str, body: bytes, kind: str) -> None:
        count("any body", ask(fuzzed, "POST", path, body, kind))

    answered()
    assert all(worker.poll() is None for worker in fuzzed.workers), "a worker died"


def test_any_path_is_answered(fuzzed: GatewayProcess) -> None:
    methods = st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"])

    @tries(few=60)
    @given(methods, st.sampled_from(PATHS), st.lists(TARGET, max_size=2))
    def answered(method: str, path: str, more: list[str]) -> None:
        count("any path", ask(fuzzed, method, path + "".join(more), None, ""))

    answered()
