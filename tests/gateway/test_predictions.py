from __future__ import annotations

import csv
import http.client
import io
import json
import os
import signal
import socket
import statistics
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import GatewayProcess, Stage, wait_until
from vllm_dropin.gateway.state import Phase

CSV = {"content-type": "text/csv"}
PATHS = ["/predict/", "/predict", "/predictions/", "/predictions", "/invocations", "/invocations/"]
Answer = tuple[int, dict[str, str], Any]


def send(
    gateway: GatewayProcess, data: bytes, headers: dict[str, str] | None = None, path: str = "/predict/"
) -> Answer:
    """One raw body; the reply's JSON."""
    status, got, body = gateway.ask("POST", gateway.config.url_prefix + path, data, CSV if headers is None else headers)
    return status, got, json.loads(body)


def table(*prompts: str, column: str = "promptText") -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([[column], *([prompt] for prompt in prompts)])
    return text.getvalue().encode()


def form(data: bytes, disposition: str = 'form-data; name="X"; filename="rows.csv"', kind: str = "text/csv") -> Any:
    boundary = uuid.uuid4().hex
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="note"\r\n\r\nignored\r\n'
        f"--{boundary}\r\nContent-Disposition: {disposition}\r\nContent-Type: {kind}\r\n\r\n"
    ).encode()
    body += data + f"\r\n--{boundary}--\r\n".encode()
    return body, {"content-type": f"multipart/form-data; boundary={boundary}"}


def scored(prompt: str) -> str:
    """What the fake engine says with its default of five words."""
    words = prompt.split()
    return " ".join(words[at % len(words)] for at in range(5))


@pytest.mark.parametrize("path", PATHS)
def test_every_route_scores_rows_in_order(gateway: GatewayProcess, path: str) -> None:
    status, headers, answer = send(gateway, table("a", "b", "c"), path=path)
    assert (status, answer) == (200, {"predictions": [scored("a"), scored("b"), scored("c")]})
    assert "x-row-errors" not in headers
    assert headers["x-drum-version"] == "1.17.20"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/csv"},
        {"content-type": "text/plain; charset=UTF-8"},
        {"content-type": 'Text/CSV; charset="utf-8"'},
    ],
)
def test_raw_bodies(gateway: GatewayProcess, headers: dict[str, str]) -> None:
    assert send(gateway, table("ä"), headers)[2] == {"predictions": [scored("ä")]}


@pytest.mark.parametrize("kind", ["text/csv", "application/octet-stream", "application/vnd.ms-excel"])
def test_the_file_part_of_a_form(gateway: GatewayProcess, kind: str) -> None:
    body, headers = form(table("a", "b"), kind=kind)
    assert send(gateway, body, headers)[2] == {"predictions": [scored("a"), scored("b")]}


@pytest.mark.parametrize(
    "name", ['filename="rows.csv"', 'filename=""', "filename*=UTF-8''r%C3%B6ws.csv", 'filename="röws.csv"']
)
def test_the_name_of_the_file_does_not_matter(gateway: GatewayProcess, name: str) -> None:
    body, headers = form(table("a"), f'form-data; name="X"; {name}')
    assert send(gateway, body, headers)[2] == {"predictions": [scored("a")]}


@pytest.mark.parametrize("charset", ["utf-16", "utf-16-le", "latin-1"])
def test_the_charset_of_a_body_and_of_a_part_is_honoured(gateway: GatewayProcess, charset: str) -> None:
    data = table("äö").decode().encode(charset)
    kind = f"text/csv; charset={charset}"
    assert send(gateway, data, {"content-type": kind})[2] == {"predictions": [scored("äö")]}
    body, headers = form(data, kind=kind)
    assert send(gateway, body, headers)[2] == {"predictions": [scored("äö")]}


