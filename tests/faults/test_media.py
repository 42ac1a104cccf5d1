"""Pictures from elsewhere. No text model takes one, so vLLM's own fetcher is asked, with the flags that we give."""

from __future__ import annotations

import base64
import http.server
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_main import SCRIPT
from tests.e2e.conftest import EXAMPLE
from tests.serving import serving

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
# Each line of the input: a URL, and the hosts that are allowed, or null.
FETCH = """
import json, sys
from vllm.multimodal.media.connector import MediaConnector
for line in sys.stdin:
    url, hosts = json.loads(line)
    try:
        MediaConnector(allowed_media_domains=hosts).fetch_image(url)
        print("fetched")
    except Exception as error:
        print("refused:", str(error).replace("\\n", " "))
"""


class Pictures(http.server.ThreadingHTTPServer):
    """Gives a picture at /pixel.png, and sends who asks for /away to the host `localhost`; knows what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        pictures = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                pictures.asked.append(f"{self.headers['Host'].partition(':')[0]}{self.path}")
                away = self.path == "/away"
                self.send_response(302 if away else 200)
                if away:
                    self.send_header("Location", f"http://localhost:{pictures.server_port}/pixel.png")
                self.send_header("Content-Type", "image/png")
                self.send_header("Content-Length", str(0 if away else len(PIXEL)))
                self.end_headers()
                self.wfile.write(b"" if away else PIXEL)

            def log_message(self, *_: object) -> None:
                """Silence."""

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def pictures() -> Iterator[Pictures]:
    with serving(Pictures()) as server:
        yield server


def test_media_are_fetched_from_nowhere_unless_hosts_are_listed(pictures: Pictures, tmp_path: Path) -> None:
    python = os.environ.get("VLLM_DROPIN_ENGINE_PYTHON")
    if not python:
        pytest.skip("VLLM_DROPIN_ENGINE_PYTHON does not name a Python with vLLM")
    check = [str(SCRIPT), "check", str(EXAMPLE), "--json", "--engine-python", python, "--state-dir", str(tmp_path)]
    report = json.loads(subprocess.run(check, capture_output=True, text=True, timeout=60, check=True).stdout)
    command = report["command"]
    ours = [command[command.index("--allowed-media-domains") + 1]]
    redirects = {
        added["name"]: added["value"] for added in report["environment"]["added"] if "REDIRECT" in added["name"]
    }
    url = f"http://127.0.0.1:{pictures.server_port}"
    asks = [(f"{url}/pixel.png", None), (f"{url}/pixel.png", ours), (f"{url}/pixel.png", ["127.0.0.1"])]
    asks.append((f"{url}/away", ["127.0.0.1"]))
    done = subprocess.run(
        [python, "-c", FETCH],
        input="".join(json.dumps(ask) + "\n" for ask in asks),
        env={**os.environ, **redirects},
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = [line for line in done.stdout.splitlines() if line.startswith(("fetched", "refused"))]
    assert [line.partition(":")[0] for line in told] == ["fetched", "refused", "fetched", "refused"], told
    assert "none.invalid" in told[1]
    # By itself vLLM fetches anything; with ours nothing is asked for, and a host that is listed leads nowhere else.
    assert pictures.asked == ["127.0.0.1/pixel.png", "127.0.0.1/pixel.png", "127.0.0.1/away"]
