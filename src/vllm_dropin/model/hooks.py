"""custom.py: where it is and which hooks it defines. It is parsed, never imported, here."""

from __future__ import annotations

import ast
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from vllm_dropin.errors import ConfigurationError

FILE_NAME = "custom.py"
_WEIGHTS = "vllm"


@dataclass(frozen=True)
class Hook:
    """The user's custom.py and which of the two hooks it has at its top level."""

    file: Path
    has_init: bool
    has_load_model: bool

    @property
    def runs(self) -> bool:
        return self.has_init or self.has_load_model


def find_hook(folder: Path) -> Hook | None:
    """Look for custom.py in the folder and below it, as the contract does; not in vllm/ or hidden folders.

    Raises ConfigurationError when there are several, or when the file is not valid Python.
    """
    found = sorted(_search(folder))
    if len(found) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in found)
        raise ConfigurationError(
            f"{len(found)} files are named {FILE_NAME}: {names}", "keep one of them: only one can be the hook"
        )
    return _parse(found[0]) if found else None


def _search(folder: Path) -> list[Path]:
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and name != "__pycache__" and not (Path(root) == folder and name == _WEIGHTS)
        ]
        if FILE_NAME in files:
            found.append(Path(root) / FILE_NAME)
    return found


def _parse(file: Path) -> Hook:
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise ConfigurationError(
            f"{file.name}{line}: {error.msg}", "It was read as Python {}.{}.".format(*sys.version_info)
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{file}: {error}") from None
    names = set(_top_level_names(tree.body))
    unknown = "*" in names  # `from helpers import *` may bring both: the hook's own process will see
    return Hook(file, has_init=unknown or "init" in names, has_load_model=unknown or "load_model" in names)


def _top_level_names(body: list[ast.stmt]) -> list[str]:
    """Names that importing the module binds: definitions, assignments and imports, also inside if and try."""
    names: list[str] = []
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.append(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names += [alias.asname or alias.name for alias in aliases]
            case ast.Assign(targets=targets):
                names += [target.id for target in targets if isinstance(target, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name), value=value) if value is not None:
                names.append(name)
            case ast.If() | ast.Try() | ast.With():
                for field in ("body", "orelse", "finalbody"):
                    names += _top_level_names(getattr(statement, field, []))
                for handler in getattr(statement, "handlers", []):
                    names += _top_level_names(handler.body)
            case _:
                pass
    return names
