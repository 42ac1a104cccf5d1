"""What another version of vLLM does with flags that work today: from two flag tables, without running either."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_dropin.engine.arguments import FlagSpec, FlagUse
from vllm_dropin.engine.flags import FlagTable, release, shipped_versions
from vllm_dropin.errors import FlagError

Kind = Literal["removed", "renamed", "refused", "deprecated", "default changed", "not comparable", "new"]

_ALIKE = 0.75
"""How much of a name has to stay for a new flag to be named as a successor. Lower finds strangers."""


@dataclass(frozen=True)
class Change:
    """One thing that differs for one flag."""

    kind: Kind
    flag: str
    source: str
    problem: str
    fix: str
    blocking: bool = False
    """Whether the other version would refuse to start with this flag as it is written."""
    old_default: object = None
    new_default: object = None


@dataclass(frozen=True)
class Upgrade:
    """The way from one version's flags to another's."""

    old: FlagTable
    new: FlagTable

    def understand(self, args: Sequence[object], origin: str) -> tuple[FlagTable, FlagError | None]:
        """The table that understands these arguments: the old one, the new one, or both together.

        A folder may be half on its way: a flag that is gone beside one that is new. With the error of the old table
        when neither does: then something is wrong with the arguments that has nothing to do with versions.
        """
        error: FlagError | None = None
        for table in (self.old, self.new, _both(self.old, self.new)):
            try:
                table.parse(args, origin)
                return table, None
            except FlagError as found:
                error = error or found
        return self.old, error

    def changes(self, use: FlagUse, source: str) -> Iterator[Change]:
        """What happens to one flag of a folder. `source` names the place where it is written."""
        before, after = self.old.spec(use.dest), self.new.spec(use.dest)
        if after is None:
            yield self._gone(use, before, source)
            return
        problem = _refusal(self.new, use)
        if problem is not None:
            shown = f"`vllm serve --help={use.canonical[2:]}` shows what vLLM {self.new.version} takes."
            fix = f"Choose one of {', '.join(map(str, after.choices))}." if after.choices else shown
            yield Change("refused", use.canonical, source, problem, fix, blocking=True)
            return
        if before is None:
            yield Change(
                "new", use.canonical, source, f"vLLM {self.old.version} has no {use.option}",
                f"Nothing to do for vLLM {self.new.version}; the folder does not start on {self.old.version}.",
            )  # fmt: skip
            return
        if after.deprecated and not before.deprecated:
            yield Change(
                "deprecated", use.canonical, source, f"vLLM {self.new.version} still takes it, with a warning",
                f"Look for its successor in `vllm serve --help={use.canonical[2:]}` before it is removed.",
            )  # fmt: skip
        kept = f"Nothing to do: the value in {source} stays. Remove it only if the new default is as good."
        yield from self.default_changes(use.dest, source, kept)

    def default_changes(self, dest: str, source: str, fix: str) -> Iterator[Change]:
        """A default that differs. vLLM works some out only when it starts: those say None and can't be compared."""
        before, after = self.old.spec(dest), self.new.spec(dest)
        if before is None or after is None or before.default == after.default:
            return
        flag = "--" + dest.replace("_", "-")
        known = [spec.default for spec in (before, after) if spec.default is not None]
        if len(known) == 2:
            problem = f"the default was {show(before.default)} and is {show(after.default)} now"
            yield Change("default changed", flag, source, problem, fix, False, before.default, after.default)
        else:
            words = [f"{show(spec.default)}" for spec in (before, after)]
            problem = f"the default was {words[0]} and is {words[1]}, so they can't be compared"
            yield Change("not comparable", flag, source, problem, fix, False, before.default, after.default)

    def other_defaults(self, used: frozenset[str]) -> tuple[Change, ...]:
        """Defaults that changed of flags that nobody set: behaviour that changes without a word in the folder."""
        return tuple(
            change
            for spec in self.new.specs
            if spec.dest not in used
            for change in self.default_changes(spec.dest, "", _keep(self.old.spec(spec.dest)))
        )

    def _gone(self, use: FlagUse, before: FlagSpec | None, source: str) -> Change:
        heir, sure = self._heir(before)
        if heir is not None and sure:
            taken = _refusal(self.new, use) is None
            return Change(
                "renamed", use.canonical, source,
                f"it is {heir} in vLLM {self.new.version}{', which still takes this spelling' if taken else ''}",
                f"Write {heir} instead of {use.option} in {source}.", blocking=not taken,
            )  # fmt: skip
        fix = f"Remove {use.option}{' and its value' if use.values else ''} from {source}."
        if heir is not None:
            fix += f" {heir} is new, of the same kind and looks alike: read its help, it may be the successor."
        problem = f"vLLM {self._first_without(use.dest)} has no such flag any more"
        if before is None or release(self.new.version) < release(self.old.version):
            problem = f"vLLM {self.new.version} has no such flag"
        return Change("removed", use.canonical, source, problem, fix, blocking=True)

    def _heir(self, before: FlagSpec | None) -> tuple[str | None, bool]:
        """The flag that took over, and whether that is sure: it is when it answers to a spelling of the old one."""
        if before is None:
            return None, False
        for spec in self.new.specs:
            if set(spec.options) & set(before.options):
                return spec.options[0], True
        added = (spec for spec in self.new.specs if spec.options and self.old.spec(spec.dest) is None)
        alike = {spec.dest: spec.options[0] for spec in added if (spec.type, spec.nargs) == (before.type, before.nargs)}
        near = difflib.get_close_matches(before.dest, alike, n=1, cutoff=_ALIKE)
        return (alike[near[0]], False) if near else (None, False)

    def _first_without(self, dest: str) -> str:
        """The first version, between the two, that lacks the flag."""
        between = [
            version
            for version in shipped_versions()
            if release(self.old.version) < release(version) <= release(self.new.version)
        ]
        return next((version for version in between if FlagTable.load(version).spec(dest) is None), self.new.version)


def show(value: object) -> str:
    """A default as it would be written."""
    if value is None:
        return "worked out when vLLM starts"
    return value if isinstance(value, str) else json.dumps(value)


def _keep(spec: FlagSpec | None) -> str:
    """How to keep an old default."""
    if spec is None or spec.default is None or not spec.options:
        return "Nothing can be told from the tables: compare how the service behaves."
    if spec.boolean:
        words = spec.options[0] if spec.default else next(iter(spec.off), "")
    else:
        items = spec.default if isinstance(spec.default, list) else [spec.default]
        words = " ".join((spec.options[0], *map(show, items)))
    return f"To keep the old one, add {words} to engine_config.json." if words else "Compare how the service behaves."


def _both(one: FlagTable, two: FlagTable) -> FlagTable:
    """What either version takes, for arguments that mix them; where both have a flag, the newer speaks."""
    known = {spec.dest: spec for table in (one, two) for spec in table.specs}
    return FlagTable(two.version, tuple(known.values()))


def _refusal(table: FlagTable, use: FlagUse) -> str | None:
    """Why a version would refuse this flag, in the words of its table and without the place, which the caller knows."""
    origin = "\0"
    try:
        table.parse(use.tokens, origin)
    except FlagError as error:
        return error.message.replace(f" in {origin} (args[0])", "").rstrip(",").strip()
    return None
