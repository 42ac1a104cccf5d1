"""What is uploaded: a context for an environment, the files of a model folder, and digests to know them again."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vllm_dropin.errors import ConfigurationError, InputOutputError

_INFO = "env_info.json"
_DOCKERFILE = "Dockerfile"
_MAX_INFO = 1 << 20
_SKIPPED = frozenset({"__pycache__"})


@dataclass(frozen=True)
class Context:
    """The context of an environment. `info` is its env_info.json."""

    path: Path
    digest: str
    size: int
    info: dict[str, Any]

    def text(self, key: str) -> str:
        """A text of env_info.json, empty when it is not there."""
        value = self.info.get(key)
        return value if isinstance(value, str) else ""


def read_context(path: Path) -> Context:
    """Look into an archive or a folder. Raises ConfigurationError for one that no platform could build."""
    try:
        if path.is_dir():
            files = list(_walk(path, (), hidden=True))
            info = (path / _INFO).read_bytes() if (path / _INFO).is_file() else None
            names = {str(name) for name, _ in files}
            digest, size = digest_of(files), sum(file.stat().st_size for _, file in files)
        else:
            names, info = _look(path)
            digest, size = _digest_file(path), path.stat().st_size
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigurationError(
            f"{path} can't be read as an image context: {reason}", "Give what `vllm-dropin build` wrote."
        ) from None
    if _DOCKERFILE not in names:
        raise ConfigurationError(
            f"{path} has no {_DOCKERFILE} at its top", "Pack the folder's content, not the folder: tar … -C FOLDER ."
        )
    return Context(path, digest, size, _parse(path, info))


def _look(path: Path) -> tuple[set[str], bytes | None]:
    """The names at the top of an archive, and its env_info.json. Nothing is unpacked."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            small = _INFO in names and archive.getinfo(_INFO).file_size <= _MAX_INFO
            return names, archive.read(_INFO) if small else None
    names, info = set(), None
    with tarfile.open(path) as tar:
        for member in tar:
            name = str(PurePosixPath(member.name))
            names.add(name)
            if name == _INFO and member.isfile() and member.size <= _MAX_INFO and (file := tar.extractfile(member)):
                info = file.read()
    return names, info


def _parse(path: Path, info: bytes | None) -> dict[str, Any]:
    if info is None:
        return {}
    try:
        document = json.loads(info)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise ConfigurationError(f"{_INFO} in {path} is not a JSON object", "Build the context anew.")
    return document


def model_files(folder: Path, exclude: Sequence[str]) -> list[tuple[str, Path]]:
    """The files of a model folder by their path in it, sorted. Hidden ones and Python's caches are left out.

    Raises ConfigurationError for a link that leads out of the folder: the platform would get a file that nobody meant.
    """
    files = [(str(name), path) for name, path in _walk(folder, exclude)]
    if not files:
        raise ConfigurationError(f"{folder} has no files to push", "Begin one with `vllm-dropin init`.")
    return files


def _walk(folder: Path, exclude: Sequence[str], hidden: bool = False) -> Iterator[tuple[PurePosixPath, Path]]:
    root = folder.resolve()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if (hidden or not name.startswith(".")) and name not in _SKIPPED)
        for name in sorted(names):
            path = Path(place) / name
            relative = PurePosixPath(path.relative_to(folder))
            if (name.startswith(".") and not hidden) or name.endswith(".pyc") or _excluded(relative, exclude):
                continue
            if not path.resolve().is_relative_to(root):
                raise ConfigurationError(
                    f"{path} is a link that leads out of {folder}", "Copy the file into the folder."
                )
            if path.is_file():
                yield relative, path


def _excluded(path: PurePosixPath, patterns: Sequence[str]) -> bool:
    candidates = [str(path), *(f"{parent}/" for parent in path.parents)]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in candidates)


def digest_of(files: Sequence[tuple[object, Path]]) -> str:
    """One digest of names and contents."""
    whole = hashlib.sha256()
    for name, path in files:
        whole.update(f"{name}\0{_digest_file(path)}\0".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def _digest_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputOutputError(f"{path} can't be read: {error.strerror}") from None


def digest_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
