"""One start of the real engine for all tests that meet it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.drivers import _TAG, Service, free_port

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"
READY = 240.0
"""Seconds: 25 to 60 for the engine on two cores, and 15 for the first unpacking of the weights."""


def start_example(scratch: Path, *flags: str) -> Service:
    """Start `vllm-dropin serve examples/smollm2` and wait until it is ready."""
    if not os.environ.get("VLLM_DROPIN_ENGINE_PYTHON"):
        pytest.skip("VLLM_DROPIN_ENGINE_PYTHON does not name a Python with vLLM")
    port = free_port()
    service = Service(f"http://127.0.0.1:{port}", log=scratch / "log")
    assert service.log
    with service.log.open("wb") as log:
        service.process = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("vllm-dropin")), "serve", str(EXAMPLE),
                "--address", f"127.0.0.1:{port}", "--state-dir", str(scratch / "state"), *flags,
            ],
            env={**os.environ, _TAG: service.tag},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=scratch,
        )  # fmt: skip
    try:
        return service.wait_ready(READY)
    except BaseException:
        service.stop()
        raise


class Shared:
    """One service for all tests; started when it is first asked for, and again after a test that has ended it."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._service: Service | None = None

    def get(self) -> Service:
        if self._service is None or self._service.process is None or self._service.process.poll() is not None:
            tools = ("--", "--enable-auto-tool-choice", "--tool-call-parser", "hermes")
            self._service = start_example(self._folders.mktemp("real"), *tools)
        return self._service

    def close(self) -> None:
        if self._service is not None:
            self._service.stop()


@pytest.fixture(scope="session")
def _shared_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    shared = Shared(tmp_path_factory)
    yield shared
    shared.close()


@pytest.fixture
def real_service(_shared_service: Shared) -> Service:
    """The example on the real engine, shared by all tests."""
    return _shared_service.get()
