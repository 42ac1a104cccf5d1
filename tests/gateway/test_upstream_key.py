"""SIGHUP renews the key of an upstream: the whole service, in front of a server that asks for one."""

from __future__ import annotations

import http.client
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.serving import serving
from tests.supervisor.test_renewal import Serving

KEPT = "keys and certificate stay as they were"
READ = "0 key(s) and the key of the upstream read again"


class Upstream(ThreadingHTTPServer):
    """Lists its model and answers chats for those who have one of its `keys`; counts what each key was told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Asked)
        self.keys = {"up-one"}
        self.told: Counter[tuple[str, int]] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Asked(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_GET(self) -> None:
        self.answer({"object": "list", "data": [{"id": "falcon", "object": "model", "max_model_len": 64}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"object": "chat.completion", "choices": []})

    def answer(self, payload: object) -> None:
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        status = 200 if key in self.server.keys else 401
        self.server.told[key, status] += 1
        body = json.dumps(payload if status == 200 else {"error": {"message": "no", "code": 401}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with serving(Upstream()) as server:
        yield server


def chat(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "hi"}]}')
        return connection.getresponse().status
    finally:
        connection.close()


def test_the_key_of_an_upstream_is_rotated_and_costs_no_request(upstream: Upstream, tmp_path: Path) -> None:
    file = tmp_path / "up"
    file.write_text("# ours there\nup-one\n")
    file.chmod(0o600)
    # The last --upstream counts: Serving's own leads nowhere.
    service = Serving(tmp_path, "--upstream", upstream.url, "--upstream-key-file", str(file), "--workers", "2")
    statuses: Counter[int] = Counter()
    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(0.01):
            statuses[chat(service.port)] += 1

    clients = [threading.Thread(target=ask) for _ in range(3)]
    try:
        wait_until(lambda: service.status("/readyz") == 200, 10)
        for client in clients:
            client.start()
        upstream.keys = {"up-one", "up-two"}
        file.write_text("# none\n")
        service.hang_up(KEPT)
        assert f"{file} has no key" in service.output()
        file.write_text("up-two\n")
        service.hang_up(READ)
        old = upstream.told["up-one", 200]
        wait_until(lambda: upstream.told["up-two", 200] >= 40)
        assert upstream.told["up-one", 200] - old <= 8  # what was on its way to the two workers
        upstream.keys = {"up-two"}
        wait_until(lambda: upstream.told["up-two", 200] >= 80)
        assert set(upstream.told) == {("up-one", 200), ("up-two", 200)}
        assert set(statuses) == {200}
        upstream.keys = {"up-three"}  # without a time in which both are good
        wait_until(lambda: service.status("/readyz") == 503)
        stop.set()
        for client in clients:
            client.join(10)
        assert set(statuses) <= {200, 401, 503}
        file.write_text("up-three\n")
        service.hang_up(READ)
        wait_until(lambda: service.status("/readyz") == 200)
        assert {chat(service.port) for _ in range(8)} == {200}
    finally:
        stop.set()
        service.stop()
    assert service.process.returncode == 0
    for secret in ("up-one", "up-two", "up-three"):
        assert secret not in service.output()
