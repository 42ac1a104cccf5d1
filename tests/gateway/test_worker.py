"""The worker as a process: its start, its size, its end, and several of them."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import GatewayProcess, Stage, wait_until


def resident_mebibytes(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def test_a_worker_is_small(stage: Stage) -> None:
    gateway = stage.gateway()
    gateway.chat("hello")
    assert resident_mebibytes(gateway.workers[0].pid) < 90


@pytest.fixture(scope="module")
def used() -> Iterator[GatewayProcess]:
    """A gateway of these tests alone, which has scored a row."""
    made = Stage()
    gateway = made.gateway()
    gateway.ask("POST", "/predict/", b"promptText\nhi\n")
    yield gateway
    made.close()


@pytest.mark.parametrize(
    ("cells", "status"),
    [
        (b"bytes=9 " + b"x" * 20_000_000, 200),
        (b'"' + b"Tell me more\n" * 700_000 + b'"', 422),
        (b'"' + b"Tell me\n" * 700_000, 422),
    ],
    ids=["scored", "refused by the engine", "never closed"],
)
def test_what_a_large_cell_took_is_given_back(used: GatewayProcess, cells: bytes, status: int) -> None:
    """The allocator kept some of it, and an error that nobody needed any more the rest."""
    before = resident_mebibytes(used.workers[0].pid)
    assert used.ask("POST", "/predict/", b"promptText\n" + cells)[0] == status
    wait_until(lambda: resident_mebibytes(used.workers[0].pid) - before < 6)


def test_the_socket_answers_before_the_client_of_the_engine_is_loaded() -> None:
    """Importing aiohttp doubles the start of a worker."""
    program = "import sys, vllm_dropin.gateway.worker; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=30, check=False).returncode == 0


def test_the_listener_is_not_shared_by_reuseport(gateway: GatewayProcess) -> None:
    """A second service on the same port must fail, not split the traffic."""
    with pytest.raises(OSError), socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", gateway.port))


def test_sigterm_ends_an_idle_worker_at_once(stage: Stage) -> None:
    gateway = stage.gateway()
    kept = http.client.HTTPConnection("127.0.0.1", gateway.port)
    kept.request("GET", "/ping")
    kept.getresponse().read()
    started = time.monotonic()
    for _ in range(3):
        gateway.workers[0].send_signal(signal.SIGTERM)
    assert gateway.workers[0].wait(5) == 0
    assert time.monotonic() - started < 2
    kept.close()


def test_sigterm_lets_a_short_request_finish(stage: Stage) -> None:
    gateway = stage.gateway()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(gateway.chat, "hello delay=1")
        wait_until(lambda: gateway.engine.stats()["running"] == 1)
        gateway.workers[0].send_signal(signal.SIGTERM)
        assert answer.result()[0] == 200
    assert gateway.workers[0].wait(5) == 0


def test_sigterm_does_not_wait_for_ever(stage: Stage) -> None:
    gateway = stage.gateway()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(gateway.chat, "hello delay=30")
        wait_until(lambda: gateway.engine.stats()["running"] == 1)
        gateway.workers[0].send_signal(signal.SIGTERM)
        assert gateway.workers[0].wait(6) == 0
        with pytest.raises(OSError):
            answer.result()


def test_sigint_is_the_supervisors(stage: Stage) -> None:
    gateway = stage.gateway()
    gateway.workers[0].send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert gateway.get("/livez")[0] == 200


def test_a_dead_supervisor_takes_its_worker_along(stage: Stage, tmp_path: Path) -> None:
    program = """
import sys, subprocess, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.conftest import EngineProcess, GatewayProcess
folder = Path(sys.argv[2])
gateway = GatewayProcess(folder, EngineProcess(folder / "e.sock"), 1)
gateway.wait()
print(gateway.workers[0].pid, flush=True)
time.sleep(60)
"""
    root = str(Path(__file__).parents[2])
    with subprocess.Popen([sys.executable, "-c", program, root, str(tmp_path)], stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        worker = int(supervisor.stdout.readline())
        os.kill(worker, 0)
        supervisor.kill()
    wait_until(lambda: not alive(worker))


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_worker_without_its_supervisor_does_not_start(stage: Stage, tmp_path: Path) -> None:
    gateway = stage.gateway()
    argv = [sys.executable, "-m", "vllm_dropin.gateway.worker", *map(str, gateway.workers[0].args[3:])]  # type: ignore[index]
    descriptor = gateway.socket.fileno()
    shell = ["sh", "-c", '"$@"; exit $?', "sh", *argv]
    assert subprocess.run(shell, pass_fds=[descriptor], timeout=10, check=False).returncode == 0


def test_two_workers_share_the_counts_and_one_may_die(stage: Stage) -> None:
    gateway = stage.gateway(workers=2, limits={"max_in_flight": 64})
    with ThreadPoolExecutor(32) as pool:
        open_requests = [pool.submit(gateway.chat, "hello delay=2") for _ in range(32)]
        wait_until(lambda: gateway.state.total("in_flight") == 32)
        status = json.loads(gateway.get("/status")[1])
        assert status["load"]["in_flight"] == 32
        gateway.workers[0].kill()
        gateway.workers[0].wait(5)
        gateway.replace_worker(0)
        results = [one.exception() or one.result()[0] for one in open_requests]
    survivors = [one for one in results if one == 200]
    assert all(one == 200 or isinstance(one, OSError) for one in results)
    wait_until(lambda: gateway.state.total("in_flight") == 0)
    assert gateway.state.total("requests") >= 32
    assert len(survivors) < 33
    wait_until(lambda: all(gateway.chat("hello")[0] == 200 for _ in range(10)))
