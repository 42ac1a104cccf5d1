"""Answers straight to standard output, for input that can't be read twice: no journal, nothing to go on with."""

from __future__ import annotations

from vllm_dropin.batch.journal import Tally
from vllm_dropin.batch.order import WINDOW_ROWS
from vllm_dropin.batch.records import Record
from vllm_dropin.batch.writing import Writer
from vllm_dropin.scoring.results import RowResult

_CROWD = 3 * WINDOW_ROWS
"""Rows that may wait for the oldest unanswered one; a window is sent in an order of its own, so more than one."""


class Stream:
    """An AnswerSink (job.py) that writes each answer when it comes, or (`ordered`) when its turn comes."""

    def __init__(self, writer: Writer, *, ordered: bool) -> None:
        self.tally = Tally()
        self._writer = writer
        self._ordered = ordered
        self._asked: dict[int, Record] = {}
        self._early: dict[int, RowResult] = {}
        self._following = 0

    def has(self, row_id: int) -> bool:
        return False

    def expect(self, record: Record) -> None:
        self._asked[record.row_id] = record

    def add(self, result: RowResult) -> None:
        self.tally.add(result)
        if not self._ordered:
            self._writer.write([(self._asked.pop(result.index), result)])
            return
        self._early[result.index] = result
        ready = []
        while self._following in self._early:
            ready.append((self._asked.pop(self._following), self._early.pop(self._following)))
            self._following += 1
        if ready:
            self._writer.write(ready)

    def sync(self) -> None:
        """Nothing to commit: what has been written is the reader's."""

    @property
    def crowded(self) -> bool:
        return len(self._asked) > _CROWD
