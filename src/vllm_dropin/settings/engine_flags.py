"""The engine's flags from all who may speak: the strongest word for each flag is kept, the others are remembered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_dropin.engine.arguments import FlagUse, ParsedArgs
from vllm_dropin.engine.command import PlannedFlag
from vllm_dropin.engine.flags import FlagTable
from vllm_dropin.engine.quirks import FlagQuirk
from vllm_dropin.errors import FlagError
from vllm_dropin.model.contract import CONTRACT
from vllm_dropin.model.yaml_file import read_yaml
from vllm_dropin.settings.cascade import Setting

COMMAND_LINE = "the command line"
ENGINE_CONFIG = "engine_config.json"

_NOT_YOURS = {
    "port": "the engine listens on a private socket behind the gateway; use --address",
    "host": "the engine listens on a private socket behind the gateway; use --address",
    "uds": "the engine's socket belongs to the gateway",
    "api_key": "keys are checked by the gateway, for every route; use --api-key-file",
    "root_path": "paths belong to the gateway; use --url-prefix (URL_PREFIX)",
    "middleware": "it would run inside the engine, behind the gateway's limits and keys; put it in a proxy in front",
    "headless": "the engine would have no HTTP server for the gateway to ask",
    "grpc": "the engine would have no HTTP server for the gateway to ask",
}
_TLS = "the engine is reached by a private socket; end TLS in a proxy in front of the gateway"
_PARAMETERS = {parameter.name for parameter in CONTRACT}


@dataclass(frozen=True)
class Claim:
    """What one source says about one flag."""

    dest: str
    tokens: tuple[str, ...]
    value: object
    source: str
    key: str | None = None
    overrode: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How the setting is called: the contract's name where there is one, else the flag."""
        if self.dest in _PARAMETERS:
            return self.dest
        flag = "--" + self.dest.replace("_", "-")
        return f"{flag}.{self.key.removesuffix('+')}" if self.key else flag

    def __str__(self) -> str:
        return f"{self.value} ({self.source})"


def read_args(table: FlagTable, args: Sequence[object], source: str, folder: Path) -> ParsedArgs:
    """Parse one source's arguments, with the file of a `--config` unfolded, and refuse the flags that are ours.

    vLLM would read that file itself, unseen: its flags have to obey the same rules as others (decision 14).
    """
    parsed = table.parse(args, source)
    config = parsed.last("config")
    if config is not None:
        file = folder / config.values[0]
        if not file.is_file():
            raise FlagError(
                f"--config in {source} names {file}, and there is no such file",
                "A relative path starts at the model folder.",
            )
        name = f"{file.name} (--config in {source})"
        below = table.parse(_config_args(file), name)
        if below.last("config"):
            raise FlagError(f"{name} names a --config itself", "Put all flags into one file.")
        _refuse_ours(below, name)
        own = tuple(use for use in parsed.uses if use.dest != "config")
        said = {use.dest for use in own}
        parsed = ParsedArgs(
            (*(use for use in below.uses if use.dest not in said), *own),
            parsed.positionals or below.positionals,
            (*below.warnings, *(text for text in parsed.warnings if config.values[0] not in text)),
        )
    _refuse_ours(parsed, source)
    return parsed


def _refuse_ours(parsed: ParsedArgs, source: str) -> None:
    for use in parsed.uses:
        reason = _TLS if use.dest.startswith("ssl_") else _NOT_YOURS.get(use.dest)
        if reason:
            raise FlagError(f"{use.option} in {source} (args[{use.index}]) is not for the engine to have", reason)


def _config_args(file: Path) -> list[object]:
    """A vLLM config file as arguments, by vLLM's rules: true is a bare flag, false is left out, lists are words."""
    document = read_yaml(file)
    if not isinstance(document.data, dict):
        raise FlagError(f"{file.name} has to be a mapping of flags to values")
    args: list[object] = []
    for key, value in document.data.items():
        flag = f"--{key}"
        match value:
            case True:
                args.append(flag)
            case False:
                continue
            case list():
                args += [flag, *(str(item) for item in value)] if value else []
            case dict():
                args += [flag, json.dumps(value)]
            case _:
                args += [flag, str(value)]
    return args


def claims(parsed: ParsedArgs, source: str) -> list[Claim]:
    """One source's flags, each once: the last whole value counts, and keys win over it (as in vLLM)."""
    kept: list[Claim] = []
    keyed = {use.dest for use in parsed.uses if use.key is not None}
    for use in reversed(parsed.uses):
        repeated = any(claim.dest == use.dest and claim.key == use.key for claim in kept)
        grows = use.key is not None and use.key.endswith("+")
        if (use.key is None and use.dest in keyed) or (repeated and not grows):
            continue
        kept.append(Claim(use.dest, use.tokens, value_of(use), source, use.key))
    return kept[::-1]


def value_of(use: FlagUse) -> object:
    """A use's value as people read it."""
    return " ".join(use.values) if use.values else not use.off


def merge(layers: Sequence[Sequence[Claim]]) -> tuple[tuple[PlannedFlag, ...], tuple[Setting, ...]]:
    """Let the layers speak, strongest first. Each flag is kept from the strongest layer that has it."""
    kept: list[list[Claim]] = []
    lost: dict[Claim, list[str]] = {}
    for layer in layers:
        stronger = [claim for above in kept for claim in above]
        kept.append([])
        for claim in layer:
            winner = next((other for other in stronger if _replaces(other, claim)), None)
            if winner is None:
                kept[-1].append(claim)
            else:
                lost.setdefault(winner, []).extend((str(claim), *claim.overrode))
    # Weak first: the order of a command line that a person would write.
    flags = tuple(
        PlannedFlag(claim.dest, claim.tokens, claim.source, on=claim.value is not False)
        for layer in kept[::-1]
        for claim in layer
    )
    settings = tuple(
        Setting(claim.name, claim.value, claim.source, (*lost.get(claim, ()), *claim.overrode))
        for layer in kept
        for claim in layer
    )
    return flags, settings


def _replaces(stronger: Claim, weaker: Claim) -> bool:
    """A whole value replaces all; keys replace a whole value, the same key, and keys above or below it."""
    if stronger.dest != weaker.dest:
        return False
    if stronger.key is None or weaker.key is None:
        return True
    a, b = stronger.key.removesuffix("+"), weaker.key.removesuffix("+")
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def applicable(quirks: Sequence[FlagQuirk], table: FlagTable, cpu: bool, used: frozenset[str]) -> list[Claim]:
    """Our own flags for this build, as far as its vLLM has them and the user has not spoken."""
    return [
        Claim(quirk.dest, quirk.tokens, " ".join(quirk.tokens[1:]) or True, quirk.source)
        for quirk in quirks
        if quirk.cpu in (None, cpu) and table.spec(quirk.dest) is not None and used.isdisjoint(quirk.unless)
    ]
