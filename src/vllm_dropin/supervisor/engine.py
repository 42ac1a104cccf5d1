"""Keeps one engine running: start, readiness, watch, restart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vllm_dropin.engine.command import EngineCommand
from vllm_dropin.errors import EngineError
from vllm_dropin.gateway.state import Phase, SharedState
from vllm_dropin.logging import REDACTOR, get
from vllm_dropin.supervisor.hang import HangWatch
from vllm_dropin.supervisor.phases import PhaseBoard
from vllm_dropin.supervisor.probe import Probe
from vllm_dropin.supervisor.process import GuardedProcess
from vllm_dropin.supervisor.progress import Cause, read_progress
from vllm_dropin.supervisor.restarts import RestartBudget
from vllm_dropin.supervisor.stacks import write_stacks

log = get("engine")
engine_log = get("vllm")

START_ATTEMPTS = 2
"""Starts that may fail before the engine was ever ready. The second is for what passes (GPU memory that a dying
process still holds); a third would only hide a wrong configuration."""
DEAD = "it reports itself dead"
START_POLL, WATCH_POLL = 0.2, 0.25
"""Seconds between health checks: readiness is seen, and unreadiness shown, within a second."""
LAST_WORDS = 30.0
"""Seconds before its death in which an engine that was ready may have said why."""


@dataclass(frozen=True)
class EngineSite:
    """Where one engine lives: its command, the folder that it runs in and where it answers."""

    command: EngineCommand
    cwd: Path
    probe: Probe
    socket: Path | None


class EngineKeeper:
    """Runs the engine of one service until it is cancelled or has failed for good."""

    def __init__(
        self,
        site: EngineSite,
        budget: RestartBudget,
        state: SharedState,
        board: PhaseBoard,
        on_restart: Callable[[str], None],
        start_timeout: float | None,
        hang_timeout: float | None,
    ) -> None:
        self._site = site
        self._budget = budget
        self._state = state
        self._board = board
        self._on_restart = on_restart
        self._start_timeout = start_timeout
        self._hang_timeout = hang_timeout
        self._process: GuardedProcess | None = None
        self._cause = Cause()
        self._restarts = 0
        self._ever_ready = False

    async def run(self) -> None:
        """Keep the engine up. Raises EngineError when it can't start or its restart budget is spent."""
        failed_starts = 0
        while True:
            reason, ready_for = await self._live_once()
            if not self._ever_ready:
                failed_starts += 1
                if failed_starts >= START_ATTEMPTS:
                    raise EngineError(
                        f"the engine can't start: {reason}",
                        "Its log lines above tell more. Correct the model or the engine flags, then start again.",
                    )
            delay = self._budget.next_delay(asyncio.get_running_loop().time(), ready_for)
            if delay is None:
                raise EngineError(
                    f"the engine crashed and its budget of {self._budget.limit} restarts in "
                    f"{self._budget.window / 60:.0f} minutes is spent: {reason}",
                    "Its log lines above tell more. The parameter max_watchdog_restarts raises the budget.",
                )
            self._restarts += 1
            stage = f"restart {self._restarts} in {delay:.1f} s: {reason}"
            self._board.engine(None, self._restarts)
            self._board.enter(Phase.RESTARTING, REDACTOR.hide(stage))
            self._on_restart(reason)
            await asyncio.sleep(delay)

    async def _live_once(self) -> tuple[str, float]:
        """One life of an engine: why it ended, and for how many seconds it had been ready."""
        clock = asyncio.get_running_loop().time
        self._cause = Cause()
        if self._site.socket is not None:
            self._site.socket.unlink(missing_ok=True)  # vLLM does not: EADDRINUSE
        if not self._ever_ready:
            self._board.enter(Phase.LOADING, "engine starting")
        process = await GuardedProcess.start(
            self._site.command.argv, self._site.command.env, self._site.cwd, self._on_line
        )
        self._process = process
        self._state.generation += 1
        self._board.engine(process.pid, self._restarts)
        log.info("engine started, process %d", process.pid)
        end = asyncio.create_task(process.fell.wait())
        ready_at: float | None = None
        sickness = ""
        try:
            if await self._until_ready(end):
                ready_at = clock()
                self._ever_ready = True
                models = await self._site.probe.models()
                self._state.max_model_len = models.max_model_len if models else None
                self._cause = Cause(recent=LAST_WORDS)
                self._board.enter(Phase.READY)
                sickness = await self._until_sick(end)
            ready_for = 0.0 if ready_at is None else clock() - ready_at
            if not end.done():
                reason = sickness or "it was not ready in time"
                log.error("the engine is killed: %s", reason)
                self._leave_ready(reason)
                if sickness != DEAD:
                    await write_stacks(process)
                await process.kill()
                return reason, ready_for
            self._leave_ready("it ended unasked")  # now: what it left behind may take seconds to die
            status = await process.wait()
            reason = f"{status}; {self._cause.line()}"
            log.error("the engine ended unasked (%s)", REDACTOR.hide(reason))
            return reason, ready_for
        finally:
            end.cancel()

    def _leave_ready(self, reason: str) -> None:
        if self._board.phase is Phase.READY:
            self._board.enter(Phase.RESTARTING, REDACTOR.hide(reason))

    async def _until_ready(self, end: asyncio.Task[object]) -> bool:
        clock = asyncio.get_running_loop().time
        deadline = None if self._start_timeout is None else clock() + self._start_timeout
        while not end.done():
            if await self._site.probe.health() == 200:
                return True
            if deadline is not None and clock() > deadline:
                log.error("the engine was not ready within %.0f s", self._start_timeout)
                return False
            await asyncio.wait({end}, timeout=START_POLL)
        return False

    async def _until_sick(self, end: asyncio.Task[object]) -> str:
        """Return when the process has ended, says by a 503 that its core is dead, or hangs; and why.

        A probe that gets no answer means nothing: a busy engine answers late, and restarts for that alone have cost
        others outages.
        """
        clock = asyncio.get_running_loop().time
        watch: HangWatch | None = None
        if self._hang_timeout:
            # A look that hangs itself must end well before the verdict is due.
            counters = partial(self._site.probe.counters, timeout=self._hang_timeout / 8)
            watch = HangWatch(self._hang_timeout, self._state, counters)
        while not end.done():
            if watch is not None and await watch.hangs(clock()):
                return f"nothing has moved in it for {self._hang_timeout:g} s while requests wait for it"
            if await self._site.probe.health() == 503:
                self._leave_ready(DEAD)
                await asyncio.wait({end}, timeout=0.5)  # its own exit tells more than our kill
                return DEAD
            await asyncio.wait({end}, timeout=WATCH_POLL)
        return ""

    def _on_line(self, line: str) -> None:
        text = REDACTOR.hide(line)
        engine_log.info("%s", text)
        self._cause.read(text)
        progress = read_progress(text)
        if progress is not None and self._board.phase in (Phase.LOADING, Phase.COMPILING):
            self._board.enter(progress.phase or self._board.phase, progress.stage, progress.fraction)

    async def stop(self) -> None:
        """End the engine in order; nothing of it is left when this returns."""
        if self._process is not None and not self._process.ended:
            with suppress(asyncio.CancelledError):
                await self._process.stop()
