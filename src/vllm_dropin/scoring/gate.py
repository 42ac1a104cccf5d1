"""How many rows may be at the engine at once, and how suspects are kept apart."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager


class Gate:
    """One for all scorings of a process: `limit` rows at once, given out in order of arrival.

    A row that was in flight when the engine died may be what killed it. Such suspects are asked before all others, with
    no other row in flight: the square root of `limit` at a time after their first death, which most often has another
    cause, and one at a time after their second, so that a third has one culprit.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._suspects = 0
        self._asking = 0  # rows above suspicion
        self._questioned = 0  # suspects
        self._solitary = False  # the one that is questioned is to be alone
        self._line: deque[tuple[bool, asyncio.Future[None]]] = deque()
        self._calm = asyncio.Event()  # no suspects
        self._calm.set()

    @property
    def limit(self) -> int:
        """How many rows may hold a place."""
        return self._limit

    def resize(self, limit: int) -> None:
        """Change the limit. Rows above a smaller one keep their places until they are done."""
        self._limit = limit
        self._wake()

    async def acquire(self) -> None:
        """Take one of the places; a suspect keeps its place while it waits for its turn."""
        if self._held < self._limit and not self._waiters:
            self._held += 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.release()  # given a place and cancelled in the same turn of the loop: hand it on
            raise

    def release(self) -> None:
        self._held -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiters and self._held < self._limit:
            waiter = self._waiters.popleft()
            if not waiter.done():  # else it was cancelled, and has not run since
                self._held += 1
                waiter.set_result(None)

    @contextmanager
    def suspicion(self) -> Iterator[None]:
        """Hold other rows back while the block runs."""
        self._suspects += 1
        self._calm.clear()
        try:
            yield
        finally:
            self._suspects -= 1
            if not self._suspects:
                self._calm.set()

    @asynccontextmanager
    async def turn(self, *, crashes: int) -> AsyncIterator[None]:
        """Wait until a row may be asked that was in flight at so many deaths of the engine."""
        if crashes:
            await self._line_up(alone=crashes > 1)
            try:
                yield
            finally:
                self._questioned -= 1
                self._call_in()
            return
        while self._suspects:
            await self._calm.wait()
        self._asking += 1
        try:
            yield
        finally:
            self._asking -= 1
            self._call_in()

    async def _line_up(self, *, alone: bool) -> None:
        called = asyncio.get_running_loop().create_future()
        self._line.append((alone, called))
        self._call_in()
        try:
            await called
        except asyncio.CancelledError:
            if called.done() and not called.cancelled():
                self._questioned -= 1
                self._call_in()
            raise

    def _call_in(self) -> None:
        """Let the suspects at the head of the line be asked, as many as may be together."""
        together = math.isqrt(self._limit)
        while self._line and not self._asking:
            alone, called = self._line[0]
            if not called.done():
                if self._questioned and (alone or self._solitary or self._questioned >= together):
                    return
                self._questioned += 1
                self._solitary = alone
                called.set_result(None)
            self._line.popleft()
