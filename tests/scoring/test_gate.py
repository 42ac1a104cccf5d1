from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from vllm_dropin.scoring.gate import Gate


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await test()

    asyncio.run(bounded())


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_places_are_given_out_in_order_of_arrival() -> None:
    async def test() -> None:
        gate, order = Gate(2), []

        async def row(name: int) -> None:
            await gate.acquire()
            order.append(name)

        rows = [asyncio.create_task(row(name)) for name in range(4)]
        await settle()
        assert order == [0, 1]
        gate.release()
        gate.release()
        await asyncio.gather(*rows)
        assert order == [0, 1, 2, 3]

    run(test)


def test_a_suspect_waits_for_rows_in_flight_and_holds_back_the_others() -> None:
    async def test() -> None:
        gate, events = Gate(8), []
        leave = {name: asyncio.Event() for name in ("early", "first", "second", "late")}

        async def row(name: str, *, crashes: int) -> None:
            async with gate.turn(crashes=crashes):
                events.append(f"{name} in")
                await leave[name].wait()
            events.append(f"{name} out")

        async def suspect(name: str) -> None:
            with gate.suspicion():
                await row(name, crashes=2)

        tasks = [asyncio.create_task(row("early", crashes=0))]
        await settle()
        tasks += [asyncio.create_task(suspect(name)) for name in ("first", "second")]
        await settle()
        tasks += [asyncio.create_task(row("late", crashes=0))]
        await settle()
        assert events == ["early in"]
        for name in leave:
            leave[name].set()
            await settle()
        await asyncio.gather(*tasks)
        assert events == [f"{name} {way}" for name in ("early", "first", "second", "late") for way in ("in", "out")]

    run(test)


def test_suspects_of_one_death_are_asked_in_small_company() -> None:
    async def test() -> None:
        gate, inside = Gate(9), set()
        leave: dict[int, asyncio.Event] = {}

        async def suspect(name: int, crashes: int) -> None:
            leave[name] = asyncio.Event()
            with gate.suspicion():
                async with gate.turn(crashes=crashes):
                    inside.add(name)
                    await leave[name].wait()
                    inside.remove(name)

        tasks = [asyncio.create_task(suspect(name, 2 if name == 4 else 1)) for name in range(8)]
        await settle()
        seen = [set(inside)]
        while inside:
            leave[min(inside)].set()
            await settle()
            seen.append(set(inside))
        await asyncio.gather(*tasks)
        # Three at a time, 4 by itself, then three at a time again.
        assert seen == [{0, 1, 2}, {1, 2, 3}, {2, 3}, {3}, {4}, {5, 6, 7}, {6, 7}, {7}, set()]

    run(test)


def test_a_suspect_that_leaves_the_line_holds_nobody_up() -> None:
    async def test() -> None:
        gate = Gate(4)
        turns = [gate.turn(crashes=2) for _ in range(3)]
        await turns[0].__aenter__()
        waiting = [asyncio.create_task(turn.__aenter__()) for turn in turns[1:]]
        await settle()
        waiting[0].cancel()
        await settle()
        await turns[0].__aexit__(None, None, None)
        await asyncio.wait_for(waiting[1], 1)
        await turns[2].__aexit__(None, None, None)

    run(test)


def test_a_larger_limit_lets_waiting_rows_in_and_a_smaller_one_takes_no_place_away() -> None:
    async def test() -> None:
        gate, let_in = Gate(1), []

        async def row(name: int) -> None:
            await gate.acquire()
            let_in.append(name)

        rows = [asyncio.create_task(row(name)) for name in range(4)]
        await settle()
        assert let_in == [0]
        gate.resize(3)
        await settle()
        assert let_in == [0, 1, 2]
        gate.resize(1)
        for _ in range(2):
            gate.release()
            await settle()
            assert let_in == [0, 1, 2]
        gate.release()
        await asyncio.gather(*rows)
        assert let_in == [0, 1, 2, 3]

    run(test)


def test_a_row_that_is_cancelled_when_its_place_comes_hands_it_on() -> None:
    async def test() -> None:
        gate = Gate(1)
        await gate.acquire()
        first, second = (asyncio.create_task(gate.acquire()) for _ in range(2))
        await settle()
        gate.release()
        first.cancel()
        await asyncio.wait_for(second, 1)
        assert first.cancelled()

    run(test)


def test_places_come_free_while_those_who_wait_are_cancelled() -> None:
    async def test() -> None:
        gate = Gate(1)
        await gate.acquire()
        waiting = [asyncio.create_task(gate.acquire()) for _ in range(3)]
        await settle()
        for row in waiting[:2]:
            row.cancel()
        gate.release()  # before the cancelled ones have run
        await asyncio.wait_for(waiting[2], 1)
        gate.release()
        await asyncio.wait_for(gate.acquire(), 1)

    run(test)
