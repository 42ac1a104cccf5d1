"""Which path leads where, for whom, and in which phase."""

from __future__ import annotations

import json
import socket
import uuid

import pytest

from tests.conftest import GatewayProcess, Stage, wait_until
from vllm_dropin.gateway.state import EngineStatus, Failure, Phase, Status

PROBES = ["/", "/ping", "/ping/", "/health", "/health/", "/livez", "/readyz", "/startupz"]
READS = ["/info/", "/capabilities/", "/stats/", "/status", "/metrics", "/version", "/models", "/v1/models"]
WRITES = ["/predict/", "/predictions/", "/invocations", "/chat/completions", "/v1/chat/completions", "/tokenize"]
CSV = b"promptText\nhello\n"


def message(body: bytes) -> str:
    text: str = json.loads(body)["message"]
    return text


@pytest.fixture(scope="module")
def guarded(staged: Stage) -> GatewayProcess:
    """A gateway with keys and a prefix."""
    return staged.gateway(api_keys=["key-one", "key-two"], url_prefix="/deploy/a")


@pytest.fixture(scope="module")
def phased(staged: Stage) -> GatewayProcess:
    """A gateway whose phase the test sets."""
    return staged.gateway(workers=1)


@pytest.mark.parametrize("path", PROBES + READS)
@pytest.mark.parametrize("slash", ["", "/"])
def test_reading_routes_with_and_without_slash(gateway: GatewayProcess, path: str, slash: str) -> None:
    path = path.rstrip("/") + slash
    status, headers, _ = gateway.ask("GET", path or "/", headers={"X-Request-ID": "mine"})
    assert status == 200
    assert headers["x_request_id"] == "mine"
    assert headers["x-drum-version"] == "1.17.20"


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("path", WRITES)
def test_writing_routes_with_and_without_slash(gateway: GatewayProcess, path: str, slash: str) -> None:
    chat = json.dumps({"messages": [{"role": "user", "content": "hi"}], "prompt": "hi"}).encode()
    status, headers, _ = gateway.ask("POST", path.rstrip("/") + slash, CSV if "pre" in path or "inv" in path else chat)
    assert status == 200
    assert uuid.UUID(headers["x_request_id"]).version == 4


@pytest.mark.parametrize("given", ["x" * 300, "a b", ""])
def test_a_request_id_that_is_no_token_is_replaced(gateway: GatewayProcess, given: str) -> None:
    _, headers, _ = gateway.ask("GET", "/ping", headers={"X-Request-ID": given})
    assert uuid.UUID(headers["x_request_id"]).version == 4


def test_head_answers_like_get(gateway: GatewayProcess) -> None:
    status, headers, body = gateway.ask("HEAD", "/ping")
    assert (status, body) == (200, b"")
    assert headers["content-length"] == "17"


@pytest.mark.parametrize("path", ["/predictUnstructured/", "/predictionsUnstructured/", "/transform/"])
def test_other_target_types_are_told_where_to_go(gateway: GatewayProcess, path: str) -> None:
    status, _, body = gateway.ask("POST", path, b"x")
    assert status == 422
    assert "/predict/" in message(body)


@pytest.mark.parametrize(
    "path",
    [
        "/nope", "/v2", "/predict/more", "//ping", "/ping//", "/%2e%2e/ping", "/ping%2f", "/x/../ping", "/./ping",
        "/pause", "/update_weights", "/sleep", "/v1/load_lora_adapter", "/docs", "/redoc", "/fake/stats",
        "/directAccess/pause", "/directAccess/health", "/nim/metrics", "/nim/", "/directAccess",
        "/directAccess//v1/models", "/nim/directAccess/v1/models", "/directAccess/../v1/models",
        "/v1/chat/completions/batch",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_everything_else_is_404_and_reaches_no_engine(gateway: GatewayProcess, method: str, path: str) -> None:
    before = len(gateway.engine.requests())
    status, headers, body = gateway.ask(method, path, b"{}")
    assert status == 404
    assert json.loads(body)
    assert "x_request_id" in headers
    assert len(gateway.engine.requests()) == before


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("POST", "/ping", "GET, HEAD"), ("GET", "/predict/", "POST"), ("DELETE", "/v1/models", "GET"),
     ("GET", "/v1/chat/completions", "POST"), ("DELETE", "/directAccess/v1/models", "GET, POST, PUT")],
)  # fmt: skip
def test_wrong_method(gateway: GatewayProcess, method: str, path: str, allow: str) -> None:
    status, headers, _ = gateway.ask(method, path)
    assert (status, headers["allow"]) == (405, allow)


