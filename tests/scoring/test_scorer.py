from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass

import pytest

from vllm_dropin.scoring.gate import Gate
from vllm_dropin.scoring.prompts import GenerationDefaults, chat_body
from vllm_dropin.scoring.results import Fault, RowResult
from vllm_dropin.scoring.rows import EMPTY, Row
from vllm_dropin.scoring.scorer import CRASHED, CULPRIT, GONE, RETRIES, EngineLost, Scorer


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes


def said(text: str) -> Reply:
    choice = {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
    return Reply(200, json.dumps({"choices": [choice]}).encode())


class Engine:
    """An engine in memory. A prompt with `poison` in it kills it, and all that it is working on."""

    def __init__(self, *, latency: float = 0.002, restart: float = 0.02, restarts: int = 100) -> None:
        self.generation = 1
        self.asked: list[str] = []
        self.crowd: list[tuple[str, int]] = []  # each prompt with how many were in flight when it came
        self.cancelled = 0
        self.in_flight = 0
        self.most = 0
        self.notice = 0.0  # seconds for which a dead engine still passes for ready
        self.dying: Reply | None = None  # what its front end says meanwhile; None: it can't be reached
        self.replies: dict[str, list[Reply | Exception]] = {}
        self._latency = latency
        self._restart = restart
        self._restarts = restarts
        self._up = asyncio.Event()
        self._up.set()
        self._dead = False
        self._death: asyncio.Future[None] | None = None

    async def chat(self, body: bytes) -> Reply:
        prompt = json.loads(body)["messages"][-1]["content"]
        if self._dead and self._up.is_set() and self.dying:
            self.asked.append(prompt)
            return self.dying
        if self._dead or not self._up.is_set():
            raise EngineLost("not reachable", sent=False)
        self._death = self._death or asyncio.get_running_loop().create_future()
        death = self._death
        self.asked.append(prompt)
        self.in_flight += 1
        self.crowd.append((prompt, self.in_flight))
        self.most = max(self.most, self.in_flight)
        try:
            done, _ = await asyncio.wait({death}, timeout=self._latency)
            if not done and "poison" in prompt:
                self.crash()
            if death.done():
                raise EngineLost("the connection broke off", sent=True)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1
        planned = self.replies.get(prompt)
        reply = (planned.pop(0) if len(planned) > 1 else planned[0]) if planned else said(prompt.upper())
        if isinstance(reply, Exception):
            raise reply
        return reply

    def crash(self) -> None:
        self._dead = True
        if self._death is not None:
            self._death.set_result(None)
            self._death = None
        self._task = asyncio.get_running_loop().create_task(self._return())

    async def _return(self) -> None:
        await asyncio.sleep(self.notice)
        self._up.clear()
        if self.generation <= self._restarts:
            self.generation += 1
            await asyncio.sleep(self._restart)
            self._dead = False
            self._up.set()

    async def wait_ready(self, deadline: float) -> bool:
        while not self._up.is_set():
            if self.generation > self._restarts or time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.001)
        return True


async def source(prompts: Iterable[str]) -> AsyncIterator[Row]:
    for index, prompt in enumerate(prompts):
        yield Row(index, index + 2, prompt)


def compose(row: Row) -> bytes:
    return chat_body(row.prompt, GenerationDefaults(), "m")


def scorer(engine: Engine, *, limit: int = 8, timeout: float = 20, ahead: int = 4096) -> Scorer[Row]:
    return Scorer(engine, compose, Gate(limit), timeout=timeout, ahead=ahead, backoff=0.002)


async def collect(scorer: Scorer[Row], prompts: Iterable[str], ordered: bool = True) -> list[RowResult]:
    async with aclosing(scorer.score(source(prompts), ordered=ordered)) as results:
        return [result async for result in results]


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(bounded())


