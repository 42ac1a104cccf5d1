"""The options that shape settings: the same for every command that takes a model folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vllm_dropin.settings.options import BY_KEY, Flags

_SEPARATOR = "--"
VARIABLES = "Each can also be set by the environment variable in brackets."


def split_engine_args(argv: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Our arguments, and what follows the first `--`: flags for the engine, which argparse must not touch."""
    if _SEPARATOR not in argv:
        return argv, ()
    at = argv.index(_SEPARATOR)
    return argv[:at], tuple(argv[at + 1 :])


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """Add FOLDER, `--param` and every option of settings.options."""
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="the model folder (default: --code-dir, CODE_DIR)")
    parser.add_argument(
        "--param", action="append", default=[], metavar="NAME=VALUE", help="a runtime parameter; may be repeated"
    )
    group = parser.add_argument_group("options", VARIABLES)
    add_options(group, tuple(BY_KEY))
    parser.epilog = "Flags of vLLM go after a bare --: they are the strongest of all settings."


def add_options(group: argparse._ArgumentGroup, keys: Sequence[str]) -> None:
    """Add these options of settings.options, with their variables in brackets."""
    for option in (BY_KEY[key] for key in keys):
        words = f"{option.meaning}{f' (default: {option.default})' if option.default else ''}"
        text = f"{words} [{', '.join(option.variables)}]".replace("%", "%%")
        if option.metavar is None:
            group.add_argument(option.flag, dest=option.key, action="store_const", const="true", help=text)
        else:
            group.add_argument(option.flag, dest=option.key, metavar=option.metavar, help=text)


def read_flags(args: argparse.Namespace) -> Flags:
    """What the user typed, for settings.resolve: of the options, those that the command has."""
    given = {key: getattr(args, key, None) for key in BY_KEY}
    return Flags(
        folder=args.folder,
        options={key: value for key, value in given.items() if value is not None},
        params=tuple(args.param),
        engine_args=args.engine_args,
    )
