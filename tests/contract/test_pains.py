"""Contract, section 6: what users of the incumbent feel. The stub engine makes each of them exact."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.contract.conftest import Start
from tests.contract.drivers import Service
from tests.contract.test_chat import chat

MIB = 1 << 20


def rows(*prompts: str) -> bytes:
    return "\n".join(["promptText", *prompts, ""]).encode()


def chat_of(service: Service, prompt: str, **fields: Any) -> Any:
    with service.client() as client:
        return client.post("/chat/completions", json=chat(prompt, **fields))


@pytest.fixture
def busy(controlled: Service) -> Iterator[Service]:
    """A service with one chat of 4 seconds under way."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(chat_of, controlled, "[[sleep 4]]")
        time.sleep(0.5)
        yield controlled
        assert answer.result().status_code == 200


@pytest.mark.parametrize("path", ["/ping", "/health/", "/info/"])
def test_probe_during_a_generation(busy: Service, path: str) -> None:
    """6: a probe during a long generation answers within a second."""
    started = time.monotonic()
    with busy.client() as client:
        assert client.get(path).status_code == 200
    assert time.monotonic() - started < 1


def test_chats_at_once(controlled: Service) -> None:
    """6: eight chats of a second at once take less than three."""
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: chat_of(controlled, f"at once {i} [[sleep 1]]"), range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert time.monotonic() - started < 3


def test_rows_at_once(controlled: Service) -> None:
    """6: ten rows of half a second take less than two seconds, in order."""
    started = time.monotonic()
    with controlled.client() as client:
        answer = client.post("/predict/", content=rows(*(f"row {i} [[sleep 0.5]]" for i in range(10))))
    assert time.monotonic() - started < 2
    assert [text.split()[2] for text in answer.json()["predictions"]] == [str(i) for i in range(10)]


def test_one_bad_row(controlled: Service) -> None:
    """6: one row that the engine refuses does not lose the others; its place stays, and its reason is given."""
    with controlled.client() as client:
        answer = client.post("/predict/", content=rows("first", "[[status 400]]", "third"))
    assert answer.status_code == 200
    assert answer.json()["predictions"] == ["echo: first", "", "echo: third"]
    extra = answer.json()["extraModelOutput"]
    reasons = [row[extra["columns"].index("error")] for row in extra["data"]]
    assert [bool(reason) for reason in reasons] == [False, True, False]


def test_prompts_stay_out_of_the_log(controlled: Service) -> None:
    """6: a row's prompt is not logged, not even when the engine refuses it."""
    with controlled.client() as client:
        client.post("/predict/", content=rows("canary-good", "canary-bad [[status 400]]"))
    time.sleep(0.3)
    assert "canary-" not in controlled.output()


def test_two_completions_a_row(launch: Start) -> None:
    """6: n=2 gives one prediction a row, the second completions beside them."""
    parameters = {"n": ("numeric", 2), "temperature": ("numeric", 0.7)}
    service = launch(ready=True, parameters=parameters)
    with service.client() as client:
        answer = client.post("/predict/", content=rows("one", "two")).json()
    assert answer["predictions"] == ["echo: one", "echo: two"]
    extra = answer["extraModelOutput"]
    second = extra["columns"].index("completion_2")
    assert [row[second] for row in extra["data"]] == ["echo: one", "echo: two"]


def test_long_prompt(controlled: Service) -> None:
    """6: a prompt over 131,072 characters is a row like another."""
    with controlled.client() as client:
        answer = client.post("/predict/", content=rows("x" * 140_000))
    assert answer.status_code == 200
    assert answer.json()["predictions"][0].startswith("echo: xxx")


def test_byte_order_mark(controlled: Service) -> None:
    """6: a byte order mark before the header is no part of the first column's name."""
    with controlled.client() as client:
        answer = client.post("/predict/", content=b"\xef\xbb\xbf" + rows("marked"))
    assert answer.status_code == 200
    assert answer.json()["predictions"] == ["echo: marked"]


def test_blank_line(controlled: Service) -> None:
    """6: a blank line between one-column rows is an empty row: N lines in, N answers out."""
    with controlled.client() as client:
        answer = client.post("/predict/", content=rows("first", "", "third"))
    assert answer.status_code == 200
    assert answer.json()["predictions"] == ["echo: first", "", "echo: third"]


def test_quoted_empty_cell(controlled: Service) -> None:
    """6: an empty prompt keeps its place."""
    with controlled.client() as client:
        answer = client.post("/predict/", content=b'id,promptText\n1,first\n2,""\n3,third\n')
    assert answer.status_code == 200
    predictions = answer.json()["predictions"]
    assert (len(predictions), predictions[0], predictions[2]) == (3, "echo: first", "echo: third")


