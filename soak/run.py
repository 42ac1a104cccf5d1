"""One run from the service's start to its last process, and all that was seen in it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from soak.ledger import Entry, Events, Ledger
from soak.load import FAULTS, SATURATION, Clients
from soak.requests import Author, Request
from soak.sampler import Gauges, Probe, Process, Sampler
from soak.service import DRAIN, START_LIMIT, Options, Target

HANG_REPORT = "nothing has moved in it for"
"""What the log has of an engine that hangs."""
QUIET_LIMIT = 240.0
"""Seconds for the clients to end what they have asked."""
EXIT_LIMIT = DRAIN + 15.0
"""Seconds from SIGTERM to the exit: the drain, then the engine's own end."""
FAREWELL = 8
"""Streams that are open when SIGTERM comes."""


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    minutes: float
    seed: int
    control: bool
    output: Path
    options: Options


@dataclass
class Ending:
    """How the service ended. `late`: clients that did not come to an end; `quiet`: our gauges when all had."""

    late: int = 0
    quiet: Gauges | None = None
    restarts: int | None = None
    exit_code: int | None = None
    exit_seconds: float = 0.0
    left: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)


@dataclass
class Run:
    """All that was seen. `failure`: what ended the run before its time, if anything did; seconds since its begin."""

    plan: Plan
    ready: float = 0.0
    load_ended: float = 0.0
    interrupted: bool = False
    failure: str = ""
    entries: list[Entry] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    gauges: list[Gauges] = field(default_factory=list)
    hang_reports: int = 0
    ending: Ending = field(default_factory=Ending)


async def perform(plan: Plan, say: Callable[[str], None]) -> Run:
    """Start, load, disturb, end. Returns in bounded time, whatever the service does."""
    run = Run(plan)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        say("ending early; once more to stop at once")
        run.interrupted = True
        stop.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    with Events(plan.output / "events.jsonl") as events:
        ledger = Ledger(events)
        target = Target(plan.options, plan.output)
        limit = START_LIMIT + plan.minutes * 60 + QUIET_LIMIT + 2 * EXIT_LIMIT + 300
        with watchdog(limit, target):
            async with target:
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.add_signal_handler(number, interrupt)
                sampler = Sampler(target, ledger, events)
                say(f"the service starts at {target.url}; its log is {plan.output / 'log'}")
                try:
                    await _live(run, target, sampler, ledger, events, stop, say)
                except RuntimeError as error:
                    run.failure = str(error)
                    say(run.failure)
                run.hang_reports = target.log().count(HANG_REPORT)
        run.entries = ledger.entries
        run.processes, run.probes, run.gauges = sampler.processes, sampler.probes, sampler.gauges
    return run


async def _live(
    run: Run,
    target: Target,
    sampler: Sampler,
    ledger: Ledger,
    events: Events,
    stop: asyncio.Event,
    say: Callable[[str], None],
) -> None:
    await target.wait_ready(START_LIMIT)
    run.ready = events.now
    say(f"ready after {run.ready:.0f} s; load for {run.plan.minutes:g} minutes")
    async with Clients(target.url, lambda: target.key, ledger, events, run.plan.seed) as clients:
        samples = asyncio.create_task(sampler.run(), name="sampler")
        try:
            clients.start(SATURATION if run.plan.control else FAULTS)
            await _watch(run, target, clients, samples, events, stop, say)
            run.load_ended = events.now
            say("the clients end what they have asked")
            run.ending.late = await clients.stop(QUIET_LIMIT)
            run.ending.quiet = await _quiet(sampler)
            run.ending.restarts = (await target.status())["engine"]["restarts"]
        finally:
            samples.cancel()
            await asyncio.gather(samples, return_exceptions=True)
        say("SIGTERM under load")
        await _farewell(run, target, clients, events)
    say(f"ended with exit code {run.ending.exit_code} after {run.ending.exit_seconds:.1f} s")


async def _watch(
    run: Run,
    target: Target,
    clients: Clients,
    samples: asyncio.Task[None],
    events: Events,
    stop: asyncio.Event,
    say: Callable[[str], None],
) -> None:
    """Let the time pass. Raises RuntimeError when the service, or a part of the soak, has ended meanwhile."""
    end = events.now + run.plan.minutes * 60
    told = events.now
    while events.now < end and not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), min(1.0, max(0.0, end - events.now)))
        if not target.running:
            raise RuntimeError(f"the service has ended\n{target.log()[-3000:]}")
        if (error := clients.failure()) or (samples.done() and (error := samples.exception())):
            raise RuntimeError(f"a part of the soak has failed: {error!r}") from error
        if events.now - told > 60:
            told = events.now
            say(f"{(end - told) / 60:.0f} minutes to go")


async def _quiet(sampler: Sampler) -> Gauges | None:
    """The gauges once all are 0, or as they are after 15 s: what clients have left takes a moment."""
    for _ in range(30):
        gauges = await sampler.gauges_now()
        if gauges is not None and not gauges.engine and not any(gauges.ours.values()):
            break
        await asyncio.sleep(0.5)
    return gauges


async def _farewell(run: Run, target: Target, clients: Clients, events: Events) -> None:
    """SIGTERM while streams and a table are open, all of which have to be answered whole."""
    author = Author(f"{run.plan.seed} farewell")
    requests: list[Request] = [*(author.chat((100, 200), stream=True) for _ in range(FAREWELL)), author.table(24)]
    asked = [asyncio.create_task(clients.ask("farewell", request)) for request in requests]
    await asyncio.sleep(2.0)
    target.processes()  # so that those are known which write their titles over their environment
    target.signal(signal.SIGTERM)
    sent = events.now
    run.ending.exit_code = await target.exit_code(EXIT_LIMIT)
    run.ending.exit_seconds = events.now - sent
    await asyncio.wait(asked, timeout=5.0)
    await asyncio.sleep(1.0)
    run.ending.left = [f"{role} ({pid})" for pid, role in target.processes().items()]
    run.ending.folders = target.runtime_folders()
    for task in asked:
        task.cancel()


@contextlib.contextmanager
def watchdog(seconds: float, target: Target) -> Iterator[None]:
    """Ends everything, without a report, when a run outlives all of its own bounds."""

    def bite() -> None:
        target.end()
        os._exit(70)

    timer = threading.Timer(seconds, bite)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
