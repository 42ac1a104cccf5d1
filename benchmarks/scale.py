"""`vllm-dropin score` on millions of rows: what a row costs, and that memory does not grow with them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

from tests.contract.drivers import free_port

from benchmarks.report import Figure, at_least, at_most
from benchmarks.service import Bench, memory

NAME = "scale"
_SAMPLE_EVERY = 1.0


def measure(bench: Bench) -> list[Figure]:
    """One run of the command, from a CSV to a CSV, against a server that answers at once."""
    folder = bench.scratch / "scale"
    folder.mkdir()
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "promptText"])
        writer.writerows((place, f"What is the number {place} good for?") for place in range(bench.rows))
    port = free_port()
    server = subprocess.Popen([sys.executable, Path(__file__).with_name("answering.py"), str(port)])
    try:
        time.sleep(2)
        summary, samples = _score(folder, port)
    finally:
        server.kill()
        server.wait(10)
    assert (summary["rows"], summary["errors"]) == (bench.rows, {})
    with (folder / "out.csv").open("rb") as output:
        assert sum(1 for _ in output) == bench.rows + 1
    tenth = samples[len(samples) // 10 :]
    return [
        Figure(NAME, f"{bench.rows:,} rows", "rows/s", (summary["rows_per_second"],), at_least(5000)),
        Figure(NAME, "writing the output included", "rows/s", (bench.rows / summary["seconds"],)),
        Figure(NAME, "resident memory, peak", "MB", (max(samples) / 1e6,), at_most(300)),
        Figure(NAME, "growth after the first tenth", "MB", ((max(tenth) - tenth[0]) / 1e6,)),
    ]


def _score(folder: Path, port: int) -> tuple[dict[str, float], list[int]]:
    """The command's summary, and its resident bytes once a second."""
    command = Path(sys.executable).with_name("vllm-dropin")
    url = f"http://127.0.0.1:{port}/v1"
    with (folder / "summary").open("w+") as out:
        process = subprocess.Popen(
            [command, "score", "--url", url, "rows.csv", "-o", "out.csv", "--json"], cwd=folder, stdout=out
        )
        samples = []
        while process.poll() is None:
            samples.append(memory(process.pid).now)
            time.sleep(_SAMPLE_EVERY)
        if process.returncode:
            raise RuntimeError(f"score ended with exit code {process.returncode}")
        out.seek(0)
        return json.load(out), samples
