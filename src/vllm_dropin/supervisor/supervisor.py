"""The parent of everything: brings one service up in order, keeps it up, and takes it down in order."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_dropin.engine.quirks import MAX_N_VARIABLE
from vllm_dropin.errors import ConfigurationError, DrainOverrunError, DropinError
from vllm_dropin.gateway.state import Phase, SharedState
from vllm_dropin.logging import REDACTOR, get
from vllm_dropin.platforms.events import StatusReporter
from vllm_dropin.settings.access import reread
from vllm_dropin.settings.settings import Settings
from vllm_dropin.supervisor.briefing import brief
from vllm_dropin.supervisor.engine import EngineKeeper
from vllm_dropin.supervisor.launch import Launch, engine_keeper
from vllm_dropin.supervisor.orphans import Orphans
from vllm_dropin.supervisor.phases import PhaseBoard
from vllm_dropin.supervisor.probe import Probe
from vllm_dropin.supervisor.process import GuardedProcess
from vllm_dropin.supervisor.runtime import RuntimeFolder, listen
from vllm_dropin.supervisor.workers import GatewayWorkers, without

log = get("supervisor")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)
TICK = 0.05
"""Seconds between looks at the in-flight counters while draining."""


class Supervisor:
    """One service, from its socket to its last process. `run` once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stop = asyncio.Event()
        self._hangup = asyncio.Event()
        self._keeper: EngineKeeper | None = None

    async def run(self) -> int:
        """Serve until told to stop. Returns the exit code; raises DropinError for a failure that ends the process."""
        settings = self._settings
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._stop.set)
        terminal = has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # nohup's way to stay
        loop.add_signal_handler(signal.SIGHUP, self._hang_up, terminal)
        public = listen(settings.listen.host, settings.listen.port)
        runtime = RuntimeFolder.create(settings.paths.runtime_dir)
        try:
            return await self._run(public, runtime)
        finally:
            public.close()
            runtime.remove()
            # The loop takes its handlers with it: one more SIGTERM would then change our exit code.
            with without(*SIGNALS):
                for number in SIGNALS:
                    loop.remove_signal_handler(number)
                    signal.signal(number, signal.SIG_IGN)

    async def _run(self, public: socket.socket, runtime: RuntimeFolder) -> int:
        settings = self._settings
        state = SharedState.create(runtime.state, settings.listen.workers)
        board = PhaseBoard(state, settings.engine.python.version if settings.engine else None)
        await asyncio.to_thread(brief, settings, runtime)
        workers = GatewayWorkers(public, runtime, state, settings.environments.gateway)
        await workers.start()
        log.info("listening on %s://%s:%d", "https" if settings.listen.tls else "http", *public.getsockname()[:2])
        reporter = StatusReporter.of(settings.platform)
        service = asyncio.create_task(self._serve(runtime, state, board, reporter), name="service")
        tasks = {
            asyncio.create_task(self._stop.wait(), name="stop"),
            asyncio.create_task(workers.run(), name="workers"),
            asyncio.create_task(self._reap(workers), name="orphans"),
            asyncio.create_task(self._renew(workers, runtime), name="renewal"),
            service,
        }
        failure: DropinError | None = None
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            failure = await self._failure(done)
            if failure is not None:
                log.error("%s", REDACTOR.hide(str(failure)))
                board.fail(failure)
                reporter.send("Deployment failed", REDACTOR.hide(str(failure)))
                if settings.supervision.error_server:
                    log.info("the error server answers until SIGTERM")
                    await self._stop.wait()
            elif not await self._drain(state, board):
                failure = DrainOverrunError(
                    f"requests were still running {settings.supervision.drain_timeout:.0f} s after the stop signal; "
                    "they were cut off",
                    "Raise --drain-timeout, together with the platform's grace period.",
                )
        finally:
            await self._take_down(service, tasks, workers, state)
            if failure is None:
                board.enter(Phase.STOPPED)
            await asyncio.to_thread(reporter.close)
        if failure is not None:
            raise failure
        return 0

    async def _failure(self, done: set[asyncio.Task[Any]]) -> DropinError | None:
        """What ended the service, unless it was a signal."""
        for task in done:
            error = task.exception()
            if isinstance(error, DropinError):
                return error
            if error is not None:
                raise error  # a fault of ours: the traceback is the best report
        return None

    async def _serve(
        self, runtime: RuntimeFolder, state: SharedState, board: PhaseBoard, reporter: StatusReporter
    ) -> None:
        """Prepare and keep the engine, or watch the upstream. Ends only by an error or by cancellation."""
        settings = for_clients(self._settings)
        if settings.upstream is not None:
            await watch_upstream(lambda: self._settings, state, board)
            return
        prepare_state_dir(settings.paths.state_dir)
        site = await Launch(settings, runtime, board, reporter).prepare()
        self._keeper = engine_keeper(settings, site, state, board, reporter)
        await self._keeper.run()

    async def _reap(self, workers: GatewayWorkers) -> None:
        orphans = Orphans()
        while True:
            await asyncio.sleep(1.0)
            orphans.reap(GuardedProcess.guardians | set(workers.pids))

    def _hang_up(self, terminal: bool) -> None:
        """SIGHUP: the files have changed; or the terminal that we were started from is gone, and its user with it."""
        if terminal and not has_terminal():
            self._stop.set()
        else:
            self._hangup.set()

    async def _renew(self, workers: GatewayWorkers, runtime: RuntimeFolder) -> None:
        """At each SIGHUP, read the keys and the certificate again. What can't be used changes nothing."""
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            warnings: list[str] = []
            try:
                settings = await asyncio.to_thread(reread, self._settings, warnings)
                REDACTOR.learn(settings.secrets())
                await asyncio.to_thread(brief, settings, runtime)
            except (ConfigurationError, OSError) as error:
                log.error("SIGHUP: keys and certificate stay as they were: %s", error)
                continue
            self._settings = settings
            workers.renew()
            for warning in warnings:
                log.warning("%s", warning)
            log.info("SIGHUP: %s read again", " and ".join(_renewable(settings)))

    async def _drain(self, state: SharedState, board: PhaseBoard) -> bool:
        """Refuse new work and wait for what runs. False when the deadline passed first."""
        state.draining = True
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._settings.supervision.drain_timeout
        board.enter(Phase.DRAINING, f"{_running(state)} request(s) and rows in flight")
        await asyncio.sleep(TICK)  # a request may have passed the check a moment before the flag was set
        while _running(state) > 0:
            if clock() >= deadline:
                return False
            await asyncio.sleep(TICK)
        return True

    async def _take_down(
        self, service: asyncio.Task[None], tasks: set[asyncio.Task[Any]], workers: GatewayWorkers, state: SharedState
    ) -> None:
        """Stop the whole tree: the engine, the workers, then our own tasks.

        The workers last: who comes while the engine stops, which takes seconds, is told so. On a socket that nobody
        serves he would wait until we end, and then be reset.
        """
        service.cancel()
        await asyncio.wait({service})  # not its outcome: a fault of ours must not keep us from ending the rest
        engine = asyncio.create_task(self._keeper.stop() if self._keeper is not None else asyncio.sleep(0))
        if _running(state) == 0:  # otherwise it is to be cut off, and no later than it must
            await asyncio.wait({engine})
        await workers.stop()
        await engine
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def for_clients(settings: Settings) -> Settings:
    """The same service, whose engine has the gateway's bound on `n` too, unless the environment names another.

    It also holds where the gateway does not look: in the forms of audio requests.
    """
    if settings.engine is None:
        return settings
    environ = {MAX_N_VARIABLE: str(settings.limits.max_n), **settings.engine.environ}
    return replace(settings, engine=replace(settings.engine, environ=environ))


