"""Which rows have been answered, and how: a folder that survives SIGKILL, a full disk and a power cut.

    OUTPUT.partial/
      manifest.json     what is being scored: a run that goes on must score the same
      lock              held while a scorer writes here
      sealed            one line for each part that is whole: its rows, errors and tokens
      parts/000000      the answers of rows 0 to 4,095 in the order in which they came, and so on

All but the manifest are append-only. Each line has a checksum: what a crash or a full disk left unfinished at the end
of a file is cut off when it is opened again, and those rows are asked once more. `sync` commits what was added.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_dropin.errors import ConfigurationError, InputOutputError
from vllm_dropin.scoring.results import Fault, RowResult

ROWS_PER_PART = 4096
_FORMAT = 1
_GO_ON = "What was committed is intact: put this right, then give the same command again."


@dataclass
class Tally:
    """What is known of the answered rows as a whole. Tokens are the engine's."""

    rows: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    def add(self, result: RowResult) -> None:
        self.rows += 1
        self.prompt_tokens += result.prompt_tokens
        self.completion_tokens += result.completion_tokens
        if result.fault is not None:
            self.errors[result.fault.value] = self.errors.get(result.fault.value, 0) + 1

    def include(self, other: Tally) -> None:
        self.rows += other.rows
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        for kind, count in other.errors.items():
            self.errors[kind] = self.errors.get(kind, 0) + count


