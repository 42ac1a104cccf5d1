"""HTTPS, and what SIGHUP renews in a worker: certificate and keys, while requests and streams run."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.certificates import Certificate, make_certificate, served_name
from tests.conftest import GatewayProcess, Stage, wait_until

CHAT = {"messages": [{"role": "user", "content": "hi tokens=3"}]}
KEY = {"Authorization": "Bearer key-one"}


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two certificates, each in one file with its key."""
    folder = tmp_path_factory.mktemp("tls")
    return [written(make_certificate(folder, name)) for name in ("first", "second")]


@pytest.fixture(scope="module")
def secure(pems: list[Path]) -> Iterator[GatewayProcess]:
    """A gateway with the first certificate, which its tests leave as it is."""
    made = Stage()
    yield made.gateway(tls=str(pems[0]))
    made.close()


def written(certificate: Certificate) -> Path:
    both = certificate.cert.with_suffix(".pem")
    both.write_text(certificate.both)
    return both


class Crowd:
    """Clients that keep their connections and ask all the time; counts what each request came to."""

    def __init__(self, gateway: GatewayProcess, trust: ssl.SSLContext | None, pauses: list[float]) -> None:
        self.counts: Counter[str] = Counter()
        self._port = gateway.port
        self._trust = trust
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(pause,)) for pause in pauses]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(20)

    def _connection(self) -> http.client.HTTPConnection:
        if self._trust is None:
            return http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        return http.client.HTTPSConnection("127.0.0.1", self._port, timeout=10, context=self._trust)

    def _ask(self, pause: float) -> None:
        connection = self._connection()
        while not self._stop.wait(pause):
            try:
                connection.request("POST", "/v1/chat/completions", json.dumps(CHAT), KEY)
                response = connection.getresponse()
                response.read()
                self.counts[str(response.status)] += 1
                if response.getheader("connection") == "close":
                    self.counts["asked to come back"] += 1
            except OSError as error:
                self.counts[type(error).__name__] += 1
                connection.close()
            except http.client.HTTPException as error:
                self.counts[type(error).__name__] += 1
                connection.close()
        connection.close()


def trusting(pems: list[Path]) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for pem in pems:
        context.load_verify_locations(pem)
    return context


