"""Rows in, answers out: many at once, each on its own, through crashes of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from typing import Generic, Protocol, TypeVar

from vllm_dropin.scoring.gate import Gate
from vllm_dropin.scoring.results import Fault, RowResult, failure, from_answer
from vllm_dropin.scoring.rows import Row

CRASHED = "engine crashed on this row"
GONE = "the engine is down and will not come back"
CULPRIT = 3  # deaths of the engine with this row in flight, at the last of them alone
RETRIES = 5  # further tries against one and the same engine
AHEAD = 4096  # rows that may be finished or running ahead of the oldest one that is not
_LONGEST_PAUSE = 5.0
_DOUBT = 2.0
"""Seconds within which a death of the engine is noticed at the latest: its front end may go on for a while, and answers
500 to all that comes."""

R = TypeVar("R", bound=Row)


class Answer(Protocol):
    """A whole reply of the engine."""

    @property
    def status(self) -> int: ...
    @property
    def body(self) -> bytes: ...


class EngineLost(Exception):
    """The engine died or can't be reached. `sent` is False when it surely never saw the request."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class Completer(Protocol):
    """What answers chat requests: an engine that may die and be started again."""

    async def chat(self, body: bytes) -> Answer:
        """Ask for one chat completion. Raises EngineLost. A cancellation must abort the engine's work."""

    async def wait_ready(self, deadline: float) -> bool:
        """Wait until it can be asked. False: never again, or not before `deadline` (time.monotonic)."""

    @property
    def generation(self) -> int:
        """How many engines have been started; it grows before the next one can be asked."""


class Scorer(Generic[R]):
    """Asks `completer` about rows. `compose` makes the chat completion request, as JSON, of one row.

    `timeout` in seconds bounds one row, the wait for a restart included. `backoff` in seconds is the first pause before
    a further try; it doubles up to 5 s. `keep_reply` keeps the engine's whole reply with each answer.
    """

    def __init__(
        self,
        completer: Completer,
        compose: Callable[[R], bytes],
        gate: Gate,
        *,
        timeout: float = 3600,
        ahead: int = AHEAD,
        backoff: float = 0.2,
        keep_reply: bool = False,
    ) -> None:
        self._completer = completer
        self._compose = compose
        self._gate = gate
        self._timeout = timeout
        self._ahead = ahead
        self._backoff = backoff
        self._keep_reply = keep_reply

    async def score(self, rows: AsyncIterable[R], *, ordered: bool = True) -> AsyncGenerator[RowResult, None]:
        """One result for each row, in the order of the rows or (`ordered` False) as they come.

        Rows are pulled only as places come free, so a source of millions costs no memory. Closing the generator cancels
        what is in flight; use `contextlib.aclosing`. An error of the source is raised here and cancels the rest.
        """
        done: asyncio.Queue[tuple[int, RowResult] | None] = asyncio.Queue()
        room = asyncio.Semaphore(self._ahead)
        pump = asyncio.create_task(self._pump(rows, done, room))
        early: dict[int, RowResult] = {}
        following = 0
        try:
            while (item := await done.get()) is not None:
                place, result = item
                early[place] = result
                while early and (following in early or not ordered):
                    room.release()
                    yield early.pop(following if ordered else place)
                    following += 1
            await pump
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)

    async def _pump(
        self,
        rows: AsyncIterable[R],
        done: asyncio.Queue[tuple[int, RowResult] | None],
        room: asyncio.Semaphore,
    ) -> None:
        async def answer(place: int, row: R) -> None:
            done.put_nowait((place, await self._ask(row)))

        place = 0
        try:
            async with asyncio.TaskGroup() as asking:
                async for row in rows:
                    await room.acquire()
                    if row.fault is not None:
                        done.put_nowait((place, failure(row, row.fault, Fault.INPUT)))
                    else:
                        await self._gate.acquire()
                        task = asking.create_task(answer(place, row))
                        # Not in `answer`: a task that is cancelled before it starts runs none of its code.
                        task.add_done_callback(lambda _: self._gate.release())
                    place += 1
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            done.put_nowait(None)

    async def _ask(self, row: R) -> RowResult:
        try:
            async with asyncio.timeout(self._timeout):
                return await self._persist(row, time.monotonic() + self._timeout)
        except TimeoutError:
            return failure(row, f"no answer within {self._timeout:g} s", Fault.UNAVAILABLE)

    async def _persist(self, row: R, deadline: float) -> RowResult:
        """Ask until there is an answer that will not change by asking again.

        Whether the engine died is only known when the next one is up: `lost_in` remembers the engine that had the row
        when its connection broke, and a later engine proves the death.
        """
        body = self._compose(row)
        tries = failures = crashes = 0
        lost_in: int | None = None
        with contextlib.ExitStack() as stack:
            while True:
                if lost_in is not None and self._completer.generation != lost_in:
                    lost_in = None
                    crashes += 1
                    if crashes == CULPRIT:
                        return failure(row, CRASHED, Fault.ENGINE, tries)
                    if crashes == 1:
                        stack.enter_context(self._gate.suspicion())
                async with self._gate.turn(crashes=crashes):
                    generation = self._completer.generation
                    if lost_in not in (None, generation):
                        continue  # it died while this row waited for its turn
                    tries += 1
                    try:
                        answer = await self._completer.chat(body)
                    except EngineLost as lost:
                        problem = failure(row, str(lost), Fault.UNAVAILABLE, tries)
                        seen = lost.sent
                    else:
                        problem = from_answer(row, answer.status, answer.body, tries, keep_reply=self._keep_reply)
                        if answer.status < 500 and answer.status != 429:
                            return problem
                        seen = answer.status >= 500  # a dying engine may still say so itself
                    if seen:
                        lost_in = generation
                        if crashes:
                            # The next suspects would go to an engine that is dying, and be blamed for it.
                            await self._settle(generation, deadline)
                failures += 1
                if failures > RETRIES:
                    return problem
                if not await self._completer.wait_ready(deadline):
                    return failure(row, GONE, Fault.UNAVAILABLE, tries)
                await asyncio.sleep(self._pause(failures))
                if self._completer.generation != generation:
                    failures = 0

    async def _settle(self, generation: int, deadline: float) -> None:
        """Wait until it is known whether this engine lives, and for the next one when it does not."""
        known = time.monotonic() + _DOUBT
        while self._completer.generation == generation and time.monotonic() < known:  # noqa: ASYNC110 (an engine has no event)
            await asyncio.sleep(_DOUBT / 100)
        await self._completer.wait_ready(deadline)

    def _pause(self, failures: int) -> float:
        """Seconds before the next try; half of it is random, so that rows do not come back in step."""
        pause: float = min(_LONGEST_PAUSE, self._backoff * 2 ** (failures - 1))
        return pause * random.uniform(0.5, 1)  # noqa: S311 (spreads load, guards nothing)