@pytest.mark.parametrize(
    ("data", "headers", "words"),
    [
        (b"", CSV, "body is empty"),
        (b"\n", CSV, "no header"),
        (table("a"), {"content-type": "application/json"}, "'application/json' is not taken"),
        (table("a"), {"content-type": "application/x-www-form-urlencoded"}, "is not taken"),
        (table("a"), {"content-type": "text/csv", "content-encoding": "gzip"}, "compressed"),
        (table("a"), {"content-type": "text/csv; charset=nonsense"}, "charset 'nonsense'"),
        (b'promptText\n"a', CSV, "never closed"),
        (b"id,prompt\n1,a\n", CSV, "'promptText' is missing; the CSV has 'id', 'prompt'"),
        (*form(table("a"), 'form-data; name="X"'), "no file part X"),
        (*form(table("a"), 'form-data; name="Y"; filename="rows.csv"'), "no file part X"),
        (*form(b""), "part X is empty"),
        (b"no form", {"content-type": "multipart/form-data; boundary=b"}, "multipart"),
        (b"no form", {"content-type": "multipart/form-data"}, "multipart"),
        (b"", {"content-type": "multipart/form-data; boundary=b"}, "cut short"),
        (form(table("a"))[0][:-20], {"content-type": "multipart/form-data; boundary=b"}, "multipart"),
    ],
)
def test_what_cannot_be_scored_is_refused(gateway: GatewayProcess, data: bytes, headers: Any, words: str) -> None:
    status, _, answer = send(gateway, data, headers)
    assert status == 422
    assert answer["message"].startswith("ERROR: ")
    assert words in answer["message"]


def test_a_form_that_is_cut_short_is_refused(gateway: GatewayProcess) -> None:
    body, headers = form(table("a", "b"))
    status, _, answer = send(gateway, body[: -len(headers["content-type"])], headers)
    assert (status, answer["message"]) == (422, "ERROR: the multipart body is cut short")


def test_bytes_that_are_no_text_are_named_by_offset(gateway: GatewayProcess) -> None:
    status, _, answer = send(gateway, b"promptText\nab\xff\n")
    assert status == 400
    assert "byte 13 is not UTF-8" in answer["message"]


def test_a_header_alone_is_no_rows(gateway: GatewayProcess) -> None:
    status, headers, answer = send(gateway, table())
    assert (status, answer) == (200, {"predictions": []})
    assert "x-row-errors" not in headers


def test_failed_rows_keep_their_place_and_tell_why(gateway: GatewayProcess) -> None:
    long = "word " * 3000
    status, headers, answer = send(gateway, table("a", long, "", "status=400", "b"))
    assert status == 200
    assert headers["x-row-errors"] == "3"
    assert answer["predictions"] == [scored("a"), "", "", "", scored("b")]
    extra = answer["extraModelOutput"]
    assert (extra["columns"], extra["index"]) == (["error"], [0, 1, 2, 3, 4])
    errors = [cells[0] for cells in extra["data"]]
    assert errors[0] is errors[4] is None
    assert "maximum context length" in errors[1] and "word word" not in errors[1]
    assert errors[2] == "the prompt is empty"
    assert errors[3] == "the engine answered with status 400: asked for 400"


def test_ten_thousand_rows_of_which_137_are_broken(gateway: GatewayProcess) -> None:
    broken = set(range(0, 10_000, 73))
    lines = [
        f"{at},{'' if at in broken else f'p{at}'}" if at % 2 else f"{at}" if at in broken else f"{at},p{at}"
        for at in range(10_000)
    ]
    status, headers, answer = send(gateway, "\n".join(["id,promptText", *lines]).encode())
    assert status == 200
    assert headers["x-row-errors"] == "137" == str(len(broken))
    assert answer["predictions"] == ["" if at in broken else scored(f"p{at}") for at in range(10_000)]
    assert {at for at, cells in enumerate(answer["extraModelOutput"]["data"]) if cells[0]} == broken


