"""More than the service can carry: the refused hear of it at once and can read it, the admitted don't wait for long."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from benchmarks import arrivals

from tests.conftest import GatewayProcess, Stage, wait_until
from tests.faults.figures import record
from tests.gateway.test_worker import resident_mebibytes

ROOT = Path(__file__).parents[2]
KEY = {"Authorization": "Bearer the-key"}
PLACES = 16
SPAN = 1.6  # seconds of load
WARM_UP = 0.5


def load(gateway: GatewayProcess, bodies: Path, how: str, number: float) -> arrivals.Report:
    """From a process of its own, until nothing is left of it in the gateway."""
    command = [sys.executable, "-m", "benchmarks.arrivals", how, str(number), gateway.url, str(bodies), str(SPAN)]
    printed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, timeout=60, check=True).stdout
    wait_until(lambda: gateway.state.total("in_flight") + gateway.state.total("queued") == 0)
    return arrivals.read(printed)


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def test_ten_times_its_capacity(stage: Stage, tmp_path: Path) -> None:
    """Answers take 0.2 to 0.6 s. The bars are those of benchmarks/overload.py, which measures for longer.

    One of three rounds has to meet them: a round in which others have the cores says nothing about us.
    """
    source = random.Random(1)
    prompts = (f"hi delay={source.uniform(0.2, 0.6):.3f}" for _ in range(200))
    bodies = tmp_path / "bodies"
    messages = ({"messages": [{"role": "user", "content": prompt}]} for prompt in prompts)
    bodies.write_text("\n".join(map(json.dumps, messages)))
    gateway = stage.gateway(limits={"max_in_flight": PLACES, "max_queue": PLACES // 2})
    for _ in range(3):
        full = load(gateway, bodies, "--clients", PLACES)
        memory = resident_mebibytes(gateway.workers[0].pid)
        storm = load(gateway, bodies, "--rate", 10 * len(full.asked) / SPAN)
        assert {one.status for one in full.asked} == {200}
        assert {one.status for one in storm.asked} == {200, 429}
        assert all(one.sound for one in storm.asked)
        assert resident_mebibytes(gateway.workers[0].pid) - memory < 8
        assert gateway.state.total("held_bytes") == 0
        refused = [one.took for one in storm.asked if one.status == 429]
        assert len(refused) > 0.8 * len(storm.asked)
        at_capacity, in_storm = (
            p99([one.took for one in report.asked if one.status == 200 and one.due > WARM_UP])
            for report in (full, storm)
        )
        if p99(refused) < 0.1 and in_storm <= 2 * at_capacity:
            break
    record(17, "p99 of the 429s", p99(refused))
    record(17, "p99 of the admitted, times that at capacity", in_storm / at_capacity, "times")
    assert p99(refused) < 0.1
    assert in_storm <= 2 * at_capacity


@pytest.fixture(scope="module")
def taken() -> Iterator[GatewayProcess]:
    """A gateway whose only place is taken."""
    made = Stage()
    gateway = made.gateway(api_keys=["the-key"], limits={"max_in_flight": 1, "max_queue": 0})
    connection = gateway.connect()
    body = json.dumps({"messages": [{"role": "user", "content": "hi delay=60"}]})
    connection.request("POST", "/v1/chat/completions", body, KEY)
    wait_until(lambda: gateway.state.total("in_flight") == 1)
    yield gateway
    connection.close()
    made.close()


REFUSALS = [
    ("POST", "/v1/chat/completions", KEY, 429),
    ("POST", "/v1/chat/completions", {}, 401),
    ("POST", "/nope", KEY, 404),
    ("PUT", "/v1/completions", KEY, 405),
    ("POST", "/transform/", KEY, 422),
]


@pytest.mark.parametrize("size", [1_000, 30_000, 300_000, 1_000_000])
@pytest.mark.parametrize(("method", "path", "headers", "status"), REFUSALS)
def test_a_client_that_is_refused_keeps_its_connection(
    taken: GatewayProcess, method: str, path: str, headers: dict[str, str], status: int, size: int
) -> None:
    """The body was not read, and the server closed the connection on which a pooling client then asked again."""
    connection = taken.connect()
    for _ in range(5):
        connection.request(method, path, b"x" * size, headers)
        local = connection.sock.getsockname()
        response = connection.getresponse()
        response.read()
        assert (response.status, response.getheader("connection")) == (status, None)
        assert connection.sock is not None
        assert connection.sock.getsockname() == local
    connection.close()


@pytest.mark.parametrize(("method", "path", "headers", "status"), REFUSALS)
def test_where_the_body_is_too_large_for_that_the_client_is_told(
    taken: GatewayProcess, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    with httpx2.Client(base_url=taken.root, trust_env=False, headers=headers) as client:
        for _ in range(5):
            answer = client.request(method, path, content=b"x" * 5_000_000)
            assert (answer.status_code, answer.headers["connection"]) == (status, "close")


def test_a_body_that_does_not_come_is_not_waited_for(taken: GatewayProcess) -> None:
    connection = taken.connect()
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", "1000")
    connection.putheader("Authorization", KEY["Authorization"])
    connection.endheaders()
    started = time.monotonic()
    response = connection.getresponse()
    assert (response.status, response.getheader("connection")) == (429, "close")
    assert time.monotonic() - started < 0.2
    connection.close()