def test_memory_of_one_long_answer(launch: Start) -> None:
    """6: one answer of 60,000 characters among 5,001 rows costs less than 250 MiB at the peak."""
    service = launch(ready=True)
    with service.client(120) as client:
        answer = client.post("/predict/", content=rows("[[chars 60000]]", *["short"] * 5000))
    assert [len(text) for text in answer.json()["predictions"][:2]] == [60000, 11]
    assert len(answer.json()["predictions"]) == 5001
    assert service.peak_memory() < 250 * MIB


@pytest.mark.parametrize("status", [500, 503])
def test_engine_errors_are_not_repeated(controlled: Service, status: int) -> None:
    """6: a chat that the engine fails is sent to it once."""
    prompt = f"not repeated [[status {status}]]"
    assert chat_of(controlled, prompt).status_code >= 500
    assert len(controlled.asked(prompt)) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"extra_body": {"a": 1}},
        {"extra_query": {"a": "1"}},
        {"extra_headers": {"X-Mine": "1"}},
        {"timeout": 0.2},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_client_arguments_in_a_request(controlled: Service, fields: dict[str, Any]) -> None:
    """6: extra_body, extra_query, extra_headers and timeout in a request are forwarded as fields, without effect."""
    prompt = f"fields like others {next(iter(fields))} [[sleep 0.6]]"
    assert chat_of(controlled, prompt, **fields).status_code == 200
    seen = controlled.asked(prompt)
    assert len(seen) == 1
    body = json.loads(seen[0]["body"])
    assert {name: body.get(name) for name in fields} == fields
    assert "x-mine" not in seen[0]["headers"]
    assert seen[0]["target"] == "/v1/chat/completions"


def test_direct_access_streams(controlled: Service) -> None:
    """6: /directAccess hands a stream on as it comes: the first chunk long before the last."""
    started = time.monotonic()
    body = chat("[[sleep 3]]", stream=True)
    with (
        controlled.client() as client,
        client.stream("POST", "/directAccess/v1/chat/completions", json=body) as answer,
    ):
        next(answer.iter_bytes())
        assert time.monotonic() - started < 1.5


def test_direct_access_keeps_chunked_replies(controlled: Service) -> None:
    """6: /directAccess hands on chunked replies whole."""
    with controlled.client() as client:
        answer = client.post("/directAccess/v1/chat/completions", json=chat("whole", stream=True))
    assert answer.text.endswith("data: [DONE]\n\n")


def test_direct_access_keeps_gzip(controlled: Service) -> None:
    """6: /directAccess hands on compressed replies as they are."""
    with (
        controlled.client() as client,
        client.stream("POST", "/directAccess/v1/embeddings", json={"input": "zip"}) as answer,
    ):
        assert answer.headers["Content-Encoding"] == "gzip"
        raw = b"".join(answer.iter_raw())
    assert json.loads(gzip.decompress(raw))["object"] == "list"


def leave(service: Service, path: str, body: bytes, after: float) -> None:
    """Send a request and close the connection after some seconds."""
    host, port = service.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {{}}\r\nContent-Length: {len(body)}\r\n\r\n"
    kind = "text/csv" if body.startswith(b"promptText") else "application/json"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.format(kind).encode() + body)
        time.sleep(after)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_leaving_client_ends_the_generation(controlled: Service, stream: bool) -> None:
    """6: when a chat's client leaves, the engine stops working for it within two seconds."""
    prompt = f"leaving {stream} [[sleep 8]]"
    leave(controlled, "/chat/completions", json.dumps(chat(prompt, stream=stream)).encode(), 1)
    assert [seen["outcome"] for seen in controlled.asked(prompt)] == ["aborted"], "within two seconds"


def test_leaving_client_ends_its_rows(launch: Start) -> None:
    """6: when the client of a CSV leaves, the engine stops working for its rows within two seconds."""
    service = launch(ready=True)
    leave(service, "/predict/", rows(*["leaving rows [[sleep 4]]"] * 6), 1)
    service.wait_for(lambda: service.engine_requests("leaving rows"), 2, "the engine was not told")
    time.sleep(1)
    seen = service.engine_requests("leaving rows")
    assert {entry["outcome"] for entry in seen} == {"aborted"}
    time.sleep(4)
    assert service.engine_requests("leaving rows") == seen, "rows were sent after the client had left"


def test_sigterm_takes_the_engine_along(launch: Start) -> None:
    """4: after SIGTERM the product has ended with 0 and no process of it is left."""
    service = launch(ready=True)
    assert service.process
    service.process.terminate()
    assert service.exit_code(10) == 0
    service.wait_for(lambda: not service.processes(), 1, "processes are left")


def test_sigkill_leaves_no_engine(launch: Start) -> None:
    """4: after SIGKILL of the product's first process no engine is left."""
    service = launch(ready=True)
    assert service.process
    service.process.kill()
    service.wait_for(lambda: not service.processes(), 5, "processes are left")
