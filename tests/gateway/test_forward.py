"""What passes between a client and the engine, on real sockets."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import EngineProcess, GatewayProcess, Stage, UnixConnection, wait_until
from vllm_dropin.gateway.state import Phase

JSON = {"content-type": "application/json"}


def direct(gateway: GatewayProcess, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """The engine's own answer."""
    connection = UnixConnection(str(gateway.engine.uds))
    try:
        connection.request(method, path, body, JSON)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def frames(body: bytes) -> list[Any]:
    """The data of each event; `[DONE]` as text."""
    parts = body.decode().split("\n\n")
    assert parts[-1] == ""
    texts = [part.removeprefix("data: ") for part in parts[:-1]]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions"])
def test_chat_gets_the_association_id(gateway: GatewayProcess, path: str) -> None:
    payload = {"messages": [{"role": "user", "content": "hello"}], "datarobot_association_id": "id-7"}
    status, headers, body = gateway.post(path, payload)
    assert status == 200
    assert int(headers["content-length"]) == len(body)
    answer = json.loads(body)
    assert answer["datarobot_association_id"] == "id-7"
    assert answer["choices"][0]["message"]["content"].startswith("hello")
    assert "datarobot_association_id" not in gateway.engine.last()["body"]


@pytest.mark.parametrize("fragment", [0, 1, 7, 100])
def test_every_chunk_gets_the_association_id(gateway: GatewayProcess, fragment: int) -> None:
    words = f"hello tokens=20 fragment={fragment}" if fragment else "hello tokens=20"
    status, headers, body = gateway.chat(words, stream=True, n=2)
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    events = frames(body)
    assert events[-1] == "[DONE]"
    assert len(events) == 20 * 2 + 2
    assert len({event["datarobot_association_id"] for event in events[:-1]}) == 1


def test_unknown_fields_reach_the_engine(gateway: GatewayProcess) -> None:
    fields = {"extra_body": {"a": 1}, "timeout": 3, "guided_json": {"x": [1.5, None, "é"]}, "logprobs": True}
    assert gateway.chat("hello", **fields)[0] == 200
    seen = json.loads(gateway.engine.last()["body"])
    assert fields.items() <= seen.items()


