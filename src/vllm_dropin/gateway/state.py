"""What the supervisor and the gateway workers tell each other: one memory-mapped file.

The supervisor writes the header (phase, drain, engine generation); each worker writes the counters of its own slot; all
of them read everything. Every field is one aligned 8-byte integer with a single writer, so no lock is needed: a reader
sees the old value or the new one. Long text (timeline, error) travels in a JSON file that is replaced atomically.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
import time
from collections import OrderedDict
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict


class Phase(enum.IntEnum):
    """Where the service stands. The order of the first six is the order of a start."""

    STARTING = 0
    HOOK = 1
    DOWNLOADING = 2
    LOADING = 3
    COMPILING = 4
    READY = 5
    RESTARTING = 6
    DRAINING = 7
    FAILED = 8
    STOPPED = 9

    @property
    def label(self) -> str:
        """The name that users see: lower case."""
        return self.name.lower()

    @property
    def final(self) -> bool:
        """Whether the engine will never answer again in this process."""
        return self in (Phase.FAILED, Phase.STOPPED, Phase.DRAINING)


class Moment(BaseModel):
    """One entry of the timeline."""

    model_config = ConfigDict(frozen=True)
    at: str
    phase: str
    stage: str = ""


class Failure(BaseModel):
    """Why the service can't serve, in the words of the error hierarchy."""

    model_config = ConfigDict(frozen=True)
    code: str
    message: str
    remedy: str = ""


class EngineStatus(BaseModel):
    """The engine's part of /status."""

    model_config = ConfigDict(frozen=True)
    version: str | None = None
    pid: int | None = None
    restarts: int = 0


class Status(BaseModel):
    """The supervisor's part of /status; the gateway adds load and settings."""

    model_config = ConfigDict(frozen=True)
    phase: str
    stage: str = ""
    progress: float | None = None
    since: str
    timeline: tuple[Moment, ...] = ()
    error: Failure | None = None
    engine: EngineStatus = EngineStatus()


Gauge = Literal["in_flight", "waiting", "queued", "rows_in_flight", "rows_at_engine", "held_bytes"]
Total = Literal["requests", "errors", "refused", "rows", "row_errors", "engine_retries", "chunks"]

_GAUGES: tuple[Gauge, ...] = ("in_flight", "waiting", "queued", "rows_in_flight", "rows_at_engine", "held_bytes")
_TOTALS: tuple[Total, ...] = (
    "requests", "errors", "refused", "rows", "row_errors", "engine_retries", "chunks",
)  # fmt: skip
_OLDEST_WAIT = "oldest_wait_ns"
_FIELDS: tuple[str, ...] = (*_GAUGES, *_TOTALS, _OLDEST_WAIT)
_HEADER = (
    "magic",
    "workers",
    "phase",
    "draining",
    "generation",
    "supervisor_pid",
    "max_model_len",
    "changed_ns",
)
_MAGIC = 0x76_64_72_6F_70_69_6E_31
_WORD = struct.Struct("<q")


class Slot:
    """The counters of one worker. Only that worker changes them, on its event loop's thread."""

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self._memory = memory
        self._offset = offset
        self._waits: OrderedDict[int, int] = OrderedDict()  # what waits for the engine, the oldest first
        self._tickets = 0

    def _at(self, field: str) -> int:
        return self._offset + 8 * _FIELDS.index(field)

    def get(self, field: Gauge | Total) -> int:
        value: int = _WORD.unpack_from(self._memory, self._at(field))[0]
        return value

    def add(self, field: Gauge | Total, amount: int = 1) -> None:
        at = self._at(field)
        _WORD.pack_into(self._memory, at, _WORD.unpack_from(self._memory, at)[0] + amount)

    def begin_wait(self) -> int:
        """Note that somebody waits for the engine from now on. Returns what `end_wait` takes."""
        self._tickets += 1
        self._waits[self._tickets] = time.monotonic_ns()
        if len(self._waits) == 1:
            self._note_oldest_wait()
        self.add("waiting")
        return self._tickets

    def end_wait(self, ticket: int) -> None:
        """The engine has sent something, or nobody waits for it any more."""
        oldest = next(iter(self._waits)) == ticket
        del self._waits[ticket]
        if oldest:
            self._note_oldest_wait()
        self.add("waiting", -1)

    def _note_oldest_wait(self) -> None:
        since = next(iter(self._waits.values()), 0)
        _WORD.pack_into(self._memory, self._at(_OLDEST_WAIT), since)

    @property
    def oldest_wait(self) -> float | None:
        """When the wait began that has lasted longest, in seconds of the monotonic clock; None when nobody waits."""
        since: int = _WORD.unpack_from(self._memory, self._at(_OLDEST_WAIT))[0]
        return since / 1e9 if since else None

    def zero_gauges(self) -> None:
        """Forget what a dead worker had in flight; its totals stay. Called by the supervisor."""
        for field in (*_GAUGES, _OLDEST_WAIT):
            _WORD.pack_into(self._memory, self._at(field), 0)


