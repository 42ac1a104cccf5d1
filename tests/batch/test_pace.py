"""The pace against simple models of an engine."""

from __future__ import annotations

import asyncio

import pytest

from vllm_dropin.batch import pace as module
from vllm_dropin.batch.pace import FIRST, GRAPHS, LARGEST, SMALLEST, Load, Pace, first_crowd, keep_pace, read_load
from vllm_dropin.scoring.gate import Gate


def batch(size: int, sent: int, engines: int = 1) -> Load:
    """A server whose engines' batches hold `size` requests."""
    return Load(min(sent, size), max(0, sent - size), engines)


def test_an_idle_engine_is_given_more_to_begin_with():
    assert first_crowd(Load(0, 0)) == GRAPHS
    assert first_crowd(Load(0, 0, engines=8)) == 8 * GRAPHS
    assert first_crowd(Load(1, 0)) == first_crowd(Load(0, 1)) == first_crowd(None) == FIRST


@pytest.mark.parametrize("size", [8, 32, 256, 400])
def test_a_few_requests_wait_whatever_the_batch_holds(size):
    gate = Gate(FIRST)
    pace = Pace(gate)
    seen = []
    for _ in range(60):
        load = batch(size, gate.limit)
        pace.steer(load)
        seen.append((gate.limit, load.waiting))
    limit, waiting = seen[-1]
    assert seen[-10:] == [(limit, waiting)] * 10  # it settles
    assert limit >= size
    assert 0 < waiting <= max(128, size)


def test_a_large_batch_is_full_after_a_few_looks():
    gate = Gate(FIRST)
    pace = Pace(gate)
    for _ in range(4):
        pace.steer(batch(1024, gate.limit, engines=4))
    assert gate.limit > 1024
    assert pace.starting
    for _ in range(2):
        pace.steer(batch(100, gate.limit))
    assert not pace.starting


def test_a_batch_beyond_the_cuda_graphs_is_not_filled():
    gate = Gate(FIRST)
    pace = Pace(gate)
    for _ in range(20):
        pace.steer(batch(1024, gate.limit))
    assert gate.limit == GRAPHS


def test_an_idle_engine_is_no_reason_for_more():
    gate = Gate(FIRST)
    Pace(gate).steer(Load(3, 0))  # the source is slow, or the engine is between two rows
    assert gate.limit == FIRST


def test_a_full_cache_that_shrinks_the_batch_shrinks_the_crowd():
    gate = Gate(512)
    pace = Pace(gate)
    pace.steer(Load(400, 112))
    pace.steer(Load(60, 452))
    assert gate.limit == 90


def test_requests_that_wait_for_their_prompts_turn_are_no_reason_for_fewer():
    """An engine takes up so many prompt tokens a step: at the start most requests wait though its batch is empty."""
    gate = Gate(FIRST)
    pace = Pace(gate)
    for running in (16, 48, 80, 112):
        pace.steer(Load(running, FIRST - running))
        assert gate.limit == FIRST
    pace.steer(Load(FIRST, 0))
    assert gate.limit == 2 * FIRST


def test_the_limit_has_limits():
    gate = Gate(FIRST)
    pace = Pace(gate)
    for _ in range(30):
        pace.steer(Load(10_000, 0, engines=100))
    assert gate.limit == LARGEST
    for _ in range(30):
        pace.give_way()
    assert gate.limit == SMALLEST


def test_without_metrics_the_rate_decides():
    gate = Gate(FIRST)
    pace = Pace(gate)
    for _ in range(20):
        pace.try_more(min(gate.limit, 300))  # rows a second, up to what the server can do
    assert 200 <= gate.limit <= 500
    settled = gate.limit
    pace.try_more(1000)
    assert gate.limit == settled


def test_a_refusal_makes_room():
    gate = Gate(90)
    pace = Pace(gate)
    pace.give_way()
    assert gate.limit == 60
    pace.try_more(1000)
    assert gate.limit == 60


def test_the_loop_steers_by_what_it_sees(monkeypatch):
    monkeypatch.setattr(module, "PERIOD", 0.01)

    async def run() -> int:
        gate = Gate(FIRST)

        async def look() -> Load:
            return batch(500, gate.limit, engines=2)

        task = asyncio.create_task(keep_pace(Pace(gate), look, lambda: 0, lambda: 0))
        await asyncio.sleep(0.5)
        task.cancel()
        return gate.limit

    assert 500 <= asyncio.run(run()) <= 750


def test_the_engines_gauges_are_read():
    text = b"""# HELP vllm:num_requests_running x
vllm:num_requests_running{engine="0"} 12.0
vllm:num_requests_running{engine="1"} 3.0
vllm:num_requests_waiting{engine="0"} 4.0
vllm:num_requests_waiting_by_reason{reason="capacity"} 99.0
"""
    assert read_load(text) == Load(15, 4, engines=2)
    assert read_load(b"vllm:num_requests_running 1.0\n") is None
    assert read_load(b"") is None