def test_every_row_is_answered_in_order_within_the_bound() -> None:
    async def test() -> None:
        engine = Engine()
        results = await collect(scorer(engine), (f"p{at}" for at in range(500)))
        assert [result.prediction for result in results] == [f"P{at}" for at in range(500)]
        assert [result.line for result in results] == list(range(2, 502))
        assert engine.most == 8

    run(test)


def test_broken_rows_fail_alone() -> None:
    async def test() -> None:
        engine = Engine(latency=0)
        broken = set(range(0, 10_000, 73))
        kinds = [Reply(400, b'{"error":{"message":"too long"}}'), Reply(422, b"{}"), Reply(200, b"no json")]
        prompts = []
        for at in range(10_000):
            prompts.append(f"p{at}" if at not in broken or at % 4 else " ")
            if at in broken and at % 4:
                engine.replies[f"p{at}"] = [kinds[at % 3]]
        results = await collect(scorer(engine, limit=64), prompts)
        assert len(broken) == 137
        assert [result.index for result in results] == list(range(10_000))
        assert {result.index for result in results if result.error is not None} == broken
        assert all(result.prediction == ("" if result.error else f"P{result.index}") for result in results)
        assert " " not in engine.asked
        assert results[0].error == EMPTY and results[0].fault is Fault.INPUT

    run(test)


def test_unordered_results_come_as_they_are_done() -> None:
    async def test() -> None:
        engine = Engine()
        engine.replies["slow"] = [Reply(503, b""), Reply(503, b""), said("SLOW")]
        results = await collect(scorer(engine), ["slow", *(f"p{at}" for at in range(20))], ordered=False)
        assert sorted(result.index for result in results) == list(range(21))
        assert results[0].index != 0

    run(test)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_passing_troubles_are_tried_again(status: int) -> None:
    async def test() -> None:
        engine = Engine()
        engine.replies["a"] = [Reply(status, b""), EngineLost("reset", sent=True), said("A")]
        engine.replies["b"] = [Reply(status, b'{"error":{"message":"always"}}')]
        a, b = await collect(scorer(engine), "ab")
        assert (a.prediction, a.tries) == ("A", 3)
        assert (b.tries, b.error) == (RETRIES + 1, f"the engine answered with status {status}: always")
        assert b.fault is Fault.ENGINE

    run(test)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_refusals_are_final(status: int) -> None:
    async def test() -> None:
        engine = Engine()
        engine.replies["a"] = [Reply(status, b""), said("A")]
        (result,) = await collect(scorer(engine), "a")
        assert result.tries == 1 and result.error is not None

    run(test)


def test_connections_that_keep_breaking_without_a_death_fail_the_row_in_the_end() -> None:
    async def test() -> None:
        engine = Engine()
        engine.replies["a"] = [EngineLost("the connection broke off", sent=True)]
        a, b = await collect(scorer(engine), "ab")
        assert (a.tries, a.error, a.fault) == (RETRIES + 1, "the connection broke off", Fault.UNAVAILABLE)
        assert b.prediction == "B"

    run(test)


@pytest.mark.parametrize("notice", [0.0, 0.02])
def test_rows_in_flight_at_a_crash_are_sent_again(notice: float) -> None:
    async def test() -> None:
        engine = Engine(latency=0.005)
        engine.notice = notice
        asyncio.get_running_loop().call_later(0.03, engine.crash)
        results = await collect(scorer(engine), (f"p{at}" for at in range(200)))
        assert [result.prediction for result in results] == [f"P{at}" for at in range(200)]
        assert engine.generation == 2
        assert sum(result.tries > 1 for result in results) >= 8

    run(test)


@pytest.mark.parametrize("poisons", [{50}, {0, 1, 2}, {10, 90, 199}, {5, 6, 7, 8, 9, 10, 11, 12, 13}])
def test_rows_that_kill_the_engine_fail_and_no_others(poisons: set[int]) -> None:
    async def test() -> None:
        engine = Engine()
        prompts = [f"poison{at}" if at in poisons else f"p{at}" for at in range(200)]
        results = await collect(scorer(engine), prompts)
        assert {result.index for result in results if result.error} == poisons
        assert {results[at].error for at in poisons} == {CRASHED}
        assert all(result.prediction == prompts[at].upper() for at, result in enumerate(results) if at not in poisons)
        assert all(engine.asked.count(prompts[at]) == CULPRIT for at in poisons)

    run(test)


