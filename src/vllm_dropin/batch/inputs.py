"""What to score: from the names that the user typed to files that can be opened, compared and read again.

A name is a file, a glob, a folder (its files of known extensions, by name; hidden ones and subfolders are left out), a
URL of these, or `-` for standard input.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, cast

from vllm_dropin.batch.kinds import KNOWN, Compression, Format, by_extension, named_format
from vllm_dropin.batch.storage import BLOCK, STDIO, Location, locate, reading, standard_input
from vllm_dropin.errors import ConfigurationError

_BUFFER = 1 << 18
_PEEK = 1 << 16
_PIECE = 1 << 20
_MAGIC = "*?["


@dataclass(frozen=True)
class InputFile:
    """One file to read. `size` is what it takes where it lies, compressed if it is; None where nobody knows.

    `rereadable` tells whether it can be opened more than once: not standard input, nor a pipe.
    """

    name: str
    size: int | None
    format: Format
    compression: Compression | None = None
    location: Location | None = field(default=None, repr=False)
    rereadable: bool = True

    @property
    def shown(self) -> str:
        """What messages call it."""
        return "standard input" if self.location is None else self.name

    def open(self, moved: Callable[[int], None] | None = None, *, peek: bool = False) -> BinaryIO:
        """Its bytes, decompressed. `moved` is told of each piece how many bytes it took of `size`.

        With `peek` no more than its beginning is fetched from a remote.

        Raises InputOutputError, here and in every read, when the disk, the remote or the compression fails.
        """
        block = _PEEK if peek else BLOCK
        raw = standard_input() if self.location is None else self.location.open(block)
        return io.BufferedReader(_Guarded(self.shown, raw, self.compression, moved), min(_BUFFER, block))

    def fingerprint(self) -> str:
        """What tells this content from any other: blocking, and reads all of a local file.

        Of a remote file the size with its checksum, or with its times where it has none: nothing is downloaded. Two
        readings of standard input or of a pipe are never the same.
        """
        if self.location is None or not self.rereadable:
            return f"{self.shown} {secrets.token_hex(8)}"
        if self.location.remote is not None:
            return " ".join(f"{name}:{value}" for name, value in self.location.marks().items())
        digest = hashlib.blake2b(digest_size=32)
        with reading(self.name), self.location.open() as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        return f"blake2b:{digest.hexdigest()}"


def find_inputs(
    names: Sequence[str], format: str | None = None, output: Location | None = None
) -> tuple[InputFile, ...]:
    """The files that `names` mean, in this order, all of one format: `format`, or what their extensions tell.

    The `output` and its journal are left out of folders and globs: they may be there from an earlier run. JSON Lines
    whose first record has `custom_id` and `body` are an OpenAI Batch file, unless `format` says otherwise.
    Raises ConfigurationError; InputOutputError when a file can't be looked at.
    """
    chosen = None if format is None else named_format(format)
    if STDIO in names:
        return (_stdin(names, chosen),)
    files = [_file(location, chosen) for name in names for location in _expand(name, output)]
    if not files:
        raise ConfigurationError("there is nothing to score", "Name a file, a glob, a folder or a URL.")
    if chosen is None:
        files = _recognised(files)
    first = files[0]
    for other in files:
        if other.format != first.format:
            raise ConfigurationError(
                f"the inputs are of different formats: {first.name} is {first.format}, {other.name} is {other.format}",
                "Score them one after the other, or say with --format what all of them are.",
            )
    return tuple(files)


def _stdin(names: Sequence[str], chosen: Format | None) -> InputFile:
    if len(names) > 1:
        raise ConfigurationError("standard input (-) can't be read together with files", "Give one or the other.")
    if chosen is None or chosen == "parquet":
        told = "Parquet can't be read from it" if chosen else "its format is not known"
        raise ConfigurationError(f"standard input (-): {told}", "Add --format csv or --format jsonl.")
    return InputFile("-", None, chosen, rereadable=False)


def _expand(name: str, output: Location | None) -> list[Location]:
    location = locate(name)
    if location.is_folder():
        found = [child for child in location.children() if by_extension(child.name)[0]]
        found = _without(found, output)
        if not found:
            raise ConfigurationError(f"the folder {name} has no file of a known format", f"Known are {KNOWN}.")
        return found
    if location.exists():
        if not _without([location], output):
            raise ConfigurationError(f"{name} is both input and output", "Name another output.")
        return [location]
    if any(sign in name for sign in _MAGIC):
        found = _without(location.matches(), output)
        if not found:
            raise ConfigurationError(f"no file matches {name}", "Check the pattern; ** goes into subfolders.")
        return found
    raise ConfigurationError(f"the input {name} does not exist", "Name a file, a glob, a folder or a URL.")


def _without(found: list[Location], output: Location | None) -> list[Location]:
    if output is None:
        return found
    return [place for place in found if not (place.same(output) or place.below(f"{output.path}.partial"))]


def _file(location: Location, chosen: Format | None) -> InputFile:
    told, compression = by_extension(location.name)
    format = chosen or told
    if format is None:
        raise ConfigurationError(
            f"{location.name}: the extension names no format that can be read",
            f"Known are {KNOWN}. --format says it too.",
        )
    regular = location.is_file()
    if format == "parquet" and not regular:
        raise ConfigurationError(f"{location.name}: Parquet can't be read from a pipe", "Save it to a file first.")
    return InputFile(location.name, location.size() if regular else None, format, compression, location, regular)


def _recognised(files: list[InputFile]) -> list[InputFile]:
    """With OpenAI Batch files told from other JSON Lines; a file without any line is what the others are."""
    kinds = [_is_batch(file) if file.format == "jsonl" and file.rereadable else None for file in files]
    if True not in kinds:
        return files
    return [
        replace(file, format="openai-batch") if kind or (kind is None and file.format == "jsonl") else file
        for file, kind in zip(files, kinds, strict=True)
    ]


def _is_batch(file: InputFile) -> bool | None:
    """Whether the first record is a request; None when there is no record."""
    with file.open(peek=True) as lines:
        for line in lines:
            if not line.strip(b" \t\r\n\xef\xbb\xbf"):
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                return False
            return isinstance(record, dict) and "custom_id" in record and "body" in record
    return None


class _Guarded(io.RawIOBase):
    """A file's bytes, decompressed and counted, with its errors told in our words."""

    def __init__(
        self, name: str, raw: BinaryIO, compression: Compression | None, moved: Callable[[int], None] | None
    ) -> None:
        self._name = name
        self._raw = raw
        counted = _Counting(raw, moved) if moved else raw
        self._file = cast(BinaryIO, _decompressed(name, counted, compression))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        with reading(self._name):
            chunk = self._file.read(len(view))
        view[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        if not self.closed and self._raw is not standard_input():
            self._raw.close()
        super().close()


class _Counting(io.RawIOBase):
    """Tells `moved` of every piece that is read."""

    def __init__(self, file: BinaryIO, moved: Callable[[int], None]) -> None:
        self._file = file
        self._moved = moved

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        chunk = self._file.read(size)
        self._moved(len(chunk))
        return chunk


def _decompressed(name: str, file: io.RawIOBase | BinaryIO, compression: Compression | None) -> object:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=cast(BinaryIO, file), mode="rb")
    if compression == "zstd":
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")
    return file
