"""What is looked at all the time: memory of each process, readiness, and the gauges of /metrics."""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_left
from dataclasses import asdict, dataclass
from pathlib import Path

from soak.ledger import Events, Ledger
from soak.service import Target

MEMORY_EVERY, GAUGES_EVERY, PROBE_EVERY = 5.0, 1.0, 0.2
"""Seconds between two looks."""
OURS = ("in_flight", "waiting", "queued", "rows_in_flight", "rows_at_engine", "held_bytes")
"""The service's own gauges, all of which are 0 when nobody asks."""


@dataclass(frozen=True)
class Process:
    """One look at one process. `memory`: its resident bytes, shared pages included.

    Not the proportional size: that grows by itself when another process with the same libraries ends.
    """

    at: float
    pid: int
    role: str
    memory: int
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Probe:
    """One question to /readyz; `status` None when it was not answered within five seconds."""

    sent: float
    answered: float
    status: int | None


@dataclass(frozen=True)
class Gauges:
    """One look at /metrics. `engine`: requests in the engine, running or waiting; None while it is away.

    `open`: the most that our clients had open since the look before.
    """

    at: float
    engine: int | None
    open: int
    ours: dict[str, int]


class Sampler:
    """Looks at one service until it is cancelled. Samples stay in the order in which they were taken."""

    def __init__(self, target: Target, ledger: Ledger, events: Events) -> None:
        self.processes: list[Process] = []
        self.probes: list[Probe] = []
        self.gauges: list[Gauges] = []
        self._target = target
        self._ledger = ledger
        self._events = events

    def since(self, sent: float) -> list[Probe]:
        """The probes that were sent then or later."""
        return self.probes[bisect_left(self.probes, sent, key=lambda probe: probe.sent) :]

    async def run(self) -> None:
        """Take samples until cancelled."""
        await asyncio.gather(self._look_at_memory(), self._look_at_gauges(), self._probe())

    async def _look_at_memory(self) -> None:
        while True:
            found = await asyncio.to_thread(self._look)
            self.processes += found
            self._events.write("memory", processes=[asdict(process) for process in found])
            await asyncio.sleep(MEMORY_EVERY)

    def _look(self) -> list[Process]:
        now = self._events.now
        found = []
        for pid, role in self._target.processes().items():
            with contextlib.suppress(OSError, KeyError):  # it ended while we looked
                found.append(read_process(now, pid, role))
        return found

    async def _look_at_gauges(self) -> None:
        while True:
            most = 0
            for _ in range(5):
                most = max(most, self._ledger.open)
                await asyncio.sleep(GAUGES_EVERY / 5)
            if (gauges := await self.gauges_now(most)) is not None:
                self.gauges.append(gauges)
                self._events.write("gauges", **asdict(gauges))

    async def gauges_now(self, most: int = 0) -> Gauges | None:
        """The gauges at this moment; None when /metrics does not answer."""
        status, body = await self._target.get("/metrics")
        if status != 200:
            return None
        return read_gauges(body.decode(), self._events.now, max(most, self._ledger.open))

    async def _probe(self) -> None:
        while True:
            sent = self._events.now
            status, _ = await self._target.get("/readyz")
            self.probes.append(Probe(sent, self._events.now, status))
            await asyncio.sleep(PROBE_EVERY)


def read_process(now: float, pid: int, role: str) -> Process:
    """Raises OSError when it has ended."""
    folder = Path(f"/proc/{pid}")
    lines = (folder / "status").read_text(encoding="utf-8", errors="replace").splitlines()
    fields = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    memory, threads = int(fields["VmRSS"].split()[0]) * 1024, int(fields["Threads"])
    return Process(now, pid, role, memory, len(list((folder / "fd").iterdir())), threads)


def read_gauges(text: str, now: float, most: int) -> Gauges:
    """Read our gauges, and vLLM's requests, from the text of /metrics."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            with contextlib.suppress(ValueError):
                values[name] = values.get(name, 0.0) + float(value)
    engine = None
    if "vllm:num_requests_running" in values:
        engine = round(values["vllm:num_requests_running"] + values.get("vllm:num_requests_waiting", 0.0))
    ours = {name: round(values.get(f"vllm_dropin_{name}", 0.0)) for name in OURS}
    return Gauges(now, engine, most, ours)