def test_suspects_come_first_in_smaller_and_smaller_company() -> None:
    async def test() -> None:
        engine = Engine()
        prompts = ["poison", *(f"p{at}" for at in range(60))]
        await collect(scorer(engine, limit=9), prompts)
        assert {prompt for prompt, _ in engine.crowd[:9]} == set(prompts[:9])
        seen: Counter[str] = Counter()
        for prompt, company in engine.crowd:
            assert company <= (9, 3, 1)[seen[prompt]]
            seen[prompt] += 1
        assert seen["poison"] == CULPRIT
        # All nine of the crash come again before any row that was not there.
        after = [prompt for prompt, _ in engine.crowd[9:]]
        stranger = next(at for at, prompt in enumerate(after) if prompt not in prompts[:9])
        assert not set(after[stranger:]) & set(prompts[:9])

    run(test)


def test_a_front_end_that_outlives_its_engine_is_no_trap_for_those_who_wait() -> None:
    """Killed three times from outside, the engine answers all rows."""

    async def test() -> None:
        engine = Engine(latency=0.02)
        engine.notice, engine.dying = 0.2, Reply(500, b'{"error": "EngineCore died"}')
        patient = Scorer(engine, compose, Gate(64), backoff=0.1)
        asking = asyncio.create_task(collect(patient, [f"row {place}" for place in range(100)]))
        for deaths in (1, 2, 3):
            while not (engine.generation == deaths and engine.in_flight and not engine._dead):
                await asyncio.sleep(0.001)
            engine.crash()
        results = await asking
        assert [result.index for result in results if result.error] == []
        assert engine.generation == 4
        assert max(count for count in Counter(engine.asked).values()) < 64

    run(test)


def test_a_death_while_a_row_waits_for_its_turn_counts() -> None:
    async def test() -> None:
        engine, gate = Engine(), Gate(2)
        lost = EngineLost("the connection broke off", sent=True)
        engine.replies["a"] = [lost, lost, lost, said("A")]
        asking = Scorer(engine, compose, gate, backoff=0.002)
        task = asyncio.create_task(collect(asking, "a"))
        while not engine.in_flight:
            await asyncio.sleep(0)
        with gate.suspicion():
            await asyncio.sleep(0.05)  # the row has lost its connection and waits for its turn
            engine.generation = 2
        for asked in (2, 3):
            while len(engine.asked) < asked:
                await asyncio.sleep(0.001)
            engine.generation = asked + 1
        (result,) = await task
        assert (result.error, result.tries) == (CRASHED, CULPRIT)

    run(test)


def test_a_row_that_never_reached_the_engine_is_no_suspect() -> None:
    async def test() -> None:
        engine = Engine(restart=0.05)
        engine.crash()
        await asyncio.sleep(0.01)
        results = await collect(scorer(engine, limit=4), "abcd")
        assert [result.prediction for result in results] == list("ABCD")
        assert engine.most == 4  # together, not one at a time

    run(test)


def test_rows_of_two_scorings_share_the_bound_and_the_suspicion() -> None:
    async def test() -> None:
        engine = Engine()
        shared = scorer(engine)
        first, second = await asyncio.gather(
            collect(shared, ["poison", *(f"a{at}" for at in range(80))]),
            collect(shared, (f"b{at}" for at in range(80))),
        )
        assert [result.error for result in first] == [CRASHED] + [None] * 80
        assert all(result.error is None for result in second)
        assert engine.most == 8

    run(test)