def has_terminal() -> bool:
    """Whether this process has a terminal that is still there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _renewable(settings: Settings) -> list[str]:
    """What SIGHUP reads again, in words."""
    words = [f"{len(settings.listen.api_keys)} key(s)"]
    words += ["the certificate"] * bool(settings.listen.tls)
    return words + ["the key of the upstream"] * bool(settings.upstream_key_file)


def _running(state: SharedState) -> int:
    return state.total("in_flight") + state.total("queued") + state.total("rows_in_flight")


async def watch_upstream(current: Callable[[], Settings], state: SharedState, board: PhaseBoard) -> None:
    """Follow the health of a server that somebody else runs: ready while it answers, loading while it does not.

    `current` are the settings of the moment: SIGHUP renews the key.
    """
    state.generation += 1
    board.enter(Phase.LOADING, "waiting for the upstream")
    while True:
        settings = current()
        assert settings.upstream is not None
        probe = Probe(settings.upstream, key=settings.upstream_key.reveal() if settings.upstream_key else None)
        if (models := await probe.models()) is not None:
            state.max_model_len = models.max_model_len
            board.enter(Phase.READY)
        elif board.phase is Phase.READY:
            state.generation += 1
            board.enter(Phase.RESTARTING, "the upstream does not answer")
        await asyncio.sleep(1.0)


def prepare_state_dir(folder: Path) -> None:
    """Make the state folder, private. Raises ConfigurationError when it can't be written."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"the state folder {folder} can't be written: {error.strerror}", "Give a writable one with --state-dir."
        ) from error
