"""`vllm-dropin check FOLDER`: everything that `serve` would decide, without starting anything."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from vllm_dropin.cli.options import add_settings_arguments, read_flags

if TYPE_CHECKING:
    from vllm_dropin.cli.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    add_settings_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report on stdout. Returns 0, or raises what makes the folder unservable (exit code 78).

    With --json an error is a report too, beside its message on stderr.
    """
    import os

    from vllm_dropin.airgap.progress import Progress
    from vllm_dropin.cli import report
    from vllm_dropin.errors import DropinError

    progress = Progress(sys.stderr)  # hashing takes minutes where there are hundreds of gigabytes
    try:
        found: Report = report.make(read_flags(args), os.environ, progress.counting("verifying weights"))
    except DropinError as error:
        if args.json:
            print(report.failure_json(error))
        raise
    finally:
        progress.clear()
    print(report.as_json(found) if args.json else report.as_text(found))
    sys.stdout.flush()
    if found.error is not None:
        raise found.error
    return 0
