"""How many rows may be at the engine at once, and how suspects are kept apart."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager


class Gate:
    """One for all scorings of a process: `limit` rows at once, given out in order of arrival.

    A row that was in flight when the engine died may be what killed it. Such suspects are asked one at a time, with no
    other row in flight, so that a second death has one culprit (decision 7). Other rows wait for them.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._alone = asyncio.Lock()
        self._suspects = 0
        self._asking = 0
        self._calm = asyncio.Event()  # no suspects
        self._idle = asyncio.Event()  # no other row is being asked
        self._calm.set()
        self._idle.set()

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
            else:
                self._waiters.remove(waiter)
            raise

    def release(self) -> None:
        self._held -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiters and self._held < self._limit:
            self._held += 1
            self._waiters.popleft().set_result(None)

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
    async def turn(self, *, alone: bool) -> AsyncIterator[None]:
        """Wait until this row may be asked: `alone` for a suspect, else together with others."""
        if alone:
            async with self._alone:
                await self._idle.wait()
                yield
            return
        while self._suspects:
            await self._calm.wait()
        self._asking += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._asking -= 1
            if not self._asking:
                self._idle.set()
