"""`vllm-dropin score` with the real engine: one that it starts itself, and one that is killed while it works."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import EXAMPLE

pytestmark = pytest.mark.e2e

COMMAND = str(Path(sys.executable).with_name("vllm-dropin"))


def write_rows(path: Path, prompts: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["promptText"])
        writer.writerows([prompt] for prompt in prompts)


def tagged(folder: Path) -> dict[int, bytes]:
    """The processes of the run in this folder, with their command lines.

    vLLM's own write a title over their environment and with it over the mark: they are known by their parents, of which
    the guardian takes in those that lose theirs.
    """
    mark = f"VLLM_TEST_MARK={folder}".encode()
    parents: dict[int, int] = {}
    found: dict[int, bytes] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes()
    while more := [pid for pid, parent in parents.items() if parent in found and pid not in found]:
        for pid in more:
            found[pid] = b""
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
    return found


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    if not os.environ.get("VLLM_DROPIN_ENGINE_PYTHON"):
        pytest.skip("VLLM_DROPIN_ENGINE_PYTHON does not name a Python with vLLM")
    return subprocess.Popen(
        [COMMAND, "score", str(EXAMPLE), *words, "--json", "--state-dir", str(folder / "state")],
        env={**os.environ, "VLLM_TEST_MARK": str(folder)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_folder_scores_a_file_and_leaves_nothing_running(tmp_path):
    rows = [{"promptText": f"What is {place} plus one?", "key": place} for place in range(24)]
    rows.insert(5, {"promptText": "long " * 5000, "key": "too long"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = start(tmp_path, "rows.jsonl", "-o", "out.parquet", "--params", "max_tokens=12")
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    summary = json.loads(out)
    assert (summary["rows"], summary["errors"]) == (25, {"input": 1})
    assert "loading: engine starting" in errors
    assert "vllm_dropin.vllm" not in errors  # what the engine says is in engine.log
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["row_id"] for row in table] == list(range(25))
    assert table[5]["completion"] is None and "2048" in table[5]["error"]
    good = [row for row in table if row["error"] is None]
    assert all(row["completion"] and 0 < row["completion_tokens"] <= 12 for row in good)
    assert not tagged(tmp_path)
    assert not list(tmp_path.glob("out.parquet.*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_deaths_of_the_engine_core_lose_nothing(tmp_path):
    write_rows(tmp_path / "rows.csv", [f"Write a story about the number {place}." for place in range(300)])
    process = start(tmp_path, "rows.csv", "-o", "out.csv", "--params", "max_tokens=64")
    killed: list[int] = []
    target = 20
    deadline = time.monotonic() + 600
    while process.poll() is None and len(killed) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.2)
        done = sum(part.read_bytes().count(b"\n") for part in tmp_path.glob("out.csv.partial/parts/*"))
        cores = [pid for pid, command in tagged(tmp_path).items() if b"EngineCore" in command and pid not in killed]
        if done >= target and cores:
            os.kill(cores[0], signal.SIGKILL)
            killed.append(cores[0])
            target = done + 80  # past the rows that were in flight
    out, errors = process.communicate(timeout=600)
    assert len(killed) == 3, errors[-3000:]
    assert process.returncode == 0, errors[-3000:]
    summary = json.loads(out)
    assert (summary["rows"], summary["errors"], summary["engine_restarts"]) == (300, {}, 3)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        answers = list(csv.DictReader(file))
    assert [row["row_id"] for row in answers] == [str(place) for place in range(300)]
    assert all(row["completion"] for row in answers)
    assert not tagged(tmp_path)


def test_a_running_service_scores_a_file_too(real_service, tmp_path):
    write_rows(tmp_path / "rows.csv", [f"Say {place}." for place in range(12)])
    done = subprocess.run(
        [
            COMMAND,
            "score",
            "--url",
            f"{real_service.url}/v1",
            "rows.csv",
            "-o",
            "out.jsonl",
            "--params",
            "max_tokens=8",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["row_id"] for answer in answers] == list(range(12))
    assert all(answer["completion"] and answer["error"] is None for answer in answers)
