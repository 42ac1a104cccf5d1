"""What a test measured, for the table of docs/reliability.md."""

from __future__ import annotations

import json
import os
from pathlib import Path

VARIABLE = "FAULTS_FIGURES"
"""Names the file that figures are added to, a JSON line each; unset, they are only checked against their bounds."""


def record(row: int, name: str, value: float, unit: str = "s") -> None:
    """Note a figure of one row of the table (tests/faults/table.py)."""
    if file := os.environ.get(VARIABLE):
        with Path(file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"row": row, "name": name, "value": round(value, 3), "unit": unit}) + "\n")


def worst(file: Path) -> dict[int, dict[str, str]]:
    """By row and name, the largest figure of a file, with its unit."""
    found: dict[tuple[int, str, str], float] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        figure = json.loads(line)
        key = (figure["row"], figure["name"], figure["unit"])
        found[key] = max(figure["value"], found.get(key, figure["value"]))
    rows: dict[int, dict[str, str]] = {}
    for (row, name, unit), value in sorted(found.items()):
        rows.setdefault(row, {})[name] = f"{value:.3g} {unit}" if value else f"0 {unit}"
    return rows
