"""The manifest that `vllm-dropin bundle` leaves beside weights: where they came from, and what each file has to be.

It guards against what happens on the way: a file that was cut short, changed, left out or added. It is no signature:
who can write the folder can write the manifest too, so the checksum of the archive has to travel by another way.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from vllm_dropin.errors import ModelError
from vllm_dropin.model.hashes import Progress, digest_files

FILE_NAME = "bundle-manifest.json"
MAX_BYTES = 16 << 20
MAX_FILES = 100_000
_MAX_PATH = 1024
_SHOWN = 3
_CACHE = "__pycache__"
_AGAIN = (
    "Compare the checksum of the bundle's archive and unpack it again, into an empty folder. "
    f"Where the change is meant, remove {FILE_NAME}."
)
_REMAKE = "Make the bundle anew, with the vllm-dropin that is to serve it."


def _inside(path: str) -> str:
    """A path that stays below its folder, in its only spelling."""
    parts = path.split("/")
    if not path or len(path) > _MAX_PATH or any(ord(letter) < 32 for letter in path):
        raise ValueError("is no file name")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError("leads out of the folder, or is not written plainly")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Source(_Strict):
    """Where files came from. `revision` is the commit, where a hub told it."""

    kind: Literal["hub", "folder", "storage", "hook"]
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}{f', commit {self.revision}' if self.revision else ''})"


class Part(Source):
    """A further repository that the engine's flags name (a tokenizer, a draft model, an adapter), in a folder below."""

    path: RelativePath


class FileRecord(_Strict):
    """What a file has to be. `size` in bytes."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0, lt=1 << 63)


class Manifest(_Strict):
    """The whole file. Paths are relative to its folder; `licence` is one of them."""

    version: Literal[1] = 1
    created_by: str
    source: Source
    licence: RelativePath | None = None
    parts: tuple[Part, ...] = ()
    files: dict[RelativePath, FileRecord] = Field(min_length=1, max_length=MAX_FILES)

    @property
    def bytes(self) -> int:
        return sum(record.size for record in self.files.values())

    def render(self) -> str:
        """The same text for the same content."""
        document = self.model_dump(mode="json")
        document["files"] = dict(sorted(document["files"].items()))
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Verification:
    """Files that are what their manifest says. `computed` of them were read now, the others had been before."""

    manifest: Manifest
    computed: int

    def __str__(self) -> str:
        files, known = len(self.manifest.files), len(self.manifest.files) - self.computed
        hashed = f", {known} of them known from before" if known else ""
        return f"{files} file(s), {self.manifest.bytes / (1 << 20):,.0f} MiB{hashed}, from {self.manifest.source}"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder of weights, or None where it has none.

    Raises ModelError when it can't be read, is too large, or says what no manifest of ours would.
    """
    path = folder / FILE_NAME
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}", _AGAIN) from None
    if len(data) > MAX_BYTES:
        raise ModelError(f"{path} is larger than {MAX_BYTES >> 20} MiB", _REMAKE)
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        raise ModelError(f"{path}: {_problem(error)}", _REMAKE) from None


def verify(folder: Path, cache: Path | None = None, on_progress: Progress | None = None) -> Verification | None:
    """Compare a folder with its manifest: names and sizes, then hashes. None where it has no manifest.

    `cache` remembers hashes (hashes.cache_file). Raises ModelError, which names the files that differ.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    try:
        _refuse(folder, _structure(folder, manifest))
        paths = {folder / name: record for name, record in manifest.files.items()}
        digests = digest_files(tuple(paths), cache, on_progress)
    except OSError as error:
        raise ModelError(f"{error.filename or folder} can't be read: {error.strerror}", _AGAIN) from None
    wrong = [
        f"{path} has not the content that {FILE_NAME} says (SHA-256 {digest[:12]}…, not {paths[path].sha256[:12]}…)"
        for path, digest in sorted(digests.by_file.items())
        if digest != paths[path].sha256
    ]
    _refuse(folder, wrong)
    return Verification(manifest, digests.computed)


def visible_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The entries of a folder and those below that are no folders, by relative path, sorted.

    Hidden ones are left out, and Python's caches: loading a plugin or the code of a model leaves one beside it. A link
    to a folder is an entry: it is not followed. Raises OSError.
    """
    for place, folders, names in os.walk(folder, onerror=_raise):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        left_out = {_CACHE, *links, *(name for name in folders if name.startswith("."))}
        folders[:] = sorted(set(folders) - left_out)
        for name in sorted([*names, *links]):
            if not name.startswith("."):
                path = Path(place) / name
                yield str(PurePosixPath(path.relative_to(folder))), path


def _structure(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong by name and size alone."""
    found = []
    for name, record in manifest.files.items():
        path = folder / name
        try:
            entry = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            found.append(f"{path} is missing; {FILE_NAME} lists it")
            continue
        if not stat.S_ISREG(entry.st_mode):
            found.append(f"{path} is no file; {FILE_NAME} says it is")
        elif entry.st_size != record.size:
            cut = " (cut short)" if entry.st_size < record.size else ""
            found.append(f"{path} has {entry.st_size:,} bytes{cut}; {FILE_NAME} says {record.size:,}")
    listed = {*manifest.files, FILE_NAME}
    found += [f"{path} is not in {FILE_NAME}" for name, path in visible_files(folder) if name not in listed]
    return found


def _refuse(folder: Path, problems: list[str]) -> None:
    if not problems:
        return
    shown = "\n  ".join(problems[:_SHOWN])
    more = f"\n  and {len(problems) - _SHOWN} more in {folder}" if len(problems) > _SHOWN else ""
    raise ModelError(f"{shown}{more}", _AGAIN)


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(key) for key in first["loc"] if key != "[key]")
    message = first["msg"].removeprefix("Value error, ")
    return f"{place[:200]}: {message[:1].lower()}{message[1:]}" if place else message


def _raise(error: OSError) -> None:
    raise error