def test_a_short_scoring_is_not_held_up_by_a_long_one() -> None:
    async def test() -> None:
        engine = Engine(latency=0.01)
        shared = scorer(engine, limit=4)
        long = asyncio.create_task(collect(shared, (f"a{at}" for at in range(400))))
        await asyncio.sleep(0.05)
        await collect(shared, ["short"])
        assert engine.asked.index("short") < 60
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)

    run(test)


def test_an_engine_that_will_not_come_back_fails_what_is_left() -> None:
    async def test() -> None:
        engine = Engine(restarts=0)
        asyncio.get_running_loop().call_later(0.02, engine.crash)
        results = await collect(scorer(engine), (f"p{at}" for at in range(300)))
        assert len(results) == 300
        answered = [result for result in results if result.error is None]
        assert 0 < len(answered) < 300
        lost = [result for result in results if result.error is not None]
        assert {(result.error, result.fault) for result in lost} == {(GONE, Fault.UNAVAILABLE)}

    run(test)


def test_a_row_waits_for_a_restart_until_its_deadline() -> None:
    async def test() -> None:
        engine = Engine(restart=60)
        engine.crash()
        await asyncio.sleep(0.01)
        started = time.monotonic()
        (result,) = await collect(scorer(engine, timeout=0.2), "a")
        assert result.fault is Fault.UNAVAILABLE
        assert 0.15 < time.monotonic() - started < 2

    run(test)


def test_an_engine_that_never_answers_is_left_at_the_deadline() -> None:
    async def test() -> None:
        engine = Engine(latency=60)
        (result,) = await collect(scorer(engine, timeout=0.1), "a")
        assert result.error == "no answer within 0.1 s"
        assert engine.cancelled == 1

    run(test)


def test_leaving_cancels_what_is_in_flight_and_frees_the_places() -> None:
    async def test() -> None:
        engine = Engine(latency=60)
        engine.replies["fast"] = [said("FAST")]
        shared = scorer(engine)
        leaving = asyncio.create_task(collect(shared, (f"p{at}" for at in range(100))))
        await asyncio.sleep(0.02)
        assert engine.in_flight == 8
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert (engine.in_flight, engine.cancelled) == (0, 8)
        engine._latency = 0.0
        results = await collect(shared, (f"q{at}" for at in range(20)))
        assert [result.prediction for result in results] == [f"Q{at}" for at in range(20)]

    run(test)


def test_leaving_while_suspects_are_asked_lets_the_others_go_on() -> None:
    async def test() -> None:
        engine = Engine(latency=0.01)
        shared = scorer(engine)
        leaving = asyncio.create_task(collect(shared, ["poison", *(f"p{at}" for at in range(50))]))
        while engine.generation == 1:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.03)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        results = await collect(shared, "abc")
        assert [result.prediction for result in results] == list("ABC")

    run(test)


def test_an_error_of_the_source_is_raised_and_ends_the_rest() -> None:
    async def failing() -> AsyncIterator[Row]:
        yield Row(0, 2, "a")
        await asyncio.sleep(0.02)
        raise OSError("the disk is gone")

    async def test() -> None:
        engine = Engine()
        with pytest.raises(OSError, match="the disk is gone"):
            async with aclosing(scorer(engine).score(failing())) as results:
                async for result in results:
                    assert result.prediction == "A"
        assert engine.in_flight == 0

    run(test)


def test_rows_are_pulled_only_a_bounded_way_ahead() -> None:
    pulled = 0

    async def counting() -> AsyncIterator[Row]:
        nonlocal pulled
        for index in range(10_000):
            pulled += 1
            yield Row(index, index + 2, "slow" if index == 0 else "p")

    async def test() -> None:
        engine = Engine(latency=0.001)
        engine.replies["slow"] = [Reply(503, b"")]
        async with aclosing(scorer(engine, ahead=50).score(counting())) as results:
            first = await anext(results)
            assert first.index == 0 and first.error is not None
            assert pulled <= 52
            async for _ in results:
                pass
        assert pulled == 10_000

    run(test)
