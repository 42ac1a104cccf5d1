"""Clients that mean harm, or behave as if they did, and one that does not: it must not notice them."""

from __future__ import annotations

import json
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GatewayProcess, Stage
from tests.faults.figures import record
from vllm_dropin.gateway.errors import ERROR_BYTES
from vllm_dropin.gateway.worker import find_temporary_folder

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
KEY = b"Authorization: Bearer the-key\r\n"
HUGE_NUMBERS: list[Any] = [9, 16384, 10**30, "16384", " 9 ", "9.0", 9.0, 1e300]
SMALL_NUMBERS: list[Any] = [None, 1, 8, "8", 8.0, "many", []]


@pytest.fixture(scope="module")
def strict(staged: Stage) -> GatewayProcess:
    """A gateway whose patience is short."""
    return staged.gateway(api_keys=["the-key"], limits={"idle_timeout": 1.5, "body_grace": 1.0, "json_body": 1 << 20})


@pytest.fixture(scope="module")
def front(staged: Stage) -> GatewayProcess:
    """A gateway with default bounds."""
    return staged.gateway()


@pytest.fixture(scope="module")
def drum(staged: Stage, front: GatewayProcess) -> GatewayProcess:
    """One that has the engine's errors in the incumbent's form."""
    return staged.gateway(front.engine, error_status="drum")


def cut_after(port: int, start: bytes, trickle: bytes, every: float = 0.1, limit: float = 8) -> tuple[float, bytes]:
    """Seconds until the server closes a connection that goes on sending a little, and what it said."""
    said = b""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(every)
        connection.sendall(start)
        started = time.monotonic()
        while time.monotonic() - started < limit:
            try:
                piece = connection.recv(65536)
                if not piece:
                    break
                said += piece
            except TimeoutError:
                pass
            except OSError:
                break
            try:
                connection.sendall(trickle)
            except OSError:
                break
        return time.monotonic() - started, said


