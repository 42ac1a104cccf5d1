"""Does one fault after the other to the service, and watches how it takes it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass

from soak.ledger import Events
from soak.load import Clients
from soak.platform import AWAY, Mood, Platform
from soak.requests import CHAT, Author
from soak.sampler import Sampler
from soak.schedule import Kind
from soak.service import Target
from soak.verdicts import Outcome

READY_LIMIT = 240.0
"""Seconds in which a new engine has to be ready."""
KEY_LIMIT, WORKER_LIMIT, PROBE_LIMIT = 5.0, 3.0, 2.0
"""Seconds for new keys to count, for a new worker to be there, for a probe while half requests come in."""
PAUSE = 2.0
HALVES, HALVES_LAST = 150, 8.0
"""Half requests at once, and the seconds for which they stay."""
ALL_WORKERS = 12
"""Answers on new connections that agree, so that each worker has given one."""


@dataclass(frozen=True)
class Happened:
    """One fault, in seconds since the run began. `ended`: all was well again, by what we can see.

    `last_ready`: the last probe that was sent after the fault and was answered with ready nevertheless; `ready_again`:
    the first one that was answered so again. Both in seconds after the fault; None where no restart was asked for.
    """

    kind: Kind
    at: float
    ended: float
    last_ready: float | None = None
    ready_again: float | None = None
    note: str = ""
    problem: str = ""

    @property
    def away(self) -> float | None:
        """Seconds for which the service said that it was not ready."""
        return None if self.ready_again is None or self.last_ready is None else self.ready_again - self.last_ready


class Faults:
    """Injects faults; one at a time."""

    def __init__(
        self, target: Target, clients: Clients, sampler: Sampler, platform: Platform, events: Events, seed: int
    ) -> None:
        self._target = target
        self._clients = clients
        self._sampler = sampler
        self._platform = platform
        self._events = events
        self._random = random.Random(f"victims {seed}")
        self._author = Author(f"burst {seed}")
        self._renewals = 0
        self._stopped: int | None = None
        self._actions: dict[Kind, Callable[[], Awaitable[str]]] = {
            Kind.KILL_FRONT_END: lambda: self._strike("engine front end", signal.SIGKILL),
            Kind.KILL_CORE: lambda: self._strike("engine core", signal.SIGKILL),
            Kind.KILL_GUARDIAN: lambda: self._strike("guardian", signal.SIGKILL),
            Kind.STOP_CORE: lambda: self._strike("engine core", signal.SIGSTOP),
            Kind.PLATFORM_AWAY: self._lose_platform,
            Kind.KILL_WORKER: self._kill_worker,
            Kind.PAUSE_WORKER: self._pause_worker,
            Kind.RENEW_KEYS: self._renew_keys,
            Kind.BURST: self._burst,
            Kind.HALF_REQUESTS: self._send_halves,
        }

    async def inject(self, kind: Kind) -> Happened:
        """Do it, and return when the service is ready again. Raises RuntimeError when it ends, or does not recover."""
        before = await self._restarts()
        at = self._events.now
        self._events.write("fault", kind=kind.value)
        note, problem, last_ready, ready_again = "", "", None, None
        try:
            note = await self._actions[kind]()
            if kind.restarts:
                last_ready, ready_again = await self._recovery(at)
        except _Problem as error:
            problem = str(error)
        finally:
            self._platform.mood = Mood.WELL
            self._wake()
        await self._target.wait_ready(READY_LIMIT)
        made = await self._restarts() - before
        if made != kind.restarts:
            problem = problem or f"{made} restarts"
        happened = Happened(kind, at, self._events.now, last_ready, ready_again, note, problem)
        self._events.write("recovered", **asdict(happened))
        return happened

    def _wake(self) -> None:
        """Let go on what was stopped, should it have outlived that: a hang that was not noticed ends so."""
        if self._stopped is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._stopped, signal.SIGCONT)
            self._stopped = None

    async def _restarts(self) -> int:
        restarts: int = (await self._target.status())["engine"]["restarts"]
        return restarts

    async def _recovery(self, at: float) -> tuple[float, float]:
        """When the service was last said to be ready, and when it was ready again; seconds after the fault."""
        for_hang = 2 * self._target.options.hang_timeout + 10
        refused = await self._first_probe(503, at, for_hang, "noticed")
        ready = await self._first_probe(200, refused, READY_LIMIT, "ready again")
        sent = [probe.sent for probe in self._sampler.since(at) if probe.sent < refused and probe.status == 200]
        return (max(sent) - at if sent else 0.0), ready - at

    async def _first_probe(self, status: int, after: float, seconds: float, what: str) -> float:
        """When the first probe with this answer was sent."""
        deadline = self._events.now + seconds
        while self._events.now < deadline and self._target.running:
            first = next((probe.sent for probe in self._sampler.since(after) if probe.status == status), None)
            if first is not None:
                return first
            await asyncio.sleep(0.1)
        raise _Problem(f"not {what} within {seconds:.0f} s")

    def _pid(self, role: str) -> int:
        for pid, found in self._target.processes().items():
            if found == role:
                return pid
        raise RuntimeError(f"there is no {role}")

    async def _strike(self, role: str, number: signal.Signals) -> str:
        pid = await asyncio.to_thread(self._pid, role)
        os.kill(pid, number)
        if number == signal.SIGSTOP:
            self._stopped = pid
        return f"process {pid}"

    async def _lose_platform(self) -> str:
        self._platform.mood = self._random.choice(AWAY)
        note = await self._strike("engine core", signal.SIGKILL)
        return f"{note}; the platform answers {self._platform.mood}"

    async def _kill_worker(self) -> str:
        role = self._worker()
        old = await asyncio.to_thread(self._pid, role)
        killed = self._events.now
        os.kill(old, signal.SIGKILL)
        while True:
            table = await asyncio.to_thread(self._target.processes)
            if any(found == role and pid != old for pid, found in table.items()):
                return f"{role}; another after {self._events.now - killed:.1f} s"
            if self._events.now - killed > WORKER_LIMIT:
                raise _Problem(f"no other {role} after {WORKER_LIMIT:.0f} s")
            await asyncio.sleep(0.05)

    async def _pause_worker(self) -> str:
        role = self._worker()
        pid = await asyncio.to_thread(self._pid, role)
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(PAUSE)
        finally:
            os.kill(pid, signal.SIGCONT)
        return role

    def _worker(self) -> str:
        return f"worker {self._random.randrange(self._target.options.workers)}"

    async def _renew_keys(self) -> str:
        """The new key beside the old one, the clients change, then the new one alone."""
        old, self._renewals = self._target.key, self._renewals + 1
        new = f"soak-{self._renewals}"
        first = await self._tell_keys([old, new], new, 200)
        self._target.key = new
        await asyncio.sleep(0.5)  # what was just asked with the old one
        second = await self._tell_keys([new], old, 401)
        return f"the new key counted after {first:.1f} s, the old one no more after {second:.1f} s"

    async def _tell_keys(self, keys: list[str], key: str, expected: int) -> float:
        """Seconds from SIGHUP until every worker answers a key as it should."""
        self._target.write_keys(keys)
        sent = self._events.now
        self._target.signal(signal.SIGHUP)
        agreed = 0
        while agreed < ALL_WORKERS:
            if self._events.now - sent > KEY_LIMIT:
                raise _Problem(f"a key was not answered with {expected} within {KEY_LIMIT:.0f} s of SIGHUP")
            status, _ = await self._target.get("/version", key, fresh=True)
            agreed = agreed + 1 if status == expected else 0
        return self._events.now - sent

    async def _burst(self) -> str:
        options = self._target.options
        count = 2 * (options.max_in_flight + options.max_queue)
        asks = (self._clients.ask("burst", self._author.chat((4, 8))) for _ in range(count))
        entries = await asyncio.gather(*asks)
        refused = sum(entry.verdict.outcome is Outcome.REFUSED for entry in entries)
        if not refused:
            raise _Problem(f"none of {count} requests was refused")
        return f"{refused} of {count} refused with 429"

    async def _send_halves(self) -> str:
        began = self._events.now
        halves = [*_halves(self._target.key)]
        host, port = self._target.url.removeprefix("http://").split(":")
        connections = [await asyncio.open_connection(host, int(port)) for _ in range(HALVES)]
        for index, (_, writer) in enumerate(connections):
            writer.write(halves[index % len(halves)])
        await asyncio.sleep(HALVES_LAST)
        for _, writer in connections:
            writer.close()
        for _, writer in connections:
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        slowest = max((probe.answered - probe.sent for probe in self._sampler.since(began)), default=0.0)
        if slowest > PROBE_LIMIT:
            raise _Problem(f"a probe took {slowest:.1f} s")
        return f"{HALVES} connections; the slowest probe took {slowest:.2f} s"


class _Problem(Exception):
    """A fault that the service did not take as it should."""


def _halves(key: str) -> Iterator[bytes]:
    """Nothing, half a header, and half a body."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: soak\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    yield b""
    yield head[: len(head) // 2].encode()
    yield f"{head}Content-Length: 1000\r\n\r\n".encode() + b'{"messages": ['
