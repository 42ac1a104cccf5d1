"""One run, from the service's start to its last process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from soak.faults import READY_LIMIT, Faults
from soak.ledger import Events, Ledger
from soak.load import FAULTS, SATURATION, Clients
from soak.platform import Platform
from soak.record import Plan, Run
from soak.requests import Author, Request
from soak.sampler import Gauges, Sampler
from soak.schedule import SETTLE
from soak.schedule import plan as planned
from soak.service import DRAIN, START_LIMIT, Target

HANG_REPORT = "nothing has moved in it for"
"""What the log has of an engine that hangs, once each time."""
QUIET_LIMIT = 240.0
"""Seconds for the clients to end what they have asked."""
EXIT_LIMIT = DRAIN + 15.0
"""Seconds from SIGTERM to the exit: the drain, then the engine's own end."""
FAREWELL = 8
"""Streams that are open when SIGTERM comes."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


async def perform(plan: Plan, say: Callable[[str], None]) -> Run:
    """Start, load, disturb, end. Returns in bounded time, whatever the service does."""
    with Events(plan.output / "events.jsonl") as events, Platform() as platform:
        target = Target(plan.options, plan.output, platform.environ)
        limit = START_LIMIT + plan.minutes * 60 + READY_LIMIT + QUIET_LIMIT + 2 * EXIT_LIMIT + 300
        with watchdog(limit, target):
            async with target:
                performance = _Performance(plan, target, platform, events, say)
                await performance.run()
                return performance.seen()


class _Performance:
    """The course of one run on a service that has been started."""

    def __init__(
        self, plan: Plan, target: Target, platform: Platform, events: Events, say: Callable[[str], None]
    ) -> None:
        self._run = Run(plan)
        self._target = target
        self._platform = platform
        self._events = events
        self._say = say
        self._ledger = Ledger(events)
        self._sampler = Sampler(target, self._ledger, events)
        self._clients = Clients(target.url, lambda: target.key, self._ledger, events, plan.seed)
        self._stop = asyncio.Event()

    def seen(self) -> Run:
        """All that has been seen so far."""
        run, sampler = self._run, self._sampler
        run.asked, run.entries = self._ledger.asked.total(), self._ledger.entries
        run.processes = sampler.processes
        run.probes, run.gauges = sampler.probes, sampler.gauges
        run.told = self._platform.taken["Engine restarted"]
        run.hang_reports = self._target.log().count(f"the engine is killed: {HANG_REPORT}")
        return run

    async def run(self) -> None:
        """All of it. What goes wrong ends it, and is kept as the run's failure."""
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._interrupt)
        self._say(f"the service starts at {self._target.url}; its log is {self._run.plan.output / 'log'}")
        try:
            await self._start()
            self._run.ready = self._events.now
            self._say(f"ready after {self._run.ready:.0f} s; load for {self._run.plan.minutes:g} minutes")
            async with self._clients:
                await self._under_load()
                self._say("SIGTERM under load")
                await self._farewell()
            self._say(f"ended with {self._run.ending.exit_code} after {self._run.ending.exit_seconds:.1f} s")
        except RuntimeError as error:
            self._run.failure = str(error)
            self._say(self._run.failure)

    async def _start(self) -> None:
        """Until the service is ready. Raises RuntimeError when it does not get so, or when the run is to end before."""
        ready = asyncio.create_task(self._target.wait_ready(START_LIMIT), name="ready")
        stop = asyncio.create_task(self._stop.wait(), name="stop")
        try:
            await asyncio.wait({ready, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                raise RuntimeError("ended before the service was ready")
            ready.result()
        finally:
            for task in (ready, stop):
                task.cancel()

    def _interrupt(self) -> None:
        self._say("ending early, with a report; once more to stop at once")
        self._run.interrupted = True
        self._stop.set()
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)

    async def _under_load(self) -> None:
        plan = self._run.plan
        samples = asyncio.create_task(self._sampler.run(), name="sampler")
        end = self._events.now + plan.minutes * 60
        faults = asyncio.create_task(self._idle(end) if plan.control else self._disturb(end), name="faults")
        try:
            self._clients.start(SATURATION if plan.control else FAULTS)
            try:
                await self._until_done(faults, samples)
            finally:
                self._run.load_ended = self._events.now
            self._say("the clients end what they have asked")
            self._run.ending.late = await self._clients.stop(QUIET_LIMIT)
            self._run.ending.quiet = await self._quiet()
            self._run.ending.restarts = (await self._target.status())["engine"]["restarts"]
        finally:
            for task in (faults, samples):
                task.cancel()
            await asyncio.gather(faults, samples, return_exceptions=True)

    async def _idle(self, end: float) -> None:
        while not await self._time_passes(min(end, self._events.now + 60.0)) and self._events.now < end:
            self._say(f"{(end - self._events.now) / 60:.0f} minutes to go")

    async def _time_passes(self, until: float) -> bool:
        """Wait until then; True when the run is to end before."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), max(0.0, until - self._events.now))
        return self._stop.is_set()

    async def _disturb(self, end: float) -> None:
        """One fault after the other; none begins after `end`, and one that has begun is seen through."""
        run, seed = self._run, self._run.plan.seed
        faults = Faults(self._target, self._clients, self._sampler, self._platform, self._events, seed)
        last = well = self._events.now
        for fault in planned(seed):
            due = max(last + fault.gap, well + SETTLE)
            if await self._time_passes(min(due, end)) or due > end:
                return
            last = self._events.now
            self._say(f"{fault.kind}")
            happened = await faults.inject(fault.kind)
            well = happened.ended
            run.faults.append(happened)
            self._say(f"  all well after {happened.ended - happened.at:.1f} s; {happened.problem or happened.note}")

    async def _until_done(self, faults: asyncio.Task[None], samples: asyncio.Task[None]) -> None:
        """Let the time pass. Raises RuntimeError when the service, or a part of the soak, has ended meanwhile."""
        while not faults.done():
            await asyncio.wait({faults, samples}, timeout=1.0)
            if not self._target.running:
                raise RuntimeError(f"the service has ended\n{self._target.log()[-3000:]}")
            if (error := self._clients.failure()) or (samples.done() and (error := samples.exception())):
                raise RuntimeError(f"a part of the soak has failed: {error!r}") from error
        faults.result()

    async def _quiet(self) -> Gauges | None:
        """The gauges once all are 0, or as they are after 15 s: what clients have left takes a moment."""
        gauges = None
        for _ in range(30):
            gauges = await self._sampler.gauges_now()
            if gauges is not None and not gauges.engine and not any(gauges.ours.values()):
                break
            await asyncio.sleep(0.5)
        return gauges

    async def _farewell(self) -> None:
        """SIGTERM while streams and a table are open, all of which have to be answered whole."""
        author, target, ending = Author(f"{self._run.plan.seed} farewell"), self._target, self._run.ending
        streams = [author.chat((100, 200), stream=True) for _ in range(FAREWELL)]
        requests: list[Request] = [*streams, author.table(24)]
        asked = [asyncio.create_task(self._clients.ask("farewell", request)) for request in requests]
        await asyncio.sleep(2.0)
        target.processes()  # so that those are known which write their titles over their environment
        target.signal(signal.SIGTERM)
        sent = self._events.now
        ending.exit_code = await target.exit_code(EXIT_LIMIT)
        ending.exit_seconds = self._events.now - sent
        await asyncio.wait(asked, timeout=5.0)
        await asyncio.sleep(1.0)
        ending.left = [f"{role} ({pid})" for pid, role in target.processes().items()]
        ending.folders = target.runtime_folders()
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
