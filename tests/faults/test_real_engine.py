"""One start of the real engine, hurt in every way that a host can hurt it, while it works.

With `--distributed-executor-backend mp` the work is done in a process of its own, as on several GPUs; without it, it is
done in the engine core (tests/e2e). The tests build on one service: the last one ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.contract.drivers import Service
from tests.e2e.conftest import READY, start_example
from tests.e2e.test_rows import as_csv
from tests.e2e.test_survival import LONG_STREAM, engine_pids
from tests.faults.conftest import Events
from tests.faults.figures import record
from tests.serving import serving
from tests.supervisor.test_service import gone, status

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

HANG_TIMEOUT = 10.0
MEMORY = Path("/sys/fs/cgroup/memory")


@pytest.fixture(scope="module")
def platform() -> Iterator[Events]:
    with serving(Events()) as server:
        yield server


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, platform: Events) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in platform.environ.items():
            patch.setenv(name, value)
        # The deaths of one after the other are not a crash loop, whose pauses would be in the figures.
        flags = ("--hang-timeout", f"{HANG_TIMEOUT:g}", "--param", "max_watchdog_backoff_sec=1")
        flags += ("--", "--distributed-executor-backend", "mp")
        service = start_example(tmp_path_factory.mktemp("faults"), *flags)
    yield service
    service.stop()


@pytest.fixture
def service(started: Service) -> Service:
    """The service, ready again after what the test before has done to it."""
    assert started.process and started.process.poll() is None, started.output()[-3000:]
    return started.wait_ready(READY)


def named(service: Service, title: str) -> int:
    """The engine's process of this title: vLLM names its own."""
    for pid in engine_pids(service):
        if title in Path(f"/proc/{pid}/cmdline").read_text():
            return pid
    raise AssertionError(f"no {title}")