class GoodClient:
    """Asks every 20 ms meanwhile; `worst` is the longest that it had to wait."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self._gateway = gateway
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.statuses: set[int] = set()
        self.worst = 0.0

    def _ask(self) -> None:
        while not self._stop.wait(0.02):
            started = time.monotonic()
            body = {"messages": [{"role": "user", "content": "hi"}]}
            self.statuses.add(self._gateway.post("/v1/chat/completions", body, {"Authorization": "Bearer the-key"})[0])
            self.worst = max(self.worst, time.monotonic() - started)

    def __enter__(self) -> GoodClient:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)


def test_tricklers_are_cut_off_and_a_good_client_does_not_notice(strict: GatewayProcess) -> None:
    length = b"Content-Length: 900000\r\n\r\n{"
    kinds = {
        "header": (HEAD, b"X-A: b\r\n"),
        "half a line of a header": (HEAD + b"X-A: ", b"b"),
        "nothing at all": (b"", b""),
        "body": (HEAD + KEY + length, b" "),
        "chunks": (HEAD + KEY + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        "body without a key": (HEAD + length, b" "),
        "body to nowhere": (b"POST /nope HTTP/1.1\r\nHost: x\r\n" + KEY + length, b" "),
        "rows": (b"POST /predict/ HTTP/1.1\r\nHost: x\r\n" + KEY + b"Content-Length: 900000\r\n\r\n{", b"a"),
    }
    results: dict[str, list[tuple[float, bytes]]] = {kind: [] for kind in kinds}

    def attack(kind: str, start: bytes, trickle: bytes) -> None:
        results[kind].append(cut_after(strict.port, start, trickle))

    threads = [threading.Thread(target=attack, args=(kind, *kinds[kind])) for kind in kinds for _ in range(12)]
    with GoodClient(strict) as good:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    for kind, cuts in results.items():
        assert len(cuts) == 12
        assert max(seconds for seconds, _ in cuts) < 5, kind
        assert not any(b" 200 " in said for _, said in cuts), kind
    for kind in ("body", "chunks", "rows"):
        assert all(said.startswith(b"HTTP/1.1 408 ") for _, said in results[kind]), kind
    for kind, status in (("body without a key", b" 401 "), ("body to nowhere", b" 404 ")):
        assert all(status in said and seconds < 1 for seconds, said in results[kind]), kind
    assert good.statuses == {200}
    record(18, "the good client's longest wait", good.worst)
    assert good.worst < 1
    assert strict.state.total("held_bytes") == strict.state.total("in_flight") == 0


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions", "/chat/completions", "/v1/completions", "/directAccess/v1/chat/completions",
        "/nim/v1/chat/completions", "/directAccess/v1/completions", "/nim/v1/completions",
    ],
)  # fmt: skip
def test_completions_are_bounded_by_every_door(front: GatewayProcess, path: str) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi"}
    before = front.engine.stats()["started"]
    for name in ("n", "best_of"):
        for number in HUGE_NUMBERS:
            status, _, answer = front.post(path, {**body, name: number})
            error = json.loads(answer)["error"]
            assert (status, error["code"], error["type"]) == (400, 400, "invalid_request_error"), number
            assert error["message"] == f"{name} must be at most 8: the server's --max-n"
    many = front.post(path, {**body, "prompt": ["a"] * 2049})
    assert many[0] == 400
    assert b"prompt may have at most 2048 members" in many[2]
    assert front.ask("POST", path, b'{"n": 16384', {"content-type": "application/json"})[0] == 400
    assert front.ask("POST", path, b'{"n": 1, "n": 16384, "prompt": "hi"}')[0] == 400
    assert front.engine.stats()["started"] == before
    for number in SMALL_NUMBERS[:3]:
        assert front.post(path, {**body, "n": number, "best_of": number})[0] == 200
    assert b"2048 members" not in front.post(path, {**body, "prompt": [1] * 3000})[2]  # one prompt of many tokens
    raw = b'{ "prompt":"hi",  "messages":[{"role":"user","content":"hi"}],"model":"datarobot-deployed-llm" , "n":8}'
    assert front.ask("POST", path, raw)[0] == 200
    if "chat" not in path:
        assert front.engine.last()["body"].encode() == raw


@pytest.mark.parametrize("door", ["", "/directAccess", "/nim"])
@pytest.mark.parametrize(
    ("path", "name", "member"),
    [
        ("/v1/responses", "input", {"type": "x"}),
        ("/v1/responses", "input", 1),
        ("/v1/responses", "tools", {}),
        ("/v1/messages", "messages", 1),
        ("/v1/messages/count_tokens", "messages", {}),
        ("/v1/chat/completions", "messages", {"role": "user", "content": "hi"}),
        ("/v1/chat/completions", "tools", {}),
        ("/v1/completions", "prompt", ""),
        ("/v1/completions", "stop_token_ids", "x"),
    ],
)
def test_a_list_is_bounded_by_every_door(front: GatewayProcess, door: str, path: str, name: str, member: Any) -> None:
    """12,000 wrong items of `input` made vLLM keep 2.8 million errors, until the kernel ended it."""
    before = front.engine.stats()["started"]
    status, _, answer = front.post(door + path, {name: [member] * 2049})
    assert (status, json.loads(answer)["error"]["message"]) == (400, f"{name} may have at most 2048 members")
    first = 1 if name == "prompt" else member
    assert front.post(door + path, {name: [first, *[member] * 2048]})[0] == 400
    assert front.engine.stats()["started"] == before
    front.post(door + path, {name: [member] * 2048})
    assert front.engine.stats()["started"] == before + 1


@pytest.mark.parametrize("deeper", [1, 2])
def test_the_lists_within_a_list_are_bounded_together(front: GatewayProcess, deeper: int) -> None:
    """A million wrong parts of one input item are as bad as many wrong items."""
    before = front.engine.stats()["started"]

    def body(count: int) -> dict[str, Any]:
        parts: Any = [{}] * count
        for _ in range(deeper):
            parts = {"content": parts}
        return {"input": [parts, parts]}

    status, _, answer = front.post("/v1/responses", body(4097))
    assert (status, b"the lists within input may have at most 8192 members together" in answer) == (400, True)
    assert front.engine.stats()["started"] == before
    front.post("/v1/responses", body(4095))
    front.post("/v1/completions", {"prompt": [[1] * 5000, [2] * 5000]})  # prompts as numbers of tokens
    assert front.engine.stats()["started"] == before + 2


@pytest.mark.parametrize("number", SMALL_NUMBERS)
def test_what_is_no_number_above_the_bound_is_the_engines_to_judge(front: GatewayProcess, number: Any) -> None:
    before = front.engine.stats()["started"]
    front.post("/v1/completions", {"prompt": "hi", "n": number})
    assert front.engine.stats()["started"] == before + 1


def test_the_bound_is_the_folders_to_raise(stage: Stage) -> None:
    gateway = stage.gateway(limits={"max_n": 12}, generation={"n": 12})
    assert len(json.loads(gateway.chat("hi")[2])["choices"]) == 12
    assert gateway.chat("hi", n=13)[0] == 400
    table = json.loads(gateway.ask("POST", "/predict/", b"promptText\nhi\n")[2])
    assert table["extraModelOutput"]["columns"][-1] == "completion_12"


@pytest.mark.parametrize(
    ("method", "path", "headers", "body"),
    [
        ("X" * 30_000, "/ping", {}, b""),
        ("GET", "/" + "n" * 30_000, {}, b""),
        ("POST", "/predict/", {"content-type": "text/csv; charset=" + "q" * 30_000}, b"a\n"),
        ("POST", "/predict/", {"content-type": "x" * 30_000}, b"a\n"),
        ("POST", "/predict/", {"content-type": "multipart/form-data; boundary=" + "b" * 30_000}, b"a\n"),
        ("POST", "/predict/", {}, b",".join(b"\x01" * 500 for _ in range(2000)) + b"\n1\n"),
        ("POST", "/predict/", {}, b"promptText\n" + b",,,\n" * 30_000),
        ("POST", "/v1/chat/completions", {}, b"[" * 100_000),
        ("POST", "/v1/chat/completions", {}, b'{"datarobot_association_id": "' + b"i" * 30_000 + b'"}'),
        ("POST", "/v1/chat/completions", {}, b'{"messages": "' + b"m" * 900_000 + b'"}'),
        ("POST", "/chat/completions", {}, b'{"messages": [{"content": "h"}], "model": "' + b"\\u0001" * 30_000 + b'"}'),
        ("POST", "/v1/completions", {}, b'{"model": "' + b'\\"' * 30_000 + b'", "prompt": "hi"}'),
    ],
)  # fmt: skip
def test_no_error_is_longer_than_16_kib(
    front: GatewayProcess, drum: GatewayProcess, method: str, path: str, headers: dict[str, str], body: bytes
) -> None:
    for gateway in (front, drum):
        status, _, answer = gateway.ask(method, path, body, headers)
        assert 400 <= status <= 500
        assert len(answer) <= ERROR_BYTES
        assert json.loads(answer)


def full_disk(gateway: GatewayProcess) -> None:
    """No file of its worker may grow beyond 64 KiB: what a full disk is like, to those who write."""
    resource.prlimit(gateway.workers[0].pid, resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))


@pytest.mark.parametrize("kind", ["body", "form", "answers"])
def test_a_full_disk_is_said_and_leaves_nothing_behind(stage: Stage, kind: str) -> None:
    gateway = stage.gateway(limits={"spool_above": 256 << 10})
    full_disk(gateway)
    large = b"promptText\n" + b"x" * 3_000_000 + b"\n"
    sent: Callable[[], tuple[int, dict[str, str], bytes]] = {
        "body": lambda: gateway.ask("POST", "/predict/", large, {"content-type": "text/csv"}),
        "form": lambda: gateway.ask(
            "POST",
            "/predict/",
            b'--b\r\nContent-Disposition: form-data; name="X"; filename="r"\r\n\r\n' + large + b"\r\n--b--\r\n",
            {"content-type": "multipart/form-data; boundary=b"},
        ),
        "answers": lambda: gateway.ask("POST", "/predict/", b"promptText\n" + b"hi bytes=2000000\n" * 6),
    }[kind]
    status, headers, body = sent()
    assert (status, headers["retry-after"]) == (503, "5")
    assert json.loads(body) == {"message": "the server has no room on its disk for the request"}
    assert gateway.state.total("held_bytes") == gateway.state.total("rows_in_flight") == 0
    assert gateway.ask("POST", "/predict/", b"promptText\nhi\n")[0] == 200


def test_without_a_temporary_folder_the_runtime_folder_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    find_temporary_folder(tmp_path)
    with tempfile.NamedTemporaryFile() as file:
        assert Path(file.name).parent == tmp_path
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "usual")])
    (tmp_path / "usual").mkdir()
    find_temporary_folder(tmp_path)
    assert tempfile.gettempdir() == str(tmp_path / "usual")
