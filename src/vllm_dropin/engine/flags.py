"""The flags of each vLLM version, from a dump of its parser, so that arguments are checked without importing vLLM.

Dumps of every minor release are shipped in `flags/` (made by `scripts/dump_flags.py`). For a version without one the
engine's own parser is asked once, in a subprocess, and the answer kept in the state folder (design, decision 13).
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from vllm_dropin.engine.arguments import FlagSpec, FlagUse, ParsedArgs, Reader
from vllm_dropin.errors import ConfigurationError

__all__ = ["FlagSpec", "FlagTable", "FlagUse", "ParsedArgs", "load_table", "shipped_versions"]

_DUMPS = resources.files("vllm_dropin.engine") / "flags"
_DUMPER = Path(__file__).parent.parent / "children" / "dump_flags.py"
_DUMP_SECONDS = 180.0
"""Importing vLLM takes 5 to 10 s on two idle cores; a cold disk takes far longer."""


@dataclass(frozen=True)
class FlagTable:
    """What one version of vLLM takes on its command line."""

    version: str
    """The version that was dumped."""
    specs: tuple[FlagSpec, ...]
    note: str = ""
    """Set when this is the table of another patch release than the engine's."""

    @classmethod
    def load(cls, version: str) -> FlagTable:
        """The shipped table of this version, or of another patch release of its minor, with a note.

        Raises ConfigurationError naming the shipped versions when there is none.
        """
        shipped = {_minor(known): known for known in shipped_versions()}
        known = shipped.get(_minor(version))
        if known is None:
            raise ConfigurationError(
                f"no flag table for vLLM {version}; shipped: {', '.join(shipped_versions())}",
                "Use one of these versions, or give the service a state folder to keep a table in.",
            )
        table = _shipped(known)
        if release(known) == release(version):
            return table
        return replace(table, note=f"the flags of vLLM {version} are checked against those of {known}")

    def parse(self, args: Sequence[object], origin: str) -> ParsedArgs:
        """Understand arguments as vLLM would.

        `args` may hold numbers and booleans, as JSON does. `origin` (`engine_config.json`, `the command line`)
        names their source in errors. Raises FlagError for what vLLM would refuse, or silently misread.
        """
        return Reader(self._options, origin, self._explain).read(args)

    def spec(self, dest: str) -> FlagSpec | None:
        return self._specs.get(dest)

    @cached_property
    def _specs(self) -> dict[str, FlagSpec]:
        return {spec.dest: spec for spec in self.specs}

    @cached_property
    def _options(self) -> dict[str, FlagSpec]:
        return {option: spec for spec in self.specs for option in spec.options}

    def _explain(self, option: str) -> str:
        """What is known of an option that this version lacks: a near name here, or another version that has it."""
        told = []
        others = [known for known in shipped_versions() if option in _shipped(known)._options]
        older = [known for known in others if release(known) < release(self.version)]
        if older:
            gone = (known for known in shipped_versions() if release(known) > release(older[-1]))
            told.append(f"vLLM {_minor(next(gone, self.version))} removed it")
        elif others:
            told.append(f"vLLM {_minor(others[0])} introduced it and this is {self.version}")
        else:
            told.append(f"no vLLM from {_minor(shipped_versions()[0])} to {_minor(shipped_versions()[-1])} has it")
        near = difflib.get_close_matches(option, self._options, n=1, cutoff=0.7)
        if near:
            told.append(f"did you mean {near[0]}?")
        return "; ".join(told)


def shipped_versions() -> tuple[str, ...]:
    """The versions whose flags are shipped, oldest first."""
    names = (entry.name for entry in _DUMPS.iterdir())
    return tuple(sorted((name.removesuffix(".json") for name in names if name.endswith(".json")), key=release))


def load_table(
    version: str,
    cache_dir: Path | None,
    interpreter: Path | None,
    environ: Mapping[str, str] | None = None,
) -> FlagTable:
    """The table of an installed vLLM: shipped, else cached in `cache_dir`, else asked of `interpreter`.

    Development builds never take a shipped table: they carry flags of their own. `environ` is what the
    interpreter is run with. Raises ConfigurationError when the parser can't be found in this vLLM.
    """
    if not re.search(r"dev|rc|[ab]\d", version):
        try:
            return FlagTable.load(version)
        except ConfigurationError:
            if interpreter is None:
                raise
    kept = cache_dir / f"flags-{re.sub(r'[^A-Za-z0-9.+-]', '_', version)}.json" if cache_dir else None
    if kept is not None and kept.is_file():
        try:
            return _read(kept.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError):
            pass  # damaged: made anew below
    if interpreter is None:
        return FlagTable.load(version)
    text = render_dump(version, dump(interpreter, os.environ if environ is None else environ))
    if kept is not None:
        with contextlib.suppress(OSError):  # a state folder that can't be written costs the same wait next time
            kept.parent.mkdir(parents=True, exist_ok=True)
            fresh = kept.with_suffix(f".{os.getpid()}")
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(kept)
    return _read(text)


def dump(interpreter: Path, environ: Mapping[str, str]) -> list[str]:
    """Ask the vLLM of an interpreter for its flags: one JSON record a line. Takes 5 to 10 s.

    A CUDA build on a machine without a GPU won't build its parser, so a failure is tried again as a CPU build.
    """
    quiet = {**environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    for flags in ([], ["--as-cpu"]):
        try:
            done = subprocess.run(
                [interpreter, _DUMPER, *flags],
                env=quiet,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_DUMP_SECONDS,
                cwd="/",
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigurationError(f"can't ask {interpreter} for the flags of its vLLM: {error}") from error
        if done.returncode == 0:
            return done.stdout.splitlines()
    reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    raise ConfigurationError(
        f"the vLLM of {interpreter} did not tell its flags: {reason[0]}",
        f"Check that `{interpreter} -c 'import vllm'` works, or use a version with a shipped table: "
        f"{', '.join(shipped_versions())}.",
    )


def render_dump(version: str, records: Iterable[str], wheel: str = "", sha256: str = "") -> str:
    """A dump file: JSON with one action a line, so that two versions can be compared by eye."""
    head = {"version": version, "wheel": wheel, "sha256": sha256}
    lines = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    actions = ",\n".join(f"    {record}" for record in records)
    return f'{{\n{lines}  "actions": [\n{actions}\n  ]\n}}\n'


@cache
def _shipped(version: str) -> FlagTable:
    return _read((_DUMPS / f"{version}.json").read_text(encoding="utf-8"))


def _read(text: str) -> FlagTable:
    document = json.loads(text)
    return FlagTable(document["version"], tuple(_spec(action) for action in document["actions"]))


def _spec(action: dict[str, Any]) -> FlagSpec:
    lists = {key: tuple(value) for key, value in action.items() if key in {"options", "choices", "off"}}
    return FlagSpec(**{**action, **lists})


def release(version: str) -> tuple[int, ...]:
    """`0.32.1.post2+cpu` as (0, 32, 1)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")[:3]) if found else ()


def _minor(version: str) -> str:
    return ".".join(str(part) for part in release(version)[:2])
