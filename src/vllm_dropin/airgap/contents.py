"""What a bundle takes from a model folder, and what it refuses: pickles, secrets, links that lead elsewhere."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath

from vllm_dropin.errors import ConfigurationError, InputOutputError, ModelError
from vllm_dropin.model.folder import WEIGHTS
from vllm_dropin.model.manifest import visible_files

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")
"""Kinds of files that Python's pickle may be in: loading one can run code."""
_PICKLE_HEAD = re.compile(rb"\x80[\x02-\x05]")
_RUBBISH = ("~", ".orig", ".pyc", ".rej", ".swp", ".tmp", ".partial", ".part", ".incomplete")
_LICENCE = re.compile(r"(licen[cs]e|copying)([._-].*)?", re.IGNORECASE)
_SCANNED = 1 << 20
_SECRET_LENGTH = 8
"""Characters: a shorter text could be in any file by chance."""


def folder_files(folder: Path, without: Collection[Path]) -> dict[str, Path]:
    """The files of a model folder but `vllm/`, by relative path; without caches, hidden files and what editors leave.

    `without` are files and folders that are not taken either. Raises ConfigurationError for a link that leads out of
    the folder, InputOutputError for what can't be read.
    """
    root = folder.resolve()
    left_out = {folder / WEIGHTS, *without}
    found = {}
    try:
        for name, path in visible_files(folder):
            if any(parent in left_out for parent in (path, *path.parents)):
                continue
            if name.endswith(_RUBBISH):
                continue
            if not path.resolve().is_relative_to(root):
                raise ConfigurationError(
                    f"{path} is a link that leads out of {folder}", "Copy the file into the folder, or remove the link."
                )
            if path.is_file():
                found[name] = path
    except OSError as error:
        raise InputOutputError(f"{error.filename or folder} can't be read: {error.strerror}") from None
    return found


def weight_files(folder: Path) -> dict[str, Path]:
    """The files of a folder of weights by relative path. Links to files are followed: stores of weights have many.

    Raises ModelError for a link to a folder or to nothing, and for what is no file.
    """
    found = {}
    for name, path in visible_files(folder):
        if not path.is_file():
            what = "is a link to a folder or to nothing" if path.is_symlink() else "is no file"
            raise ModelError(f"{path} {what}", "Put the files themselves there.")
        if not name.endswith(_RUBBISH):
            found[name] = path
    return found


def refuse_pickles(files: Mapping[str, Path]) -> None:
    """Raises ModelError that names Python pickles, by their name or their first bytes."""
    found = [name for name, path in files.items() if name.lower().endswith(PICKLES) or _begins_as_pickle(path)]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ModelError(
            f"{', '.join(sorted(found)[:3])}{more}: Python pickles can run code when they are loaded",
            "Take them away where safetensors are there too, or choose a model that has safetensors; or add "
            "--allow-pickle if you trust where they come from.",
        )


def _begins_as_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return _PICKLE_HEAD.match(file.read(2)) is not None


def refuse_secrets(files: Mapping[str, Path | bytes], secrets: Iterable[str]) -> None:
    """Raises ConfigurationError for a small file that holds a secret which this run was given."""
    known = [secret.encode("utf-8", "surrogateescape") for secret in secrets if len(secret) >= _SECRET_LENGTH]
    if not known:
        return
    for name, content in files.items():
        if isinstance(content, Path):
            if content.stat().st_size > _SCANNED:
                continue
            content = content.read_bytes()
        if any(secret in content for secret in known):
            raise ConfigurationError(
                f"{name} holds a credential or key that this run was given, and a bundle travels",
                "Take it out of the file: the other side gets its own as a runtime parameter.",
            )


def find_licence(weights: Iterable[str]) -> str | None:
    """The licence file beside the weights."""
    return next((name for name in sorted(weights) if _LICENCE.fullmatch(name)), None)


def has_chat_template(files: Mapping[str, Path], tokenizer: str) -> bool:
    """Whether the tokenizer in this folder of the bundle brings a chat template. Mistral's own tokenizers do."""
    own = {
        PurePosixPath(name).name: path for name, path in files.items() if str(PurePosixPath(name).parent) == tokenizer
    }
    if "tekken.json" in own or any(name.startswith("chat_template.") for name in own):
        return True
    try:
        document = json.loads(own["tokenizer_config.json"].read_bytes())
    except (KeyError, OSError, ValueError):
        return False
    return isinstance(document, dict) and bool(document.get("chat_template"))


def is_executable(path: Path) -> bool:
    return os.access(path, os.X_OK) and bool(path.stat().st_mode & 0o100)