def test_two_completions_are_one_output_with_a_further_column(stage: Stage) -> None:
    gateway = stage.gateway(generation={"n": 2, "system_prompt": "Be kind.", "temperature": 0.5, "max_tokens": 3})
    answer = send(gateway, table("a", "b"))[2]
    assert answer == {
        "predictions": ["a a a", "b b b"],
        "extraModelOutput": {"columns": ["completion_2"], "index": [0, 1], "data": [["a a a #1"], ["b b b #1"]]},
    }
    asked = json.loads(gateway.engine.last()["body"])
    assert asked["messages"][0] == {"role": "system", "content": "Be kind."}
    assert (asked["n"], asked["temperature"], asked["max_tokens"]) == (2, 0.5, 3)
    assert asked["model"] == "datarobot-deployed-llm"


def test_the_deployment_form_under_a_prefix_with_another_column(stage: Stage) -> None:
    gateway = stage.gateway(
        url_prefix="/service",
        generation={"prompt_column_name": "question", "temperature": 0},
        deployment={"target_name": "resultText"},
    )
    status, headers, answer = send(gateway, b"id,question\n1,a\n2,status=400\n")
    assert (status, headers["x-row-errors"]) == (200, "1")
    first, second = answer["data"]
    assert first == {
        "prediction": scored("a"),
        "predictionValues": [{"label": "resultText", "value": scored("a")}],
        "rowId": 0,
        "extraModelOutput": {"error": None},
    }
    assert (second["prediction"], second["rowId"]) == ("", 1)
    assert "400" in second["extraModelOutput"]["error"]
    assert json.loads(gateway.engine.last()["body"])["temperature"] == 0
    assert send(gateway, table(column="question"))[2] == {"data": []}


def test_row_errors_can_fail_the_request(stage: Stage) -> None:
    gateway = stage.gateway(row_errors="fail")
    assert send(gateway, table("a"))[0] == 200
    started = gateway.engine.stats()["started"]
    status, _, answer = send(gateway, b'promptText\na\n""\nb\n')
    assert (status, answer["message"]) == (422, "ERROR: 1 of 3 rows failed: row 1 (line 3): the prompt is empty")
    assert gateway.engine.stats()["started"] == started  # known before the engine is asked
    status, _, answer = send(gateway, table("a", *["status=400"] * 12))
    assert status == 422
    assert "12 of 13 rows failed: row 1 (line 3): " in answer["message"]
    assert answer["message"].endswith("and 2 more")


@pytest.mark.parametrize(
    ("prompts", "status"),
    [(["", ""], 422), (["status=400", ""], 422), (["status=404"], 502), (["status=400", "status=401"], 502)],
)
def test_when_all_rows_fail_the_request_fails(gateway: GatewayProcess, prompts: list[str], status: int) -> None:
    got, _, answer = send(gateway, table(*prompts))
    assert got == status
    assert answer["message"].startswith(f"ERROR: {len(prompts)} of {len(prompts)} rows failed: row 0 (line 2)")


def test_a_wrong_target_type(stage: Stage) -> None:
    status, _, answer = send(stage.gateway(target_type="binary"), table("a"))
    assert status == 422
    assert "textgeneration" in answer["message"]


@pytest.mark.parametrize(
    ("phase", "status"),
    [(Phase.STARTING, 503), (Phase.LOADING, 503), (Phase.COMPILING, 503), (Phase.FAILED, 513), (Phase.STOPPED, 503)],
)
def test_rows_are_refused_before_the_engine_is_ready_and_after_its_end(stage: Stage, phase: Phase, status: int) -> None:
    gateway = stage.gateway(ready=False)
    gateway.state.phase = phase
    got, headers, answer = send(gateway, table("a"))
    assert got == status
    assert isinstance(answer["message"], str) and answer["message"]
    assert ("retry-after" in headers) == (status == 503)


