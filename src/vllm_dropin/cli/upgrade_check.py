"""`vllm-dropin upgrade-check FOLDER --to VERSION`: which flags of a folder another vLLM would not take as they are."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dropin.cli.options import VARIABLES, add_options
from vllm_dropin.errors import ConfigurationError, DropinError, FlagError

if TYPE_CHECKING:
    from vllm_dropin.engine.flags import FlagTable
    from vllm_dropin.engine.upgrades import Change, Upgrade
    from vllm_dropin.model.folder import ModelFolder

_FLAGS_OF_PARAMETERS = ("model", "max_model_len", "gpu_memory_utilization", "trust_remote_code")
"""The runtime parameters that are flags of the engine by the same name."""


@dataclass(frozen=True)
class Findings:
    """What was found. `changes` are about flags of the folder, `defaults` about flags that it leaves alone."""

    old: str
    new: str
    notes: tuple[str, ...]
    changes: tuple[Change, ...]
    defaults: tuple[Change, ...]

    @property
    def blocking(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.blocking)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="the model folder")
    parser.add_argument("--to", required=True, metavar="VERSION", help="the vLLM that is to serve it, such as 0.33")
    parser.add_argument(
        "--from",
        dest="old",
        metavar="VERSION",
        help="the vLLM that serves it now (default: the installed engine's, else the oldest that is known)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    add_options(parser.add_argument_group("options", VARIABLES), ("engine_python",))
    parser.epilog = "Flags of vLLM that serve is given after a bare -- may follow here too: they are looked at as well."


def run(args: argparse.Namespace) -> int:
    """Print what changes. Returns 0, or raises FlagError (78) when the other version would refuse a flag."""
    from vllm_dropin.cli import output

    try:
        findings = examine(Path(args.folder), args.to, args.old, args.engine_python, args.engine_args)
    except DropinError as error:
        if args.json:
            told = {"code": error.code, "message": error.message, "remedy": error.remedy}
            print(output.to_json({"ok": False, "error": told}))
        raise
    print(output.to_json(_document(findings)) if args.json else _text(findings))
    sys.stdout.flush()
    if findings.blocking:
        flags = ", ".join(dict.fromkeys(change.flag for change in findings.blocking))
        raise FlagError(
            f"vLLM {findings.new} would refuse this folder: {flags}", "The fix for each is in the report above."
        )
    return 0


def examine(path: Path, to: str, old: str | None, engine_python: str | None, extra: Sequence[str]) -> Findings:
    """Compare the folder's flags between two versions. Raises ConfigurationError for a folder that can't be read."""
    from vllm_dropin.engine.upgrades import Upgrade
    from vllm_dropin.model.folder import read_folder
    from vllm_dropin.settings.engine_flags import COMMAND_LINE, ENGINE_CONFIG

    folder = read_folder(path)
    before, after = _tables(old, to, engine_python)
    upgrade = Upgrade(before, after)
    config = folder.engine_config.args if folder.engine_config else ()
    changes: list[Change] = []
    used: set[str] = set()
    for origin, args in ((ENGINE_CONFIG, config), (COMMAND_LINE, extra)):
        changes += _of_args(upgrade, args, origin, folder.path, used)
    changes += _of_parameters(upgrade, folder, used)
    # "0.33" asks for no particular patch release, so there is nothing to note about the one that is shipped.
    exact = ((before, old or ""), (after, to))
    notes = tuple(table.note for table, asked in exact if table.note and asked.count(".") != 1)
    return Findings(
        before.version, after.version, notes, tuple(changes), upgrade.other_defaults(frozenset(used | _quirks()))
    )


def _of_args(upgrade: Upgrade, args: Sequence[object], origin: str, folder: Path, used: set[str]) -> Iterator[Change]:
    from vllm_dropin.settings.engine_flags import read_args

    table, error = upgrade.understand(args, origin)
    if error is not None:
        raise error
    own = table.parse(args, origin).uses
    for use in read_args(table, args, origin, folder).uses:
        # A flag that is not among them comes from the file that --config names.
        config = next((other.values[0] for other in own if other.dest == "config"), "")
        place = f"{origin} (args[{use.index}])" if use in own else f"{config} (--config in {origin})"
        used.add(use.dest)
        yield from upgrade.changes(use, place)


def _of_parameters(upgrade: Upgrade, folder: ModelFolder, used: set[str]) -> Iterator[Change]:
    """Parameters that are flags: with the metadata's default they are on the command line, without it vLLM's own is."""
    from vllm_dropin.engine.arguments import FlagUse
    from vllm_dropin.model.parameters import read_parameters

    values = read_parameters(folder.metadata, {})
    for name in _FLAGS_OF_PARAMETERS:
        parameter = values.get(name)
        if not parameter.declared or name in used:
            continue
        flag = "--" + name.replace("_", "-")
        place = f"parameter {name} (model-metadata.yaml)"
        used.add(name)
        if parameter.value is None or not parameter.given:
            if upgrade.old.spec(name) is not None and upgrade.new.spec(name) is None:
                yield from upgrade.changes(FlagUse(name, flag, (), (flag,)), place)
            elif name not in _quirks():
                fix = f"Give {name} a defaultValue in model-metadata.yaml to choose one yourself."
                yield from upgrade.default_changes(name, place, fix)
            continue
        if parameter.value is False:
            continue
        texts = () if parameter.value is True else (str(parameter.value),)
        yield from upgrade.changes(FlagUse(name, flag, texts, (flag, *texts)), place)


def _quirks() -> set[str]:
    """Flags that we set ourselves: vLLM's default for them is never used."""
    from vllm_dropin.engine.quirks import FLAGS

    return {quirk.dest for quirk in FLAGS if quirk.cpu is not True}


