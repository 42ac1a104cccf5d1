"""The gateway's worker processes: started on the inherited public socket, and started again when they die."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator, Mapping

from vllm_dropin.errors import EngineError
from vllm_dropin.gateway.state import SharedState
from vllm_dropin.logging import get
from vllm_dropin.supervisor.runtime import RuntimeFolder

log = get("workers")

RESTART_AFTER = 0.2
"""Seconds between a worker's death and its replacement: within a second in all, and no busy loop."""
HOPELESS_AFTER = 5
"""Deaths within a second of their start, in a row, after which the worker can't be made to run."""


class GatewayWorkers:
    """`count` processes that serve the public socket. `run` returns only by an error or by cancellation."""

    def __init__(
        self, public: socket.socket, runtime: RuntimeFolder, state: SharedState, environ: Mapping[str, str]
    ) -> None:
        self._public = public
        self._runtime = runtime
        self._state = state
        self._environ = dict(environ)
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._stopping = False

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self._processes.values())

    async def _start(self, slot: int) -> asyncio.subprocess.Process:
        descriptor = self._public.fileno()
        with without(signal.SIGHUP):  # it would end a worker that has no handler yet; the worker takes it up later
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "vllm_dropin.gateway.worker",
                str(self._runtime.gateway_config),
                str(self._runtime.state),
                str(slot),
                str(descriptor),
                stdin=asyncio.subprocess.DEVNULL,
                env=self._environ,
                pass_fds=(descriptor,),
                start_new_session=True,  # a Ctrl-C in the terminal is the supervisor's to handle
            )
        self._processes[slot] = process
        if self._stopping:  # it began while `stop` had already looked at who is there
            process.kill()
        return process

    async def start(self) -> None:
        """Start every worker once; `run` then keeps them."""
        for slot in range(len(self._state.slots)):
            await self._start(slot)

    async def run(self) -> None:
        """Keep each started worker running. Raises EngineError when one dies at every start."""
        await asyncio.gather(*(self._keep(slot) for slot in range(len(self._state.slots))))

    async def _keep(self, slot: int) -> None:
        clock = asyncio.get_running_loop().time
        process, born, failures = self._processes[slot], clock(), 0
        while True:
            code = await process.wait()
            if self._stopping:
                return
            self._state.slots[slot].zero_gauges()
            failures = failures + 1 if clock() - born < 1.0 else 0
            if failures >= HOPELESS_AFTER:
                raise EngineError(
                    f"gateway worker {slot} ends at every start (exit code {code})",
                    "Its log lines above say why; this is a fault of the installation.",
                )
            log.error("gateway worker %d ended (exit code %s); starting it again", slot, code)
            await asyncio.sleep(RESTART_AFTER)
            if self._stopping:
                return
            process, born = await self._start(slot), clock()

    def renew(self) -> None:
        """Have each worker take keys and certificate from its configuration again."""
        self._signal(signal.SIGHUP)

    async def stop(self, grace: float = 3.0) -> None:
        """Close the public socket, whose last clients the workers serve: SIGTERM, then SIGKILL after `grace` seconds.

        Closed by us first, so that nobody can connect to it when the workers no longer look.
        """
        self._stopping = True
        self._public.close()
        waits = [asyncio.create_task(process.wait()) for process in self._processes.values()]
        if not waits:
            return
        self._signal(signal.SIGTERM)
        _, late = await asyncio.wait(waits, timeout=grace)
        if late:
            log.warning("%d gateway worker(s) did not stop within %.0f s; killing", len(late), grace)
            self._signal(signal.SIGKILL)
            await asyncio.wait(late)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


@contextlib.contextmanager
def without(*numbers: signal.Signals) -> Iterator[None]:
    """Block signals in this thread, and in the processes that it starts, for which they then wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