def test_draining_refuses_new_rows_and_finishes_accepted_ones(stage: Stage) -> None:
    gateway = stage.gateway(limits={"row_concurrency": 2})
    answers: list[Answer] = []
    client = threading.Thread(target=lambda: answers.append(send(gateway, table(*["delay=0.1 a"] * 10))))
    client.start()
    wait_until(lambda: gateway.state.total("rows_in_flight") == 10)
    gateway.state.draining = True
    gateway.state.phase = Phase.DRAINING
    assert send(gateway, table("b"))[0] == 503
    client.join(10)
    assert answers[0][0] == 200
    assert len(answers[0][2]["predictions"]) == 10
    assert "extraModelOutput" not in answers[0][2]
    wait_until(lambda: gateway.state.total("rows_in_flight") == 0)


def test_rows_wait_for_a_restart_that_is_under_way(stage: Stage) -> None:
    gateway = stage.gateway()
    gateway.state.phase = Phase.RESTARTING
    gateway.engine.stop()
    threading.Timer(0.5, gateway.restart_engine).start()
    status, _, answer = send(gateway, table("a", "b"))
    assert (status, answer) == (200, {"predictions": [scored("a"), scored("b")]})


def test_rows_in_flight_at_a_crash_are_sent_again(stage: Stage) -> None:
    gateway = stage.gateway(limits={"row_concurrency": 16})
    prompts = [f"delay=0.05 p{at}" for at in range(200)]
    answers: list[Answer] = []
    client = threading.Thread(target=lambda: answers.append(send(gateway, table(*prompts))))
    client.start()
    wait_until(lambda: gateway.state.total("rows") > 40)
    assert gateway.engine.process is not None
    os.kill(gateway.engine.process.pid, signal.SIGKILL)
    time.sleep(0.3)  # the supervisor notices within a second; until then the phase is wrong
    gateway.restart_engine()
    client.join(30)
    status, headers, answer = answers[0]
    assert status == 200 and "x-row-errors" not in headers
    assert answer == {"predictions": [scored(prompt) for prompt in prompts]}
    assert gateway.state.total("engine_retries") >= 16


def test_a_row_that_kills_the_engine_fails_and_the_others_do_not(stage: Stage) -> None:
    gateway = stage.gateway(limits={"row_concurrency": 8})
    stop = threading.Event()

    def supervise() -> None:
        while not stop.wait(0.02):
            if not gateway.engine.alive:
                gateway.restart_engine()

    supervisor = threading.Thread(target=supervise)
    supervisor.start()
    try:
        prompts = [f"p{at} delay=0.01" for at in range(60)]
        prompts[20] = "die=1"
        status, headers, answer = send(gateway, table(*prompts))
    finally:
        stop.set()
        supervisor.join(20)
    assert (status, headers["x-row-errors"]) == (200, "1")
    assert answer["extraModelOutput"]["data"][20] == ["engine crashed on this row"]
    assert [at for at, text in enumerate(answer["predictions"]) if not text] == [20]
    assert gateway.state.generation == 4  # at the third death it was alone


def test_leaving_aborts_the_engines_work(stage: Stage) -> None:
    gateway = stage.gateway(limits={"row_concurrency": 8})
    client = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=10)
    client.request("POST", "/predict/", table(*["delay=60 a"] * 50), CSV)
    wait_until(lambda: gateway.engine.stats()["running"] == 8)
    assert gateway.state.total("rows_in_flight") == 50
    assert gateway.state.total("held_bytes") > 0
    client.close()
    wait_until(lambda: gateway.engine.stats()["running"] == 0, 2)
    wait_until(lambda: gateway.state.total("rows_in_flight") == 0, 2)
    assert gateway.engine.stats()["aborted"] == 8
    wait_until(lambda: gateway.state.total("held_bytes") == 0, 2)
    assert gateway.state.total("rows_at_engine") == 0
    assert send(gateway, table("a"))[0] == 200


def test_counters(stage: Stage) -> None:
    gateway = stage.gateway()
    send(gateway, table("a", "status=400", ""))
    state = gateway.state
    assert (state.total("rows"), state.total("row_errors")) == (3, 2)
    gauges = ("in_flight", "rows_in_flight", "rows_at_engine", "held_bytes")
    wait_until(lambda: not any(state.total(gauge) for gauge in gauges))


