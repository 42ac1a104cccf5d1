import asyncio
import time

import pytest

from vllm_dropin.gateway.state import SharedState
from vllm_dropin.supervisor.hang import HangWatch

START = 10_000.0


class Engine:
    """Counters that the test moves; `asked` counts the looks."""

    def __init__(self, tokens: float | None = 0.0) -> None:
        self.tokens = tokens
        self.has_any = True
        self.asked = 0

    async def counters(self):
        self.asked += 1
        if self.tokens is None:
            return None
        return {"vllm:prompt_tokens_total": self.tokens} if self.has_any else {}


@pytest.fixture
def state(tmp_path):
    return SharedState.create(tmp_path / "state", workers=2)


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock, which the test sets."""
    now = [START]
    monkeypatch.setattr(time, "monotonic_ns", lambda: int(now[0] * 1e9))
    return now


def run(watch, clock, seconds, each=lambda second: None):
    """The seconds after which the watch says that the engine hangs; None when it never does."""
    begin = clock[0]
    for second in range(seconds):
        clock[0] = begin + second
        each(second)
        if asyncio.run(watch.hangs(clock[0])):
            return second
    return None


def in_turn(slot, *, every, leaving=0):
    """A client that asks `every` so many seconds; `leaving` seconds before that it has given up, or got an answer."""
    tickets = []

    def step(second):
        if tickets and (second % every == every - leaving or (not leaving and second % every == 0)):
            slot.end_wait(tickets.pop())
        if second % every == 0:
            tickets.append(slot.begin_wait())

    return step


def test_nothing_moves_while_a_request_waits(state, clock):
    state.slots[1].begin_wait()
    found = run(HangWatch(40, state, Engine().counters), clock, 100)
    assert found is not None
    assert 40 <= found <= 54


def test_an_engine_that_does_not_answer_makes_no_progress(state, clock):
    state.slots[0].begin_wait()
    assert run(HangWatch(40, state, Engine(None).counters), clock, 100) is not None


def test_an_idle_engine_is_never_suspected_nor_asked(state, clock):
    engine = Engine()
    assert run(HangWatch(40, state, engine.counters), clock, 1000) is None
    assert engine.asked == 0


def test_a_long_prefill_is_progress(state, clock):
    engine = Engine()
    state.slots[0].begin_wait()
    watch = HangWatch(40, state, engine.counters)

    def prefill(second: int) -> None:
        engine.tokens = second // 30

    assert run(watch, clock, 1000, prefill) is None
    assert engine.asked <= 101  # not more often than it has to be
    assert run(watch, clock, 100) is not None


def test_what_the_front_end_answers_by_itself_hides_no_hang(state, clock):
    """Metrics are read every few seconds, and wrong requests refused, while a completion waits in vain."""
    state.slots[0].begin_wait()
    others = in_turn(state.slots[1], every=1)
    assert run(HangWatch(40, state, Engine().counters), clock, 100, others) is not None


def test_a_flood_of_what_needs_no_engine_is_no_hang(state, clock):
    """Somebody waits at each look, and no counter moves: nobody waits for long."""
    engine = Engine()
    assert run(HangWatch(40, state, engine.counters), clock, 1000, in_turn(state.slots[0], every=1)) is None


def test_clients_that_give_up_hide_no_hang(state, clock):
    """A platform gives up after 60 s and asks again: nobody has ever waited for 120."""
    client = in_turn(state.slots[0], every=65, leaving=5)
    found = run(HangWatch(120, state, Engine().counters), clock, 400, client)
    assert found is not None
    assert found > 120


def test_time_without_anybody_does_not_count(state, clock):
    client = in_turn(state.slots[0], every=100, leaving=90)
    found = run(HangWatch(40, state, Engine().counters), clock, 1000, client)
    assert found is not None
    assert found >= 400


@pytest.mark.parametrize("kind", ["none", "no answer"])
def test_without_counters_the_pieces_of_completions_are_progress(state, clock, kind):
    engine = Engine(None if kind == "no answer" else 0.0)
    engine.has_any = False
    state.slots[0].begin_wait()
    watch = HangWatch(40, state, engine.counters)
    assert run(watch, clock, 1000, lambda _: state.slots[1].add("chunks")) is None
    assert run(watch, clock, 100) is not None


def test_a_slow_reader_is_not_a_hang(state, clock):
    """The request is in flight, but nobody waits to read from the engine."""
    state.slots[0].add("in_flight")
    assert run(HangWatch(40, state, Engine().counters), clock, 1000) is None


def test_what_a_dead_worker_waited_for_is_forgotten(state, clock):
    state.slots[0].begin_wait()
    state.slots[0].zero_gauges()
    assert run(HangWatch(40, state, Engine().counters), clock, 1000) is None
