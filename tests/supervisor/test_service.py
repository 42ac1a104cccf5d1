"""One service from its socket to its last process: real processes, with the stub in the engine's place."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from tests.contract.drivers import Engine, Ours, Service, free_port, start
from tests.contract.folders import make_folder
from tests.faults.figures import record
from tests.serving import serving

Start = Callable[..., Service]
CHAT = {"messages": [{"role": "user", "content": "hello"}]}


class OursWith(Ours):
    """`vllm-dropin serve` with more flags."""

    def __init__(self, *flags: str) -> None:
        self.flags = flags

    def command(self, *arguments):
        return [*super().command(*arguments), *self.flags]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Start]:
    """Start the product: `serve(*flags, environ=…, load_seconds=…, **folder)`. Not yet ready."""
    started: list[Service] = []

    def begin(*flags: str, environ=None, load_seconds: float = 0, **folder) -> Service:
        scratch = tmp_path / str(len(started))
        scratch.mkdir()
        model = make_folder(scratch / "model", **folder)
        engine = Engine.stub(scratch / "engine", load_seconds)
        started.append(start(OursWith(*flags), model, engine, scratch, environ))
        return started[-1]

    yield begin
    for service in started:
        service.stop()


class Events(http.server.ThreadingHTTPServer):
    """The platform's side of the status events: keeps what arrives."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.tokens: list[str] = []
        events = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                events.bodies.append({"path": self.path, **json.loads(self.rfile.read(length))})
                events.tokens.append(self.headers["Authorization"])
                self.send_response(202)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def environ(self) -> dict[str, str]:
        return {
            "DATAROBOT_ENDPOINT": f"http://127.0.0.1:{self.server_port}/api/v2",
            "DATAROBOT_API_TOKEN": "platform-token",
            "MLOPS_DEPLOYMENT_ID": "deployment-1",
        }

    def titles(self) -> list[str]:
        return [body["title"] for body in self.bodies]


@pytest.fixture
def events() -> Iterator[Events]:
    with serving(Events()) as server:
        yield server


def status(service: Service) -> dict:
    return httpx2.get(f"{service.url}/status").json()


def answers(service: Service, path: str) -> int | None:
    try:
        return httpx2.get(f"{service.url}{path}", timeout=5).status_code
    except httpx2.TransportError:
        return None


def gone(pids: list[int]) -> bool:
    return not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_the_socket_answers_while_the_hook_runs_and_the_engine_loads(serve):
    begin = time.monotonic()
    service = serve(load_seconds=1, custom="import time\ndef load_model(code_dir):\n    time.sleep(1.5)\n")
    service.wait_for(lambda: answers(service, "/") == 503, 5, "no 503")
    record(12, "start to the first answer", time.monotonic() - begin)
    for phase in ("hook", "loading"):
        service.wait_for(lambda phase=phase: status(service)["phase"] == phase, 10, f"not in {phase}")
        assert [answers(service, path) for path in ("/livez", "/readyz", "/startupz")] == [200, 503, 503]
        refusal = httpx2.get(f"{service.url}/readyz").text
        assert phase in refusal, refusal
        assert status(service)["stage"]
    service.wait_ready(20)
    assert [answers(service, path) for path in ("/livez", "/readyz", "/startupz")] == [200, 200, 200]
    assert status(service)["phase"] == "ready"
    assert [moment["phase"] for moment in status(service)["timeline"]][-1] == "ready"


def test_a_taken_port_ends_at_once(serve, tmp_path):
    with socket.create_server(("127.0.0.1", free_port())) as other:
        service = serve("--address", f"127.0.0.1:{other.getsockname()[1]}")
        begin = time.monotonic()
        assert service.exit_code(10) == 78
    took = time.monotonic() - begin
    record(8, "start to the exit", took)
    assert took < 1
    assert "is taken by another process" in service.output()
    assert not (tmp_path / "0" / "engine" / "record" / "launch.json").exists()


def test_an_engine_that_dies_is_started_again(serve, events):
    service = serve(environ=events.environ).wait_ready(20)
    first = service.launch().pid
    os.kill(first, signal.SIGKILL)
    killed = time.monotonic()
    service.wait_for(lambda: answers(service, "/readyz") == 503, 1, "still ready")
    record(3, "SIGKILL to unready, stub", time.monotonic() - killed)
    service.wait_ready(20)
    assert service.launch().pid != first
    assert status(service)["engine"]["restarts"] == 1
    service.wait_for(lambda: "Engine restarted" in events.titles(), 5, "no event")
    assert "SIGKILL" in events.bodies[-1]["message"]


