"""The command `vllm-dropin`: one entry point, one place where errors end.

A command is a module with `add_arguments(parser)` and `run(args) -> int`. Only the module of the command that is called
is imported, and heavy imports wait until it runs: `--help` has to be quick.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from vllm_dropin import __version__
from vllm_dropin.cli.options import split_engine_args
from vllm_dropin.errors import DropinError

COMMANDS = {
    "serve": "serve a model folder over HTTP",
    "score": "answer every row of a file",
    "check": "say what serve would do with a folder, and what is wrong with it",
    "build": "write the image context that a platform builds",
    "bundle": "pack a model folder with its weights, for a machine without internet",
    "init": "begin a model folder",
    "push": "publish an environment, a model or a deployment on DataRobot",
    "verify": "prove a context and a model folder for a cluster without internet",
    "upgrade-check": "say which flags of a folder another vLLM would not take as they are",
}
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code of the process (errors.py lists them); usage errors exit 2."""
    _leave_no_core_files()
    words, engine_args = split_engine_args(list(sys.argv[1:] if argv is None else argv))
    args = _parse(words)
    args.engine_args = engine_args
    try:
        code: int = _module(args.command).run(args)
        sys.stdout.flush()
        return code
    except DropinError as error:
        _explain(error)
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`| head`). Python would complain once more at exit.
        sys.stderr.close()
        return 1


def _leave_no_core_files() -> None:
    """Of us and of all that we start: keys and prompts are in that memory, and an engine's takes minutes to write."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vllm-dropin",
        description="Turns a model folder into an OpenAI-compatible production service on vLLM.",
        epilog="vllm-dropin COMMAND --help tells more about a command.",
    )
    parser.add_argument("--version", action="version", version=f"vllm-dropin {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, meaning in COMMANDS.items():
        description = meaning[0].upper() + meaning[1:] + "."
        command = commands.add_parser(name, help=meaning, description=description, allow_abbrev=False)
        if name in words[:1]:
            _module(name).add_arguments(command)
    args, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (flags of vLLM go after a bare --)")
    return args


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"vllm_dropin.cli.{command.replace('-', '_')}")


def _explain(error: DropinError) -> None:
    from vllm_dropin.logging import REDACTOR

    message = f"error: {error.message}"
    if error.remedy:
        message += f"\n  {error.remedy}"
    print(REDACTOR.hide(message), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
