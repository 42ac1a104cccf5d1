"""Faults of the folder and of its hook: told in time, by name, and before an engine is started."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from tests.contract.drivers import Service
from tests.contract.folders import make_folder
from tests.e2e.conftest import EXAMPLE
from tests.faults.conftest import Serve
from tests.faults.figures import record
from tests.supervisor.test_service import CHAT

LIMIT = 2.0
"""Seconds from the start to the exit."""
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")


def refused(begin: Callable[[], Service], row: int, *words: str) -> str:
    """See the service end with 78, with these words and without an engine, within 2 s. Returns what it said.

    Late is what is late three times: a single time may be the machine's.
    """
    for _ in range(3):
        service = begin()
        started = time.monotonic()
        assert service.exit_code(20) == 78, service.output()
        took = time.monotonic() - started
        log = service.output()
        assert [word for word in words if word not in log] == []
        assert "Traceback" not in log
        assert service.engine and service.engine.record
        assert not (service.engine.record / "launch.json").exists()
        assert "restart" not in log
        if took < LIMIT:
            break
    record(row, "start to exit 78", took)
    assert took < LIMIT
    return log


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"engine_config": '{\n  "args": ["--max-model-len" "5"]\n}'}, ["engine_config.json, line 2, column"]),
        ({"engine_config": '{"args": [],\n "args": ["-tp", "2"]}'}, ["engine_config.json, line 2", "'args'", "twice"]),
        ({"engine_config": '{\n"arg": []}'}, ["engine_config.json, line 2", "'arg'", "'args'"]),
        ({"args": ["--max-modle-len", "5"]}, ["engine_config.json", "--max-modle-len", "args[0]", "--max-model-len"]),
        ({"metadata": "name: again\n"}, ["model-metadata.yaml, line 4", "name", "duplicate"]),
        ({"metadata": "runtimeParameterDefinitions: [\n"}, ["model-metadata.yaml, line 5"]),
    ],
)
def test_bad_configuration(serve: Serve, fault: dict[str, object], words: list[str]) -> None:
    refused(lambda: serve(**fault), 6, *words)


def cut(weights: Path) -> str:
    with (weights / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1)
    return "model.safetensors is truncated"


def drop(weights: Path) -> str:
    (weights / "model.safetensors").rename(weights / "model-00001-of-00002.safetensors")
    return "model-00002-of-00002.safetensors is missing"


def flip(weights: Path) -> str:
    with (weights / "model.safetensors").open("r+b") as file:
        file.seek(8)
        byte = file.read(1)[0]
        file.seek(8)
        file.write(bytes([byte ^ 1]))
    return "model.safetensors is corrupt"


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", [cut, drop, flip])
def test_damaged_weights(serve: Serve, tmp_path: Path, damage: Callable[[Path], str], real: bool) -> None:
    folder = make_folder(tmp_path / "model", weights=not real)
    if real:
        if not (EXAMPLE / "vllm" / "model.safetensors").exists():
            pytest.skip("the example's weights are not unpacked")
        shutil.copytree(EXAMPLE / "vllm", folder / "vllm")
    said = damage(folder / "vllm")
    log = refused(lambda: serve(model=folder), 9, said)
    assert str(folder / "vllm") in log


HALF_WRITTEN = """
import json, pathlib, struct, time
def load_model(code_dir):
    folder = pathlib.Path(code_dir, "vllm")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    head = json.dumps({"w": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    whole = struct.pack("<Q", len(head)) + head + bytes(8)
    again = (folder / "model.safetensors").exists()
    (folder / "model.safetensors").write_bytes(whole if again else whole[:-3])
    print("half is written", flush=True)
    WAIT
"""


def test_a_hook_that_writes_half_the_weights(serve: Serve) -> None:
    hook = HALF_WRITTEN.replace("WAIT", "")
    refused(lambda: serve(weights=False, custom=hook), 7, "model.safetensors is truncated")


def test_a_hook_that_was_killed_is_run_again(serve: Serve, tmp_path: Path) -> None:
    """The second run finds half of the weights, and a note of ours that the first run did not finish."""
    wait = "time.sleep(0 if again else 60)"
    folder = make_folder(tmp_path / "model", weights=False, custom=HALF_WRITTEN.replace("WAIT", wait))
    state = ("--state-dir", str(tmp_path / "state"))
    first = serve(*state, model=folder)
    first.wait_for(lambda: "half is written" in first.output(), 10, "no hook")
    assert first.process
    first.process.kill()
    first.process.wait(5)
    second = serve(*state, model=folder).wait_ready(20)
    assert "did not finish" in second.output()
    assert httpx2.post(f"{second.url}/v1/chat/completions", json=CHAT).status_code == 200


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A model folder that nobody can write to, root included."""
    folder = make_folder(tmp_path / "model", custom="def load_model(code_dir):\n    return None\n")
    for options in (["--bind", str(folder), str(folder)], ["-o", "remount,ro,bind", str(folder)]):
        if subprocess.run(["mount", *options], capture_output=True).returncode:
            pytest.skip("no mounting here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def contents(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


@ROOT_ONLY
def test_a_read_only_folder_serves_and_a_killed_service_leaves_nothing_in_it(read_only: Path, serve: Serve) -> None:
    before = contents(read_only)
    with pytest.raises(OSError, match="Read-only"):
        (read_only / "file").touch()
    first = serve(model=read_only).wait_ready(20)
    assert first.process
    first.process.kill()
    first.process.wait(5)
    second = serve(model=read_only)
    second.wait_for(lambda: second.output(), 5, "silent")
    second.wait_ready(20)
    assert httpx2.post(f"{second.url}/predict/", content="promptText\none\n").json()["predictions"] == ["echo: one"]
    assert contents(read_only) == before
