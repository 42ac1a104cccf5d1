"""`serve` on a folder whose weights have a manifest: verified before the engine, which is then started offline."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from tests.contract.drivers import Engine, Ours, Service, start
from tests.contract.folders import make_folder
from tests.model.test_manifest import manifest_of
from vllm_dropin.model.manifest import FILE_NAME, FileRecord, Manifest, visible_files

Serve = Callable[[Path], Service]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with a manifest of its weights."""
    folder = make_folder(tmp_path / "model")
    weights = folder / "vllm"
    files = {name: path.read_bytes() for name, path in visible_files(weights)}
    (weights / FILE_NAME).write_text(manifest_of(files).render())
    return folder


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    started: list[Service] = []

    def begin(folder: Path) -> Service:
        scratch = tmp_path / f"scratch-{len(started)}"
        scratch.mkdir()
        started.append(start(Ours(), folder, Engine.stub(scratch / "engine"), scratch, {}))
        return started[-1]

    yield begin
    for service in started:
        service.stop()


def test_verified_weights_are_served_offline(folder: Path, serve: Serve) -> None:
    service = serve(folder).wait_ready(20)
    assert "the weights are what their manifest says: 3 file(s)" in service.output()
    assert service.launch().environ["HF_HUB_OFFLINE"] == "1"
    stages = [moment["stage"] for moment in httpx2.get(f"{service.url}/status").json()["timeline"]]
    assert stages.count("verifying weights") == 1


@pytest.mark.parametrize(("size", "words"), [(-1, "(cut short)"), (None, "has not the content")])
def test_other_weights_end_the_start(folder: Path, serve: Serve, size: int | None, words: str) -> None:
    path = folder / "vllm" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\1" if size is None else data[:size])
    service = serve(folder)
    assert service.exit_code(20) == 78
    assert f"{path} has" in service.output()
    assert words in service.output()
    assert not list(folder.parent.glob("scratch-*/engine/**/launch.json")), "the engine was started"


def test_a_stop_signal_ends_the_hashing(folder: Path, serve: Serve) -> None:
    """A sparse file of 100 GB takes a minute or more to hash."""
    weights = folder / "vllm"
    with (weights / "model-2.safetensors").open("wb") as file:
        file.truncate(100 << 30)
    manifest = Manifest.model_validate_json((weights / FILE_NAME).read_bytes())
    files = {**manifest.files, "model-2.safetensors": FileRecord(sha256="0" * 64, size=100 << 30)}
    (weights / FILE_NAME).write_text(manifest.model_copy(update={"files": files}).render())
    service = serve(folder)
    assert service.process is not None

    def fraction() -> float | None:
        try:
            status = httpx2.get(f"{service.url}/status").json()
        except httpx2.TransportError:
            return None
        assert status["phase"] in ("starting", "loading")
        return status["progress"] if status["stage"] == "verifying weights" else None

    service.wait_for(fraction, 20, "no progress")
    began = time.monotonic()
    os.kill(service.process.pid, signal.SIGTERM)
    assert service.exit_code(10) == 0
    assert time.monotonic() - began < 5