def test_requests_rows_and_streams_over_tls(secure: GatewayProcess) -> None:
    assert secure.chat("hi")[0] == 200
    status, _, body = secure.ask("POST", "/predict/", b"promptText\n" + b"x" * 3_000_000 + b"\n")
    assert (status, len(json.loads(body)["predictions"])) == (200, 1)
    _, headers, stream = secure.chat("hi tokens=4", stream=True)
    assert headers["content-type"].startswith("text/event-stream")
    assert stream.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_versions(secure: GatewayProcess, pems: list[Path], version: ssl.TLSVersion) -> None:
    context = trusting(pems)
    context.minimum_version = context.maximum_version = version
    with (
        socket.create_connection(("127.0.0.1", secure.port)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped,
    ):
        assert wrapped.version() == version.name.replace("_", ".")


def test_plain_http_is_no_way_in(secure: GatewayProcess) -> None:
    with socket.create_connection(("127.0.0.1", secure.port), timeout=10) as plain:
        plain.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"200" not in plain.recv(4096)
    assert secure.get("/ping")[0] == 200


def test_clients_that_never_finish_their_handshake_keep_nobody_out(secure: GatewayProcess) -> None:
    silent = [socket.create_connection(("127.0.0.1", secure.port)) for _ in range(300)]
    try:
        for connection in silent[::2]:
            connection.sendall(b"\x16\x03\x01")
        started = time.monotonic()
        assert secure.get("/ping")[0] == 200
        assert time.monotonic() - started < 2
    finally:
        for connection in silent:
            connection.close()


def test_a_new_certificate_costs_no_request(stage: Stage, pems: list[Path]) -> None:
    """Connections that are busy, that pause, and that stream."""
    gateway = stage.gateway(tls=str(pems[0]), api_keys=["key-one"], workers=2)
    streams: list[bytes] = []

    def stream() -> None:
        prompt = {"messages": [{"role": "user", "content": "hi tokens=25 token_delay=0.1"}], "stream": True}
        streams.append(gateway.post("/v1/chat/completions", prompt, KEY)[2])

    long = [threading.Thread(target=stream) for _ in range(3)]
    with Crowd(gateway, trusting(pems), [0, 0, 0, 0.05, 0.05, 0.1]) as crowd:
        for thread in long:
            thread.start()
        wait_until(lambda: gateway.engine.stats()["running"] >= 3)
        gateway.renew(tls=str(pems[1]))
        wait_until(lambda: all(served_name(gateway.port) == "second" for _ in range(4)), 5)
        time.sleep(0.5)  # the old listeners have closed what was idle
    for thread in long:
        thread.join(20)
    assert [text.endswith(b"data: [DONE]\n\n") for text in streams] == [True] * 3
    assert crowd.counts["asked to come back"] >= 3
    assert set(crowd.counts) == {"200", "asked to come back"}, crowd.counts
    assert gateway.state.total("in_flight") == 0


def test_new_keys_count_from_the_next_request_on_and_cost_none(stage: Stage) -> None:
    gateway = stage.gateway(api_keys=["key-one", "key-old"], workers=2)

    def status(key: str) -> int:
        return gateway.get("/status", headers={"Authorization": f"Bearer {key}"})[0]

    assert (status("key-old"), status("key-new")) == (200, 401)
    with Crowd(gateway, None, [0, 0, 0.01]) as crowd:
        for _ in range(5):
            gateway.renew(api_keys=("key-one", "key-new"))
            wait_until(lambda: {status("key-new") for _ in range(6)} == {200})
            gateway.renew(api_keys=("key-one",))
            wait_until(lambda: {status("key-new") for _ in range(6)} == {401})
    assert status("key-old") == 401
    assert set(crowd.counts) == {"200"}, crowd.counts


def test_a_stream_outlives_its_key(stage: Stage) -> None:
    gateway = stage.gateway(api_keys=["key-one"])
    connection = gateway.connect()
    prompt = {"messages": [{"role": "user", "content": "hi tokens=10 token_delay=0.05"}], "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(prompt), KEY)
    response = connection.getresponse()
    gateway.renew(api_keys=("key-two",))
    wait_until(lambda: gateway.get("/status", headers=KEY)[0] == 401)
    assert response.read().endswith(b"data: [DONE]\n\n")
    connection.request("GET", "/status", headers=KEY)
    assert connection.getresponse().status == 401
    connection.close()


def test_a_worker_is_never_left_without_keys(stage: Stage) -> None:
    """The supervisor would not send this; an open door must not be one mistake away."""
    gateway = stage.gateway(api_keys=["key-one"])
    gateway.renew(api_keys=())
    (gateway.folder / "gateway.json").write_text("{")
    gateway.workers[0].send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert gateway.get("/status")[0] == 401
    assert gateway.get("/status", headers=KEY)[0] == 200


def test_the_trial_of_a_certificate(tmp_path: Path, pems: list[Path]) -> None:
    def trial(pem: Path) -> int:
        argv = [sys.executable, "-m", "vllm_dropin.gateway.server", str(pem)]
        return subprocess.run(argv, capture_output=True, timeout=20, cwd=tmp_path, check=False).returncode

    assert trial(pems[0]) == 0
    assert trial(written(make_certificate(tmp_path, "large", "secp521r1"))) != 0
    assert not list(tmp_path.glob("core*"))


@pytest.mark.slow
def test_an_idle_connection_outlives_the_pools_of_python_clients(secure: GatewayProcess) -> None:
    """httpx keeps one for 5 s; a server that closes it just then meets the next request."""
    connection = secure.connect()
    for pause in (0, 7):
        time.sleep(pause)
        connection.request("GET", "/ping")
        response = connection.getresponse()
        response.read()
        assert response.status == 200  # on the same connection: http.client opens no new one by itself
    connection.close()


@pytest.mark.slow
def test_a_handshake_that_never_ends_is_cut_off(secure: GatewayProcess) -> None:
    with socket.create_connection(("127.0.0.1", secure.port), timeout=20) as silent:
        silent.sendall(b"\x16\x03\x01")
        started = time.monotonic()
        assert silent.recv(100) == b""
        assert 9 < time.monotonic() - started < 12
