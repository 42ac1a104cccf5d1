"""A gateway to fuzz, and the report of `make fuzz` at the end of the run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import START_DEADLINE, EngineProcess, GatewayProcess, Stage, wait_until
from tests.fuzz import report

HERE = Path(__file__).parent


class LenientProcess(EngineProcess):
    """An engine whose every 5xx would be the gateway's."""

    def start(self) -> None:
        argv = [sys.executable, str(HERE / "lenient_engine.py"), "--uds", str(self.uds)]
        self.process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        wait_until(self.answers, START_DEADLINE)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A ready gateway before a lenient engine."""
    stage = Stage()
    engine = LenientProcess(stage._folder() / "e.sock")
    try:
        engine.start()
        yield stage.gateway(engine, model_metadata={"name": "m"})
    finally:
        stage.close()
        engine.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.fuzz)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if report.EXAMPLES:
        terminalreporter.section("what was tried")
        for line in report.lines():
            terminalreporter.write_line(line)
