"""Bounds: how large a body may be, how much we hold at once, how many requests run and wait."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from io import BytesIO
from types import TracebackType
from typing import IO

from vllm_dropin.gateway.config import Limits
from vllm_dropin.gateway.errors import ClientGone, HttpError, Receive, retry_after
from vllm_dropin.gateway.state import SharedState, Slot

SPOOL_ABOVE = 8 << 20  # bytes; larger bodies wait on disk (decision 7)
SPOOL_PIECE = 64 << 10
# bytes; a thread that goes through a file lets go of the interpreter at each read and has it back before the event loop
# wakes: with the usual 8 KiB the loop stood still for a second, with this it waits 15 ms at most
SPOOL_BUFFER = 1 << 20
BODY_PACE = 16 << 10  # bytes a second that a body must keep up after its time of grace, else 408
QUEUE_POLL = 0.02  # seconds; a place freed by another worker is only seen by looking


class Hold:
    """Bytes that this worker keeps for clients, counted over all workers (decision 7)."""

    def __init__(self, state: SharedState, slot: Slot, limit: int) -> None:
        self._state = state
        self._slot = slot
        self._limit = limit

    def take(self, size: int) -> None:
        """Count `size` more bytes. Raises HttpError 429 when all workers would hold more than the limit."""
        if size > 0 and self._state.total("held_bytes") + size > self._limit:
            self._slot.add("refused")
            raise HttpError(429, "too many bytes are in flight; try again later", [retry_after(1)])
        self._slot.add("held_bytes", size)

    def release(self, size: int) -> None:
        self._slot.add("held_bytes", -size)

    @contextmanager
    def during(self, size: int) -> Iterator[None]:
        """Count `size` bytes while the block runs. Raises as `take`."""
        self.take(size)
        try:
            yield
        finally:
            self.release(size)


class Body:
    """A request's body: in memory, or in an unlinked temporary file above the spool size. Close it."""

    def __init__(self, spool_above: int = SPOOL_ABOVE, hold: Hold | None = None) -> None:
        self.size = 0
        self._parts: list[bytes] = []
        self._spool: IO[bytes] | None = None
        self._spool_above = spool_above
        self._hold = hold

    @property
    def spooled(self) -> bool:
        """Whether it waits on disk."""
        return self._spool is not None

    def write(self, chunk: bytes) -> None:
        if self._hold is not None:
            self._hold.take(len(chunk))
        self.size += len(chunk)
        if self._spool is None and self.size <= self._spool_above:
            self._parts.append(chunk)
            return
        if self._spool is None:
            # Not a context manager: the file lives as long as the body, until `close`.
            self._spool = tempfile.TemporaryFile(buffering=SPOOL_BUFFER)  # noqa: SIM115
            self._spool.writelines(self._parts)
            self._parts.clear()
        self._spool.write(chunk)

    def read(self) -> bytes:
        """All of it."""
        if self._spool is not None:
            self._spool.seek(0)
            return self._spool.read()
        return b"".join(self._parts)

    def open(self) -> IO[bytes]:
        """A binary file at its start; valid until the body is closed."""
        if self._spool is None:
            return BytesIO(self.read())
        self._spool.seek(0)
        return self._spool

    async def stream(self) -> AsyncIterator[bytes]:
        """The bytes in pieces, for sending on without holding them all."""
        file = self.open()
        while piece := file.read(SPOOL_PIECE):
            yield piece

    def close(self) -> None:
        """Free the bytes and the count of them. Closing twice is harmless."""
        self._parts.clear()
        if self._hold is not None:
            self._hold.release(self.size)
            self._hold = None
        if self._spool is not None:
            with suppress(OSError):  # a full disk, to which closing would still write
                self._spool.close()

    def __enter__(self) -> Body:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def read_body(
    receive: Receive,
    headers: Mapping[bytes, bytes],
    limit: int,
    *,
    spool_above: int = SPOOL_ABOVE,
    grace: float = 30.0,
    hold: Hold | None = None,
) -> Body:
    """Read one request's body of at most `limit` bytes.

    Raises HttpError 413 as soon as the announced or the received size is above `limit`, 408 when the client sends
    slower than 16 KiB a second after `grace` seconds, 429 when `hold` is full; ClientGone when the client leaves.
    """
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(limit)
    body = Body(spool_above, hold)
    started = time.monotonic()
    try:
        while True:
            patience = started + grace + body.size / BODY_PACE - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(patience, 0.001))
            except TimeoutError:
                raise HttpError(408, "the request body came too slowly") from None
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk: bytes = message.get("body", b"")
            if body.size + len(chunk) > limit:
                raise _too_large(limit)
            if chunk:
                body.write(chunk)
            if not message.get("more_body", False):
                return body
    except BaseException:
        # Whatever ends the reading, a cancellation included, must not leak the spool file or the count.
        body.close()
        raise


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"the request body is larger than {limit} bytes")


class Admission:
    """At most `max_in_flight` generation requests run and `max_queue` wait, over all workers; the rest get 429.

    The sums are read and the own slot written without a lock between workers, so with W workers the bound can be
    passed by at most W - 1 for a moment.
    """

    def __init__(self, state: SharedState, slot: Slot, limits: Limits) -> None:
        self._state = state
        self._slot = slot
        self._limits = limits
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._poll: asyncio.TimerHandle | None = None

    def check(self) -> None:
        """Refuse before the body is read. Raises HttpError 429 when there is no place to run or to wait."""
        if self._state.total("in_flight") < self._limits.max_in_flight:
            return
        if self._state.total("queued") < self._limits.max_queue:
            return
        self._slot.add("refused")
        raise HttpError(429, "the server is at its limit of requests; try again later", [retry_after(1)])

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Hold one place while the block runs, after waiting for it in order of arrival."""
        if self._waiters or not self._free():
            await self._queue()
        else:
            self._slot.add("in_flight")
        try:
            yield
        finally:
            self._slot.add("in_flight", -1)
            self._wake()

    def _free(self) -> bool:
        return self._state.total("in_flight") < self._limits.max_in_flight

    async def _queue(self) -> None:
        self.check()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._slot.add("queued")
        self._look_later()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                # Admitted and cancelled in the same turn of the loop: hand the place on.
                self._slot.add("in_flight", -1)
                self._wake()
            raise
        finally:
            self._slot.add("queued", -1)
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _wake(self) -> None:
        while self._waiters and self._free():
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._slot.add("in_flight")
                waiter.set_result(None)

    def _look_later(self) -> None:
        if self._poll is None and self._waiters and len(self._state.slots) > 1:
            self._poll = asyncio.get_running_loop().call_later(QUEUE_POLL, self._look)

    def _look(self) -> None:
        self._poll = None
        self._wake()
        self._look_later()
