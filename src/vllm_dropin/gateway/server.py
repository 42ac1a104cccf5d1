"""Granian on a socket that the supervisor has bound; its certificate can be changed while it serves.

`python -m vllm_dropin.gateway.server PEM` exits with 0 when granian can serve the certificate and key in that file.
Its TLS library takes fewer kinds of keys than OpenSSL, and granian's answer to another is to abort the process.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sys
from pathlib import Path
from typing import Any

from granian._granian import SocketHolder
from granian.constants import HTTPModes, Interfaces, SSLProtocols
from granian.http import HTTP1Settings
from granian.server.embed import Server

from vllm_dropin.gateway.errors import Message, Receive, Scope, Send
from vllm_dropin.gateway.request import HEADER_BYTES

BACKLOG = 1 << 16  # the kernel takes less when its own bound is lower
FAREWELL = 1.0  # seconds in which clients are asked to leave a listener before its idle connections are closed


class InheritedServer(Server):
    """Granian without a bind of its own, which would take SO_REUSEPORT (decision 1).

    What it overrides and calls is private to granian: pinned in pyproject.toml, tried by tests/gateway/test_worker.py
    and test_tls.py.
    """

    def __init__(
        self, app: Any, descriptor: int, idle_timeout: float, connections: int, pem: str | None = None
    ) -> None:
        """Serve at most `connections` clients at once; others wait in the socket's queue until one leaves."""
        self._app = app
        self._term = _Term(app)
        super().__init__(
            self._term,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            websockets=False,
            log_enabled=False,
            backlog=BACKLOG,
            backpressure=connections,
            # One clock for both: hyper starts it when it waits for a header, which is when a connection falls idle.
            http1_settings=HTTP1Settings(header_read_timeout=int(idle_timeout * 1000), max_buffer_size=HEADER_BYTES),
        )
        self._descriptor = descriptor
        self.pem = pem
        self._read_certificate()

    def _read_certificate(self) -> None:
        file = Path(self.pem) if self.pem else None
        # 1.3 alone, granian's default, would leave clients outside that have 1.2 only.
        self.build_ssl_context(file, file, None, SSLProtocols.tls12, None, [], False)

    def _init_shared_socket(self) -> None:
        with socket.socket(fileno=os.dup(self._descriptor)) as twin:
            is_unix = twin.family == socket.AF_UNIX
        # Each listener closes the descriptor that it was given.
        holder: Any = SocketHolder
        self._shd: Any = holder(os.dup(self._descriptor), is_unix, BACKLOG)

    async def renew_certificate(self, pem: str) -> None:
        """Serve new connections with the certificate and key in this file, which has been tried.

        Requests that run are answered on their connections. Other clients are asked to come back on a new one; those
        that have not asked anything within a second find their idle connection closed.
        """
        old, term = self.wrks[0], self._term
        self.pem, self._term = pem, _Term(self._app)
        self._read_certificate()
        self._init_shared_socket()
        listener = self._spawn_worker(0, self._spawn_asgi_worker, self._term)
        listener.start()  # type: ignore[no-untyped-call]
        self.wrks[:] = [listener]
        term.ends = True
        await asyncio.sleep(FAREWELL)
        old.terminate()  # type: ignore[no-untyped-call]


class _Term:
    """The application behind one listener. When its term ends, each answer closes its connection."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.ends = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive, send_last if self.ends else send)


async def _try(pem: str) -> None:
    """Serve with the file for a moment, on a socket that nobody knows."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # Linux chooses an abstract name
        listener.listen()
        server = InheritedServer(_Term(None), listener.fileno(), 1, 1, pem)
        serving = asyncio.create_task(server.serve())
        await asyncio.wait({serving}, timeout=0.05)
        server.stop()  # type: ignore[no-untyped-call]
        await serving


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core of an aborted process would have the key in it
    asyncio.run(_try(sys.argv[1]))
