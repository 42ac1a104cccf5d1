"""Crashes that need no real engine, because the supervisor alone has to answer for what follows."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.drivers import envelopes
from tests.faults.conftest import Events, Serve, wrapped
from tests.faults.figures import record
from tests.supervisor.test_service import answers, gone

ENDS_AT_1_S = """
import os, sys, threading, time
def end():
    while not os.path.exists(sys.argv[sys.argv.index("--uds") + 1]):
        time.sleep(0.01)
    time.sleep(1)
    os._exit(0)
threading.Thread(target=end, daemon=True).start()
"""
WITH_WORKER = """
import os, signal, time
if os.fork() == 0:  # a worker that can't be asked to leave
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("worker", os.getpid(), flush=True)
    while True:
        time.sleep(1)
"""
FREEZER = Path("/sys/fs/cgroup/freezer")


def test_an_engine_that_ends_with_0_at_1_s_again_and_again(serve: Serve, events: Events) -> None:
    """Exit code 0 or not, an end that nobody asked for is a crash; and a crash loop ends the service."""
    budget = envelopes({"max_watchdog_restarts": ("numeric", 2)})
    service = serve(environ={**events.environ, **budget}, alter=lambda engine: wrapped(engine, ENDS_AT_1_S))
    begin = time.monotonic()
    assert service.exit_code(30) == 70
    record(5, "three lives of 1 s, start to exit 70", time.monotonic() - begin)
    log = service.output()
    delays = [float(delay) for delay in re.findall(r"restart \d in ([\d.]+) s: exit code 0", log)]
    assert len(delays) == 2
    assert 0.5 <= delays[0] <= 0.6 and 1.0 <= delays[1] <= 1.1
    assert log.count("engine started, process") == 3
    assert "budget of 2 restarts in 60 minutes is spent: exit code 0" in log
    assert events.titles()[-3:] == ["Engine restarted"] * 2 + ["Deployment failed"]
    assert answers(service, "/livez") is None
    assert gone(service.processes())


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Keep a process from dying: in a frozen control group (version 1) it takes SIGKILL only when it is thawed.

    It stands for what no test can order: a process that a driver holds for seconds after its death.
    """
    group = FREEZER / f"faults-{uuid.uuid4().hex}"
    try:
        group.mkdir()
        (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        pytest.skip("needs root and the freezer of control groups, version 1")
    try:
        (group / "freezer.state").write_text("FROZEN")
        yield
    finally:
        (group / "freezer.state").write_text("THAWED")
        deadline = time.monotonic() + 5
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        group.rmdir()


@pytest.mark.slow
def test_an_api_server_whose_worker_will_not_die(serve: Serve) -> None:
    """Only the API server is killed. Its worker ignores SIGTERM, and outlives SIGKILL for longer than we wait."""
    service = serve(alter=lambda engine: wrapped(engine, WITH_WORKER)).wait_ready(20)
    first = service.launch().pid
    found = re.search(r"worker (\d+)", service.output())
    assert found
    worker = int(found[1])
    with frozen(worker):
        os.kill(first, signal.SIGKILL)
        killed = time.monotonic()
        service.wait_for(lambda: answers(service, "/readyz") == 503, 1, "still ready")
        record(3, "SIGKILL to unready, the worker unkillable", time.monotonic() - killed)
        service.wait_for(lambda: service.launch().pid != first, 5, "not started again")
        record(3, "SIGKILL to the new start, the worker unkillable", time.monotonic() - killed)
        assert not gone([worker])
    service.wait_ready(20)
    service.wait_for(lambda: gone([worker]), 5, "the worker is left")