class SharedState:
    """The mapped file. `create` in the supervisor, `attach` in a worker."""

    def __init__(self, memory: mmap.mmap, status_path: Path) -> None:
        self._memory = memory
        self._status_path = status_path
        if self._header("magic") != _MAGIC:
            raise ValueError("not a state file of this version")
        base = 8 * len(_HEADER)
        self.slots = tuple(Slot(memory, base + index * 8 * len(_FIELDS)) for index in range(self._header("workers")))

    @classmethod
    def create(cls, path: Path, workers: int) -> SharedState:
        """Make the file (mode 0600) for `workers` slots, phase STARTING."""
        size = 8 * (len(_HEADER) + workers * len(_FIELDS))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, size)
            memory = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        _WORD.pack_into(memory, 0, _MAGIC)
        _WORD.pack_into(memory, 8, workers)
        state = cls(memory, path.with_suffix(".json"))
        state._set_header("supervisor_pid", os.getpid())
        state.phase = Phase.STARTING
        return state

    @classmethod
    def attach(cls, path: Path) -> SharedState:
        """Map an existing file. Raises ValueError when it is not one of ours."""
        with path.open("r+b") as file:
            return cls(mmap.mmap(file.fileno(), 0), path.with_suffix(".json"))

    def _header(self, field: str) -> int:
        value: int = _WORD.unpack_from(self._memory, 8 * _HEADER.index(field))[0]
        return value

    def _set_header(self, field: str, value: int) -> None:
        _WORD.pack_into(self._memory, 8 * _HEADER.index(field), value)

    @property
    def phase(self) -> Phase:
        return Phase(self._header("phase"))

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._set_header("phase", phase)
        self._set_header("changed_ns", time.time_ns())

    @property
    def draining(self) -> bool:
        """New work is refused with 503; probes and work in flight go on."""
        return bool(self._header("draining"))

    @draining.setter
    def draining(self, draining: bool) -> None:
        self._set_header("draining", draining)

    @property
    def generation(self) -> int:
        """How many engines have been started in this process; a change means that the old one is gone."""
        return self._header("generation")

    @generation.setter
    def generation(self, generation: int) -> None:
        self._set_header("generation", generation)

    @property
    def max_model_len(self) -> int | None:
        """The context length, in tokens, that the engine reported when it became ready; None until then."""
        return self._header("max_model_len") or None

    @max_model_len.setter
    def max_model_len(self, tokens: int | None) -> None:
        self._set_header("max_model_len", tokens or 0)

    @property
    def supervisor_pid(self) -> int:
        return self._header("supervisor_pid")

    def total(self, field: Gauge | Total) -> int:
        """The sum of one counter over all workers."""
        return sum(slot.get(field) for slot in self.slots)

    @property
    def oldest_wait(self) -> float | None:
        """As that of a slot, over all workers: the clock is one for all processes."""
        return min((since for slot in self.slots if (since := slot.oldest_wait) is not None), default=None)

    def write_status(self, status: Status) -> None:
        """Replace the long text atomically. Called by the supervisor."""
        temporary = self._status_path.with_suffix(".new")
        temporary.write_text(status.model_dump_json(), encoding="utf-8")
        temporary.replace(self._status_path)

    def read_status(self) -> Status:
        """The long text; a bare one made of the header until the supervisor has written the first."""
        try:
            return Status.model_validate_json(self._status_path.read_bytes())
        except FileNotFoundError:
            return Status(phase=self.phase.label, since="")