def test_stages_are_told_to_the_platform(serve, events):
    service = serve(environ=events.environ, custom="def load_model(code_dir):\n    return None\n").wait_ready(20)
    service.wait_for(lambda: len(events.bodies) == 3, 5, "no three events")
    assert events.titles() == [f"Deployment stage {index} out of 3" for index in (1, 2, 3)]
    assert {body["eventType"] for body in events.bodies} == {"deploymentInfo"}
    assert {body["deploymentId"] for body in events.bodies} == {"deployment-1"}
    assert {body["path"] for body in events.bodies} == {"/api/v2/remoteEvents/"}
    assert set(events.tokens) == {"Bearer platform-token"}
    assert "DATAROBOT_API_TOKEN" not in service.launch().environ
    assert service.launch().environ["VLLM_MAX_N_SEQUENCES"] == "8"


def test_an_engine_that_never_starts_ends_the_service(serve, events):
    service = serve(load_seconds=-1, environ=events.environ)
    assert service.exit_code(30) == 70
    assert "the engine can't start" in service.output()
    assert "Deployment failed" in events.titles()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('no such bucket')", "ValueError: no such bucket"),
        ("import os; os._exit(3)", "exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
        ("import time; time.sleep(60)", "deadline of 1 s"),
    ],
)
def test_a_hook_that_fails_in_any_way_ends_the_service(serve, events, body, said):
    code = f"def load_model(code_dir):\n    {body}\n"
    service = serve("--hook-timeout", "1", custom=code, environ=events.environ)
    assert service.exit_code(20) == 78
    assert said in service.output()
    assert events.titles()[-1] == "Deployment failed"
    assert said in events.bodies[-1]["message"]


def test_the_error_server_says_why_until_sigterm(serve):
    code = "def load_model(code_dir):\n    raise ValueError('no such bucket')\n"
    service = serve("--with-error-server", custom=code)
    for path in ("/", "/ping", "/ping/", "/health/"):
        service.wait_for(lambda path=path: answers(service, path) == 513, 10, "no 513")
    assert (answers(service, "/readyz"), answers(service, "/livez")) == (503, 200)
    error = status(service)["error"]
    assert error["code"] == "hook"
    assert "no such bucket" in error["message"]
    assert error["remedy"]
    assert service.process is not None
    service.process.terminate()
    assert service.exit_code(10) == 78


def test_rows_wait_for_a_restart_and_chats_do_not(serve):
    service = serve().wait_ready(20)
    results = []
    rows = "promptText\n" + "".join(f"[[sleep 1.5]] {index}\n" for index in range(8))
    client = threading.Thread(
        target=lambda: results.append(httpx2.post(f"{service.url}/predict/", content=rows, timeout=60))
    )
    client.start()
    service.wait_for(lambda: service.engine_requests() or status(service)["load"]["in_flight"], 5, "no rows")
    time.sleep(0.5)
    os.kill(service.launch().pid, signal.SIGKILL)
    service.wait_for(lambda: answers(service, "/readyz") == 503, 2, "still ready")
    chat = httpx2.post(f"{service.url}/v1/chat/completions", json=CHAT)
    assert chat.status_code == 503
    assert "Retry-After" in chat.headers
    client.join(60)
    assert results[0].status_code == 200
    assert [text.split()[-1] for text in results[0].json()["predictions"]] == [str(index) for index in range(8)]


@pytest.mark.slow  # tests/gateway/test_predictions.py shows the same of a worker in less time
def test_a_row_that_kills_the_engine_again_and_again_fails_alone(serve):
    """The stub dies of nothing by itself: the test kills it whenever the poisoned row is alone in it."""
    service = serve().wait_ready(20)
    results = []
    rows = "promptText\n[[sleep 3]] poison\nfine\n"
    client = threading.Thread(
        target=lambda: results.append(httpx2.post(f"{service.url}/predict/", content=rows, timeout=60))
    )
    client.start()
    for _ in range(3):  # the third death convicts (scoring/gate.py)
        time.sleep(1)
        pid = service.launch().pid
        os.kill(pid, signal.SIGKILL)
        service.wait_for(lambda pid=pid: service.launch().pid != pid, 20, "no restart")
        service.wait_for(lambda: answers(service, "/readyz") == 200, 20, "not ready")
    client.join(60)
    answer = results[0].json()
    assert answer["predictions"] == ["", "echo: fine"]
    assert "engine crashed on this row" in answer["extraModelOutput"]["data"][0][0]


