"""One run: every row of the input that has no answer yet is asked, and each answer is kept as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vllm_dropin.batch.journal import Tally
from vllm_dropin.batch.order import WINDOW_BYTES, WINDOW_ROWS, Order, arrange, shared_by_all
from vllm_dropin.batch.pace import FIRST, Load, Pace, keep_pace
from vllm_dropin.batch.progress import Position, Progress
from vllm_dropin.batch.records import Record, Source
from vllm_dropin.batch.request import MaxErrors
from vllm_dropin.batch.requests import Composer
from vllm_dropin.batch.server import Server
from vllm_dropin.errors import EngineAwayError, FailedRowsError
from vllm_dropin.scoring.gate import Gate
from vllm_dropin.scoring.results import Fault, RowResult
from vllm_dropin.scoring.rows import Row
from vllm_dropin.scoring.scorer import EngineLost, Scorer

SYNC_EVERY = 1.0
"""Seconds: what a power cut may cost. A killed process loses no finished row."""
_TICK = 0.1
_WARM_FROM = 1024
"""Characters at the beginning of all rows from which on the engine is given them beforehand."""


@dataclass(frozen=True, slots=True)
class Question(Row):
    """A row with its request. Whether it can be asked is the composer's to say: an image has no text."""

    body: bytes = b""

    @property
    def fault(self) -> str | None:
        return self.error


@dataclass(frozen=True)
class JobOptions:
    """How rows are sent. `concurrency` None: as many as fill the engine. `timeout` in seconds bounds one row."""

    order: Order = "auto"
    concurrency: int | None = None
    max_errors: MaxErrors = field(default_factory=MaxErrors)
    timeout: float = 3600
    keep_reply: bool = False


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
        self._server = server
        self._progress = progress
        self._options = options
        self._gate = Gate(options.concurrency or FIRST)
        self._batches: Iterator[list[Record]] = iter(())
        self._load: Load | None = None
        self._sent = 0
        self.rows = 0
        """Rows read; after `run`, all that the input has."""

    async def run(self) -> None:
        """Answer every row. Raises FailedRowsError, EngineAwayError, and what the engine or the disk raise.

        However it ends, by a cancellation too, what was answered is in the sink, and committed.
        """
        self._progress.begin()
        scoring = asyncio.create_task(self._score(), name="scoring")
        engine = asyncio.create_task(self._server.ended(), name="engine-end")
        helpers = [asyncio.create_task(self._tick(), name="tick")]
        if self._options.concurrency is None:
            pace = keep_pace(
                Pace(self._gate), self._look, lambda: self._progress.rows_here, lambda: self._server.refused
            )
            helpers.append(asyncio.create_task(pace, name="pace"))
        try:
            done, _ = await asyncio.wait({scoring, engine, *helpers}, return_when=asyncio.FIRST_COMPLETED)
            if scoring in done and not scoring.cancelled() and isinstance(scoring.exception(), EngineAwayError):
                await asyncio.wait({engine}, timeout=2.0)  # its own error says more than that it is away
            for task in (engine, *helpers, scoring):
                if task.done():
                    await task
        finally:
            for task in (scoring, engine, *helpers):
                task.cancel()
            await asyncio.gather(scoring, engine, *helpers, return_exceptions=True)
            self._progress.end()
            await asyncio.to_thread(self._sink.sync)

    async def _score(self) -> None:
        scorer = Scorer[Question](
            self._server,
            lambda question: question.body,
            self._gate,
            timeout=self._options.timeout,
            keep_reply=self._options.keep_reply,
        )
        limit = self._options.max_errors
        async with contextlib.aclosing(scorer.score(self._questions(), ordered=False)) as results:
            async for result in results:
                if result.fault is Fault.UNAVAILABLE:
                    raise EngineAwayError(
                        f"the engine is away: {result.error}",
                        "Every answered row is kept: give the same command again when it is back.",
                    )
                self._sink.add(result)
                if result.fault is not None and limit.passed(self._sink.tally):
                    raise too_many(self._sink.tally, result)
        if limit.passed(self._sink.tally, final=True):
            raise too_many(self._sink.tally, None)

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
                    await self._warm(window)
                for question in window:
                    self._sent += 1
                    yield question
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    async def _warm(self, window: Sequence[Question]) -> None:
        """Let the engine compute a long beginning that all rows share, once, before the first of them are sent.

        Rows that it takes up in the same step would each compute it.
        """
        if len(window) < 2 or self._composer.instruction + shared_by_all(window) < _WARM_FROM:
            return
        body = {**json.loads(window[0].body), "max_tokens": 1, "n": 1}
        body.pop("max_completion_tokens", None)
        with contextlib.suppress(EngineLost):  # the rows themselves find out
            await self._server.chat(json.dumps(body).encode("ascii"))

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

    async def _look(self) -> Load | None:
        self._load = await self._server.load()
        return self._load

    async def _tick(self) -> None:
        """Show how far it is, and commit what has come."""
        clock = asyncio.get_running_loop().time
        synced = clock()
        while True:
            await asyncio.sleep(_TICK)
            done, total = self._source.position
            self._progress.show(Position(self.rows, done, total), self._load, self._sent - self._progress.rows_here)
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
