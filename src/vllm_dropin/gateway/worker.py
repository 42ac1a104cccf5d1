"""One gateway worker: `python -m vllm_dropin.gateway.worker CONFIG_JSON STATE_FILE SLOT FD`.

Serves the listening socket that it inherits as descriptor FD, and ends with its parent, the supervisor. Stop it with
SIGTERM: it takes no new connection and ends when what runs has ended, after 3 s at the latest. The supervisor drains
first (decision 1). SIGINT is left to the supervisor, because a terminal sends it to the whole group.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import uvloop
from granian._granian import SocketHolder
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server

from vllm_dropin import logging
from vllm_dropin.gateway.app import create_app
from vllm_dropin.gateway.config import GatewayConfig
from vllm_dropin.gateway.request import HEADER_BYTES
from vllm_dropin.gateway.state import SharedState

STOP_GRACE = 3.0
CONNECTIONS = 1 << 16  # granian's own bound on open connections; ours are those of limits.py
_PR_SET_PDEATHSIG = 1

_log = logging.get("gateway")


class InheritedServer(Server):
    """Granian on a socket that the supervisor has bound: its own binding would take SO_REUSEPORT (decision 1)."""

    def __init__(self, app: Any, descriptor: int, header_timeout: float) -> None:
        super().__init__(
            app,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            websockets=False,
            log_enabled=False,
            backlog=CONNECTIONS,
            backpressure=CONNECTIONS,
            http1_settings=HTTP1Settings(header_read_timeout=int(header_timeout * 1000), max_buffer_size=HEADER_BYTES),
        )
        self._descriptor = descriptor

    def _init_shared_socket(self) -> None:
        with socket.socket(fileno=os.dup(self._descriptor)) as twin:
            is_unix = twin.family == socket.AF_UNIX
        # Private to granian and untyped there: pinned in pyproject.toml, tried by tests/gateway/test_worker.py.
        holder: Any = SocketHolder
        self._shd: Any = holder(self._descriptor, is_unix, CONNECTIONS)


def end_with_parent(parent: int) -> None:
    """Be killed when `parent` dies. Exits at once when it is dead already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def _raise_descriptor_limit() -> None:
    """Each client takes up to two descriptors; the soft limit is often 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, CONNECTIONS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def serve(config: GatewayConfig, state: SharedState, slot: int, descriptor: int) -> None:
    """Serve until SIGTERM."""
    app = create_app(config, state, slot)
    server = InheritedServer(app, descriptor, config.limits.header_timeout)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    serving = asyncio.create_task(server.serve())
    # Half of the imports only matter once there is an engine: the socket answers before them.
    warming = asyncio.create_task(asyncio.to_thread(import_module, "vllm_dropin.gateway.transport"))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    await warming
    if serving.done():
        serving.result()
        raise RuntimeError("the server ended by itself")
    server.stop()  # type: ignore[no-untyped-call]
    try:
        await asyncio.wait_for(serving, STOP_GRACE)
    except TimeoutError:
        _log.warning("worker %d stops with requests open", slot)
        sys.stderr.flush()
        os._exit(0)  # what still runs belongs to clients that the drain deadline has cut off
    await app.close()


def main() -> int:
    config_path, state_path, slot, descriptor = sys.argv[1:5]
    config = GatewayConfig.load(Path(config_path))
    logging.setup(config.log_level)
    logging.REDACTOR.learn(key for key in (*config.api_keys, config.engine_key) if key)
    state = SharedState.attach(Path(state_path))
    end_with_parent(state.supervisor_pid)
    _raise_descriptor_limit()
    uvloop.run(serve(config, state, int(slot), int(descriptor)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
