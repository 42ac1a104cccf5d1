"""Status events: their body, and endpoints that refuse, hang, fail, lie or are not who they say."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.serving import serving
from vllm_dropin.model.secret import Secret
from vllm_dropin.platforms import events
from vllm_dropin.platforms.events import StatusReporter
from vllm_dropin.settings.settings import Platform

TOKEN = "canary-token-4711"


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log, which never has the token in it."""
    caplog.set_level(logging.DEBUG)
    yield caplog
    assert TOKEN not in caplog.text


@dataclass
class Received:
    path: str
    authorization: str | None
    body: dict[str, str]


@dataclass
class Platformlike:
    """A platform that answers with `statuses`, one after the other, then with the last again."""

    url: str = ""
    statuses: list[int] = field(default_factory=lambda: [200])
    location: str = ""
    received: list[Received] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    platform: Platformlike

    def do_POST(self) -> None:
        platform = self.platform
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        platform.received.append(Received(self.path, self.headers["Authorization"], body))
        statuses = platform.statuses
        self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
        if platform.location:
            self.send_header("Location", platform.location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Silence."""


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that does not trust us hangs up: no reason for a traceback."""


@contextlib.contextmanager
def serve(tls: ssl.SSLContext | None = None) -> Iterator[Platformlike]:
    platform = Platformlike()
    server = QuietServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"platform": platform}))
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    platform.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}/api/v2"
    with serving(server):
        yield platform


