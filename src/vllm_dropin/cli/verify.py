"""`vllm-dropin verify CONTEXT [MODEL_FOLDER]`: what would go wrong in a cluster without internet, found before it."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vllm_dropin.cli.options import VARIABLES, add_options, read_flags

if TYPE_CHECKING:
    from vllm_dropin.airgap.report import Report

_OPTIONS = ("engine_python", "hook_path", "hook_timeout", "runtime_params_file")
_LONG = ("unpack", "folder", "run")
"""Steps that can take long: it is said when they begin."""
_DETAIL = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("context", metavar="CONTEXT", help="what `build` wrote, an archive or a folder; or the root of an image")
    add("folder", nargs="?", metavar="MODEL_FOLDER", help="the model folder, or its tar: served without network")
    add("--param", action="append", default=[], metavar="NAME=VALUE", help="a runtime parameter; may be repeated")
    add("--question", metavar="TEXT", help="what the served model is asked (default: the capital of France)")
    add(
        "--timeout",
        type=float,
        default=1800,
        metavar="SECONDS",
        help="for the start, the hook included (default: 1800)",
    )
    add("--strict", action="store_true", help="fail when something could not be checked")
    add("--report", metavar="FILE", help="write the JSON report there")
    add("--json", action="store_true", help="print JSON instead of text")
    add_options(parser.add_argument_group("options", VARIABLES), _OPTIONS)
    parser.epilog = "Flags of vLLM go after a bare --. What is unpacked and written goes to TMPDIR and is removed."


def run(args: argparse.Namespace) -> int:
    """Print a table on stdout, problems and warnings on stderr. Returns 0 when nothing failed, else 78 or 74."""
    import os

    from vllm_dropin.airgap.verify import QUESTION, Request, verify

    signal.signal(signal.SIGTERM, _leave)  # so that what was unpacked is removed
    request = Request(
        context=Path(args.context),
        folder=Path(args.folder) if args.folder else None,
        flags=read_flags(args),
        environ=os.environ,
        question=args.question or QUESTION,
        seconds=args.timeout,
    )
    with tempfile.TemporaryDirectory(prefix="vllm-dropin-verify-", ignore_cleanup_errors=True) as scratch:
        report = verify(request, Path(scratch), _announce)
    text = _as_json(report, args.strict)
    if args.report:
        _save(text, Path(args.report))
    print(text if args.json else _as_text(report))
    sys.stdout.flush()
    _tell(report, args.strict)
    return report.exit_code(args.strict)


def _announce(name: str) -> None:
    if name in _LONG:
        print(f"... {name}", file=sys.stderr, flush=True)


def _leave(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def _as_json(report: Report, strict: bool) -> str:
    from vllm_dropin.cli.output import to_json

    return to_json(report.document(strict))


def _as_text(report: Report) -> str:
    from vllm_dropin.cli.output import table
    from vllm_dropin.logging import REDACTOR

    rows = [(step.name, str(step.verdict), _cut(step.detail)) for step in report.steps]
    return REDACTOR.hide(table(rows, indent=""))


def _cut(text: str) -> str:
    return text if len(text) <= _DETAIL else f"{text[: _DETAIL - 3]}..."


def _tell(report: Report, strict: bool) -> None:
    from vllm_dropin.airgap.report import Verdict
    from vllm_dropin.logging import REDACTOR

    lines = [f"warning: {step.name}: {warning}" for step in report.steps for warning in step.warnings]
    for step in report.steps:
        for problem in step.problems:
            lines.append(f"error: {step.name}: {problem.message}" + (f"\n  {problem.remedy}" if problem.remedy else ""))
    failed, left = len(report.of(Verdict.FAILED)), report.of(Verdict.NOT_CHECKED)
    lines.append(f"{failed} of {len(report.steps)} steps failed" if failed else "nothing that was checked failed")
    if left:
        names = ", ".join(step.name for step in left)
        lines[-1] += f"; not checked: {names}" + (" (--strict: a failure)" if strict else "")
    for line in lines:
        print(REDACTOR.hide(line), file=sys.stderr)


def _save(text: str, path: Path) -> None:
    """Beside its place and renamed. Raises InputOutputError."""
    from vllm_dropin.errors import InputOutputError

    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.absolute().parent, prefix=f".{path.name}.", delete=False
        ) as file:
            draft = Path(file.name)
            try:
                file.write(f"{text}\n")
                file.flush()
                draft.chmod(0o644)
                draft.replace(path)
            except BaseException:
                draft.unlink()
                raise
    except OSError as error:
        raise InputOutputError(f"--report: cannot write {path}: {error.strerror}", "Name another place.") from error
