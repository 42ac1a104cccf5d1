"""HTTP to the engine: the one module that knows aiohttp.

It is imported after the socket answers, because importing aiohttp takes as long as starting the rest of a worker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from types import SimpleNamespace
from typing import Any

import aiohttp
from yarl import URL

from vllm_dropin.gateway.errors import EngineUnavailable, Header
from vllm_dropin.gateway.limits import Body
from vllm_dropin.gateway.state import Slot

# vLLM closes an idle connection after 5 s unless told otherwise; leaving first means meeting no reset.
KEEP_ALIVE = 4.0
CONNECT_TIMEOUT = 5.0
# A pooled connection that the engine had closed fails at once; anything later is a death, never sent again.
STALE_WITHIN = 1.0


class StaleConnection(Exception):
    """The pooled connection was closed before the engine could see the request."""


class Response:
    """An answer whose headers have come. `chunks` counts in the slot what waits, and what came of the engine's work.

    Errors, lists and metrics are no work: vLLM's front end answers them while its engine hangs.
    """

    def __init__(self, inner: aiohttp.ClientResponse, slot: Slot) -> None:
        self._inner = inner
        self._slot = slot
        self._is_work = inner.method == "POST" and inner.status < 300
        self.status = inner.status
        self.content_type = inner.content_type
        self.content_length = inner.content_length
        self.headers: list[Header] = [(name.lower(), value) for name, value in inner.raw_headers]

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes, undecoded. Raises EngineUnavailable when it breaks off."""
        slot, content = self._slot, self._inner.content
        while True:
            ticket = slot.begin_wait()
            try:
                chunk = await content.readany()
            except (aiohttp.ClientError, OSError) as error:
                raise _broken() from error
            finally:
                slot.end_wait(ticket)
            if not chunk:
                return
            if self._is_work:
                slot.add("chunks")
            yield chunk

    async def read(self, limit: int | None = None) -> bytes:
        """The rest of the body, or its first `limit` bytes. Raises EngineUnavailable when it breaks off."""
        parts: list[bytes] = []
        size = 0
        async for chunk in self.chunks():
            parts.append(chunk)
            size += len(chunk)
            if limit is not None and size >= limit:
                break
        whole = b"".join(parts)
        return whole if limit is None else whole[:limit]

    def close(self) -> None:
        """Give the connection back, or cut it when the body was not read to its end: that makes the engine abort."""
        if self._inner.content.at_eof():
            self._inner.release()
        else:
            self._inner.close()


class Pool:
    """The connections to one engine. Closed when it has been retired and its last request has ended."""

    def __init__(self, uds: str | None, generation: int, slot: Slot) -> None:
        self.generation = generation
        self._slot = slot
        self._users = 0
        self._retired = False
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        connector: aiohttp.BaseConnector
        if uds is not None:
            connector = aiohttp.UnixConnector(path=uds, limit=0, keepalive_timeout=KEEP_ALIVE)
        else:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE, ttl_dns_cache=30)
        self._session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            trace_configs=[trace],
        )

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | Body | None, timeout: float
    ) -> Response:
        """Send one request and wait for the headers of its answer; `leave` after its body has been read.

        Raises TimeoutError after `timeout` seconds, StaleConnection, EngineUnavailable.
        """
        note = SimpleNamespace(reused=False)
        data = body.stream() if isinstance(body, Body) else body
        target = URL(url, encoded=True)
        started = time.monotonic()
        ticket = self._slot.begin_wait()
        try:
            async with asyncio.timeout(timeout):
                inner = await self._session.request(
                    method, target, headers=headers, data=data, allow_redirects=False, trace_request_ctx=note
                )
        except aiohttp.ClientConnectorError as error:
            raise EngineUnavailable("the engine is not reachable", sent=False) from error
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if note.reused and time.monotonic() - started < STALE_WITHIN:
                raise StaleConnection from error
            raise _broken() from error
        except aiohttp.ClientError as error:
            raise _broken() from error
        finally:
            self._slot.end_wait(ticket)
        return Response(inner, self._slot)

    def enter(self) -> None:
        """Count a user: a retired pool lives as long as it has one."""
        self._users += 1

    async def leave(self) -> None:
        self._users -= 1
        await self._close_if_idle()

    async def retire(self) -> None:
        """No new request comes."""
        self._retired = True
        await self._close_if_idle()

    async def _close_if_idle(self) -> None:
        if self._retired and self._users == 0:
            await self._session.close()


async def _note_reuse(_: Any, context: SimpleNamespace, __: Any) -> None:
    context.trace_request_ctx.reused = True


def _broken() -> EngineUnavailable:
    return EngineUnavailable("the connection to the engine broke off")