@pytest.fixture
def platform() -> Iterator[Platformlike]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def self_signed(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


def wait_until(happens: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, f"did not happen within {seconds} s"
        time.sleep(0.01)


def quickly(reporter: StatusReporter, count: int = 3) -> None:
    """Send, and see that the caller was not held up."""
    begin = time.monotonic()
    for number in range(1, count + 1):
        reporter.stage(number, count, "message")
    assert time.monotonic() - begin < 0.1


def test_events_arrive_in_order_with_the_body_of_the_contract(platform: Platformlike) -> None:
    reporter = StatusReporter(platform.url, TOKEN, "65f0")
    quickly(reporter)
    reporter.send("Deployment failed", "why")
    reporter.close()
    titles = [f"Deployment stage {number} out of 3" for number in (1, 2, 3)]
    assert [received.body["title"] for received in platform.received] == [*titles, "Deployment failed"]
    first = platform.received[0]
    assert first.path == "/api/v2/remoteEvents/"
    assert first.authorization == f"Bearer {TOKEN}"
    stamp = datetime.fromisoformat(first.body.pop("timestamp"))
    assert stamp.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - stamp) < timedelta(seconds=60)
    assert first.body == {
        "eventType": "deploymentInfo",
        "title": "Deployment stage 1 out of 3",
        "message": "message",
        "deploymentId": "65f0",
    }


def test_the_settings_make_a_reporter(platform: Platformlike) -> None:
    reporter = StatusReporter.of(Platform(platform.url + "/", Secret(TOKEN), "65f0", True))
    reporter.send("Engine restarted", "exit code 0")
    reporter.close()
    assert [received.path for received in platform.received] == ["/api/v2/remoteEvents/"]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_nothing_is_sent_unless_all_three_are_set(platform: Platformlike, missing: int) -> None:
    given: list[str | None] = [platform.url, TOKEN, "65f0"]
    given[missing] = None
    reporter = StatusReporter(*given)
    quickly(reporter)
    reporter.close()
    assert platform.received == []


def test_a_failing_platform_is_tried_again(platform: Platformlike, log: pytest.LogCaptureFixture) -> None:
    platform.statuses = [500, 429, 200]
    reporter = StatusReporter(platform.url, TOKEN, "65f0")
    quickly(reporter, 1)
    wait_until(lambda: len(platform.received) == 3)
    reporter.close()
    assert len({received.body["timestamp"] for received in platform.received}) == 1
    assert "status 500" in log.text


def test_what_is_refused_is_not_tried_again(platform: Platformlike, log: pytest.LogCaptureFixture) -> None:
    platform.statuses = [401, 200]
    reporter = StatusReporter(platform.url, TOKEN, "65f0")
    quickly(reporter, 2)
    reporter.close()
    assert len(platform.received) == 2
    assert "'Deployment stage 1 out of 2' was not taken by the platform: status 401" in log.text


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(platform: Platformlike, log: pytest.LogCaptureFixture, status: int) -> None:
    with serve() as other:
        platform.statuses, platform.location = [status], other.url
        reporter = StatusReporter(platform.url, TOKEN, "65f0")
        quickly(reporter, 1)
        reporter.close()
        assert len(platform.received) == 1
        assert other.received == []
    assert f"status {status}" in log.text


def test_a_refusing_endpoint_costs_a_warning(log: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    reporter = StatusReporter(f"http://127.0.0.1:{port}", TOKEN, "65f0")
    quickly(reporter)
    wait_until(lambda: "Connection refused" in log.text)
    begin = time.monotonic()
    reporter.close()
    assert time.monotonic() - begin < 2.5


def test_a_silent_endpoint_holds_up_nobody(log: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reporter = StatusReporter(f"http://127.0.0.1:{silent.getsockname()[1]}", TOKEN, "65f0")
        quickly(reporter)
        begin = time.monotonic()
        reporter.close(timeout=0.5)
        assert time.monotonic() - begin < 1.0
        assert "3 status event(s) could not be sent" in log.text
        quickly(reporter)  # after the close: nothing happens


def test_an_endpoint_that_answers_nonsense_costs_a_warning(log: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        reporter = StatusReporter(f"http://127.0.0.1:{server.getsockname()[1]}", TOKEN, "65f0")
        quickly(reporter, 1)
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"I AM NO HTTP SERVER\r\n\r\n")
        wait_until(lambda: "BadStatusLine" in log.text)
    reporter.close(timeout=1.0)


def test_a_certificate_that_nobody_signed_is_refused(
    self_signed: ssl.SSLContext, log: pytest.LogCaptureFixture
) -> None:
    with serve(self_signed) as platform:
        reporter = StatusReporter(platform.url, TOKEN, "65f0")
        quickly(reporter)
        wait_until(lambda: "verifySSL" in log.text)
        reporter.close()
        assert platform.received == []


def test_verify_false_accepts_it_and_warns(self_signed: ssl.SSLContext, log: pytest.LogCaptureFixture) -> None:
    with serve(self_signed) as platform:
        reporter = StatusReporter(platform.url, TOKEN, "65f0", verify=False)
        quickly(reporter)
        reporter.close()
        assert len(platform.received) == 3
    assert "verifySSL is false" in log.text


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("http://platform.invalid/api/v2", "in the clear"),
        ("ftp://platform.invalid", "no http or https address"),
        ("platform.invalid", "no http or https address"),
        ("https://host:99999999", "no http or https address"),
    ],
)
def test_endpoints_that_would_show_the_token_are_not_used(
    endpoint: str, reason: str, log: pytest.LogCaptureFixture
) -> None:
    reporter = StatusReporter(endpoint, TOKEN, "65f0")
    assert reason in log.text
    quickly(reporter)
    begin = time.monotonic()
    reporter.close()
    assert time.monotonic() - begin < 0.1


def test_a_token_that_no_header_can_hold_is_not_shown(log: pytest.LogCaptureFixture) -> None:
    StatusReporter("https://127.0.0.1", f"{TOKEN}\nX-Evil: 1", "65f0").close()
    assert "no header can hold" in log.text


def test_a_full_queue_drops_the_oldest(log: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reporter = StatusReporter(f"http://127.0.0.1:{silent.getsockname()[1]}", TOKEN, "65f0")
        quickly(reporter, events.QUEUE_LIMIT + 5)
        assert log.text.count("is dropped") == 5
        reporter.close(timeout=0.1)


def test_messages_are_bounded_and_without_secrets(platform: Platformlike) -> None:
    reporter = StatusReporter(platform.url, TOKEN, "65f0")
    reporter.send("Deployment failed", f"{TOKEN} " + "x" * 100_000)
    reporter.close()
    message = platform.received[0].body["message"]
    assert message.startswith("*** x")
    assert len(message) == events.MESSAGE_LIMIT


def test_what_waits_for_its_next_try_gets_one_at_the_close(platform: Platformlike) -> None:
    platform.statuses = [503, 200]
    reporter = StatusReporter(platform.url, TOKEN, "65f0")
    quickly(reporter, 1)
    wait_until(lambda: platform.received)
    reporter.close()
    assert len(platform.received) == 2
