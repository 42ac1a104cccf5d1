"""Rows to one server, as many at once as fill it, until there are no more rows or the server has ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_dropin.batch.order import common
from vllm_dropin.batch.pace import FIRST, Load, Pace, first_crowd, keep_pace
from vllm_dropin.batch.server import Server
from vllm_dropin.errors import EngineAwayError
from vllm_dropin.scoring.gate import Gate
from vllm_dropin.scoring.results import Fault, RowResult
from vllm_dropin.scoring.rows import Row
from vllm_dropin.scoring.scorer import EngineLost, Scorer

_WARM_FROM = 1024
"""Bytes that all requests begin with from which on the engine is given them beforehand."""


@dataclass(frozen=True, slots=True)
class Question(Row):
    """A row with its request. Whether it can be asked is the composer's to say: an image has no text."""

    body: bytes = b""

    @property
    def fault(self) -> str | None:
        return self.error


@dataclass(frozen=True)
class AskOptions:
    """How rows are sent. `concurrency` None: as many as fill the engine. `timeout` in seconds bounds one row."""

    concurrency: int | None = None
    timeout: float = 3600
    keep_reply: bool = False


class Asking:
    """Asks `server`. `run` once."""

    def __init__(self, server: Server, options: AskOptions) -> None:
        self._server = server
        self._options = options
        self._gate = Gate(options.concurrency or FIRST)
        self.load: Load | None = None
        """What the server last said of its batch."""
        self.answered = 0

    @property
    def limit(self) -> int:
        """How many rows may be at the engine now."""
        return self._gate.limit

    async def warm(self, questions: Sequence[Question]) -> None:
        """Let the engine compute a long beginning that all questions share, once, before the first of them are sent.

        Rows that it takes up in the same step would each compute it.
        """
        bodies = [question.body for question in questions if question.body]
        if len(bodies) < 2 or common(min(bodies), max(bodies)) < _WARM_FROM:
            return
        body = {**json.loads(bodies[0]), "max_tokens": 1, "n": 1}
        body.pop("max_completion_tokens", None)
        with contextlib.suppress(EngineLost):  # the rows themselves find out
            await self._server.chat(json.dumps(body).encode("ascii"))

    async def run(
        self,
        questions: AsyncIterator[Question],
        take: Callable[[RowResult], None],
        *beside: Coroutine[Any, Any, None],
    ) -> None:
        """Give `take` the answer of every question. What runs `beside` must not end before.

        Raises EngineAwayError, and what ends the server, `questions`, `take` or what runs beside.
        """
        if self._options.concurrency is None:
            self._gate.resize(first_crowd(await self._look()))
        scoring = asyncio.create_task(self._score(questions, take), name="scoring")
        engine = asyncio.create_task(self._server.ended(), name="engine-end")
        helpers = [asyncio.create_task(work) for work in beside]
        if self._options.concurrency is None:
            pace = keep_pace(Pace(self._gate), self._look, lambda: self.answered, lambda: self._server.refused)
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

    async def _score(self, questions: AsyncIterator[Question], take: Callable[[RowResult], None]) -> None:
        scorer = Scorer[Question](
            self._server,
            lambda question: question.body,
            self._gate,
            timeout=self._options.timeout,
            keep_reply=self._options.keep_reply,
        )
        async with contextlib.aclosing(scorer.score(questions, ordered=False)) as results:
            async for result in results:
                if result.fault is Fault.UNAVAILABLE:
                    raise EngineAwayError(
                        f"the engine is away: {result.error}",
                        "Every answered row is kept: give the same command again when it is back.",
                    )
                self.answered += 1
                take(result)

    async def _look(self) -> Load | None:
        self.load = await self._server.load()
        return self.load