@pytest.mark.parametrize(
    ("path", "payload"),
    [
        ("/v1/completions", {"prompt": "hello you", "max_tokens": 9}),
        ("/v1/completions", {"prompt": "hello tokens=9", "stream": True}),
        ("/v1/completions", {"prompt": "hello tokens=9 fragment=3", "stream": True}),
        ("/v1/embeddings", {"input": ["a", "b"]}),
        ("/v1/embeddings", {"input": ["a", "b"], "user": "gzip"}),
        ("/tokenize", {"prompt": "a b c"}),
        ("/detokenize", {"tokens": [1, 2]}),
        ("/v1/responses", {"input": "hello tokens=4", "stream": True}),
        ("/v1/messages", {"messages": "tokens=9 fragment=2", "stream": True}),
        ("/v1/messages/count_tokens", {"messages": []}),
        ("/rerank", {"query": "a"}),
        ("/v1/rerank", {"query": "a"}),
        ("/v2/rerank", {"query": "a"}),
        ("/score", {"query": "a"}),
        ("/v1/score", {"query": "a"}),
        ("/v1/audio/transcriptions", {"file": "x"}),
        ("/directAccess/v1/completions", {"prompt": "hello tokens=9", "stream": True}),
        ("/nim/v1/embeddings", {"input": "a", "user": "gzip"}),
        ("/directAccess/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
        ("/nim/v1/chat/completions", {"messages": [{"role": "user", "content": "tokens=3"}], "stream": True}),
    ],
)
def test_other_routes_pass_identical_bytes(gateway: GatewayProcess, path: str, payload: dict[str, Any]) -> None:
    body = json.dumps(payload, indent=1).encode()
    inner = path.removeprefix("/directAccess").removeprefix("/nim")
    status, headers, through = gateway.ask("POST", path, body, JSON)
    sent = gateway.engine.last()
    assert (status, through) == direct(gateway, "POST", inner, body)
    assert status == 200
    assert (sent["path"], sent["sha256"]) == (inner, hashlib.sha256(body).hexdigest())
    assert sent["headers"]["accept-encoding"] == "identity"
    assert headers.get("content-encoding") == ("gzip" if payload.get("user") == "gzip" else None)


def test_models_pass_identical_bytes(gateway: GatewayProcess) -> None:
    expected = direct(gateway, "GET", "/v1/models")
    for path in ("/models", "/v1/models", "/directAccess/v1/models", "/nim/v1/models/"):
        assert gateway.get(path) == expected


@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
def test_direct_access_keeps_method_query_and_body(gateway: GatewayProcess, method: str) -> None:
    body = None if method == "GET" else b'{"a": 1}'
    assert gateway.ask(method, "/directAccess/v1/responses?x=%20y&z=1", body, JSON)[0] == 200
    seen = gateway.engine.last()
    assert (seen["method"], seen["path"], seen["query"]) == (method, "/v1/responses", "x=%20y&z=1")
    assert seen["body"] == (body or b"").decode()


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/responses/resp_1"), ("POST", "/v1/responses/resp-1/cancel")])
def test_stored_responses(gateway: GatewayProcess, method: str, path: str) -> None:
    assert gateway.ask(method, path)[0] in (200, 400)
    assert gateway.engine.last()["path"] == path


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
@pytest.mark.parametrize("stream", [False, True])
def test_engine_errors_pass_with_their_status_once(gateway: GatewayProcess, status: int, stream: bool) -> None:
    before = gateway.engine.stats()["started"]
    code, _, body = gateway.chat(f"status={status}", stream=stream)
    error = json.loads(body)
    assert (code, error["error"]["code"], error["error"]["message"]) == (status, status, f"asked for {status}")
    assert set(error) == {"error"}
    assert gateway.engine.stats()["started"] == before + 1


def test_engine_errors_are_bounded(gateway: GatewayProcess) -> None:
    status, _, body = gateway.chat("status=400 error_bytes=3000000")
    assert status == 400
    assert len(body) <= 16 << 10


def test_unknown_model_is_404(gateway: GatewayProcess) -> None:
    status, _, body = gateway.chat("hello", model="nope")
    assert (status, json.loads(body)["error"]["type"]) == (404, "NotFoundError")


def test_error_status_of_the_incumbent(stage: Stage) -> None:
    gateway = stage.gateway(error_status="drum")
    status, _, body = gateway.chat("hello", model="nope")
    assert status == 500
    assert json.loads(body)["message"].startswith("ERROR: Error code: 404 - {'error': {'message': 'The model `nope`")
    assert gateway.post("/v1/completions", {"prompt": "status=404"})[0] == 404
    for prefix in ("/directAccess", "/nim"):
        payload = {"model": "nope", "messages": [{"role": "user", "content": "hello"}]}
        assert gateway.post(f"{prefix}/v1/chat/completions", payload)[0] == 404


def test_the_input_is_not_echoed(gateway: GatewayProcess) -> None:
    status, _, body = gateway.post("/v1/chat/completions", {"messages": [], "secret": "s3cr3t-input"})
    assert status == 400
    assert b"s3cr3t-input" not in body


def test_bad_json_is_refused_here(gateway: GatewayProcess) -> None:
    before = gateway.engine.stats()["started"]
    status, _, body = gateway.ask("POST", "/v1/chat/completions", b'{"messages": [', JSON)
    assert (status, json.loads(body)["error"]["type"]) == (400, "invalid_request_error")
    assert gateway.engine.stats()["started"] == before


def test_engine_death_in_a_stream_ends_in_an_error_frame(gateway: GatewayProcess) -> None:
    status, _, body = gateway.chat("hello die=3 tokens=9", stream=True)
    gateway.engine.wait_dead()
    assert status == 200
    events = frames(body)
    assert [("error" in event) for event in events] == [False, False, False, True]
    assert events[-1]["error"]["code"] == 503


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_core_death_in_a_stream_has_no_done(gateway: GatewayProcess, path: str) -> None:
    words = "hello core_dies=2 tokens=9"
    payload = {"messages": [{"role": "user", "content": words}], "prompt": words, "stream": True}
    events = frames(gateway.post(path, payload)[2])
    assert "[DONE]" not in events
    assert "error" in events[-1]
    assert len(events) == 3


def test_an_aborted_stream_has_no_done(gateway: GatewayProcess) -> None:
    events = frames(gateway.chat("hello aborted=1 tokens=9", stream=True)[2])
    assert events[-2]["choices"][0]["finish_reason"] == "abort"
    assert "error" in events[-1]


def test_engine_death_in_an_answer_is_503(gateway: GatewayProcess) -> None:
    status, headers, body = gateway.chat("hello die=1")
    gateway.engine.wait_dead()
    assert (status, headers["retry-after"]) == (503, "5")
    assert json.loads(body)["error"]["type"] == "service_unavailable_error"


def test_engine_death_in_a_large_answer_cuts_the_connection(gateway: GatewayProcess) -> None:
    errors = gateway.state.total("errors")
    with pytest.raises(http.client.IncompleteRead):
        gateway.chat("hello bytes=2000000 die=1")
    gateway.engine.wait_dead()
    wait_until(lambda: gateway.state.total("errors") == errors + 1)


def test_dead_engine_is_503_and_a_new_one_is_found(stage: Stage) -> None:
    gateway = stage.gateway()
    assert gateway.chat("hello")[0] == 200
    gateway.engine.stop()
    assert gateway.chat("hello")[0] == 503
    gateway.engine.start()
    assert gateway.chat("hello")[0] == 200
    gateway.restart_engine()
    assert gateway.chat("hello")[0] == 200


def test_large_answer(gateway: GatewayProcess) -> None:
    status, headers, body = gateway.chat("hello bytes=3000000")
    assert status == 200
    assert int(headers["content-length"]) == len(body) > 3_000_000
    assert "datarobot_association_id" in json.loads(body)


def start_chat(gateway: GatewayProcess, words: str, **fields: Any) -> socket.socket:
    """Send a chat request and leave its answer unread."""
    body = json.dumps({"messages": [{"role": "user", "content": words}], **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=10)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("read", [0, 200], ids=["before the first token", "mid-stream"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_the_engine(gateway: GatewayProcess, read: int, stream: bool) -> None:
    before = gateway.engine.stats()["aborted"]
    words = "hello tokens=1000 token_delay=0.05" if read and stream else "hello delay=30"
    with start_chat(gateway, words, stream=stream) as connection:
        if read and stream:
            connection.recv(read)
        else:
            wait_until(lambda: gateway.engine.stats()["running"] == 1)
    wait_until(lambda: gateway.engine.stats()["aborted"] == before + 1, 2)
    wait_until(lambda: gateway.state.total("in_flight") == gateway.state.total("waiting") == 0, 2)
    assert gateway.engine.stats()["running"] == 0


def test_a_client_that_leaves_the_queue_leaves_no_trace(stage: Stage) -> None:
    gateway = stage.gateway(limits={"max_in_flight": 1, "max_queue": 1})
    with start_chat(gateway, "hello delay=30"):
        wait_until(lambda: gateway.state.total("in_flight") == 1)
        with start_chat(gateway, "hello"):
            wait_until(lambda: gateway.state.total("queued") == 1)
        wait_until(lambda: gateway.state.total("queued") == 0, 2)
    wait_until(lambda: gateway.state.total("in_flight") == 0, 2)
    assert gateway.engine.stats()["started"] == 1
    assert gateway.chat("hello")[0] == 200


@pytest.mark.parametrize("workers", [1, 2])
def test_overload_is_429_at_once(stage: Stage, workers: int) -> None:
    gateway = stage.gateway(workers=workers, limits={"max_in_flight": 4, "max_queue": 4})

    def ask(_: int) -> int:
        return gateway.chat("hello delay=0.5")[0]

    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(ask, range(30)))
    # The bounds are sums over workers, read without a lock: W workers may pass each by W - 1.
    assert set(answers) == {200, 429}
    assert answers.count(200) >= 8
    assert gateway.engine.stats()["most_running"] <= 4 + workers - 1
    assert gateway.state.total("refused") == answers.count(429)
    assert gateway.state.total("in_flight") == gateway.state.total("queued") == 0


def test_a_refusal_comes_within_milliseconds(stage: Stage) -> None:
    gateway = stage.gateway(limits={"max_in_flight": 1, "max_queue": 1})
    with start_chat(gateway, "hello delay=30"), start_chat(gateway, "hello delay=30"):
        wait_until(lambda: gateway.state.total("queued") == 1)
        seconds = []
        for _ in range(10):
            started = time.monotonic()
            status, headers, _ = gateway.chat("hello")
            seconds.append(time.monotonic() - started)
            assert (status, headers["retry-after"]) == (429, "1")
    assert min(seconds) < 0.05


def chunked(gateway: GatewayProcess, path: str, piece: bytes, count: int) -> int:
    """POST with chunked encoding; the status, as soon as the server answers."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        framed = f"{len(piece):x}\r\n".encode() + piece + b"\r\n"

        def upload() -> None:
            try:
                for _ in range(count):
                    connection.sendall(framed)
                connection.sendall(b"0\r\n\r\n")
            except OSError:
                return  # the server has had enough

        sender = threading.Thread(target=upload)
        sender.start()
        try:
            answer = connection.recv(4096)
        finally:
            sender.join(20)
        return int(answer.split(b" ")[1])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/predict/"])
def test_a_huge_body_is_413_while_it_comes(stage: Stage, path: str) -> None:
    gateway = stage.gateway(limits={"json_body": 1 << 20, "row_body": 2 << 20})
    before = resident(gateway)
    assert chunked(gateway, path, b"x" * 65536, 2000) == 413
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as connection:
        connection.sendall(head.encode())
        assert connection.recv(4096).split(b" ")[1] == b"413"
    assert resident(gateway) - before < 34 << 20
    assert gateway.state.total("held_bytes") == 0


def resident(gateway: GatewayProcess) -> int:
    """Bytes that the first worker has in memory."""
    with open(f"/proc/{gateway.workers[0].pid}/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def test_a_large_upload_goes_by_disk(stage: Stage) -> None:
    gateway = stage.gateway(limits={"spool_above": 1 << 20, "held_bytes": 40 << 20})
    body = b"x" * (20 << 20)
    status, _, answer = gateway.ask("POST", "/v1/audio/transcriptions", body, {"content-type": "audio/wav"})
    assert (status, json.loads(answer)) == (200, {"text": f"{len(body)} bytes"})
    assert gateway.engine.last()["sha256"] == hashlib.sha256(body).hexdigest()
    assert gateway.state.total("held_bytes") == 0


def test_held_bytes_are_bounded(stage: Stage) -> None:
    gateway = stage.gateway(limits={"held_bytes": 2 << 20})
    status, headers, _ = gateway.ask("POST", "/v1/audio/transcriptions", b"x" * (3 << 20))
    assert (status, headers["retry-after"]) == (429, "1")
    assert gateway.state.total("held_bytes") == 0
    assert gateway.state.total("refused") == 1
    assert gateway.chat("hello")[0] == 200


def test_a_slow_reader_does_not_fill_memory_or_count_as_waiting(gateway: GatewayProcess) -> None:
    before, chunks = resident(gateway), gateway.state.total("chunks")

    def stalled() -> bool:
        seen = gateway.state.total("chunks")
        time.sleep(0.5)
        return seen > chunks + 10 and gateway.state.total("chunks") == seen

    with start_chat(gateway, "hello bytes=60000000"):
        wait_until(stalled, 20)
        assert gateway.state.total("waiting") == 0
        assert gateway.state.total("in_flight") == 1
        assert resident(gateway) - before < 16 << 20
    wait_until(lambda: gateway.state.total("in_flight") == 0, 2)


def test_deadline_is_504(stage: Stage) -> None:
    gateway = stage.gateway(limits={"request_timeout": 0.3})
    status, _, body = gateway.chat("hello delay=5")
    assert (status, json.loads(body)["error"]["type"]) == (504, "timeout_error")
    wait_until(lambda: gateway.engine.stats()["aborted"] == 1, 2)


def test_an_open_stream_outlives_the_deadline_and_the_drain(stage: Stage) -> None:
    gateway = stage.gateway(limits={"request_timeout": 0.3})
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(gateway.chat, "hello tokens=10 token_delay=0.1", stream=True)
        wait_until(lambda: gateway.state.total("in_flight") == 1)
        gateway.state.draining = True
        gateway.state.phase = Phase.DRAINING
        assert gateway.chat("hello")[0] == 503
        assert frames(answer.result()[2])[-1] == "[DONE]"


def test_what_waits_when_a_drain_begins_is_still_answered(stage: Stage) -> None:
    gateway = stage.gateway(limits={"max_in_flight": 1})
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(gateway.chat, "hello delay=0.3") for _ in range(3)]
        wait_until(lambda: gateway.state.total("queued") == 2)
        gateway.state.draining = True
        gateway.state.phase = Phase.DRAINING
        assert [answer.result()[0] for answer in answers] == [200, 200, 200]


@pytest.mark.parametrize("prefix", ["/directAccess", "/nim"])
def test_direct_access_has_a_deadline_of_its_own(stage: Stage, prefix: str) -> None:
    gateway = stage.gateway(limits={"direct_timeout": 0.3})
    payload = {"messages": [{"role": "user", "content": "hello delay=0.6"}]}
    assert gateway.post(f"{prefix}/v1/chat/completions", payload)[0] == 504
    assert gateway.post("/v1/chat/completions", payload)[0] == 200


@pytest.fixture
def upstream(stage: Stage) -> EngineProcess:
    """An engine on a port, which calls its model falcon."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return stage.engine("--served-model-name", "falcon", "small-falcon", port=port)


def in_front_of(stage: Stage, upstream: EngineProcess, **config: Any) -> GatewayProcess:
    return stage.gateway(upstream, engine_url=f"http://127.0.0.1:{upstream.port}", served_model=None, **config)


def test_upstream_by_address(stage: Stage, upstream: EngineProcess) -> None:
    gateway = in_front_of(stage, upstream)
    status, _, body = gateway.chat("hello")
    assert (status, json.loads(body)["object"]) == (200, "chat.completion")
    assert gateway.get("/models")[0] == 200


@pytest.mark.parametrize(
    ("fields", "sent"),
    [({}, "falcon"), ({"model": ""}, "falcon"), ({"model": "datarobot-deployed-llm"}, "falcon"),
     ({"model": "small-falcon"}, "small-falcon")],
)  # fmt: skip
def test_the_aliases_mean_the_model_of_an_upstream(
    stage: Stage, upstream: EngineProcess, fields: dict[str, str], sent: str
) -> None:
    gateway = in_front_of(stage, upstream)
    assert gateway.chat("hello", **fields)[0] == 200
    assert json.loads(upstream.last()["body"])["model"] == sent
    assert gateway.ask("POST", "/predict/", b"promptText\nhello\n")[0] == 200
    assert json.loads(upstream.last()["body"])["model"] == "falcon"
    assert [one["path"] for one in upstream.requests()].count("/v1/models") == 1


def test_an_upstream_that_has_the_name_of_the_contract_keeps_it(stage: Stage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    engine = stage.engine("--served-model-name", "falcon", "datarobot-deployed-llm", port=port)
    gateway = in_front_of(stage, engine)
    assert gateway.chat("hello", model="datarobot-deployed-llm")[0] == 200
    assert json.loads(engine.last()["body"])["model"] == "datarobot-deployed-llm"


def test_the_key_of_an_upstream_is_the_only_one_it_sees(stage: Stage, upstream: EngineProcess) -> None:
    gateway = in_front_of(stage, upstream, engine_key="up-key")
    gateway.post("/v1/completions", {"prompt": "hello"}, {"authorization": "Bearer theirs"})
    assert upstream.last()["headers"]["authorization"] == "Bearer up-key"


def test_an_upstream_without_keys_of_ours_gets_the_clients(stage: Stage, upstream: EngineProcess) -> None:
    gateway = in_front_of(stage, upstream)
    gateway.post("/v1/completions", {"prompt": "hello"}, {"authorization": "Bearer theirs"})
    assert upstream.last()["headers"]["authorization"] == "Bearer theirs"


def test_a_key_of_ours_does_not_reach_an_upstream(stage: Stage, upstream: EngineProcess) -> None:
    gateway = in_front_of(stage, upstream, api_keys=["ours"])
    assert gateway.post("/v1/completions", {"prompt": "hello"}, {"authorization": "Bearer ours"})[0] == 200
    assert "authorization" not in upstream.last()["headers"]
