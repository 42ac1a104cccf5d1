"""Writes the table of faults into docs/reliability.md.

    python -m tests.faults [FIGURES]

FIGURES is what `make faults` has measured (figures.py): it replaces what figures.json has.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from tests.faults.figures import worst
from tests.faults.table import ROWS, Row

STORE = Path(__file__).with_name("figures.json")
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- the table of faults: python -m tests.faults -->\n", "<!-- end of the table -->\n"


def main(words: list[str]) -> int:
    """Bring figures.json and the page up to date."""
    stored = json.loads(STORE.read_text(encoding="utf-8"))
    for word in words:
        measured = {str(row): figures for row, figures in worst(Path(word)).items()}
        stored = {"machine": machine(), "rows": measured}
        _write(STORE, json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _write(PAGE, before + BEGIN + render(stored) + END + rest.partition(END)[2])
    return 0


def machine() -> str:
    """What the figures depend on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def render(stored: dict[str, Any]) -> str:
    """The table, then the tests of each row."""
    lines = ["| | fault | what ours shows | bound | measured |", "|---|---|---|---|---|"]
    lines += [_line(row, stored["rows"].get(str(row.number), {})) for row in ROWS]
    lines += ["", f"Measured on {stored['machine']}: the worst of a run.", "", "### The tests of each row", ""]
    for row in ROWS:
        lines.append(f"{row.number}. {' '.join(f'`{test}`' for test in row.tests)}")
    return "\n".join(lines) + "\n"


def _line(row: Row, figures: dict[str, str]) -> str:
    measured = "<br>".join(f"{name}: {value}" for name, value in figures.items())
    shows = ". ".join(text for text in (row.shows, row.nearest) if text)
    return f"| {row.number} | {row.fault} | {shows} | {row.bound} | {measured} |"


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
