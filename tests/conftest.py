"""Shared fixtures: a fake engine, and gateway workers in front of it, as real processes on real sockets."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_dropin.gateway.config import GatewayConfig
from vllm_dropin.gateway.state import Phase, SharedState

FAKE_ENGINE = Path(__file__).parent / "fake_engine.py"
START_DEADLINE = 15.0


def wait_until(happens: Callable[[], Any], seconds: float = 5.0, every: float = 0.02) -> Any:
    """The first true value of `happens`; fails the test when there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        value = happens()
        if value:
            return value
        assert time.monotonic() < deadline, f"did not happen within {seconds} s"
        time.sleep(every)


class UnixConnection(http.client.HTTPConnection):
    """http.client on a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("engine", timeout=10)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class EngineProcess:
    """The fake engine on a unix socket."""

    def __init__(self, uds: Path, *flags: str, environ: dict[str, str] | None = None, port: int | None = None) -> None:
        self.uds = uds
        self.port = port
        self._flags = flags
        self._environ = {**os.environ, **(environ or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        where = ["--uds", str(self.uds)] if self.port is None else ["--port", str(self.port)]
        argv = [sys.executable, str(FAKE_ENGINE), *where, *self._flags]
        self.process = subprocess.Popen(argv, env=self._environ, stdout=subprocess.DEVNULL)
        wait_until(self.answers, START_DEADLINE)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def wait_dead(self) -> None:
        """Until it has exited, after a prompt that told it to."""
        assert self.process is not None
        self.process.wait(10)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def answers(self) -> bool:
        try:
            return self._ask("/health")[0] == 200
        except OSError:
            return False

    def _ask(self, path: str) -> tuple[int, bytes]:
        connection: http.client.HTTPConnection = UnixConnection(str(self.uds))
        if self.port is not None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def stats(self) -> dict[str, int]:
        """Counts of what started, finished, was aborted, and runs."""
        stats: dict[str, int] = json.loads(self._ask("/fake/stats")[1])
        return stats

    def requests(self) -> list[dict[str, Any]]:
        """What came in, oldest first."""
        requests: list[dict[str, Any]] = json.loads(self._ask("/fake/requests")[1])
        return requests

    def last(self) -> dict[str, Any]:
        """The request that came in last."""
        return self.requests()[-1]


class GatewayProcess:
    """Workers on one socket, and the supervisor's half of the shared state, which the test plays itself."""

    def __init__(self, folder: Path, engine: EngineProcess, workers: int, **config: Any) -> None:
        self.folder = folder
        self.engine = engine
        values = {"code_dir": str(folder), "engine_uds": str(engine.uds), "served_model": "datarobot-deployed-llm"}
        if config.get("engine_url"):
            values.pop("engine_uds")
        self.config = GatewayConfig.model_validate({**values, **config})
        self.config.save(folder / "gateway.json")
        self.trust = ssl.create_default_context(cafile=self.config.tls) if self.config.tls else None
        self.state = SharedState.create(folder / "state", workers)
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self.socket.getsockname()[1]
        self.root = f"http://127.0.0.1:{self.port}"
        self.url = self.root + self.config.url_prefix
        self.workers = [self._spawn(slot) for slot in range(workers)]

    def _spawn(self, slot: int) -> subprocess.Popen[bytes]:
        descriptor = self.socket.fileno()
        argv = [sys.executable, "-m", "vllm_dropin.gateway.worker"]
        argv += [str(self.folder / "gateway.json"), str(self.folder / "state"), str(slot), str(descriptor)]
        return subprocess.Popen(argv, pass_fds=[descriptor])

    def wait(self) -> None:
        """Until it answers."""
        wait_until(lambda: self.get("/livez")[0] == 200, START_DEADLINE)

    def ready(self) -> None:
        """Say that the engine runs."""
        self.state.generation += 1
        self.state.draining = False
        self.state.phase = Phase.READY

    def restart_engine(self) -> None:
        """A new engine after a crash, as the supervisor would."""
        self.state.phase = Phase.RESTARTING
        self.engine.stop()
        self.state.generation += 1  # before the next engine can be asked
        self.engine.start()
        self.state.phase = Phase.READY

    def replace_worker(self, slot: int) -> None:
        """A new worker for a dead one, as the supervisor would."""
        self.state.slots[slot].zero_gauges()
        self.workers[slot] = self._spawn(slot)

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """GET at the root, whatever the prefix is."""
        status, _, body = self.ask("GET", path, headers=headers)
        return status, body

    def connect(self, timeout: float = 30) -> http.client.HTTPConnection:
        """A connection of its own, which trusts the certificate that the gateway was started with, if any."""
        if self.trust is None:
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=timeout, context=self.trust)

    def renew(self, **config: Any) -> None:
        """Tell the workers something else and have them read it, as the supervisor would at SIGHUP."""
        self.config = self.config.model_copy(update=config)
        self.config.save(self.folder / "gateway.json")
        for worker in self.workers:
            worker.send_signal(signal.SIGHUP)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own; header names in lower case."""
        connection = self.connect()
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def post(self, path: str, payload: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
        """POST JSON under the prefix."""
        sent = {"content-type": "application/json", **(headers or {})}
        return self.ask("POST", self.config.url_prefix + path, json.dumps(payload).encode(), sent)

    def chat(self, prompt: str, **fields: Any) -> tuple[int, dict[str, str], bytes]:
        """One chat completion."""
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}], **fields})

    def stop(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        for worker in self.workers:
            try:
                worker.wait(10)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait(10)
        self.socket.close()


class Stage:
    """Starts engines and gateways and ends all of them."""

    def __init__(self) -> None:
        self._folders: list[str] = []
        self._engines: list[EngineProcess] = []
        self._gateways: list[GatewayProcess] = []

    def _folder(self) -> Path:
        # Short, because a unix socket's path has at most 107 bytes.
        folder = tempfile.mkdtemp(prefix="vd-")
        self._folders.append(folder)
        return Path(folder)

    def engine(self, *flags: str, environ: dict[str, str] | None = None, port: int | None = None) -> EngineProcess:
        """A started engine, on a unix socket unless a port is given."""
        engine = EngineProcess(self._folder() / "e.sock", *flags, environ=environ, port=port)
        self._engines.append(engine)
        engine.start()
        return engine

    def gateway(
        self, engine: EngineProcess | None = None, *, workers: int = 1, ready: bool = True, **config: Any
    ) -> GatewayProcess:
        """A gateway with this configuration; with an engine of its own unless one is given."""
        gateway = GatewayProcess(self._folder(), engine or self.engine(), workers, **config)
        self._gateways.append(gateway)
        gateway.wait()
        if ready:
            gateway.ready()
        return gateway

    def close(self) -> None:
        for gateway in self._gateways:
            gateway.stop()
        for engine in self._engines:
            engine.stop()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def stage() -> Iterator[Stage]:
    """A factory of engines and gateways for one test."""
    made = Stage()
    yield made
    made.close()


@pytest.fixture(scope="session")
def _shared_gateway() -> Iterator[GatewayProcess]:
    made = Stage()
    yield made.gateway()
    made.close()


@pytest.fixture
def gateway(_shared_gateway: GatewayProcess) -> GatewayProcess:
    """A ready gateway with one worker and default settings in front of a living fake engine; shared by all tests."""
    if not _shared_gateway.engine.alive:
        _shared_gateway.restart_engine()
    return _shared_gateway
