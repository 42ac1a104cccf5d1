"""Every route by every method in every spelling, without a key: nothing but the six probes answers.

The requests are written byte by byte, because clients tidy up what they send. A route of the application that has no
line in DOORS fails the first test.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest

from tests.conftest import GatewayProcess, Stage
from vllm_dropin.gateway.app import create_app
from vllm_dropin.gateway.config import GatewayConfig
from vllm_dropin.gateway.openai import INFERENCE_ROUTES, RESPONSE_ROUTES
from vllm_dropin.gateway.state import SharedState

PROBE, KEY = "probe", "key"
DOORS = {
    "/": PROBE,
    "/ping": PROBE,
    "/health": PROBE,
    "/livez": PROBE,
    "/readyz": PROBE,
    "/startupz": PROBE,
    "/status": KEY,
    "/metrics": KEY,
    "/version": KEY,
    "/openapi.json": KEY,
    "/info": KEY,
    "/capabilities": KEY,
    "/stats": KEY,
    "/predict": KEY,
    "/predictions": KEY,
    "/invocations": KEY,
    "/predictUnstructured": KEY,
    "/predictionsUnstructured": KEY,
    "/transform": KEY,
    "/chat/completions": KEY,
    "/models": KEY,
    "/v1/models": KEY,
    "/v1/chat/completions": KEY,
    "/v1/completions": KEY,
    "/v1/embeddings": KEY,
    "/v1/responses": KEY,
    "/v1/responses/{id}": KEY,
    "/v1/responses/{id}/cancel": KEY,
    "/v1/messages": KEY,
    "/v1/messages/count_tokens": KEY,
    "/v1/audio/transcriptions": KEY,
    "/v1/audio/translations": KEY,
    "/v1/audio/speech": KEY,
    "/tokenize": KEY,
    "/detokenize": KEY,
    "/rerank": KEY,
    "/v1/rerank": KEY,
    "/v2/rerank": KEY,
    "/score": KEY,
    "/v1/score": KEY,
    "/directAccess/{path}": KEY,
    "/nim/{path}": KEY,
}
AT_THE_ROOT = {"/livez", "/readyz", "/startupz", "/status", "/metrics", "/version", "/openapi.json"}
# vLLM's own, which must not be there at all.
ADMIN = [
    "/pause",
    "/sleep",
    "/update_weights",
    "/collective_rpc",
    "/scale_elastic_ep",
    "/v1/load_lora_adapter",
    "/docs",
]
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get"]


def first_encoded(path: str) -> str:
    return f"{path[:1]}%{ord(path[1]):02x}{path[2:]}" if len(path) > 1 else path


# The same path, written in another way.
SAME: list[Callable[[str], str]] = [
    lambda path: path,
    lambda path: f"{path.rstrip('/')}/",
    lambda path: f"{path}?key=x",
    lambda path: f"http://elsewhere{path}",
    first_encoded,
]
# Another path, or one that can be read in two ways.
ODD: list[Callable[[str], str]] = [
    lambda path: f"/{path}",
    lambda path: f"{path}//",
    lambda path: path.replace("/", "%2f"),
    lambda path: f"/%2f{path[1:]}",
    lambda path: f"{path}%2f",
    lambda path: f"/ping/..{path}",
    lambda path: f"/ping/%2e%2e{path}",
    lambda path: f"/ping%2f..{path}",
    lambda path: f"/.{path}",
    lambda path: f"{path}/.",
    lambda path: f"{path}.",
    lambda path: f"{path}..",
    lambda path: f"{path}%2e",
    lambda path: f"{path}%00",
    lambda path: f"{path}%20",
    lambda path: f"{path};/ping",
    lambda path: f"{path}%3f",
    lambda path: f"/ping\\..{path}",
    lambda path: f"/ping%5c..{path}",
    lambda path: f"/%252e%252e{path}",
    lambda path: f"{path.upper()}X" if path == path.upper() else path.upper(),
    lambda path: f"{path}\xef\xbc\x8f",
    lambda path: f"/x{path}",
]


class Line:
    """A connection on which requests are written by hand."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=10)
        self._file = self._socket.makefile("rb")

    def ask(self, method: str, target: str, *headers: str) -> int:
        """The status of the answer; the connection is kept where the server keeps it."""
        lines = [f"{method} {target} HTTP/1.1", *(headers or ["Host: x"]), "Content-Length: 0", "", ""]
        self._socket.sendall("\r\n".join(lines).encode("latin-1"))
        status = int(self._file.readline().split(b" ")[1])
        length, close = 0, False
        while (line := self._file.readline().lower()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            length = int(value) if name == b"content-length" else length
            close = close or (name == b"connection" and b"close" in value)
        if method != "HEAD":
            self._file.read(length)
        if close or status == 400:
            self.close()
            self._connect()
        return status

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@pytest.fixture(scope="module", params=["", "/deploy/a"])
def guarded(request: Any, staged: Stage) -> GatewayProcess:
    """A gateway with a key, at the root or under a prefix, in front of an engine that counts what reaches it."""
    return staged.gateway(api_keys=["the-key"], url_prefix=request.param)


@pytest.fixture
def line(guarded: GatewayProcess) -> Iterator[Line]:
    made = Line(guarded.port)
    yield made
    made.close()


def concrete(path: str) -> list[str]:
    """Paths that a client would write for a path of the table."""
    if path.endswith("{path}"):
        return [
            path.replace("/{path}", inner) for inner in ("/v1/models", "/v1/chat/completions", "/metrics", "/pause")
        ]
    return [path.replace("{id}", "resp_1")]


def test_every_route_has_its_line(tmp_path: Any) -> None:
    state = SharedState.create(tmp_path / "state", 1)
    app = create_app(GatewayConfig(code_dir="/m", engine_uds="/e", served_model="m"), state, 0)
    direct = {"/directAccess/{path}", "/nim/{path}"}
    assert {*app.routes, *INFERENCE_ROUTES, *RESPONSE_ROUTES, *direct} == set(DOORS)


def test_nothing_but_the_probes_answers_without_a_key(guarded: GatewayProcess, line: Line) -> None:
    prefix = guarded.config.url_prefix
    wrong = []
    for path, kind in [*DOORS.items(), *((path, KEY) for path in ADMIN)]:
        for at, method in product(dict.fromkeys((prefix, "")), METHODS):
            here = at == prefix or path in AT_THE_ROOT
            for one in concrete(path):
                plain = f"{at}{one}"
                open_here = kind == PROBE and here and method in ("GET", "HEAD")
                for write in SAME:
                    status = line.ask(method, write(plain))
                    if status != (200 if open_here else 401):
                        wrong.append((method, write(plain), status))
                for write in ODD if here else ():
                    status = line.ask(method, write(plain))
                    if status not in (401, 404, 400):
                        wrong.append((method, write(plain), status))
    assert wrong == []
    assert guarded.engine.stats()["started"] == 0


@pytest.mark.parametrize(
    "headers",
    [
        ["Host: x/ping?"],
        ["Host: /ping"],
        ["Host: ping"],
        ["Host: "],
        ["Host: x", "Host: y"],
        ["Host: x", "X-Forwarded-Host: localhost", "X-Forwarded-For: 127.0.0.1", "Forwarded: for=127.0.0.1"],
        ["Host: x", "X-Original-URL: /ping", "X-Rewrite-URL: /ping"],
        ["Host: x", "X-HTTP-Method-Override: GET"],
        ["Host: x", "Authorization: Bearer"],
        ["Host: x", "Authorization: Bearer the-ke"],
        ["Host: x", "Authorization: Bearer the-key2"],
        ["Host: x", "Authorization: Basic dGhlLWtleTo="],
        ["Host: x", "Authorization: bearer the-key,"],
        ["Host: x", "Proxy-Authorization: Bearer the-key"],
        ["Host: x", "X-Api-Key: the-key"],
        ["Host: x", "Cookie: api_key=the-key"],
    ],
)
def test_no_header_but_the_right_key_opens(guarded: GatewayProcess, line: Line, headers: list[str]) -> None:
    prefix = guarded.config.url_prefix
    for path, kind in DOORS.items():
        if kind == KEY:
            for one in concrete(path):
                for method in ("GET", "POST"):
                    assert line.ask(method, prefix + one, *headers) in (401, 400), (method, one)
    assert line.ask("GET", f"{prefix}/status", "Host: x", "Authorization: Bearer the-key") == 200


def test_with_the_key_an_odd_path_still_leads_nowhere(guarded: GatewayProcess, line: Line) -> None:
    prefix = guarded.config.url_prefix
    before = guarded.engine.stats()["started"]
    for path in [*DOORS, *ADMIN]:
        for one in concrete(path):
            for write in ODD:
                target = write(f"{prefix}{one}")
                status = line.ask("POST", target, "Host: x", "Authorization: Bearer the-key")
                assert status in (404, 400), target
    assert guarded.engine.stats()["started"] == before
