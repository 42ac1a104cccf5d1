"""`vllm-dropin build`: writes the image context, as an archive for a platform or as a folder."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_dropin.environment.context import Written
    from vllm_dropin.environment.image import Image

_DEFAULT = "vllm_dropin.tar.gz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", default=_DEFAULT, metavar="FILE",
        help="a .tar.gz, .tgz or .tar archive, or a folder (default: %(default)s)",
    )  # fmt: skip
    variant = parser.add_mutually_exclusive_group()
    variant.add_argument("--gpu", dest="variant", action="store_const", const="gpu", help="vLLM's own image (default)")
    variant.add_argument(
        "--cpu", dest="variant", action="store_const", const="cpu", help="a slim Python with vLLM's CPU build"
    )
    parser.add_argument("--base", metavar="IMAGE", help="another base: NAME:TAG or, better, NAME@sha256:DIGEST")
    parser.add_argument("--vllm", metavar="VERSION", help="vLLM in the base (default: the newest that is supported)")
    parser.add_argument(
        "--python", choices=("3.11", "3.12"), help="Python of the base (default: 3.12, and 3.11 for --cpu)"
    )
    parser.add_argument("--wheelhouse", action="store_true", help="add every wheel: the image needs no package index")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(variant="gpu")


def run(args: argparse.Namespace) -> int:
    """Print what was written on stdout, warnings on stderr. Returns 0, or raises (exit code 78 or 74)."""
    from vllm_dropin.environment import context, image, wheelhouse
    from vllm_dropin.errors import ConfigurationError

    if args.engine_args:
        raise ConfigurationError("build takes no flags of vLLM", "Put them into the model folder's engine_config.json.")
    output = Path(args.output)
    context.check_output(output)
    chosen = image.choose(args.variant, args.base, args.vllm, args.python)
    if chosen.base.digest is None:
        print(
            f"warning: {chosen.base} is a tag, which its owner can move; pin it with --base NAME@sha256:DIGEST",
            file=sys.stderr,
        )
    with ExitStack() as stack:
        wheels = None
        if args.wheelhouse:
            # Beside the output: the disk that has room for the archive.
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".wheels.", dir=output.absolute().parent))
            print("fetching wheels", file=sys.stderr)
            wheels = wheelhouse.download(chosen, Path(folder))
        written = context.write(context.assemble(chosen, _command(args), wheels), output)
    print(_as_json(chosen, written) if args.json else _as_text(chosen, written))
    return 0


def _command(args: argparse.Namespace) -> str:
    """The command that makes the same context, without the output's place."""
    words = ["vllm-dropin", "build", *(["--cpu"] if args.variant == "cpu" else [])]
    for option in ("base", "vllm", "python"):
        words += [f"--{option}", value] if (value := getattr(args, option)) else []
    return shlex.join([*words, *(["--wheelhouse"] if args.wheelhouse else [])])


def _facts(image: Image, written: Written) -> dict[str, object]:
    return {
        "output": str(written.path),
        "size": written.size,
        "sha256": written.sha256,
        "label": image.label,
        "base": str(image.base),
        "vllm": image.vllm,
        "python": image.python,
    }


def _as_json(image: Image, written: Written) -> str:
    from vllm_dropin.cli.output import to_json

    return to_json(_facts(image, written))


def _as_text(image: Image, written: Written) -> str:
    from vllm_dropin.cli.output import table

    rows = [(name, str(value)) for name, value in _facts(image, written).items() if value is not None]
    return table(rows, indent="")
