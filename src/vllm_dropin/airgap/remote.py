"""A model that lies in S3, Google Cloud Storage or Azure: fetched whole, and taken up where a cut has left it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit, urlunsplit

from vllm_dropin.batch.storage import BLOCK, Location, finding, locate, reading
from vllm_dropin.errors import ConfigurationError, InputOutputError, ModelError

SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "abfss")
_FILES_AT_ONCE = 4
_RECORD = "fetched.json"
_MAX_FILES = 10_000


def plain(url: str) -> str:
    """The URL without what may be secret in it: user, password, query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


@dataclass(frozen=True)
class _RemoteFile:
    """`marks` tell this version of the file from another: its size and what the store has as its checksum."""

    name: str
    location: Location
    marks: Mapping[str, str]
    size: int


class Stage:
    """The local copy of one URL. What a run that was cut off has left is used while the remote is the same."""

    def __init__(self, state_dir: Path, url: str) -> None:
        self.path = state_dir / "bundles" / hashlib.sha256(plain(url).encode()).hexdigest()[:16]
        self._url = url
        self._files = self.path / "files"
        self._held: int | None = None

    def fetch(self, on_progress: Callable[[int, int], None]) -> Path:
        """Bring every file below the URL. Returns the folder that has them: it is ours until `release` or `remove`.

        Raises ConfigurationError (no credentials, nothing there), InputOutputError (network, disk), ModelError.
        """
        files = self._list()
        try:
            self._files.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._take()
            self._fetch_all(files, on_progress)
        except OSError as error:
            self.release()
            raise InputOutputError(
                f"{error.filename or self.path} can't be written: {error.strerror}",
                "Free some space, or give --state-dir on a larger disk; what was fetched is kept.",
            ) from error
        except BaseException:
            self.release()
            raise
        return self._files

    def _fetch_all(self, files: list[_RemoteFile], on_progress: Callable[[int, int], None]) -> None:
        self._forget_others(files)
        here = sum(min(file.size, self._here(file)) for file in files)
        total = sum(file.size for file in files)
        free = shutil.disk_usage(self.path).free
        if total - here > free:
            raise InputOutputError(
                f"{plain(self._url)} needs {(total - here) / 1e9:.2f} GB more, and {self.path} has "
                f"{free / 1e9:.2f} GB left",
                "Free some space, or give --state-dir on a larger disk; what was fetched is kept.",
            )
        self._fetch(files, _Count(here, total, on_progress))

    def remove(self) -> None:
        """Give the disk back, once the bundle is there."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let other runs at what was fetched."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _take(self) -> None:
        """Keep other runs away: two would write into each other's files."""
        self._held = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"another run is fetching {plain(self._url)}", "Wait for it, or stop it; or give another --state-dir."
            ) from None
        except OSError:
            pass  # a file system without locks

    def _list(self) -> list[_RemoteFile]:
        place = locate(self._url)
        with finding(plain(self._url)):
            entries = place.remote.find(place.path, detail=True)
        files = []
        root = place.path.rstrip("/") + "/"
        for path, entry in sorted(entries.items()):
            name = PurePosixPath(path.removeprefix(root))
            if entry["type"] != "file" or path.endswith("/") or not path.startswith(root):
                continue  # a folder, a stand-in for one, or a neighbour
            if any(part.startswith(".") for part in name.parts):
                continue  # hidden; or it would lead out of the folder
            if name.is_absolute() or any(ord(letter) < 32 for letter in str(name)):
                raise ModelError(f"{plain(self._url)} has a file whose name no folder can have: {path!r}")
            location = Location(place.remote.unstrip_protocol(path), path, place.remote)
            files.append(_RemoteFile(str(name), location, location.marks(), int(entry["size"])))
        if not files:
            raise ConfigurationError(f"{plain(self._url)} has no files", "Name the folder that has config.json in it.")
        if len(files) > _MAX_FILES:
            raise ConfigurationError(
                f"{plain(self._url)} has {len(files):,} files: more than any model", "Name the folder of one model."
            )
        return files

    def _forget_others(self, files: list[_RemoteFile]) -> None:
        """Drop what is of another version than the remote has now, and write down which version is fetched."""
        record = self.path / _RECORD
        try:
            known = json.loads(record.read_bytes())
        except (OSError, ValueError):
            known = {}
        wanted = {file.name: dict(file.marks) for file in files}
        for path in [path for path in self._files.rglob("*") if not path.is_dir()]:
            name = str(path.relative_to(self._files)).removesuffix(".partial")
            if name not in wanted or known.get(name) != wanted[name]:
                path.unlink()
        fresh = record.with_suffix(".new")
        fresh.write_text(json.dumps(wanted), encoding="utf-8")
        fresh.replace(record)

    def _here(self, file: _RemoteFile) -> int:
        """Bytes of it that are on the disk."""
        for path in (self._files / file.name, self._partial(file)):
            if path.is_file():
                return path.stat().st_size
        return 0

    def _partial(self, file: _RemoteFile) -> Path:
        return self._files / f"{file.name}.partial"

    def _fetch(self, files: list[_RemoteFile], count: _Count) -> None:
        stop = threading.Event()
        todo = [file for file in files if not (self._files / file.name).is_file()]
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            tasks = [pool.submit(self._fetch_one, file, count, stop) for file in todo]
            try:
                for task in as_completed(tasks):
                    task.result()
            except BaseException:
                stop.set()
                raise

    def _fetch_one(self, file: _RemoteFile, count: _Count, stop: threading.Event) -> None:
        partial = self._partial(file)
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as written:
            if written.tell() > file.size:
                written.truncate(0)
            with reading(file.location.name), file.location.open() as stream:
                stream.seek(written.tell())
                while not stop.is_set() and (block := stream.read(BLOCK)):
                    written.write(block)
                    count.add(len(block))
            written.flush()
            if stop.is_set():
                return
            if written.tell() != file.size:
                raise InputOutputError(
                    f"{file.location.name} gave {written.tell():,} of {file.size:,} bytes",
                    "Give the same command again: it goes on from there.",
                )
            os.fsync(written.fileno())
        partial.replace(self._files / file.name)


class _Count:
    """Bytes that are here, told as they come."""

    def __init__(self, done: int, total: int, on_progress: Callable[[int, int], None]) -> None:
        self._done, self._total, self._on_progress = done, total, on_progress
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._done += size
            self._on_progress(self._done, self._total)
