"""One gateway worker: `python -m vllm_dropin.gateway.worker CONFIG_JSON STATE_FILE SLOT FD`.

Serves the listening socket that it inherits as descriptor FD, and ends with its parent, the supervisor. Stop it with
SIGTERM: it takes no new connection and ends when what runs has ended, after 3 s at the latest. The supervisor drains
first (decision 1). SIGINT is left to the supervisor, because a terminal sends it to the whole group. At SIGHUP it reads
CONFIG_JSON again, and takes the keys and the certificate from it.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import signal
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import uvloop

from vllm_dropin import logging
from vllm_dropin.gateway.app import Gateway, create_app
from vllm_dropin.gateway.config import GatewayConfig
from vllm_dropin.gateway.server import InheritedServer
from vllm_dropin.gateway.state import SharedState

STOP_GRACE = 3.0
CONNECTIONS = 1 << 16  # of a worker, where its limit of descriptors allows so many; further bounds are in limits.py
SPARE_DESCRIPTORS = 64  # for what belongs to no client
FEW_CONNECTIONS = 1024  # fewer are worth a warning
_PR_SET_PDEATHSIG = 1
_M_MMAP_THRESHOLD = -3
_LARGE_PIECE = 128 << 10  # bytes; what glibc begins with

_log = logging.get("gateway")


def end_with_parent(parent: int) -> None:
    """Be killed when `parent` dies. Exits at once when it is dead already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def give_memory_back() -> None:
    """Have glibc return each large piece of memory to the system as soon as it is free.

    It would raise its own threshold to the size of the largest piece so far: a worker that had read a CSV cell of 26 MB
    kept twice that.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none, and does so anyway
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_PIECE)


def find_connection_limit() -> int:
    """How many clients may be connected at once: each takes up to two descriptors, its own and one for the engine.

    Raises the soft limit, which is often 1,024, as far as it can. A server that accepts clients until no descriptor is
    left asks the kernel for one more without a pause, which takes a whole core until somebody leaves.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTIONS + SPARE_DESCRIPTORS
    wanted = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    connections = max(1, (wanted - SPARE_DESCRIPTORS) // 2)
    if connections < FEW_CONNECTIONS:
        _log.warning(
            "no more than %d clients can be connected at once: this process may open %d files (ulimit -n)",
            connections,
            wanted,
        )
    return connections


def find_temporary_folder(runtime: Path) -> None:
    """Where large bodies wait: TMPDIR or another usual place; where none of them can be written, the runtime folder."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = str(runtime)


async def serve(config_path: Path, config: GatewayConfig, state: SharedState, slot: int, descriptor: int) -> None:
    """Serve until SIGTERM."""
    app = create_app(config, state, slot)
    server = InheritedServer(app, descriptor, config.limits.idle_timeout, find_connection_limit(), config.tls)
    stop, hangup = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # blocked by the supervisor until there is a handler
    serving = asyncio.create_task(server.serve())
    renewing = asyncio.create_task(_renew(config_path, app, server, hangup))
    # Half of the imports only matter once there is an engine: the socket answers before them.
    warming = asyncio.create_task(asyncio.to_thread(import_module, "vllm_dropin.gateway.transport"))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    await warming
    if serving.done():
        serving.result()
        raise RuntimeError("the server ended by itself")
    renewing.cancel()
    server.stop()  # type: ignore[no-untyped-call]
    try:
        await asyncio.wait_for(serving, STOP_GRACE)
    except TimeoutError:
        _log.warning("worker %d stops with requests open", slot)
        sys.stderr.flush()
        os._exit(0)  # what still runs belongs to clients that the drain deadline has cut off
    await app.close()


async def _renew(config_path: Path, app: Gateway, server: InheritedServer, hangup: asyncio.Event) -> None:
    """At each SIGHUP, take keys and certificate from the file, which the supervisor has checked and replaced."""
    while True:
        await hangup.wait()
        hangup.clear()
        try:
            config = GatewayConfig.load(config_path)
            logging.REDACTOR.learn(key for key in (*config.api_keys, config.engine_key) if key)
            app.renew_keys(config.api_keys, config.engine_key)
            if config.tls is not None and config.tls != server.pem:
                await server.renew_certificate(config.tls)
        except (OSError, ValueError):
            _log.exception("keys and certificate stay as they were")


def main() -> int:
    config_path, state_path = (Path(text) for text in sys.argv[1:3])
    slot, descriptor = (int(text) for text in sys.argv[3:5])
    config = GatewayConfig.load(config_path)
    logging.setup(config.log_level)
    logging.REDACTOR.learn(key for key in (*config.api_keys, config.engine_key) if key)
    state = SharedState.attach(state_path)
    find_temporary_folder(config_path.parent)
    give_memory_back()
    end_with_parent(state.supervisor_pid)
    uvloop.run(serve(config_path, config, state, slot, descriptor))
    return 0


if __name__ == "__main__":
    sys.exit(main())
