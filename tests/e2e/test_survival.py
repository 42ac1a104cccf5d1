"""The real engine killed, and the service stopped: what a client sees, and what is left in the process table."""

import http.client
import json
import os
import signal
import threading
import time

import httpx2
import pytest

from tests.e2e.test_rows import as_csv
from tests.faults.figures import record

pytestmark = pytest.mark.e2e

LONG_STREAM = {
    "messages": [{"role": "user", "content": "Count."}],
    "max_tokens": 1500,
    "stream": True,
    "ignore_eos": True,
}


def engine_pids(service) -> list[int]:
    """The processes of vLLM: those under the pid that /status names, by parent."""
    found = [httpx2.get(f"{service.url}/status").json()["engine"]["pid"]]
    for pid in found:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                found += [int(child) for child in file.read().split()]
    return found


def core_pid(service) -> int:
    """vLLM renames its core process to `VLLM::EngineCore`."""
    for pid in engine_pids(service):
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"EngineCore" in file.read():
                return pid
    raise AssertionError(f"no engine core among {engine_pids(service)}")


def test_rows_survive_the_death_of_the_engine_core(real_service):
    """All rows of a CSV are answered although the core is killed in the middle of it; a stream ends in an error."""
    answers, frames = [], []

    def read():
        with httpx2.stream("POST", f"{real_service.url}/v1/chat/completions", json=LONG_STREAM, timeout=60) as stream:
            frames.extend(line.removeprefix("data: ") for line in stream.iter_lines() if line)

    def score():
        rows = as_csv([f"Write a story about the number {index}." for index in range(200)])
        answers.append(httpx2.post(f"{real_service.url}/predict/", content=rows, timeout=400))

    client, reader = threading.Thread(target=score), threading.Thread(target=read)
    victims = engine_pids(real_service)
    core = core_pid(real_service)
    client.start()
    reader.start()
    real_service.wait_for(lambda: len(frames) >= 10, 30, "no ten tokens")
    time.sleep(2)
    assert not answers, "the rows were done before the fault"
    os.kill(core, signal.SIGKILL)
    killed = time.monotonic()
    real_service.wait_for(lambda: httpx2.get(f"{real_service.url}/readyz").status_code == 503, 5, "still ready")
    unready = time.monotonic() - killed
    record(2, "SIGKILL of the core to unready, no workers", unready)
    assert unready < 3  # of a busy machine; make faults holds it against the second that it may take
    reader.join(60)
    assert "[DONE]" not in frames
    assert json.loads(frames[-1])["error"]
    client.join(400)
    assert answers and answers[0].status_code == 200, answers and answers[0].text[:500]
    assert len(answers[0].json()["predictions"]) == 200
    assert all(answers[0].json()["predictions"])
    assert not [pid for pid in victims if os.path.exists(f"/proc/{pid}")]
    status = httpx2.get(f"{real_service.url}/status").json()
    assert (status["phase"], status["engine"]["restarts"]) == ("ready", 1)


@pytest.mark.parametrize(
    ("path", "body", "read", "crowd"),
    [
        ("/v1/chat/completions", json.dumps(LONG_STREAM), 2000, 1),
        ("/v1/chat/completions", json.dumps(LONG_STREAM), 0, 1),
        # The engine drops nobody before the end of its step, and one that reads dozens of prompts takes seconds of
        # these cores: it is over when so many have begun to write.
        ("/predict/", as_csv([f"Write a story about the number {index}." for index in range(100)]), 0, 48),
    ],
    ids=["in a stream", "before its first byte is read", "in a CSV"],
)
def test_a_client_that_leaves_ends_the_engines_work(real_service, path, body, read, crowd):
    def running() -> float:
        text = httpx2.get(f"{real_service.url}/metrics").text
        return sum(
            float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:num_requests_running")
        )

    client = http.client.HTTPConnection(real_service.url.removeprefix("http://"), timeout=60)
    kind = "text/csv" if path == "/predict/" else "application/json"
    client.request("POST", path, body, {"Content-Type": kind})
    if read:
        response = client.getresponse()  # kept: a collected one closes the connection
        assert len(response.read(read)) == read
    real_service.wait_for(lambda: running() >= crowd, 30, "not enough runs")
    client.close()
    if read:
        response.close()
    left = time.monotonic()
    real_service.wait_for(lambda: running() == 0, 2, "it still runs")
    record(15, f"leaving {path} to nothing running", time.monotonic() - left)


def test_sigterm_with_open_streams(real_service):
    """New work is refused at once, streams that end in time end whole, and nothing is left.

    The last of this file, for it ends the service that all share.
    """
    service = real_service
    pids = service.processes()
    begun, ended = [], []

    def stream():
        short = {**LONG_STREAM, "max_tokens": 200}
        with httpx2.stream("POST", f"{service.url}/v1/chat/completions", json=short, timeout=120) as response:
            begun.append(response.status_code)
            ended.append("".join(response.iter_text()))

    clients = [threading.Thread(target=stream) for _ in range(8)]
    for client in clients:
        client.start()
    service.wait_for(lambda: begun == [200] * 8, 30, "not all streams have begun")
    for _ in range(3):
        service.process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    # 3 s for a busy machine; make faults holds it against one
    service.wait_for(lambda: httpx2.get(f"{service.url}/readyz").status_code == 503, 3, "it is still ready")
    record(13, "SIGTERM to unready, 8 streams", time.monotonic() - told)
    refused = httpx2.post(f"{service.url}/v1/chat/completions", json=LONG_STREAM)
    assert refused.status_code == 503
    assert json.loads(refused.content)["error"]
    for client in clients:
        client.join(60)
    assert len(ended) == 8
    assert all(text.rstrip().endswith("data: [DONE]") for text in ended)
    assert service.exit_code(30) == 0
    service.wait_for(lambda: not [pid for pid in pids if os.path.exists(f"/proc/{pid}")], 5, "processes are left")
