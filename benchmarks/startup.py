"""From the command to an answer: how soon the socket speaks, how soon help comes, how soon ready follows the engine."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.report import Figure, at_most
from benchmarks.service import EXAMPLE, Bench

NAME = "startup"
_LIMIT = 30.0


def measure(bench: Bench) -> list[Figure]:
    """Figures in seconds."""
    if not (EXAMPLE / "vllm").exists():
        bench.serving()  # the first run of the example's hook unpacks the weights, beside which nothing is measured
    answers = tuple(_first_answer(bench, number) for number in range(bench.pairs))
    helps = tuple(_help() for _ in range(bench.pairs))
    return [
        Figure(NAME, "socket answers 503 after", "s", answers, at_most(0.7)),
        Figure(NAME, "vllm-dropin --help", "s", helps, at_most(0.3)),
        Figure(NAME, "ready after the engine is", "s", (bench.serving().lag,), at_most(1.0)),
    ]


def _first_answer(bench: Bench, number: int) -> float:
    """Seconds from the start of `vllm-dropin serve` to its first response, which has to be 503."""
    started = time.perf_counter()
    service = bench.start_ours(f"start{number}")
    try:
        host, _, port = service.url.removeprefix("http://").partition(":")
        while True:
            connection = http.client.HTTPConnection(host, int(port), timeout=_LIMIT)
            try:
                connection.request("GET", "/")
                status = connection.getresponse().status
                break
            except ConnectionRefusedError:
                if time.perf_counter() - started > _LIMIT or service.exit_code(0.005) is not None:
                    raise RuntimeError(f"no answer\n{service.output()[-3000:]}") from None
            finally:
                connection.close()
        seconds = time.perf_counter() - started
    finally:
        service.stop()
    if status != 503:
        raise RuntimeError(f"the first answer is {status}, not 503")
    return seconds


def _help() -> float:
    script = Path(sys.executable).with_name("vllm-dropin")
    environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    started = time.perf_counter()
    subprocess.run([script, "--help"], env=environ, stdout=subprocess.DEVNULL, check=True, timeout=_LIMIT)
    return time.perf_counter() - started
