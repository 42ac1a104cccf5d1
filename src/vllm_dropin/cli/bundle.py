"""`vllm-dropin bundle FOLDER`: the model folder with everything in it that the other side of an air gap needs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dropin.cli.options import VARIABLES, add_options, read_flags
from vllm_dropin.errors import ConfigurationError

if TYPE_CHECKING:
    from vllm_dropin.airgap.bundle import Bundle

_OPTIONS = (
    "runtime_params_file", "engine_python", "state_dir", "runtime_dir", "hook_timeout", "hook_path", "logging_level",
    "verbose",
)  # fmt: skip
"""Of the settings' options, those that say something about finding and fetching a model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="the model folder (default: CODE_DIR)")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUTPUT", help="a .tar archive, or a folder, outside of FOLDER"
    )
    parser.add_argument("--allow-pickle", action="store_true", help="take Python pickles too: loading one can run code")
    parser.add_argument(
        "--keep-hook",
        action="store_true",
        help="take custom.py too: it runs again at each start, behind the gap (default: it runs here, once)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    group = parser.add_argument_group("options", VARIABLES)
    group.add_argument(
        "--param", action="append", default=[], metavar="NAME=VALUE", help="a runtime parameter; may be repeated"
    )
    add_options(group, _OPTIONS)
    parser.epilog = "Interrupted or cut off: the same command goes on with what was fetched."


def run(args: argparse.Namespace) -> int:
    """Print what was written on stdout, stages and warnings on stderr. Returns 0, or raises (exit code 78 or 74)."""
    import os
    import signal

    from vllm_dropin.airgap.bundle import BundleRequest, bundle
    from vllm_dropin.airgap.progress import Progress

    if args.engine_args:
        raise ConfigurationError("bundle takes no flags of vLLM", "Put them into the folder's engine_config.json.")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # drafts are removed on the way out
    progress = Progress(sys.stderr)
    request = BundleRequest(Path(args.output), args.allow_pickle, args.keep_hook)
    try:
        made = bundle(request, read_flags(args), os.environ, progress)
    finally:
        progress.clear()
    for note in made.notes:
        progress.say(f"note: {note}")
    for warning in made.warnings:
        progress.say(f"warning: {warning}")
    print(_as_json(made) if args.json else _as_text(made))
    return 0


def _as_json(made: Bundle) -> str:
    from vllm_dropin.cli.output import to_json

    return to_json(
        {
            "output": str(made.written.path),
            "size": made.written.size,
            "sha256": made.written.sha256,
            "files": made.files,
            "source": made.manifest.source.model_dump(),
            "parts": [part.model_dump() for part in made.manifest.parts],
            "licence": made.manifest.licence,
            "weights": {"files": len(made.manifest.files), "bytes": made.manifest.bytes},
            "notes": list(made.notes),
            "warnings": list(made.warnings),
        }
    )


def _as_text(made: Bundle) -> str:
    from vllm_dropin.cli.output import table

    rows = [
        ("output", str(made.written.path)),
        ("size", f"{made.written.size:,} bytes"),
        ("sha256", made.written.sha256),
        ("files", str(made.files)),
        ("model", str(made.manifest.source)),
        *(("with", f"{part} in vllm/{part.path}") for part in made.manifest.parts),
        ("licence", made.manifest.licence),
    ]
    return table([(name, value) for name, value in rows if value is not None], indent="")
