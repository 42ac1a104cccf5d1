"""A bundle on the disk: a tar archive or a folder, the same bytes for the same content, whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from vllm_dropin.environment.context import MTIME
from vllm_dropin.errors import ConfigurationError, InputOutputError
from vllm_dropin.model import manifest
from vllm_dropin.model.folder import WEIGHTS

_OTHER_ARCHIVES = (".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst", ".7z")
_BLOCK = 4 << 20


@dataclass(frozen=True)
class Entry:
    """One file of a bundle. `data` is its bytes, or the file that has them; `sha256` is what they have to hash to."""

    path: str
    data: bytes | Path
    size: int
    sha256: str
    executable: bool = False

    @property
    def mode(self) -> int:
        return 0o755 if self.executable else 0o644

    def open(self) -> IO[bytes]:
        return self.data.open("rb") if isinstance(self.data, Path) else io.BytesIO(self.data)


@dataclass(frozen=True)
class Written:
    """What was left on the disk; an archive's SHA-256 is of all its bytes."""

    path: Path
    size: int
    sha256: str | None


def check_output(output: Path, folder: Path) -> None:
    """Raises ConfigurationError for a place where nothing can be written, before any work is done."""
    parent = output.absolute().parent
    if not parent.is_dir():
        raise ConfigurationError(f"--output: there is no folder {parent}", "Make it, or correct it.")
    if parent.resolve().is_relative_to(folder.resolve()):
        raise ConfigurationError(
            f"--output: {output} is in the model folder, and would be part of the next bundle", "Name a place outside."
        )
    if output.suffix in _OTHER_ARCHIVES:
        raise ConfigurationError(
            f"--output: {output.name} is no kind of archive that is written",
            "Use .tar (weights can't be compressed to speak of), or a folder.",
        )
    if output.suffix == ".tar":
        if output.is_dir():
            raise ConfigurationError(f"--output: {output} is a folder", "Name a file that ends in .tar.")
    elif output.exists() and not _is_ours(output):
        raise ConfigurationError(
            f"--output: {output} is there and is no bundle",
            "Name a new or an empty folder, one that `vllm-dropin bundle` wrote, or a file that ends in .tar.",
        )


def write(entries: Sequence[Entry], output: Path, on_progress: Callable[[int, int], None]) -> Written:
    """Write an archive or a folder, by the name of `output`.

    Raises InputOutputError when the disk is full or a file has changed since it was hashed, ConfigurationError when
    another run writes the same output; then what was there before is still there.
    """
    entries = sorted(entries, key=lambda entry: entry.path)
    meter = _Meter(sum(entry.size for entry in entries), on_progress)
    try:
        _check_space(entries, output)
        if output.suffix == ".tar":
            return _write_archive(entries, output, meter)
        return _write_folder(entries, output, meter)
    except OSError as error:
        raise InputOutputError(
            f"--output: cannot write {output}: {error.strerror or error}", "Free some space, or choose another folder."
        ) from error


class _Meter:
    """Counts the bytes of all files."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None]) -> None:
        self._total, self._done, self._on_progress = total, 0, on_progress

    @contextlib.contextmanager
    def reading(self, entry: Entry) -> Iterator[IO[bytes]]:
        """The entry's bytes. Raises InputOutputError at their end when they are not those that were hashed."""
        changed = InputOutputError(
            f"{entry.data if isinstance(entry.data, Path) else entry.path} changed while it was bundled",
            "Give the same command again when nothing writes to it.",
        )
        with entry.open() as stream:
            reader = _Reader(stream, self)
            try:
                yield cast(IO[bytes], reader)
            except OSError as error:
                if reader.size < entry.size and str(error) == "unexpected end of data":  # tarfile's words
                    raise changed from None
                raise
            if reader.hash.hexdigest() != entry.sha256 or reader.size != entry.size:
                raise changed

    def count(self, size: int) -> None:
        self._done += size
        self._on_progress(self._done, self._total)


class _Reader:
    """Hashes what is read."""

    def __init__(self, stream: IO[bytes], meter: _Meter) -> None:
        self._stream, self._meter = stream, meter
        self.hash, self.size = hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.hash.update(data)
        self.size += len(data)
        self._meter.count(len(data))
        return data


class _HashingFile:
    """A file for tarfile to write to, hashed on the way."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.hash, self.size = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self._stream.write(data)

    def tell(self) -> int:
        return self.size


def _write_archive(entries: Sequence[Entry], output: Path, meter: _Meter) -> Written:
    draft = output.with_name(f"{output.name}.partial")
    with draft.open("ab") as raw, _locked(raw.fileno(), output):
        try:
            raw.truncate(0)  # what a killed run has left
            stream = _HashingFile(raw)
            _tar(entries, stream, meter)
            raw.flush()
            os.fsync(raw.fileno())
            draft.replace(output)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    return Written(output, stream.size, stream.hash.hexdigest())


def _tar(entries: Sequence[Entry], stream: Any, meter: _Meter) -> None:
    """A tar file whose members are in order, owned by 0:0 and dated 1980-01-01."""
    parents = {str(parent) for entry in entries for parent in Path(entry.path).parents} - {"."}
    members: dict[str, Entry | None] = {**dict.fromkeys(parents), **{entry.path: entry for entry in entries}}
    with tarfile.TarFile(
        fileobj=stream, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8", copybufsize=_BLOCK
    ) as archive:
        for path, entry in sorted(members.items()):
            member = tarfile.TarInfo(path)
            member.mtime = MTIME
            if entry is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(member)
            else:
                member.size, member.mode = entry.size, entry.mode
                with meter.reading(entry) as data:
                    archive.addfile(member, data)


def _write_folder(entries: Sequence[Entry], output: Path, meter: _Meter) -> Written:
    draft = output.with_name(f".{output.name}.partial")
    draft.mkdir(exist_ok=True)
    descriptor = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _locked(descriptor, output):
            try:
                _empty(draft)
                fresh = draft / "new"
                for entry in entries:
                    _copy(entry, fresh / entry.path, meter)
                for path in (fresh, *(path for path in fresh.rglob("*") if path.is_dir())):
                    os.utime(path, (MTIME, MTIME))
                if output.exists():
                    output.rename(draft / "old")
                fresh.rename(output)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    finally:
        os.close(descriptor)
    return Written(output, sum(entry.size for entry in entries), None)


def _copy(entry: Entry, path: Path, meter: _Meter) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with meter.reading(entry) as data, path.open("wb") as written:
        shutil.copyfileobj(data, written, _BLOCK)
    path.chmod(entry.mode)
    os.utime(path, (MTIME, MTIME))


@contextlib.contextmanager
def _locked(descriptor: int, output: Path) -> Iterator[None]:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigurationError(f"--output: another run is writing {output}", "Wait for it, or stop it.") from None
    except OSError:
        pass  # a file system without locks
    yield


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_space(entries: Sequence[Entry], output: Path) -> None:
    needed, free = sum(entry.size for entry in entries), shutil.disk_usage(output.absolute().parent).free
    if needed > free:
        raise InputOutputError(
            f"--output: {output} needs {needed / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB left",
            "Free some space, or choose another folder.",
        )


def _is_ours(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return not any(folder.iterdir()) or (folder / WEIGHTS / manifest.FILE_NAME).is_file()
