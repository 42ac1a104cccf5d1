"""The report of `make fuzz`, at the end of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import report

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.fuzz)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if report.EXAMPLES:
        terminalreporter.section("what was tried")
        for line in report.lines():
            terminalreporter.write_line(line)
