"""The clients: each asks one thing after the other until it is told to stop, and enters what came back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import aiohttp

from soak.batches import Batches
from soak.ledger import Entry, Events, Ledger
from soak.requests import Author, Request
from soak.verdicts import Outcome, Reply, Verdict, judge

DEADLINE = 600.0
"""Seconds that a request may take, restarts of the engine included."""
_PIECE = 512
_TRICKLE = 10.0  # seconds that a slow client takes for its body


@dataclass(frozen=True)
class Mix:
    """How many clients of each kind, and what they ask. `pause`: the longest, in seconds, between two requests."""

    chats: int
    streams: int
    tables: int
    leaving: int
    slow: int
    batches: int
    rows: int
    tokens: tuple[int, int]
    long_share: float
    pause: float


FAULTS = Mix(
    chats=4, streams=4, tables=2, leaving=2, slow=1, batches=1, rows=24, tokens=(8, 96), long_share=0.05, pause=1.0
)
"""About what the engine can do on two cores, so that it recovers between two faults."""
SATURATION = Mix(
    chats=40, streams=40, tables=2, leaving=4, slow=2, batches=0, rows=64, tokens=(8, 128), long_share=0.1, pause=0.0
)
"""More than twice as many at once as the example's engine batches (64)."""


class Clients:
    """The load of one run. `key` gives the key that counts now; `url` is the service's."""

    def __init__(self, url: str, key: Callable[[], str], ledger: Ledger, events: Events, seed: int) -> None:
        self._url = url
        self._key = key
        self._ledger = ledger
        self._events = events
        self._seed = seed
        self._stop = asyncio.Event()
        self._session: aiohttp.ClientSession | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Clients:
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(self._url, connector=connector, timeout=aiohttp.ClientTimeout())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        assert self._session
        await self._session.close()

    def start(self, mix: Mix) -> None:
        """Start all clients of a mix."""

        def chat(author: Author) -> Request:
            return author.chat(mix.tokens, long_share=mix.long_share)

        def stream(author: Author) -> Request:
            return author.chat(mix.tokens, stream=True, long_share=mix.long_share)

        def table(author: Author) -> Request:
            return author.table(mix.rows)

        kinds = (
            ("chat", mix.chats, chat, False, False),
            ("stream", mix.streams, stream, False, False),
            ("table", mix.tables, table, False, False),
            ("leaving stream", mix.leaving, stream, True, False),
            ("leaving table", mix.leaving, table, True, False),
            ("slow chat", mix.slow, chat, False, True),
            ("slow table", mix.slow, table, False, True),
        )
        for name, count, write, leaves, slow in kinds:
            for index in range(count):
                client = self._client(name, index, write, mix.pause, leaves=leaves, slow=slow)
                self._tasks.append(asyncio.create_task(client, name=f"{name} {index}"))
        for index in range(mix.batches):
            batches = Batches(self._url, self._ledger, self._events, self._seed + index)
            self._tasks.append(asyncio.create_task(batches.run(self._stop), name=f"score {index}"))

    async def stop(self, seconds: float) -> int:
        """Let every client end what it has asked; how many have not after this time."""
        self._stop.set()
        if not self._tasks:
            return 0
        _, late = await asyncio.wait(self._tasks, timeout=seconds)
        return len(late)

    def failure(self) -> BaseException | None:
        """What ended a client that should go on: a fault of the soak itself."""
        ended = (task for task in self._tasks if task.done() and not task.cancelled())
        return next((error for task in ended if (error := task.exception())), None)

    async def _client(
        self,
        name: str,
        index: int,
        write: Callable[[Author], Request],
        pause: float,
        *,
        leaves: bool,
        slow: bool,
    ) -> None:
        seed = f"{self._seed} {name} {index}"
        author, chance = Author(seed), random.Random(seed)
        while not self._stop.is_set():
            patience = chance.uniform(0.1, 4.0) if leaves else None
            entry = await self.ask(name, write(author), patience, slow=slow)
            wait = chance.uniform(0, pause)
            if entry.verdict.outcome in (Outcome.REFUSED, Outcome.FAILED, Outcome.CUT):
                wait = max(wait, 0.5)  # as a client with some sense would
            await asyncio.sleep(wait)

    async def ask(self, client: str, request: Request, patience: float | None = None, *, slow: bool = False) -> Entry:
        """One request, entered. With `patience` the client leaves after so many seconds."""
        started = self._events.now
        exchange = _Exchange(self._events)
        with self._ledger.asking(client, request.weight):
            try:
                async with asyncio.timeout(patience or DEADLINE):
                    reply = await exchange.run(self._require(), request, self._key(), slow=slow)
                verdict = judge(request, reply)
            except TimeoutError:
                late = Verdict(Outcome.WRONG, f"no answer within {DEADLINE:.0f} s")
                verdict = Verdict(Outcome.LEFT) if patience else late
        entry = Entry(client, request.number, started, exchange.first, self._events.now, exchange.status, verdict)
        self._ledger.add(entry)
        return entry

    def _require(self) -> aiohttp.ClientSession:
        assert self._session, "clients are used as a context manager"
        return self._session


class _Exchange:
    """One request on the wire, and what is known of its response while it comes."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self.status: int | None = None
        self.first: float | None = None

    async def run(self, session: aiohttp.ClientSession, request: Request, key: str, *, slow: bool) -> Reply:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": request.content_type}
        body = request.body()
        parts: list[bytes] = []
        sent: bytes | AsyncIterator[bytes] = trickle(body) if slow else body
        try:
            async with session.post(request.path, data=sent, headers=headers) as response:
                self.status = response.status
                async for chunk in response.content.iter_any():
                    self.first = self.first or self._events.now
                    parts.append(chunk)
                return Reply(response.status, b"".join(parts), response.headers)
        except (aiohttp.ClientError, OSError) as error:
            return Reply(self.status, b"".join(parts), error=f"{type(error).__name__}: {error}")


async def trickle(body: bytes) -> AsyncIterator[bytes]:
    """The body in pieces over some ten seconds: within the pace that the service asks for."""
    pieces = [body[at : at + _PIECE] for at in range(0, len(body), _PIECE)] or [b""]
    for piece in pieces:
        yield piece
        await asyncio.sleep(_TRICKLE / len(pieces))