def test_sigterm_waits_for_what_runs(serve):
    service = serve().wait_ready(20)
    slow = {"messages": [{"role": "user", "content": "[[sleep 2]] slow"}], "stream": True}
    begun, ended = [], []

    def read() -> None:
        with httpx2.stream("POST", f"{service.url}/v1/chat/completions", json=slow, timeout=30) as stream:
            begun.append(stream.status_code)
            ended.append(stream.read().decode())

    clients = [threading.Thread(target=read) for _ in range(50)]
    for client in clients:
        client.start()
    service.wait_for(lambda: begun == [200] * 50, 10, "not all have begun")
    pids = service.processes()
    assert service.process is not None
    for _ in range(3):
        service.process.terminate()
        time.sleep(0.05)
    asked = time.monotonic()
    assert answers(service, "/readyz") == 503
    assert httpx2.post(f"{service.url}/v1/chat/completions", json=CHAT).status_code == 503
    record(13, "SIGTERM to the refusal of new work", time.monotonic() - asked)
    for client in clients:
        client.join(30)
    assert len([text for text in ended if text.rstrip().endswith("data: [DONE]")]) == 50
    assert service.exit_code(15) == 0
    assert gone(pids)


def test_who_comes_while_the_engine_stops_is_refused_not_reset(serve):
    service = serve().wait_ready(20)
    assert service.process is not None
    engine = service.launch().pid
    os.kill(engine, signal.SIGSTOP)  # it will take as long as we like
    service.process.terminate()
    service.wait_for(lambda: answers(service, "/readyz") == 503, 2, "still ready")
    asked, answered = time.monotonic(), []
    while time.monotonic() - asked < 1:
        answered.append(httpx2.post(f"{service.url}/v1/chat/completions", json=CHAT).status_code)
        time.sleep(0.05)
    assert set(answered) == {503}
    os.kill(engine, signal.SIGCONT)
    assert service.exit_code(10) == 0


def test_a_drain_that_takes_too_long_is_cut_off_and_told(serve):
    service = serve("--drain-timeout", "1").wait_ready(20)
    slow = {"messages": [{"role": "user", "content": "[[sleep 30]] slow"}]}

    def ask() -> None:
        with contextlib.suppress(httpx2.TransportError):
            httpx2.post(f"{service.url}/v1/chat/completions", json=slow, timeout=60)

    client = threading.Thread(target=ask)
    client.start()
    service.wait_for(lambda: status(service)["load"]["in_flight"] == 1, 5, "not in flight")
    pids = service.processes()
    assert service.process is not None
    service.process.terminate()
    assert service.exit_code(20) == 75
    client.join(30)
    assert gone(pids)


HANGING_HOOK = """
import subprocess, time
def load_model(code_dir):
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    print("in the hook", flush=True)
    time.sleep(600)
"""


def at(moment: str, serve: Start) -> Service:
    """A service at this moment of its life."""
    if moment == "hook":
        service = serve(custom=HANGING_HOOK)
        service.wait_for(lambda: "in the hook" in service.output(), 20, "no hook")
        return service
    service = serve(load_seconds=30 if moment == "loading" else 0)
    if moment == "loading":
        service.launch()
        return service
    service.wait_ready(20)
    for crash in range(1, 4) if moment == "backoff" else ():  # the third delay is two seconds
        pid = service.launch().pid
        os.kill(pid, signal.SIGKILL)
        service.wait_for(lambda crash=crash: f"restart {crash} in" in service.output(), 5, "no restart")
        if crash < 3:
            service.wait_for(lambda pid=pid: service.launch().pid != pid, 20, "not started again")
            service.wait_ready(20)
    return service


