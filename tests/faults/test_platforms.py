"""A status endpoint that is down in four ways: the engine starts all the same, and as soon."""

from __future__ import annotations

import http.server
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import httpx2
import pytest

from tests.certificates import make_certificate
from tests.contract.drivers import Service
from tests.faults.conftest import Serve
from tests.faults.figures import record

KINDS = {
    "refused": "Connection refused",
    "blackhole": "could not be sent",  # told at the end: until then it may still be taken
    "500": "status 500",
    "self-signed": "verifySSL",
}


class Failing(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silence."""


class QuietServer(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that does not trust us hangs up: no reason for a traceback."""


@pytest.fixture
def endpoints(tmp_path: Path) -> Iterator[dict[str, dict[str, str]]]:
    """By kind, the environment that names an endpoint of that kind."""
    certificate = make_certificate(tmp_path / "tls", "nobody")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert, certificate.key)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        urls = {"refused": f"http://127.0.0.1:{closed.getsockname()[1]}"}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        servers = {"500": QuietServer(("127.0.0.1", 0), Failing), "self-signed": QuietServer(("127.0.0.1", 0), Failing)}
        servers["self-signed"].socket = context.wrap_socket(servers["self-signed"].socket, server_side=True)
        urls["blackhole"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for kind, server in servers.items():
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            urls[kind] = f"{'https' if kind == 'self-signed' else 'http'}://127.0.0.1:{server.server_port}"
        yield {
            kind: {
                "DATAROBOT_ENDPOINT": f"{url}/api/v2",
                "DATAROBOT_API_TOKEN": "token",
                "MLOPS_DEPLOYMENT_ID": "deployment-1",
            }
            for kind, url in urls.items()
        }
        for server in servers.values():
            server.shutdown()
            server.server_close()


def launch_after(service: Service) -> float:
    """Seconds from the first phase to the engine's start: all that could wait for the endpoint lies between."""
    timeline = httpx2.get(f"{service.url}/status").json()["timeline"]
    at = {moment["stage"] or moment["phase"]: datetime.fromisoformat(moment["at"]) for moment in reversed(timeline)}
    return (at["engine starting"] - at["starting"]).total_seconds()


@pytest.mark.parametrize("kind", KINDS)
def test_the_service_is_ready_and_warns(serve: Serve, endpoints: dict[str, dict[str, str]], kind: str) -> None:
    service = serve(environ=endpoints[kind]).wait_ready(20)
    assert launch_after(service) < 3  # of a busy machine; a silent endpoint would take longer by far
    if kind != "blackhole":
        service.wait_for(lambda: KINDS[kind] in service.output(), 5, "no warning")
    assert service.process
    service.process.terminate()
    assert service.exit_code(10) == 0
    assert re.search(rf"WARNING .*{KINDS[kind]}", service.output())


@pytest.mark.slow
def test_the_launch_is_not_delayed(serve: Serve, endpoints: dict[str, dict[str, str]]) -> None:
    """The best start of each kind, in turns, until what remains of the difference is no accident of a busy machine."""
    hook = "def load_model(code_dir):\n    return None\n"  # one more stage to be told
    best: dict[str, float] = {}
    for _ in range(12):
        for kind in ("none", *KINDS):
            service = serve(environ=endpoints.get(kind, {}), custom=hook).wait_ready(20)
            best[kind] = min(best.get(kind, 60.0), launch_after(service))
            service.stop()
        if max(best.values()) - best["none"] < 0.1:
            break
    for kind in KINDS:
        record(1, f"launch later than without an endpoint, {kind}", max(0.0, best[kind] - best["none"]))
        assert best[kind] - best["none"] < 0.1, sorted(best.items())
