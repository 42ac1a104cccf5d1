"""The table of faults is whole, names tests that are there, and is what the documentation shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.faults.__main__ import BEGIN, END, PAGE, STORE, render
from tests.faults.conftest import COLLECTED
from tests.faults.figures import worst
from tests.faults.table import ROWS, named

ROOT = Path(__file__).parents[2]


def test_each_of_the_thirty_rows_is_there_and_has_a_test() -> None:
    assert [row.number for row in ROWS] == list(range(1, 31))
    for row in ROWS:
        assert row.fault and row.shows and row.bound
        assert row.tests
        assert len(set(row.tests)) == len(row.tests)


def test_every_named_test_is_there(pytestconfig: pytest.Config) -> None:
    """Collected, where this run has collected the file as a whole; in the file's text elsewhere."""
    collected = pytestconfig.stash[COLLECTED]
    whole = {test.partition("::")[0] for test in collected}
    if any("::" in word for word in pytestconfig.args):
        whole = set()
    for test in {test for row in ROWS for test in row.tests}:
        file, _, function = test.partition("::")
        if file in whole:
            assert not function or test in collected
        else:
            assert re.search(rf"^def {function or 'test_'}", (ROOT / file).read_text(encoding="utf-8"), re.M), test


def test_what_is_named_has_the_mark(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        assert named(item.nodeid) == any(mark.name == "faults" for mark in item.iter_markers())


def test_the_documentation_shows_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    shown = page.partition(BEGIN)[2].partition(END)[0]
    assert shown == render(json.loads(STORE.read_text(encoding="utf-8"))), "run: python -m tests.faults"


def test_the_largest_figure_of_a_run_counts(tmp_path: Path) -> None:
    file = tmp_path / "figures.jsonl"
    lines = [{"row": 2, "name": "unready", "value": value, "unit": "s"} for value in (0.2, 0.4567, 0.3)]
    lines.append({"row": 1, "name": "later", "value": 0, "unit": "s"})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert worst(file) == {1: {"later": "0 s"}, 2: {"unready": "0.457 s"}}