def test_two_workers_keep_one_bound(stage: Stage) -> None:
    gateway = stage.gateway(workers=2, limits={"row_concurrency": 4})
    clients = [threading.Thread(target=send, args=(gateway, table(*["delay=0.02 a"] * 40))) for _ in range(6)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(30)
    assert gateway.engine.stats()["finished"] == 240
    assert gateway.engine.stats()["most_running"] <= 5  # sums are read without a lock between workers


def test_large_cells_and_answers(stage: Stage) -> None:
    gateway = stage.gateway(stage.engine("--max-model-len", "5000000"), limits={"spool_above": 1024})
    prompts = ["x" * 1_000_000, "long words " * 1_000_000, "bytes=300000"]
    body, headers = form(table(*prompts))
    answer = send(gateway, body, headers)[2]
    assert answer["predictions"] == [" ".join(["x" * 1_000_000] * 5), scored("long words"), "x" * 300_000]


def test_bodies_above_the_limit_and_above_what_may_be_held(stage: Stage) -> None:
    gateway = stage.gateway(limits={"row_body": 10_000, "held_bytes": 1 << 20})
    assert send(gateway, table("x" * 20_000))[0] == 413
    gateway.state.slots[0].add("held_bytes", (1 << 20) - 100)
    status, headers, _ = send(gateway, table("x" * 5000))
    assert (status, "retry-after" in headers) == (429, True)
    gateway.state.slots[0].add("held_bytes", 100 - (1 << 20))
    assert send(gateway, table("x" * 5000))[0] == 200


def test_no_more_requests_at_once_than_there_is_memory_for(stage: Stage) -> None:
    """Each counts for 64 KiB, though it has one row of a few bytes."""
    gateway = stage.gateway(limits={"held_bytes": 1 << 20})
    with ThreadPoolExecutor(15) as pool:
        accepted = [pool.submit(send, gateway, table("hi delay=1")) for _ in range(15)]
        wait_until(lambda: gateway.state.total("rows_in_flight") == 15)
        for _ in range(8):
            status, headers, _ = send(gateway, table("hi"))
            assert (status, headers["retry-after"]) == (429, "1")
        assert [answer.result()[0] for answer in accepted] == [200] * 15
    assert send(gateway, table("hi"))[0] == 200
    wait_until(lambda: gateway.state.total("held_bytes") == 0)  # a moment after the client has its answer


LINES = b"Tell me more\n" * 2_000_000


@pytest.mark.parametrize("whole", [form, lambda data: (data, CSV)], ids=["form", "raw"])
@pytest.mark.parametrize("data", [LINES + b'"never closed', b'"%b"\n"never closed' % LINES], ids=["rows", "one cell"])
def test_other_requests_are_answered_while_a_large_table_is_read(
    gateway: GatewayProcess, data: bytes, whole: Callable[[bytes], Any]
) -> None:
    data, headers = whole(b"promptText\n" + data)
    answers: list[Answer] = []
    client = threading.Thread(target=lambda: answers.append(send(gateway, data, headers)))
    client.start()
    wait_until(lambda: gateway.state.total("held_bytes") >= len(data), 20)
    seconds = []
    while client.is_alive():
        started = time.monotonic()
        assert gateway.get("/livez")[0] == 200
        seconds.append(time.monotonic() - started)
    client.join()
    assert answers[0][0] == 422
    # A loop that is held up answers one or two, at the end.
    assert statistics.median(seconds) < 0.1
    assert len(seconds) >= 5


def test_a_client_that_leaves_in_the_middle_of_its_upload(gateway: GatewayProcess) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), 10) as client:
        head = b"POST /predict/ HTTP/1.1\r\nHost: a\r\nContent-Type: text/csv\r\nContent-Length: 100000\r\n\r\n"
        client.sendall(head + b"promptText\nabc")
        wait_until(lambda: gateway.state.total("held_bytes") > 0)
    wait_until(lambda: gateway.state.total("held_bytes") == 0)
    assert send(gateway, table("a"))[0] == 200
