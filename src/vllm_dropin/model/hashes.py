"""SHA-256 of files, several at a time, and once per state of a file: a cache remembers what a state had.

The cache is one JSON file that may be lost or damaged: then hashing takes its time again, and nothing else happens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[int, int], None]
"""Gets the bytes that are done and all bytes, about five times a second, from any thread. What it raises ends all."""

_BLOCK = 4 << 20
_THREADS = 8
_EVERY = 0.2
_FRESH_NS = 100_000_000
"""A file that changed less than 0.1 s before it was read may change again without a new time: clocks tick coarsely."""

State = tuple[int, int, int, int, int]
"""Device, inode, size, mtime and ctime (ns). A bundle's files all have one mtime and an inode is used again, so ctime,
which nobody can set, is what tells an unpacked file from the one that was there before."""


@dataclass(frozen=True)
class Digests:
    """Hex digests by file. `computed` counts those that no cache knew."""

    by_file: dict[Path, str]
    computed: int


def cache_file(state_dir: Path, folder: Path) -> Path:
    """Where the state folder keeps the hashes of one folder's files."""
    return state_dir / "hashes" / f"{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]}.json"


def digest_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_files(files: Sequence[Path], cache: Path | None = None, on_progress: Progress | None = None) -> Digests:
    """Hash the files. Raises OSError for one that can't be read; a `cache` that can't be written is done without."""
    known = _read_cache(cache)
    work = _Work(sum(file.stat().st_size for file in files), on_progress)
    found: dict[Path, str] = {}
    kept: dict[str, tuple[State, str]] = {}
    computed = 0
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        tasks = {}
        for file in files:
            state = _state(file.stat())
            record = known.get(str(file))
            if record is not None and record[0] == state:
                found[file], kept[str(file)] = record[1], record
                work.skip(state[2])
            else:
                tasks[pool.submit(work.digest, file)] = file
        try:
            for task in as_completed(tasks):
                file, (digest, seen) = tasks[task], task.result()
                found[file] = digest
                computed += 1
                if seen is not None:
                    kept[str(file)] = (seen, digest)
        except BaseException:
            work.stop.set()
            raise
    if computed:
        _write_cache(cache, kept)
    return Digests(found, computed)


class _Work:
    """What the threads share: how far they are, and whether they should stop."""

    def __init__(self, total: int, on_progress: Progress | None) -> None:
        self.stop = threading.Event()
        self._total, self._done, self._told = total, 0, 0.0
        self._on_progress = on_progress
        self._lock = threading.Lock()

    def digest(self, file: Path) -> tuple[str, State | None]:
        """The digest, with the file's state where it is known to have been the same from the first byte to the last."""
        whole = hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            before, now = os.fstat(stream.fileno()), time.time_ns()
            while not self.stop.is_set() and (block := stream.read(_BLOCK)):
                whole.update(block)
                self.skip(len(block))
            after = os.fstat(stream.fileno())
        fresh = now - max(before.st_mtime_ns, before.st_ctime_ns) < _FRESH_NS
        steady = _state(before) == _state(after) and not fresh
        return whole.hexdigest(), _state(before) if steady else None

    def skip(self, size: int) -> None:
        with self._lock:
            self._done += size
            now = time.monotonic()
            if self._on_progress and (now - self._told >= _EVERY or self._done >= self._total):
                self._told = now
                self._on_progress(self._done, self._total)


def _state(entry: os.stat_result) -> State:
    return entry.st_dev, entry.st_ino, entry.st_size, entry.st_mtime_ns, entry.st_ctime_ns


def _read_cache(cache: Path | None) -> dict[str, tuple[State, str]]:
    if cache is None:
        return {}
    try:
        entries = json.loads(cache.read_bytes())
        return {name: (_as_state(*state), str(digest)) for name, (state, digest) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _as_state(device: int, inode: int, size: int, mtime: int, ctime: int) -> State:
    return device, inode, size, mtime, ctime


def _write_cache(cache: Path | None, entries: dict[str, tuple[State, str]]) -> None:
    if cache is None:
        return
    with contextlib.suppress(OSError):  # a state folder that can't be written costs the same time again
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = cache.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(entries), encoding="utf-8", errors="surrogateescape")
        fresh.replace(cache)
