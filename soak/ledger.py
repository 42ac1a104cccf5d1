"""What was asked and how it ended: every request of the run, and the file that keeps all that happened."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from soak.verdicts import Verdict


class Events:
    """events.jsonl: one line for each thing that happened, with the seconds since the run began. A context manager."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._origin = time.monotonic()

    @property
    def now(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._origin

    def write(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"at": round(self.now, 3), "event": event, **fields}) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


@dataclass(frozen=True)
class Entry:
    """One request that has ended. Times in seconds since the run began; `first`: its first byte."""

    client: str
    number: int
    started: float
    first: float | None
    ended: float
    status: int | None
    verdict: Verdict

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    def overlaps(self, begin: float, end: float) -> bool:
        """Whether it was under way at any time between the two."""
        return self.started <= end and begin <= self.ended


class Ledger:
    """All entries; and how much is open: chats, and rows of tables, that were asked and have not come back."""

    def __init__(self, events: Events) -> None:
        self.entries: list[Entry] = []
        self.open = 0
        self.asked: Counter[str] = Counter()
        self._events = events

    @contextmanager
    def asking(self, client: str, weight: int) -> Iterator[None]:
        """Count a request as open, with the most that the engine gets to do for it at once; an entry has to follow."""
        self.asked[client] += 1
        self.open += weight
        try:
            yield
        finally:
            self.open -= weight

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self._events.write("request", **asdict(entry))