class Journal:
    """One scorer's record of one output. `open` it, `add` each answer once, `close` it."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self.tally = Tally()
        self._lock = lock
        self._parts: dict[int, _Part] = {}
        self._sealed: set[int] = set()
        self._index: _Log | None = None

    @classmethod
    def open(cls, folder: Path, fingerprint: Mapping[str, object], *, restart: bool = False) -> Journal:
        """Begin a journal, or go on with the one that is there when it is of the same work.

        `fingerprint` says what the work is: a name and a printable value for each thing that shapes the answers. Raises
        ConfigurationError, which names the differences, when the journal is of other work or another scorer writes it;
        InputOutputError when the disk refuses. `restart` drops what is there.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _refused(folder, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise ConfigurationError(
                f"another scorer is writing {folder}", "Wait for it, or choose another output."
            ) from None
        journal = cls(folder, lock)
        try:
            journal._begin(fingerprint, restart)
        except OSError as error:
            journal.close()
            raise _refused(folder, error) from error
        except BaseException:
            journal.close()
            raise
        return journal

    def _begin(self, fingerprint: Mapping[str, object], restart: bool) -> None:
        parts, manifest = self.folder / "parts", self.folder / "manifest.json"
        if restart:
            manifest.unlink(missing_ok=True)
        if manifest.exists():
            _require_same(manifest, fingerprint)
        else:
            # Without a manifest whatever else is here has no meaning.
            shutil.rmtree(parts, ignore_errors=True)
            (self.folder / "sealed").unlink(missing_ok=True)
            document = {"format": _FORMAT, "rows_per_part": ROWS_PER_PART, "fingerprint": fingerprint}
            write_atomically(manifest, json.dumps(document, indent=2).encode() + b"\n")
        parts.mkdir(exist_ok=True)
        self._index = _Log(self.folder / "sealed")
        for entry in self._index.read():
            self._sealed.add(entry.pop("part"))
            self.tally.include(Tally(**entry))
        for path in sorted(parts.iterdir()):
            if path.name.isdigit() and int(path.name) not in self._sealed:
                part = self._part(int(path.name))
                self.tally.include(part.tally)
                self._seal_if_whole(int(path.name), part)

    def has(self, row_id: int) -> bool:
        """Whether this row has been answered."""
        number = row_id // ROWS_PER_PART
        if number in self._sealed:
            return True
        part = self._parts.get(number)
        return part is not None and row_id in part.ids

    def add(self, result: RowResult) -> None:
        """Append one answer. Raises InputOutputError; ValueError for a row that has one already."""
        if self.has(result.index):
            raise ValueError(f"row {result.index} has been answered before")
        number = result.index // ROWS_PER_PART
        try:
            part = self._part(number)
            part.add(result)
            self.tally.add(result)
            self._seal_if_whole(number, part)
        except OSError as error:
            raise _refused(self.folder, error) from error

    def sync(self) -> None:
        """Bring all that was added to the disk. Raises InputOutputError. May run in a thread beside `add`."""
        try:
            for part in list(self._parts.values()):
                part.log.sync()
        except OSError as error:
            raise _refused(self.folder, error) from error

    def expect(self, record: object) -> None:
        """A row will be asked: nothing to do, for the input is read again when the output is written."""

    @property
    def crowded(self) -> bool:
        """Never: answers go to the disk."""
        return False

    def read_part(self, number: int) -> list[RowResult]:
        """The answers of one part, in the order in which they came."""
        try:
            log = _Log(self.folder / "parts" / f"{number:06}")
            try:
                return [_result(entry) for entry in log.read()]
            finally:
                log.close()
        except OSError as error:
            raise _refused(self.folder, error) from error

    def parts(self, rows: int, *, ordered: bool = True) -> Iterator[list[RowResult]]:
        """All answers of an input of `rows` rows, part by part; `ordered` by row within each.

        Raises InputOutputError when one is missing.
        """
        for first in range(0, rows, ROWS_PER_PART):
            results = self.read_part(first // ROWS_PER_PART)
            expected = min(ROWS_PER_PART, rows - first)
            if len(results) != expected:
                raise InputOutputError(
                    f"{self.folder} has {len(results)} answers where rows {first} to {first + expected - 1} should be",
                    "Give the same command again: it asks for what is missing.",
                )
            yield sorted(results, key=lambda result: result.index) if ordered else results

    def _part(self, number: int) -> _Part:
        part = self._parts.get(number)
        if part is None:
            part = self._parts[number] = _Part(self.folder / "parts" / f"{number:06}")
        return part

    def _seal_if_whole(self, number: int, part: _Part) -> None:
        if len(part.ids) < ROWS_PER_PART:
            return
        assert self._index is not None  # opened before the first part
        part.log.sync()
        self._index.append({"part": number, **asdict(part.tally)})
        self._index.sync()
        self._sealed.add(number)
        del self._parts[number]
        part.log.close()

    def close(self) -> None:
        """Let the folder go. What was added stays."""
        for part in self._parts.values():
            part.log.close()
        self._parts.clear()
        if self._index is not None:
            self._index.close()
        os.close(self._lock)

    def remove(self) -> None:
        """Delete the folder, once the output is in its place. Nothing is lost when this does not succeed."""
        shutil.rmtree(self.folder, ignore_errors=True)


class _Part:
    """The answers of up to 4,096 rows, of which only the numbers are kept in memory."""

    def __init__(self, path: Path) -> None:
        self.log = _Log(path)
        self.ids: set[int] = set()
        self.tally = Tally()
        for entry in self.log.read():
            result = _result(entry)
            self.ids.add(result.index)
            self.tally.add(result)

    def add(self, result: RowResult) -> None:
        self.log.append(_entry(result))
        self.ids.add(result.index)
        self.tally.add(result)


class _Log:
    """Lines of JSON, each behind its checksum. Written without a buffer: a killed process loses none of them."""

    def __init__(self, path: Path) -> None:
        fresh = not path.exists()
        self._path = path
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._dirty = False
        self._closing = threading.Lock()  # `sync` runs in a thread, and a closed descriptor's number is given out again
        if fresh:
            sync_folder(path.parent)

    def append(self, entry: Mapping[str, Any]) -> None:
        assert self._file is not None
        text = json.dumps(entry, separators=(",", ":")).encode("ascii")
        line = b"%08x %b\n" % (zlib.crc32(text), text)
        self._dirty = True
        written = os.write(self._file, line)
        while written < len(line):  # the disk is nearly full: the next write says so
            written += os.write(self._file, line[written:])

    def read(self) -> Iterator[dict[str, Any]]:
        """Every whole line; what follows the last of them is cut off."""
        assert self._file is not None
        end = 0
        with self._path.open("rb") as lines:
            for line in lines:
                entry = _checked(line)
                if entry is None:
                    break
                end += len(line)
                yield entry
        if end < os.fstat(self._file).st_size:
            os.ftruncate(self._file, end)

    def sync(self) -> None:
        with self._closing:
            if self._dirty and self._file is not None:
                self._dirty = False
                os.fdatasync(self._file)

    def close(self) -> None:
        with self._closing:
            if self._file is not None:
                os.close(self._file)
                self._file = None


def write_atomically(path: Path, content: bytes) -> None:
    """The whole file or none of it, on the disk when this returns."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: without it a power cut may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checked(line: bytes) -> dict[str, Any] | None:
    if len(line) < 10 or not line.endswith(b"\n") or line[:8] != b"%08x" % zlib.crc32(line[9:-1]):
        return None
    entry: dict[str, Any] = json.loads(line[9:])
    return entry


def _entry(result: RowResult) -> dict[str, Any]:
    """A result as JSON; what is empty is left out."""
    return {
        "row": result.index,
        **({"completions": result.completions, "reasons": result.finish_reasons} if result.completions else {}),
        **({"error": result.error, "fault": result.fault.value} if result.fault else {}),
        **({"tokens": (result.prompt_tokens, result.completion_tokens)} if result.completions else {}),
        **({"reply": result.reply.decode("utf-8", "replace")} if result.reply is not None else {}),
    }


def _result(entry: Mapping[str, Any]) -> RowResult:
    prompt_tokens, completion_tokens = entry.get("tokens", (0, 0))
    reply = entry.get("reply")
    return RowResult(
        index=entry["row"],
        line=0,
        completions=tuple(entry.get("completions", ())),
        finish_reasons=tuple(entry.get("reasons", ())),
        error=entry.get("error"),
        fault=Fault(entry["fault"]) if "fault" in entry else None,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        reply=reply.encode() if reply is not None else None,
    )


def _require_same(manifest: Path, fingerprint: Mapping[str, object]) -> None:
    """Raises ConfigurationError unless the manifest is of the same work."""
    begin_anew = f"Undo the change, or begin anew with --restart (it drops what {manifest.parent} holds)."
    try:
        document = json.loads(manifest.read_bytes())
        written: dict[str, object] = document["fingerprint"]
        same_form = document["format"] == _FORMAT and document["rows_per_part"] == ROWS_PER_PART
    except (ValueError, KeyError, TypeError):
        raise ConfigurationError(f"{manifest} is damaged", "Begin anew with --restart.") from None
    if not same_form:
        raise ConfigurationError(f"{manifest} is of another version of this program", begin_anew)
    wanted = json.loads(json.dumps(fingerprint))
    changed = [
        f"{name}: {_shown(wanted, name)}, was {_shown(written, name)}"
        for name in [*written, *(name for name in wanted if name not in written)]
        if written.get(name) != wanted.get(name)
    ]
    if changed:
        raise ConfigurationError(
            f"{manifest.parent} holds the answers to other work: {'; '.join(changed[:5])}"
            + (f"; and {len(changed) - 5} more differences" if len(changed) > 5 else ""),
            begin_anew,
        )


def _shown(values: Mapping[str, object], name: str) -> str:
    text = str(values[name]) if name in values else "nothing"
    return text if len(text) <= 80 else f"{text[:77]}…"


def _refused(folder: Path, error: OSError) -> InputOutputError:
    return InputOutputError(f"the journal {folder} can't be written or read: {error.strerror or error}", _GO_ON)
