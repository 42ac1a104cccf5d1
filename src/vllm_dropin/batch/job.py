"""One run: every row of the input that has no answer yet is asked, and each answer is kept as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vllm_dropin.batch.asking import Asking, AskOptions, Question
from vllm_dropin.batch.journal import Tally
from vllm_dropin.batch.order import WINDOW_BYTES, WINDOW_ROWS, Order, arrange
from vllm_dropin.batch.progress import Position, Progress
from vllm_dropin.batch.records import Record, Source
from vllm_dropin.batch.request import MaxErrors
from vllm_dropin.batch.requests import Composer
from vllm_dropin.batch.server import Server
from vllm_dropin.errors import FailedRowsError
from vllm_dropin.scoring.results import RowResult

SYNC_EVERY = 1.0
"""Seconds: what a power cut may cost. A killed process loses no finished row."""
_TICK = 0.1


@dataclass(frozen=True)
class JobOptions:
    """In which order and how rows are sent, and how many may fail."""

    order: Order = "auto"
    max_errors: MaxErrors = field(default_factory=MaxErrors)
    ask: AskOptions = field(default_factory=AskOptions)


class AnswerSink(Protocol):
    """Where answers go: the journal, or straight to the output (stream.py)."""

    tally: Tally

    def has(self, row_id: int) -> bool:
        """Whether the row has been answered by an earlier run."""

    def expect(self, record: Record) -> None:
        """The row will be asked."""

    def add(self, result: RowResult) -> None:
        """The row's answer; each row has one."""

    def sync(self) -> None:
        """Commit what was added; called in a thread about once a second."""

    @property
    def crowded(self) -> bool:
        """Whether no further rows should be read for now."""


class Job:
    """Asks `server` about the rows of `source`. `run` once."""

    def __init__(
        self,
        source: Source,
        composer: Composer,
        sink: AnswerSink,
        server: Server,
        progress: Progress,
        options: JobOptions,
    ) -> None:
        self._source = source
        self._composer = composer
        self._sink = sink
        self._asking = Asking(server, options.ask)
        self._progress = progress
        self._options = options
        self._batches: Iterator[list[Record]] = iter(())
        self._sent = 0
        self.rows = 0
        """Rows read; after `run`, all that the input has."""

    async def run(self) -> None:
        """Answer every row. Raises FailedRowsError, EngineAwayError, and what the engine or the disk raise.

        However it ends, by a cancellation too, what was answered is in the sink, and committed.
        """
        self._progress.begin()
        try:
            await self._asking.run(self._questions(), self._take, self._tick())
        finally:
            self._progress.end()
            await asyncio.to_thread(self._sink.sync)
        if self._options.max_errors.passed(self._sink.tally, final=True):
            raise too_many(self._sink.tally, None)

    def _take(self, result: RowResult) -> None:
        self._sink.add(result)
        if result.fault is not None and self._options.max_errors.passed(self._sink.tally):
            raise too_many(self._sink.tally, result)

    async def _questions(self) -> AsyncIterator[Question]:
        """The rows to ask, window after window; the next window is read while this one is sent."""
        self._batches = self._source.read()
        following = asyncio.create_task(self._window())
        try:
            last = False
            while not last:
                window, last = await following
                if not last:
                    following = asyncio.create_task(self._window())
                if not self._sent:
                    await self._asking.warm(window)
                for question in window:
                    self._sent += 1
                    yield question
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    async def _window(self) -> tuple[list[Question], bool]:
        while self._sink.crowded:  # noqa: ASYNC110 (the sink is no coroutine's to signal)
            await asyncio.sleep(_TICK)
        return await asyncio.to_thread(self._next_window)

    def _next_window(self) -> tuple[list[Question], bool]:
        """Read until a window is full; whether the input has ended."""
        window: list[Question] = []
        size = 0
        for batch in self._batches:
            for question in self._ask_about(batch):
                window.append(question)
                size += len(question.body) + len(question.prompt)
            if len(window) >= WINDOW_ROWS or size >= WINDOW_BYTES:
                return arrange(window, self._options.order, last=False), False
        return arrange(window, self._options.order, last=True), True

    def _ask_about(self, batch: Sequence[Record]) -> Iterator[Question]:
        for record in batch:
            self.rows += 1
            if self._sink.has(record.row_id):
                continue
            self._sink.expect(record)
            composed = self._composer.compose(record)
            yield Question(record.row_id, 0, composed.text, composed.error, composed.body)

    async def _tick(self) -> None:
        """Show how far it is, and commit what has come."""
        clock = asyncio.get_running_loop().time
        synced = clock()
        while True:
            await asyncio.sleep(_TICK)
            done, total = self._source.position
            self._progress.show(
                Position(self.rows, done, total), self._asking.load, self._sent - self._progress.rows_here
            )
            if clock() - synced >= SYNC_EVERY:
                await asyncio.to_thread(self._sink.sync)
                synced = clock()


def too_many(tally: Tally, result: RowResult | None) -> FailedRowsError:
    """More rows have failed than was allowed; `result` is the one that was too many."""
    last = f"; the last one, row {result.index}: {result.error}" if result else ""
    return FailedRowsError(
        f"{tally.failed} of {tally.rows} rows failed, more than --max-errors allows{last}",
        "Every answer is kept: the same command with a larger --max-errors goes on.",
    )
