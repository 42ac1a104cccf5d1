from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_dropin.gateway.config import Limits
from vllm_dropin.gateway.errors import ClientGone, HttpError
from vllm_dropin.gateway.limits import Admission, Body, Hold, read_body
from vllm_dropin.gateway.state import SharedState


@pytest.fixture
def state(tmp_path: Path) -> SharedState:
    return SharedState.create(tmp_path / "state", 2)


def receiver(*chunks: bytes, then: dict[str, Any] | None = None) -> Any:
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append(then or {"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    return receive


@pytest.mark.parametrize(("above", "spooled"), [(100, False), (5, True), (0, True)])
def test_body_reads_back(above: int, spooled: bool) -> None:
    async def scenario() -> None:
        with await read_body(receiver(b"abc", b"defg"), {}, 7, spool_above=above) as body:
            assert (body.size, body.spooled, body.read(), body.read()) == (7, spooled, b"abcdefg", b"abcdefg")
            assert body.open().read() == b"abcdefg"
            assert b"".join([piece async for piece in body.stream()]) == b"abcdefg"

    asyncio.run(scenario())


@pytest.mark.parametrize("headers", [{}, {b"content-length": b"8"}, {b"content-length": b"3"}])
def test_a_body_over_the_limit_is_413(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(HttpError) as caught:
        asyncio.run(read_body(receiver(b"abcd", b"efgh"), headers, 7))
    assert caught.value.status == 413


def test_an_announced_size_is_refused_before_reading() -> None:
    with pytest.raises(HttpError) as caught:
        asyncio.run(read_body(receiver(), {b"content-length": b"99999999999"}, 7))
    assert caught.value.status == 413


def test_a_client_that_leaves() -> None:
    with pytest.raises(ClientGone):
        asyncio.run(read_body(receiver(b"ab", then={"type": "http.disconnect"}), {}, 7))


def test_a_slow_body_is_408() -> None:

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.03)
        return {"type": "http.request", "body": b"x", "more_body": True}

    started = time.monotonic()
    with pytest.raises(HttpError) as caught:
        asyncio.run(read_body(receive, {}, 1000, grace=0.1))
    assert caught.value.status == 408
    assert time.monotonic() - started < 2


def test_held_bytes_are_counted_over_workers_and_given_back(state: SharedState) -> None:
    first, second = (Hold(state, slot, 10) for slot in state.slots)
    with Body(hold=first) as body:
        body.write(b"123456")
        assert state.total("held_bytes") == 6
        with pytest.raises(HttpError) as caught:
            asyncio.run(read_body(receiver(b"12", b"345"), {}, 100, hold=second))
        assert caught.value.status == 429
        assert state.total("held_bytes") == 6
    body.close()
    assert state.total("held_bytes") == 0


def test_admission_runs_queues_and_refuses(state: SharedState) -> None:
    admission = Admission(state, state.slots[0], Limits(max_in_flight=2, max_queue=2))
    order: list[int] = []

    async def request(number: int, leave: asyncio.Event) -> None:
        async with admission.admitted():
            order.append(number)
            await leave.wait()

    async def scenario() -> None:
        leave = [asyncio.Event() for _ in range(4)]
        tasks = [asyncio.create_task(request(number, leave[number])) for number in range(4)]
        await asyncio.sleep(0.01)
        assert (order, state.total("in_flight"), state.total("queued")) == ([0, 1], 2, 2)
        with pytest.raises(HttpError) as caught:
            admission.check()
        assert caught.value.status == 429
        assert (b"retry-after", b"1") in caught.value.headers
        with pytest.raises(HttpError):
            await request(9, asyncio.Event())
        leave[1].set()
        await asyncio.sleep(0.01)
        assert order == [0, 1, 2]
        for event in leave:
            event.set()
        await asyncio.gather(*tasks)
        assert (order, state.total("in_flight"), state.total("queued")) == ([0, 1, 2, 3], 0, 0)

    asyncio.run(scenario())
    assert state.slots[0].get("refused") == 2


def test_a_cancelled_waiter_leaves_no_trace(state: SharedState) -> None:
    admission = Admission(state, state.slots[0], Limits(max_in_flight=1, max_queue=5))

    async def request(seconds: float) -> None:
        async with admission.admitted():
            await asyncio.sleep(seconds)

    async def scenario() -> None:
        first = asyncio.create_task(request(0.05))
        waiters = [asyncio.create_task(request(0)) for _ in range(3)]
        await asyncio.sleep(0.01)
        waiters[0].cancel()
        first.cancel()  # its place goes to waiters[1], which is cancelled in the same turn
        waiters[1].cancel()
        await asyncio.wait_for(waiters[2], 2)
        await asyncio.gather(first, *waiters, return_exceptions=True)
        await request(0)

    asyncio.run(scenario())
    assert (state.total("in_flight"), state.total("queued")) == (0, 0)


def test_a_place_freed_by_another_worker_is_seen(state: SharedState) -> None:
    here, there = (Admission(state, slot, Limits(max_in_flight=1, max_queue=1)) for slot in state.slots)

    async def scenario() -> float:
        async with there.admitted():
            waiting = asyncio.create_task(self_admitted())
            await asyncio.sleep(0.03)
            assert not waiting.done()
        started = time.monotonic()
        await asyncio.wait_for(waiting, 2)
        return time.monotonic() - started

    async def self_admitted() -> None:
        async with here.admitted():
            pass

    assert asyncio.run(scenario()) < 0.5


def test_cancelled_at_the_moment_of_admission(state: SharedState) -> None:
    admission = Admission(state, state.slots[0], Limits(max_in_flight=1, max_queue=5))

    async def scenario() -> None:
        async def wait() -> None:
            async with admission.admitted():
                await asyncio.sleep(5)

        async with admission.admitted():
            waiter = asyncio.create_task(wait())
            await asyncio.sleep(0.01)
        # The place has been handed over, but the waiter has not run yet.
        assert state.total("in_flight") == 1
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)

    asyncio.run(scenario())
    assert (state.total("in_flight"), state.total("queued")) == (0, 0)
