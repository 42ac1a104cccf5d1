"""`vllm-dropin score --ray` on a cluster of two nodes in one machine: nodes that die, runs that go on with and without.

The nodes are raylets on the loopback address; the command is a process of its own, as a user runs it.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.batch.conftest import COMMAND, Scoring
from tests.conftest import wait_until
from tests.contract.drivers import Engine
from tests.contract.folders import make_folder
from tests.e2e.conftest import EXAMPLE
from vllm_dropin.batch.ray_errors import Told, in_short
from vllm_dropin.batch.ray_reading import Answered
from vllm_dropin.children.guardian import descendants
from vllm_dropin.errors import ConfigurationError, EngineError

ray_constants = pytest.importorskip("ray._private.ray_constants")

# Ray's own code leaves processes and files to the garbage collector.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(180)]

ROWS = 600
STORE = 80 << 20
"""Bytes of shared memory for each node; Ray takes no less than 75 MiB."""


class Nodes:
    """The cluster. Its first node is the one that drivers join."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        common = {"node_ip_address": "127.0.0.1", "num_cpus": 1, "object_store_memory": STORE}
        self._common = {**common, "temp_dir": str(folder), "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=self._common)
        self.address: str = self.cluster.address

    def add(self) -> Any:
        return self.cluster.add_node(**self._common)

    def kill(self, node: Any) -> None:
        """As when the power fails: the node and all that runs on it."""
        raylet = node.all_processes["raylet"][0].process.pid
        for pid in [raylet, *descendants(raylet)]:
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # For the nodes and the command: 127.0.0.1 is to be just that (ray_cluster.py says why Ray thinks otherwise).
        patch.setenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0")
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: there are unix sockets in it
        # Cluster writes its address where a later `ray.init()` of anyone would find it, and does not make that folder.
        patch.setenv("RAY_TMPDIR", str(folder))
        (folder / "ray").mkdir()
        try:
            made = Nodes(folder)
            yield made
            made.cluster.shutdown()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def rows_in_journal(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (folder / "parts").glob("*"))


def write_slow_rows(scoring: Scoring) -> None:
    scoring.write_csv("rows.csv", (f"row {place} tokens={place % 7 + 1} delay=0.08" for place in range(ROWS)))


def test_a_node_dies_and_every_row_has_one_answer(nodes: Nodes, scoring: Scoring) -> None:
    write_slow_rows(scoring)
    scoring.run("rows.csv", "-o", "undisturbed.csv")
    asked_before = scoring.engine.stats()["started"]
    second = nodes.add()
    run = scoring.start(
        "rows.csv", "-o", "out.csv", "--ray", nodes.address, "--replicas", "2", "--concurrency", "16", "--json"
    )
    journal = scoring.folder / "out.csv.partial"
    wait_until(lambda: rows_in_journal(journal) > ROWS // 3, 60)
    nodes.kill(second)
    stdout, messages = run.communicate(timeout=100)

    assert run.returncode == 0, messages[-3000:]
    assert json.loads(stdout)["rows"] == ROWS, stdout
    assert len(re.findall(r"replica \d on 127.0.0.1 is ready", messages)) == 2, messages
    assert re.search(r"replica \d on 127.0.0.1 is lost", messages)
    assert "Traceback" not in messages
    assert (scoring.folder / "out.csv").read_bytes() == (scoring.folder / "undisturbed.csv").read_bytes()
    asked_twice = scoring.engine.stats()["started"] - asked_before - ROWS
    # What was at the engine when the node died, and what had come back in the moment before it could be reported.
    assert 0 < asked_twice <= 2 * 16
    assert not journal.exists()


@pytest.mark.slow
def test_runs_with_and_without_ray_go_on_with_each_other(nodes: Nodes, scoring: Scoring) -> None:
    write_slow_rows(scoring)
    scoring.run("rows.csv", "-o", "undisturbed.csv")
    asked_before = scoring.engine.stats()["started"]
    journal = scoring.folder / "out.csv.partial"
    words = ("rows.csv", "-o", "out.csv", "--concurrency", "16")

    local = scoring.start(*words)
    wait_until(lambda: rows_in_journal(journal) > ROWS // 6, 30)
    local.kill()
    local.communicate()
    answered = rows_in_journal(journal)

    on_ray = scoring.start(*words, f"--ray={nodes.address}")
    wait_until(lambda: rows_in_journal(journal) > ROWS // 2, 60)
    on_ray.send_signal(signal.SIGINT)
    _, messages = on_ray.communicate(timeout=60)
    assert on_ray.returncode == 130, messages[-3000:]
    assert f"going on: {answered} rows" in messages
    assert "the same command goes on" in messages
    assert "Traceback" not in messages

    assert scoring.summary("rows.csv", "-o", "out.csv", f"--ray={nodes.address}")["rows"] == ROWS
    assert (scoring.folder / "out.csv").read_bytes() == (scoring.folder / "undisturbed.csv").read_bytes()
    assert scoring.engine.stats()["started"] - asked_before - ROWS <= 2 * 2 * 16


@pytest.mark.slow
def test_too_many_failed_rows_end_the_run(nodes: Nodes, scoring: Scoring) -> None:
    scoring.write_csv("rows.csv", (f"row {place} status=400" for place in range(50)))
    done = scoring.run("rows.csv", "-o", "out.csv", "--ray", nodes.address, "--max-errors", "9", code=65)
    assert "10 of 10 rows failed, more than --max-errors allows" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_engine_that_does_not_start_says_so_itself(nodes: Nodes, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    engine = Engine.stub(tmp_path / "engine", -1)
    (tmp_path / "rows.csv").write_text("promptText\nHello\n")
    done = subprocess.run(
        [
            COMMAND, "score", str(folder), "rows.csv", "-o", "out.csv", "--ray", nodes.address,
            "--engine-python", str(engine.python), "--state-dir", str(tmp_path / "state"),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 70, done.stderr
    assert "error: replica 1 on 127.0.0.1: the engine" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 30


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--ray", "127.0.0.1:1"), 78, "no Ray cluster answers at 127.0.0.1:1"),
        (("--ray=ray://127.0.0.1:10001",), 78, "Ray Client"),
        (("--ray", "folder"), 2, "no address"),
        (("--replicas", "3"), 78, "Add --ray"),
        (("--ray=local", "--replicas", "3:2"), 2, "neither a number of engines nor a range"),
    ],
)
def test_wrong_words_are_explained(quick: Scoring, words: tuple[str, ...], code: int, told: str) -> None:
    quick.write_csv("rows.csv", ["row"])
    assert told in quick.run("rows.csv", "-o", "out.csv", *words, code=code).stderr


def test_without_ray_it_is_said_how_to_get_it(quick: Scoring) -> None:
    quick.write_csv("rows.csv", ["row"])
    (quick.folder / "ray.py").write_text("raise ImportError('no ray')\n")
    program = "import sys; sys.path.insert(0, '.'); from vllm_dropin.cli.main import main; sys.exit(main())"
    words = quick.command("rows.csv", "-o", "out.csv", "--ray")[1:]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=quick.folder, env=quick.environ, capture_output=True, text=True
    )
    assert done.returncode == 78
    assert "pip install 'vllm-dropin[ray]'" in done.stderr


def test_answered_rows_are_known_by_ranges() -> None:
    rows = {0, 1, 2, 7, 9, 10, 4096}
    answered = Answered.among(rows.__contains__, len(rows))
    assert answered.starts == (0, 7, 9, 4096)
    assert answered.stops == (3, 8, 11, 4097)
    assert {row for row in range(5000) if answered.has(row)} == rows
    assert not Answered.among(rows.__contains__, 0).has(0)


def test_an_error_keeps_its_class_words_and_exit_code() -> None:
    told = Told.from_json(Told.of(ConfigurationError("the folder is gone", "Put it back.")).to_json())
    error = told.error("replica 3 on node")
    assert type(error) is ConfigurationError
    assert (error.message, error.remedy, error.exit_code) == (
        "replica 3 on node: the folder is gone",
        "Put it back.",
        78,
    )
    assert type(Told("Unheard", "of").error()) is EngineError
    assert in_short(ValueError("first\nsecond")) == "ValueError: first"


AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's own, which hold nothing: when their node is gone they try for a while to tell its head."""


def marked(folder: Path) -> list[int]:
    """The processes of the run in this folder, whoever their parents are."""
    mark = f"VLLM_TEST_MARK={folder}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def program_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return ""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
def test_an_engine_dies_with_its_replica_and_all_with_the_command(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    engine = Engine.stub(tmp_path / "engine")
    assert engine.record
    with (tmp_path / "rows.csv").open("w") as file:
        file.write("promptText\n" + "".join(f"row {place} [[sleep 0.3]]\n" for place in range(400)))
    journal = tmp_path / "out.csv.partial"

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                COMMAND, "score", str(folder), "rows.csv", "-o", "out.csv", "--ray=local", "--concurrency", "8",
                "--engine-python", str(engine.python), "--state-dir", str(tmp_path / "state"),
            ],
            cwd=tmp_path, env={**os.environ, "VLLM_TEST_MARK": str(tmp_path)},
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def engine_pid() -> int:
        pid: int = json.loads((engine.record / "launch.json").read_text())["pid"]
        return pid

    run = start()
    wait_until(lambda: rows_in_journal(journal) > 40, 60)
    first = engine_pid()
    for pid in marked(tmp_path):
        if program_of(pid).startswith("ray::Replica"):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: gone(first), 20)
    wait_until(lambda: rows_in_journal(journal) > 120, 60)
    second = engine_pid()
    assert second != first
    run.kill()
    run.communicate()
    wait_until(lambda: all(program_of(pid) in AGENTS for pid in marked(tmp_path)), 60)
    agents = set(marked(tmp_path))
    assert gone(second)

    run = start()
    _, messages = run.communicate(timeout=120)
    assert run.returncode == 0, messages[-3000:]
    assert set(marked(tmp_path)) <= agents
    with (tmp_path / "out.csv").open(newline="") as file:
        answers = list(csv.DictReader(file))
    assert [answer["completion"] for answer in answers] == [f"echo: row {place} [[sleep 0.3]]" for place in range(400)]


@pytest.mark.e2e
@pytest.mark.slow
def test_the_real_engine_on_a_cluster_of_its_own(tmp_path: Path) -> None:
    if not os.environ.get("VLLM_DROPIN_ENGINE_PYTHON"):
        pytest.skip("VLLM_DROPIN_ENGINE_PYTHON does not name a Python with vLLM")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "promptText"])
        writer.writerows([place, f"What is {place} plus one?"] for place in range(8))
    done = subprocess.run(
        [
            COMMAND, "score", str(EXAMPLE), "rows.csv", "-o", "out.csv", "--ray=local", "--params", "max_tokens=8",
            "--json", "--state-dir", str(tmp_path / "state"),
        ],
        cwd=tmp_path, env={**os.environ, "VLLM_TEST_MARK": str(tmp_path)}, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout)["rows"] == 8
    assert "is ready" in done.stderr
    with (tmp_path / "out.csv").open(newline="") as file:
        answers = list(csv.DictReader(file))
    assert [answer["key"] for answer in answers] == [str(place) for place in range(8)]
    assert all(answer["completion"] and not answer["error"] for answer in answers)
    deadline = time.monotonic() + 15
    while marked(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not marked(tmp_path)
