"""The other side: the example's bundle on the real engine, in a network namespace with nothing but loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.airgap.test_bundle import SCRIPT, manifest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"
ASK = """\
import json, signal, subprocess, sys, time, urllib.request

URL = "http://127.0.0.1:8080"
BODY = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 8}

subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
try:
    urllib.request.urlopen("http://192.0.2.1", timeout=5)
    sys.exit("there is a network")
except OSError:
    pass

def get(path, body=None):
    request = urllib.request.Request(URL + path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)

service = subprocess.Popen(sys.argv[1:])
try:
    while service.poll() is None:
        try:
            get("/readyz")
            break
        except (OSError, ValueError):
            time.sleep(0.5)
    answer = get("/v1/chat/completions", json.dumps(BODY).encode())
    print(json.dumps({"answer": answer, "status": get("/status")}))
finally:
    service.send_signal(signal.SIGTERM)
    code = service.wait(60)
sys.exit(code)
"""


def test_a_bundle_serves_without_a_network(tmp_path: Path) -> None:
    if not os.environ.get("VLLM_DROPIN_ENGINE_PYTHON"):
        pytest.skip("VLLM_DROPIN_ENGINE_PYTHON does not name a Python with vLLM")
    if os.geteuid() != 0:
        pytest.skip("a network namespace needs root")
    state, bundle, folder = tmp_path / "state", tmp_path / "model.tar", tmp_path / "model"
    subprocess.run([SCRIPT, "bundle", EXAMPLE, "-o", bundle, "--state-dir", state], check=True, timeout=120)
    folder.mkdir()
    subprocess.run(["tar", "-xf", bundle, "-C", folder], check=True, timeout=60)
    assert not (folder / "custom.py").exists()
    assert manifest(folder).source.kind == "hook"
    (tmp_path / "ask.py").write_text(ASK)
    serve = [SCRIPT, "serve", folder, "--state-dir", tmp_path / "other-state", "--address", "127.0.0.1:8080"]
    done = subprocess.run(
        ["unshare", "--net", sys.executable, tmp_path / "ask.py", *serve],
        env={**os.environ, "HF_HOME": str(tmp_path / "empty")},
        stdout=subprocess.PIPE, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0
    said = json.loads(done.stdout)
    assert said["answer"]["choices"][0]["message"]["content"]
    assert "verifying weights" in [moment["stage"] for moment in said["status"]["timeline"]]
