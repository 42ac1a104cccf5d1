"""Connections that ask nothing yet: how long they may stay, and what many of them cost."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.conftest import GatewayProcess, Stage, wait_until
from tests.gateway.test_abuse import GoodClient
from tests.gateway.test_worker import resident_mebibytes

ASK = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
HALF = b"GET /ping HTTP/1.1\r\nHost: x\r\nX-Slow: "
IDLE = 0.6  # seconds


@pytest.fixture(scope="module")
def brisk(staged: Stage) -> GatewayProcess:
    return staged.gateway(limits={"idle_timeout": IDLE})


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Enough of them for a thousand clients in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"this process may have {hard} descriptors at most")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def half_headers(gateway: GatewayProcess, count: int) -> Iterator[list[socket.socket]]:
    """So many clients who have sent half a header each."""
    with ExitStack() as stack:
        clients = []
        for _ in range(count):
            clients.append(stack.enter_context(socket.create_connection(("127.0.0.1", gateway.port), timeout=10)))
            clients[-1].sendall(HALF)
        yield clients


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def closed_after(client: socket.socket, trickle: bytes = b"") -> float:
    """Seconds until the server closes the connection, over which nothing or a trickle comes."""
    client.settimeout(0.1)
    started = time.monotonic()
    while time.monotonic() - started < 6:
        try:
            if not client.recv(4096):
                break
        except TimeoutError:
            client.sendall(trickle)
        except OSError:
            break
    return time.monotonic() - started


def begun(client: socket.socket) -> float:
    client.sendall(HALF)
    return closed_after(client, b"x")


def asked(client: socket.socket) -> None:
    client.sendall(ASK)
    assert client.recv(4096).startswith(b"HTTP/1.1 200 ")


def idle(client: socket.socket) -> float:
    asked(client)
    return closed_after(client)


def begun_late(client: socket.socket) -> float:
    asked(client)
    started = time.monotonic()
    time.sleep(0.6 * IDLE)
    begun(client)
    return time.monotonic() - started


@pytest.mark.parametrize("how", [closed_after, begun, idle, begun_late])
def test_one_clock_for_a_header_and_for_silence(brisk: GatewayProcess, how: Callable[[socket.socket], float]) -> None:
    """It runs from the opening or the last answer on, so half a header holds a connection no longer than silence."""
    with socket.create_connection(("127.0.0.1", brisk.port)) as client:
        assert IDLE - 0.1 < how(client) < IDLE + 0.5


def test_the_clock_does_not_run_while_a_request_does(brisk: GatewayProcess) -> None:
    assert brisk.chat(f"hi delay={1.5 * IDLE}")[0] == 200


def test_a_thousand_half_headers_hinder_nobody(stage: Stage, many_descriptors: None) -> None:
    gateway = stage.gateway(api_keys=["the-key"], limits={"idle_timeout": 1.5})
    pid = gateway.workers[0].pid
    wait_until(lambda: gateway.get("/ping")[0] == 200)
    memory, open_before = resident_mebibytes(pid), descriptors(pid)
    with half_headers(gateway, 1000), GoodClient(gateway) as good:
        wait_until(lambda: descriptors(pid) >= open_before + 1000)
        time.sleep(0.3)
        assert resident_mebibytes(pid) - memory < 64
        wait_until(lambda: descriptors(pid) < open_before + 20)
    assert good.statuses == {200}
    assert good.worst < 3


def test_clients_beyond_the_descriptors_wait_and_cost_nothing(stage: Stage, tmp_path: Path) -> None:
    """Without a bound on connections the worker asked the kernel for one more all the time: a whole core."""
    gateway = stage.gateway(limits={"idle_timeout": IDLE})
    gateway.workers[0].kill()
    gateway.workers[0].wait(5)
    argv = ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", *map(str, gateway.workers[0].args)]  # type: ignore[arg-type]
    with (tmp_path / "log").open("wb") as log:
        gateway.workers[0] = worker = subprocess.Popen(argv, pass_fds=[gateway.socket.fileno()], stderr=log)
    gateway.wait()
    assert "no more than 96 clients can be connected at once" in (tmp_path / "log").read_text()
    assert gateway.chat("hi")[0] == 200
    spent = cpu_seconds(worker.pid)
    answers: list[int] = []
    with half_headers(gateway, 400):
        good = threading.Thread(target=lambda: answers.append(gateway.chat("hi")[0]))
        good.start()
        for _ in range(5):
            assert descriptors(worker.pid) < 200
            time.sleep(0.1)
        assert good.is_alive()
        good.join(20)  # four times 96 clients are let in and cut off before its turn comes
    assert answers == [200]
    assert cpu_seconds(worker.pid) - spent < 0.5
    assert worker.poll() is None
    assert gateway.chat("hi")[0] == 200
