import asyncio

import pytest

from vllm_dropin.gateway.state import SharedState
from vllm_dropin.supervisor.hang import HangWatch


class Engine:
    """Counters that the test moves; `asked` counts the looks."""

    def __init__(self) -> None:
        self.tokens: float | None = 0.0
        self.asked = 0

    async def counters(self):
        self.asked += 1
        return None if self.tokens is None else {"vllm:prompt_tokens_total": self.tokens}


@pytest.fixture
def state(tmp_path):
    return SharedState.create(tmp_path / "state", workers=2)


def run(watch: HangWatch, seconds: int, each=lambda second: None, begin: int = 0) -> int | None:
    """The second at which the watch says that the engine hangs."""
    for second in range(begin, begin + seconds):
        each(second)
        if asyncio.run(watch.hangs(float(second))):
            return second
    return None


def test_nothing_moves_while_a_request_waits(state):
    state.slots[1].add("waiting")
    found = run(HangWatch(40, state, Engine().counters), 100)
    assert found is not None
    assert 40 <= found <= 60


def test_an_engine_that_does_not_answer_makes_no_progress(state):
    engine = Engine()
    engine.tokens = None
    state.slots[0].add("waiting")
    assert run(HangWatch(40, state, engine.counters), 100) is not None


def test_an_idle_engine_is_never_suspected_nor_asked(state):
    engine = Engine()
    assert run(HangWatch(40, state, engine.counters), 1000) is None
    assert engine.asked == 0


def test_bytes_are_progress_and_spare_the_question(state):
    engine = Engine()
    state.slots[0].add("waiting")
    assert run(HangWatch(40, state, engine.counters), 1000, lambda _: state.slots[1].add("chunks")) is None
    assert engine.asked == 0


def test_a_long_prefill_is_progress(state):
    engine = Engine()
    state.slots[0].add("waiting")

    def prefill(second: int) -> None:
        engine.tokens = second // 30

    assert run(HangWatch(40, state, engine.counters), 1000, prefill) is None
    assert run(HangWatch(40, state, engine.counters), 100, begin=1000) is not None


def test_a_slow_reader_is_not_a_hang(state):
    """The request is in flight, but nobody waits to read from the engine."""
    state.slots[0].add("in_flight")
    assert run(HangWatch(40, state, Engine().counters), 1000) is None
