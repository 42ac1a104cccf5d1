"""How results look: aligned text for people, JSON for programs. Secrets print as `***` in both."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence

from vllm_dropin.logging import REDACTOR


def table(rows: Iterable[Sequence[str]], indent: str = "  ") -> str:
    """Rows with their columns under each other; the last column is as long as it likes."""
    lines = [tuple(row) for row in rows]
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    return "\n".join(
        indent + "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )


def shell(words: Sequence[str], indent: str = "  ") -> str:
    """A command line to be pasted into a shell, one flag a line."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--") and lines[-1]:
            lines.append([])
        lines[-1].append(shlex.quote(REDACTOR.hide(word)))  # quoting may change how a secret is spelled
    return f" \\\n{indent}  ".join(" ".join(line) for line in lines).join((indent, ""))


def show(value: object) -> str:
    """A value in a table: short, on one line, nothing for None."""
    text = "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    text = " ".join(REDACTOR.hide(text).split()) or '""'  # hidden before it is cut
    return text if len(text) <= 60 else f"{text[:57]}..."


def to_json(value: object) -> str:
    """JSON with secrets hidden, also inside longer texts."""
    return json.dumps(_hidden(value), indent=2, ensure_ascii=False, default=lambda other: REDACTOR.hide(str(other)))


def _hidden(value: object) -> object:
    """Before it is JSON: there a secret with a quote or a line break in it would be spelled differently."""
    match value:
        case str():
            return REDACTOR.hide(value)
        case dict():
            return {key: _hidden(item) for key, item in value.items()}
        case list() | tuple():
            return [_hidden(item) for item in value]
        case _:
            return value
