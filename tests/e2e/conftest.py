"""One start of the real engine for all tests that meet it, and a way to start one more."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="session")
def real_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The example on the real engine, shared by every test that does not end it."""
    tools = ("--", "--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    service = start_example(tmp_path_factory.mktemp("real"), *tools)
    yield service
    service.stop()


@pytest.fixture
def start_real(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start another one, with flags; it is stopped after the test."""
    started: list[Service] = []

    def begin(*flags: str) -> Service:
        started.append(start_example(tmp_path, *flags))
        return started[-1]

    yield begin
    for service in started:
        service.stop()