class Load:
    """A stream, and a CSV of rows, in flight together; `tokens` counts the events of the stream."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.stream = ""
        self.tokens = 0
        self.rows: httpx2.Response | None = None
        self._clients = [threading.Thread(target=self._read), threading.Thread(target=self._score)]

    def _read(self) -> None:
        url = f"{self._service.url}/v1/chat/completions"
        with httpx2.stream("POST", url, json=LONG_STREAM, timeout=300) as response:
            for line in response.iter_lines():
                self.tokens += line.startswith("data: {")
                self.stream += line + "\n"

    def _score(self) -> None:
        rows = as_csv([f"Write a story about the number {index}." for index in range(100)])
        self.rows = httpx2.post(f"{self._service.url}/predict/", content=rows, timeout=400)

    def __enter__(self) -> Load:
        for client in self._clients:
            client.start()
        self._service.wait_for(lambda: self.tokens >= 10, 60, "no ten tokens")
        assert self.rows is None
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.join(400)

    def was_told_the_truth(self) -> None:
        """The stream ends in an error, not as if it were whole; all rows are answered, in order."""
        frames = [line.removeprefix("data: ") for line in self.stream.splitlines() if line]
        assert "[DONE]" not in frames
        assert json.loads(frames[-1])["error"]["message"]
        assert self.rows is not None
        assert self.rows.status_code == 200, self.rows.text[:500]
        assert len(self.rows.json()["predictions"]) == 100
        assert all(self.rows.json()["predictions"])


def until_unready(service: Service, since: float) -> float:
    """Seconds from `since` to the first 503 of /readyz."""
    with service.client(5) as client:
        while client.get("/readyz").status_code != 503:
            assert time.monotonic() - since < 30, "still ready"
            time.sleep(0.005)
    return time.monotonic() - since


@contextlib.contextmanager
def one_restart(service: Service, platform: Events, row: int, what: str) -> Iterator[None]:
    """What happens within ends this engine and no more: all of it is gone, the next is started and told of."""
    before, pids = status(service)["engine"], engine_pids(service)
    told = platform.titles().count("Engine restarted")
    begin = time.monotonic()
    yield
    service.wait_for(lambda: status(service)["engine"]["restarts"] == before["restarts"] + 1, 20, "no restart")
    service.wait_for(lambda: gone(pids), 10, "processes are left")
    service.wait_for(lambda: status(service)["engine"]["pid"] not in (before["pid"], None), 15, "not started")
    started = time.monotonic() - begin
    service.wait_ready(READY)
    record(row, f"{what} to ready again", time.monotonic() - begin)
    assert status(service)["engine"]["restarts"] == before["restarts"] + 1
    service.wait_for(lambda: platform.titles().count("Engine restarted") == told + 1, 5, "no event")
    if row == 3:
        record(row, f"{what} to the new start", started)
        assert started < 5


def test_the_core_is_killed_under_load(service: Service, platform: Events) -> None:
    with Load(service) as load, one_restart(service, platform, 2, "SIGKILL of the core under load"):
        os.kill(named(service, "EngineCore"), signal.SIGKILL)
        seconds = until_unready(service, time.monotonic())
        record(2, "SIGKILL of the core under load to unready", seconds)
        assert seconds < 1
    load.was_told_the_truth()


def test_the_core_is_killed_while_idle(service: Service, platform: Events) -> None:
    with one_restart(service, platform, 2, "SIGKILL of the idle core"):
        os.kill(named(service, "EngineCore"), signal.SIGKILL)
        seconds = until_unready(service, time.monotonic())
        record(2, "SIGKILL of the idle core to unready", seconds)
        assert seconds < 1


def test_a_worker_is_killed(service: Service, platform: Events) -> None:
    with Load(service) as load, one_restart(service, platform, 2, "SIGKILL of a worker"):
        os.kill(named(service, "Worker"), signal.SIGKILL)
        seconds = until_unready(service, time.monotonic())
        record(2, "SIGKILL of a worker to unready", seconds)
        assert seconds < 1
    load.was_told_the_truth()


@contextlib.contextmanager
def little_memory(pid: int) -> Iterator[None]:
    """Let a process have no more memory than it has (control groups, version 1): the kernel kills it for the next."""
    group = MEMORY / f"faults-{uuid.uuid4().hex}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text("1M")
        (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        pytest.skip("needs root and the memory controller of control groups, version 1")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it is dead, as it should be
            (MEMORY / "cgroup.procs").write_text(str(pid))
        until = time.monotonic() + 10
        while (group / "cgroup.procs").read_text() and time.monotonic() < until:
            time.sleep(0.01)
        group.rmdir()


def ask_for_memory(service: Service, size: int) -> None:
    """A prompt unlike any before: its prefill needs room that the work at hand may do without."""
    prompt = " ".join(uuid.uuid4().hex[:4] for _ in range(size))
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 1}
    with contextlib.suppress(httpx2.HTTPError):
        httpx2.post(f"{service.url}/v1/chat/completions", json=body, timeout=60)


def test_a_worker_is_killed_for_want_of_memory(service: Service, platform: Events) -> None:
    worker = named(service, "Worker")
    with Load(service) as load, one_restart(service, platform, 2, "an OOM kill"), little_memory(worker):
        askers = [threading.Thread(target=ask_for_memory, args=(service, 100 * size)) for size in range(1, 6)]
        for asker in askers:
            asker.start()
        service.wait_for(lambda: gone([worker]), 30, "the kernel has not killed it")
        seconds = until_unready(service, time.monotonic())
        record(2, "an OOM kill to unready", seconds)
        assert seconds < 1
    for asker in askers:
        asker.join(70)
    load.was_told_the_truth()


def test_the_api_server_is_killed(service: Service, platform: Events) -> None:
    with Load(service) as load, one_restart(service, platform, 3, "SIGKILL of the API server"):
        os.kill(engine_pids(service)[0], signal.SIGKILL)
        seconds = until_unready(service, time.monotonic())
        record(3, "SIGKILL of the API server to unready", seconds)
        assert seconds < 1
    load.was_told_the_truth()


def test_the_core_is_stopped(service: Service, platform: Events) -> None:
    """A stopped process can dump its stacks: SIGABRT waits for it, and SIGCONT follows."""
    core = named(service, "EngineCore")
    shared = {word for word in Path(f"/proc/{core}/maps").read_text().split() if word.startswith("/dev/shm/psm_")}
    assert shared
    with Load(service) as load, one_restart(service, platform, 4, "SIGSTOP of the core"):
        os.kill(core, signal.SIGSTOP)
        seconds = until_unready(service, time.monotonic())
        record(4, f"SIGSTOP of the core to unready, --hang-timeout {HANG_TIMEOUT:g}", seconds)
        assert HANG_TIMEOUT <= seconds < 1.5 * HANG_TIMEOUT + 2
    load.was_told_the_truth()
    assert [path for path in shared if Path(path).exists()] == []
    log = service.output()
    dumped = log[log.index("nothing has moved in it for 10 s") :]
    assert f"process {core} (VLLM::EngineCore): state T (stopped)" in dumped
    stacks = dumped[: dumped.index("restarting: restart")]
    assert stacks.count("Fatal Python error: Aborted") >= 3  # API server, core, worker
    for frame in ("in run_busy_loop", "in worker_busy_loop", "uvloop/__init__.py"):
        assert frame in stacks, frame


def test_sigterm_with_50_streams(service: Service) -> None:
    """The last: it ends the service."""
    assert service.process
    pids = service.processes()
    begun: list[int] = []
    ended: list[str] = []

    def read() -> None:
        body = {**LONG_STREAM, "max_tokens": 60}
        with httpx2.stream("POST", f"{service.url}/v1/chat/completions", json=body, timeout=120) as stream:
            begun.append(stream.status_code)
            ended.append("".join(stream.iter_text()))

    clients = [threading.Thread(target=read) for _ in range(50)]
    for client in clients:
        client.start()
    service.wait_for(lambda: begun == [200] * 50, 60, "not all streams have begun")
    asked = time.monotonic()
    for _ in range(3):
        service.process.terminate()
    seconds = until_unready(service, asked)
    record(13, "SIGTERM to unready, 50 streams", seconds)
    assert seconds < 1
    assert httpx2.post(f"{service.url}/v1/chat/completions", json=LONG_STREAM).status_code == 503
    for client in clients:
        client.join(60)
    assert service.exit_code(30) == 0
    record(13, "SIGTERM to exit 0, 50 streams", time.monotonic() - asked)
    assert len([text for text in ended if text.rstrip().endswith("data: [DONE]")]) == 50
    assert gone(pids)