@pytest.mark.parametrize("moment", ["hook", "loading", "backoff"])
def test_sigterm_ends_it_at_any_moment(serve, moment):
    service = at(moment, serve)
    pids = service.processes()
    assert service.process is not None
    service.process.terminate()
    assert service.exit_code(5) == 0
    assert gone(pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_until_the_very_end_do_not_change_the_exit_code(serve, number):
    service = serve().wait_ready(20)
    assert service.process is not None
    deadline = time.monotonic() + 15
    while service.process.poll() is None and time.monotonic() < deadline:
        service.process.send_signal(number)
        time.sleep(0.002)
    assert service.exit_code(1) == 0


@pytest.mark.parametrize("moment", ["hook", "loading", "ready", "backoff"])
def test_sigkill_of_the_supervisor_leaves_nothing(serve, moment):
    service = at(moment, serve)
    pids = service.processes()
    assert len(pids) >= (2 if moment == "backoff" else 4)  # supervisor, worker, guardian, engine or hook
    assert service.process is not None
    service.process.kill()
    service.process.wait(5)
    service.wait_for(lambda: gone(pids), 5, "processes are left")


def test_a_dead_gateway_worker_is_replaced_within_a_second(serve):
    service = serve("--workers", "2").wait_ready(20)

    def workers() -> set[int]:
        found = set()
        for pid in service.processes():
            with contextlib.suppress(OSError):  # it ended while we looked
                if b"vllm_dropin.gateway.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.add(pid)
        return found

    first = workers()
    assert len(first) == 2
    victim = min(first)
    os.kill(victim, signal.SIGKILL)
    service.wait_for(lambda: len(workers() - {victim}) == 2, 5, "no new worker")
    results = {answers(service, "/readyz") for _ in range(20)}
    assert results == {200}
    assert httpx2.post(f"{service.url}/v1/chat/completions", json=CHAT).status_code == 200


def test_an_upstream_is_served_without_an_engine(serve, tmp_path):
    behind = serve().wait_ready(20)
    front = serve("--upstream", f"{behind.url}/v1").wait_ready(20)
    assert httpx2.post(f"{front.url}/v1/chat/completions", json=CHAT).status_code == 200
    assert not (tmp_path / "1" / "engine" / "record" / "launch.json").exists()
    rows = httpx2.post(f"{front.url}/predict/", content="promptText\none\ntwo\n")
    assert rows.json()["predictions"] == ["echo: one", "echo: two"]
    assert behind.process is not None
    behind.process.terminate()
    behind.process.wait(15)
    front.wait_for(lambda: answers(front, "/readyz") == 503, 5, "still ready")


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_as_pid_1_it_reaps_and_stops(tmp_path):
    """In a PID namespace of its own, with a hook that leaves zombies behind: SIGTERM ends it with 0."""
    leaver = "import os, subprocess, sys\ndef load_model(code_dir):\n"
    leaver += "    subprocess.run(['sh', '-c', 'sleep 0.2 & sleep 0.3 &'])\n"
    folder = make_folder(tmp_path / "model", custom=leaver)
    engine = Engine.stub(tmp_path / "engine", 0)
    driver = Ours()
    port = free_port()
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    log = (tmp_path / "log").open("wb")
    with subprocess.Popen(
        [*command, *driver.command(folder, engine, port, tmp_path)],
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    ) as outer:
        service = Service(f"http://127.0.0.1:{port}", process=outer, log=tmp_path / "log")
        service.wait_ready(20)
        time.sleep(3)
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        assert len(children) == 1
        namespace = Path(f"/proc/{children[0]}/ns/pid").readlink()
        inside = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and in_namespace(entry, namespace)]
        assert not [entry for entry in inside if "\nState:\tZ" in (entry / "status").read_text()]
        os.kill(int(children[0]), signal.SIGTERM)
        assert outer.wait(15) == 0
    log.close()


def in_namespace(entry: Path, namespace: Path) -> bool:
    try:
        return (entry / "ns" / "pid").readlink() == namespace
    except OSError:
        return False


def test_the_command_needs_no_engine_to_explain_itself(tmp_path):
    script = Path(sys.executable).with_name("vllm-dropin")
    done = subprocess.run([script, "serve", tmp_path / "nothing"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 78
    assert "does not exist" in done.stderr


def test_a_hanging_engine_is_killed_and_started_again(serve):
    """A stopped process keeps its socket open and answers nothing: only what waits on it shows that."""
    service = serve("--hang-timeout", "2").wait_ready(20)
    first = service.launch().pid
    results = []
    client = threading.Thread(
        target=lambda: results.append(httpx2.post(f"{service.url}/predict/", content="promptText\none\n", timeout=90))
    )
    os.kill(first, signal.SIGSTOP)
    client.start()
    service.wait_for(lambda: service.launch().pid != first, 40, "no restart")
    client.join(60)
    assert results[0].json()["predictions"] == ["echo: one"]
    assert "nothing has moved in it for 2 s" in service.output()
