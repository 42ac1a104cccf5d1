"""Runs custom.py's `init(code_dir=…)` and `load_model(code_dir)`, then says what they changed in the environment.

    hook.py CUSTOM_PY CODE_DIR REPORT [PATH...]

Run by file path under the engine's Python, with the working directory where the hook expects it. REPORT is a file
that is replaced atomically (mode 0600: the environment holds secrets) when a stage begins and at the end; an end
without `finished` or `failed` in it means that the process was cut off in the stage it names. The folders PATH come
last on `sys.path`, so that what the engine's Python has installed wins over them.

Standard library only. Logging is left alone: the hook may set it up as it likes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

TRACEBACK_LINES = 12
TRACEBACK_WIDTH = 4000
"""Characters of a line in the report. The supervisor cuts them shorter, but only once it has hidden the secrets."""


def write_report(report: Path, **fields: Any) -> None:
    """Replace the report. ASCII JSON keeps bytes that are not UTF-8, as lone surrogates."""
    temporary = report.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        json.dump(fields, file)
    temporary.replace(report)


def changes(before: dict[str, str], after: dict[str, str]) -> dict[str, str | None]:
    """Variables that were added or changed, with their value, and that were deleted, with None."""
    changed: dict[str, str | None] = {name: value for name, value in after.items() if before.get(name) != value}
    changed.update(dict.fromkeys(before.keys() - after.keys()))
    return changed


def foreign(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the hook's first frame on: ours and the import machinery's say nothing to its author."""
    start = trace
    while start is not None:
        name = start.tb_frame.f_code.co_filename
        if name != __file__ and not name.startswith(("<frozen importlib", importlib.__file__)):
            return start
        start = start.tb_next
    return None


def describe(error: BaseException) -> list[str]:
    """The traceback's last lines."""
    text = traceback.format_exception(type(error), error, foreign(error.__traceback__), limit=-20)
    return "".join(text).rstrip().splitlines()[-TRACEBACK_LINES:]


def run(custom: Path, code_dir: str, report: Path) -> None:
    """Import the hook and call what it defines."""
    write_report(report, status="running", stage="import")
    module = importlib.import_module(custom.stem)
    if callable(init := getattr(module, "init", None)):
        write_report(report, status="running", stage="init")
        init(code_dir=code_dir)
    if callable(load_model := getattr(module, "load_model", None)):
        write_report(report, status="running", stage="load_model")
        load_model(code_dir)


def main(arguments: list[str]) -> int:
    custom, code_dir, report = Path(arguments[0]), arguments[1], Path(arguments[2])
    before = dict(os.environ)
    if not sys.flags.safe_path:
        del sys.path[0]  # this file's own folder, which must not shadow anything of the hook's
    sys.path.insert(0, str(custom.parent))
    sys.path.extend(arguments[3:])
    sys.argv = [str(custom)]
    try:
        run(custom, code_dir, report)
    except BaseException as error:  # noqa: BLE001 (SystemExit too: a hook that leaves early has not finished)
        lines = describe(error)
        print("\n".join(lines), file=sys.stderr)
        stage = json.loads(report.read_text(encoding="ascii"))["stage"]
        write_report(report, status="failed", stage=stage, traceback=[line[:TRACEBACK_WIDTH] for line in lines])
        return 1
    write_report(report, status="finished", changes=changes(before, dict(os.environ)))
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    # Without exit handlers and without waiting for threads: a hook used to live as long as the server, so a temporary
    # folder of its own (the weights may be in it) must not be cleaned up when load_model has returned.
    os._exit(code)