def _tables(old: str | None, new: str, engine_python: str | None) -> tuple[FlagTable, FlagTable]:
    """The flags of both versions: shipped, or asked of the installed engine where it is one of them."""
    from vllm_dropin.engine import interpreter
    from vllm_dropin.engine.flags import load_table, release, shipped_versions

    python = None
    try:
        python = interpreter.find(engine_python, os.environ)
    except ConfigurationError:
        # Nobody named an engine: then there need not be one.
        if engine_python or os.environ.get(interpreter.VARIABLE):
            raise

    def load(version: str) -> FlagTable:
        installed = python is not None and release(python.version) == release(version)
        try:
            return load_table(
                python.version if python and installed else version, None, python.path if python and installed else None
            )
        except ConfigurationError as error:
            if installed:
                raise
            known = ", ".join(shipped_versions())
            raise ConfigurationError(
                error.message, f"Name one of {known}, or an installed vLLM with --engine-python."
            ) from None

    return load(old or (python.version if python else shipped_versions()[0])), load(new)


def _text(findings: Findings) -> str:
    from vllm_dropin.cli import output
    from vllm_dropin.logging import REDACTOR

    count = len(findings.blocking)
    verdict = "every flag of the folder is taken as it is"
    if count:
        verdict = f"{count} {'flag needs' if count == 1 else 'flags need'} a change"
    parts = [f"vLLM {findings.old} to {findings.new}: {verdict}"]
    parts[0] += "".join(f"\n  ({note})" for note in findings.notes)
    for title, changes in (
        ("To be changed", findings.blocking),
        ("To know", tuple(change for change in findings.changes if not change.blocking)),
    ):
        if changes:
            lines = [
                f"  {change.flag}  {change.kind}, {change.source}\n    {change.problem}\n    {change.fix}"
                for change in changes
            ]
            parts.append(f"{title}\n" + "\n".join(lines))
    if findings.defaults:
        rows = [(change.flag, change.problem, change.fix) for change in findings.defaults]
        parts.append(f"Defaults of flags that the folder leaves alone\n{output.table(rows)}")
    return REDACTOR.hide("\n\n".join(parts))


def _document(findings: Findings) -> dict[str, object]:
    return {
        "ok": not findings.blocking,
        "from": findings.old,
        "to": findings.new,
        "notes": list(findings.notes),
        "changes": [asdict(change) for change in findings.changes],
        "defaults": [asdict(change) for change in findings.defaults],
    }
