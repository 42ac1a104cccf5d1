"""Pooled connections that go stale, engines that come and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from vllm_dropin.gateway.config import GatewayConfig
from vllm_dropin.gateway.engine_client import EngineClient, EngineUnavailable
from vllm_dropin.gateway.state import Phase, SharedState

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture
def state(tmp_path: Path) -> SharedState:
    state = SharedState.create(tmp_path / "state", 1)
    state.generation = 1
    return state


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
    return head + await reader.readexactly(length)


def scenario(
    tmp_path: Path, state: SharedState, handler: Handler, asks: Callable[[EngineClient], Awaitable[None]]
) -> None:
    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except asyncio.IncompleteReadError:
            pass  # the client has closed its connection
        finally:
            writer.close()

    async def run() -> None:
        path = str(tmp_path / "e.sock")
        server = await asyncio.start_unix_server(closing, path)
        client = EngineClient(GatewayConfig(code_dir="/m", engine_uds=path), state, state.slots[0])
        try:
            await asyncio.wait_for(asks(client), 10)
        finally:
            await client.close()
            server.close()

    asyncio.run(run())
    assert state.total("waiting") == 0


def test_a_stale_connection_is_replaced_once(tmp_path: Path, state: SharedState) -> None:
    connections = 0

    async def closes_after_the_first_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await read_request(reader)
        writer.write(OK)
        await read_request(reader)  # the second request on this connection is read and never answered

    async def asks(client: EngineClient) -> None:
        for _ in range(3):
            answer = await client.chat(b"{}")
            assert (answer.status, answer.body) == (200, b"ok")

    scenario(tmp_path, state, closes_after_the_first_answer, asks)
    assert connections == 3
    assert state.total("engine_retries") == 2


def test_a_death_on_a_new_connection_is_not_asked_again(tmp_path: Path, state: SharedState) -> None:
    requests = 0

    async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        await read_request(reader)
        requests += 1

    async def asks(client: EngineClient) -> None:
        with pytest.raises(EngineUnavailable) as caught:
            await client.chat(b"{}")
        assert caught.value.sent

    scenario(tmp_path, state, dies, asks)
    assert requests == 1


def test_half_an_answer_is_a_death(tmp_path: Path, state: SharedState) -> None:
    async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK[:-1])
        await writer.drain()

    async def asks(client: EngineClient) -> None:
        with pytest.raises(EngineUnavailable):
            await client.chat(b"{}")

    scenario(tmp_path, state, dies, asks)


def test_a_dead_core_is_a_death(tmp_path: Path, state: SharedState) -> None:
    text = b'{"error":{"message":"EngineCore encountered an issue. See stack trace"}}'

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(f"HTTP/1.1 500 X\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)

    async def asks(client: EngineClient) -> None:
        with pytest.raises(EngineUnavailable):
            await client.chat(b"{}")

    scenario(tmp_path, state, answers, asks)


def test_no_engine(tmp_path: Path, state: SharedState) -> None:
    async def run() -> None:
        client = EngineClient(GatewayConfig(code_dir="/m", engine_uds=str(tmp_path / "no")), state, state.slots[0])
        with pytest.raises(EngineUnavailable) as caught:
            await client.chat(b"{}")
        assert not caught.value.sent
        assert str(tmp_path) not in str(caught.value)
        await client.close()

    asyncio.run(run())


def test_a_new_generation_gets_new_connections(tmp_path: Path, state: SharedState) -> None:
    connections = 0

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            await read_request(reader)
            writer.write(OK)

    async def asks(client: EngineClient) -> None:
        for generation in (1, 1, 2, 2):
            state.generation = generation
            assert client.generation == generation
            await client.chat(b"{}")

    scenario(tmp_path, state, answers, asks)
    assert connections == 2


def test_wait_ready(tmp_path: Path, state: SharedState) -> None:
    client = EngineClient(GatewayConfig(code_dir="/m", engine_uds="x"), state, state.slots[0])

    async def run() -> None:
        state.phase = Phase.RESTARTING
        assert not await client.wait_ready(time.monotonic() + 0.1)
        asyncio.get_running_loop().call_later(0.1, setattr, state, "phase", Phase.READY)
        assert await client.wait_ready(time.monotonic() + 5)
        state.phase = Phase.FAILED
        assert not await client.wait_ready(time.monotonic() + 5)

    asyncio.run(run())