def test_an_odd_host_changes_nothing(gateway: GatewayProcess) -> None:
    assert gateway.get("/status", headers={"Host": "x/ping?"})[0] == 200


@pytest.mark.parametrize("path", [*READS, *WRITES, "/nope", "/directAccess/v1/models", "/", "/ping", "//x"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_no_route_without_a_key(guarded: GatewayProcess, method: str, path: str) -> None:
    for at in (guarded.config.url_prefix + path, path):
        status, headers, _ = guarded.ask(method, at, b"{}")
        assert (status, headers["www-authenticate"]) == (401, "Bearer")


@pytest.mark.parametrize("path", READS)
def test_reading_needs_a_key(guarded: GatewayProcess, path: str) -> None:
    at = guarded.config.url_prefix + path
    assert guarded.get(at)[0] == 401
    assert guarded.get(at, headers={"Authorization": "Bearer wrong"})[0] == 401
    for key in guarded.config.api_keys:
        assert guarded.get(at, headers={"Authorization": f"Bearer {key}"})[0] == 200


@pytest.mark.parametrize("path", PROBES)
def test_probes_need_no_key_under_the_prefix(guarded: GatewayProcess, path: str) -> None:
    assert guarded.get(guarded.config.url_prefix + path)[0] == 200


def test_the_key_stays_here(guarded: GatewayProcess) -> None:
    headers = {"Authorization": "Bearer key-one", "Content-Type": "application/json", "Cookie": "c", "X-Odd": "o"}
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
    assert guarded.ask("POST", "/deploy/a/chat/completions", body, headers)[0] == 200
    seen = guarded.engine.last()["headers"]
    assert not {"authorization", "cookie", "x-odd"} & set(seen)


def test_the_prefix(guarded: GatewayProcess) -> None:
    key = {"Authorization": "Bearer key-one"}
    assert guarded.get("/deploy/a")[0] == 200
    assert guarded.get("/deploy/a/")[0] == 200
    for path in ("/livez", "/readyz", "/startupz"):
        assert guarded.get(path)[0] == 200
    for path in ("/status", "/metrics", "/version"):
        assert guarded.get(path, headers=key)[0] == 200
        assert guarded.get(path)[0] == 401
    for path in ("/", "/ping", "/v1/models", "/deploy/abc/ping", "/deploy", "/predict/"):
        assert guarded.get(path, headers=key)[0] == 404


@pytest.mark.parametrize(
    ("phase", "draining", "health", "ready", "started", "chat"),
    [
        (Phase.STARTING, False, 503, 503, 503, 503),
        (Phase.HOOK, False, 503, 503, 503, 503),
        (Phase.LOADING, False, 503, 503, 503, 503),
        (Phase.READY, False, 200, 200, 200, 200),
        (Phase.RESTARTING, False, 503, 503, 200, 503),
        (Phase.READY, True, 503, 503, 200, 503),
        (Phase.DRAINING, True, 503, 503, 200, 503),
        (Phase.FAILED, False, 513, 503, 503, 503),
        (Phase.STOPPED, True, 503, 503, 503, 503),
    ],
)
def test_phases(
    phased: GatewayProcess, phase: Phase, draining: bool, health: int, ready: int, started: int, chat: int
) -> None:
    phased.state.phase, phased.state.draining = phase, draining
    for path in ("/", "/ping", "/ping/", "/health/"):
        status, body = phased.get(path)
        assert status == health
        assert message(body)
    assert phased.get("/livez")[0] == 200
    assert phased.get("/readyz")[0] == ready
    assert phased.get("/startupz")[0] == started
    for path in ("/info/", "/capabilities/", "/stats/", "/status", "/metrics", "/version"):
        assert phased.get(path)[0] == 200
    status, headers, body = phased.chat("hi")
    assert status == chat
    if chat != 200:
        assert json.loads(body)["error"]["code"] == 503
        assert ("retry-after" in headers) is (phase not in (Phase.FAILED,))
    assert phased.get("/v1/models")[0] == chat


def test_failure_is_told_where_nothing_is_guarded(
    staged: Stage, phased: GatewayProcess, guarded: GatewayProcess
) -> None:
    status = Status(phase="failed", since="now", error=Failure(code="hook", message="custom.py raised"))
    for one, told in ((phased, True), (guarded, False)):
        one.state.write_status(status)
        one.state.phase = Phase.FAILED
        code, body = one.get(one.config.url_prefix + "/ping")
        assert (code, "custom.py raised" in message(body)) == (513, told)
        one.ready()


def test_status_has_the_settled_shape(staged: Stage) -> None:
    setting = {"name": "max_tokens", "value": 5, "source": "runtime parameter", "overrode": ["default"]}
    gateway = staged.gateway(ready=False, settings=[setting])
    engine = EngineStatus(version="0.32.0", pid=7, restarts=2)
    gateway.state.write_status(Status(phase="loading", stage="weights", progress=0.5, since="t", engine=engine))
    status = json.loads(gateway.get("/status")[1])
    assert set(status) == {"phase", "stage", "progress", "since", "timeline", "error", "engine", "load", "settings"}
    assert status["engine"] == {"version": "0.32.0", "pid": 7, "restarts": 2}
    assert status["load"] == {"in_flight": 0, "queued": 0}
    assert status["settings"] == [setting]
    assert json.loads(gateway.get("/version")[1])["engine"] == {"version": "0.32.0"}


def test_contract_information(gateway: GatewayProcess) -> None:
    info = json.loads(gateway.get("/info/")[1])
    assert set(info) == {"codeDir", "targetType", "language", "drumVersion", "drumServer", "modelMetadata"}
    assert info["language"] == "other"
    capabilities = json.loads(gateway.get("/capabilities/")[1])
    assert capabilities == {"supported_payload_formats": {"csv": None}, "supported_methods": {"chat": True}}
    gateway.get("/stats/")  # looking at the times starts them anew
    gateway.ask("POST", "/predict/", CSV)
    stats = json.loads(gateway.get("/stats/")[1])
    assert stats["mem_info"]["total"] > 0
    assert {entry["pid"] for entry in stats["drum_info"]} >= {gateway.workers[0].pid}
    assert stats["time_info"]["run_predictor_total"]["samples"] == 1


def test_metrics_are_ours_and_the_engines(staged: Stage) -> None:
    gateway = staged.gateway()
    gateway.chat("hello")
    status, headers, body = gateway.ask("GET", "/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert b"\nvllm_dropin_engine_up 1\n" in body
    assert b"\nvllm_dropin_requests_total " in body
    assert b"\nvllm:generation_tokens_total 5\n" in body
    gateway.engine.stop()
    status, body = gateway.get("/metrics")
    assert status == 200
    assert b"\nvllm_dropin_engine_up 0\n" in body
    assert b"vllm:" not in body
    names = [line.split(b" ")[2] for line in body.splitlines() if line.startswith(b"# TYPE")]
    assert len(names) == len(set(names))
    assert all(name.startswith(b"vllm_dropin_") for name in names)


def raw(gateway: GatewayProcess, data: bytes, seconds: float = 8) -> bytes:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=seconds) as connection:
        connection.sendall(data)
        out = b""
        while piece := connection.recv(65536):
            out += piece
        return out


def test_half_a_header_is_cut_off(staged: Stage) -> None:
    gateway = staged.gateway(limits={"idle_timeout": 0.5})
    answer = raw(gateway, b"GET /ping HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    assert b" 200 " not in answer.split(b"\r\n")[0]


@pytest.mark.parametrize("size", [66_000, 200_000, 3_000_000])
def test_a_huge_header_is_refused(gateway: GatewayProcess, size: int) -> None:
    request = b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Huge: " + b"x" * size + b"\r\n\r\n"
    try:
        answer = raw(gateway, request)
    except (ConnectionResetError, BrokenPipeError):
        answer = b"HTTP/1.1 431 cut"
    assert answer.split(b" ")[1] in (b"431", b"400")
    wait_until(lambda: gateway.get("/ping")[0] == 200)


def test_a_header_of_60_kib_passes(gateway: GatewayProcess) -> None:
    assert gateway.get("/ping", headers={"X-Large": "x" * 60_000})[0] == 200
