"""How many rows are at the engine at once: enough to fill its batch, few enough that none waits long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from vllm_dropin.scoring.gate import Gate

PERIOD = 1.0
"""Seconds between looks at the engine; a quarter of it until its batch has been full for the first time."""
FIRST, SMALLEST, LARGEST = 128, 8, 4096
GRAPHS = 512
"""Rows for each engine behind a server that tells its load: to begin with, when it is idle, and at most.

vLLM captures CUDA graphs for batches of up to 512. On an H100 512 rows at once gave more rows a second than a batch
of 1,024 did: a tenth more with a model of 8B, two fifths with one of 1B (docs/benchmarks.md). Where a smaller batch is
full the rest waits, and the crowd shrinks.
"""
_SLOW, _FAST = 1.5, 2.0  # growth
_STEADY = 1.02  # what a batch may grow by between two looks and still count as full
_START = 40  # looks after which the start is over, whatever they saw
_WORTH = 1.03
"""Without the engine's metrics a larger crowd has to raise the rate by this much to be kept."""


@dataclass(frozen=True)
class Load:
    """What a server says of itself: requests in its batch, and requests that wait for a place there.

    With data parallelism it has several `engines`, each with a batch of its own, and the numbers are their sums.
    """

    running: float
    waiting: float
    engines: int = 1


def first_crowd(load: Load | None) -> int:
    """How many rows to begin with, by what the engine says before the first of them."""
    return FIRST if load is None or load.running + load.waiting else GRAPHS * load.engines


class Pace:
    """Moves a gate's limit. With metrics, upwards until a few requests wait (an eighth of the batch, so that a place in
    it is taken at once when it comes free), and downwards when more wait than run. Without them, upwards as long as
    more rows a second come of it.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._best = 0.0
        self._settled = False
        self._looks = 0
        self._running = 0.0
        self.starting = True
        """Nobody knows yet what the engine can take."""

    def steer(self, load: Load) -> None:
        """By the engine's own numbers."""
        self._looks += 1
        if self._looks > _START:
            self.starting = False
        absorbing = load.running > _STEADY * self._running
        self._running = load.running
        few = max(4.0, load.running / 8)
        if load.waiting < few and load.running + load.waiting >= 0.8 * self._gate.limit:
            # All that we send fits into the batch: it may hold more.
            more = self._gate.limit * (_FAST if self.starting else _SLOW)
            self._resize(max(self._gate.limit, min(more, GRAPHS * load.engines)))
        elif load.waiting > max(32.0, load.running) and not absorbing:
            # Not while the batch still grows: what waits then waits for its prompt's turn, not for a place.
            self.starting = False
            self._resize(1.5 * load.running)

    def try_more(self, rows_per_second: float) -> None:
        """By the rate alone, measured over the time since the last call."""
        if self._settled or rows_per_second <= 0:
            return
        if rows_per_second > self._best * _WORTH:
            self._best = rows_per_second
            self._resize(self._gate.limit * _SLOW)
        else:
            self._resize(self._gate.limit / _SLOW)
            self._settled = True

    def give_way(self) -> None:
        """The server refused a request because there are too many."""
        self._resize(self._gate.limit / _SLOW)
        self._settled = True

    def _resize(self, limit: float) -> None:
        self._gate.resize(round(min(LARGEST, max(SMALLEST, limit))))


async def keep_pace(
    pace: Pace, look: Callable[[], Awaitable[Load | None]], rows_done: Callable[[], int], refused: Callable[[], int]
) -> None:
    """Look and steer until cancelled. `rows_done` and `refused` (429s) are totals."""
    clock = asyncio.get_running_loop().time
    done, refusals, since = rows_done(), refused(), clock()
    while True:
        load = await look()
        if refused() > refusals:
            refusals = refused()
            pace.give_way()
        elif load is not None:
            pace.steer(load)
        elif rows_done() - done >= 64 and clock() - since >= 5 * PERIOD:
            # Rates over fewer rows or seconds are noise.
            pace.try_more((rows_done() - done) / (clock() - since))
            done, since = rows_done(), clock()
        await asyncio.sleep(PERIOD / 4 if load is not None and pace.starting else PERIOD)


def read_load(exposition: bytes) -> Load | None:
    """The two gauges in vLLM's Prometheus text, summed over its engines; None when they are not there."""
    sums: dict[bytes, float] = {}
    engines = set()
    for line in exposition.splitlines():
        name, _, labels = line.partition(b" ")[0].partition(b"{")
        if name in (b"vllm:num_requests_running", b"vllm:num_requests_waiting"):
            sums[name] = sums.get(name, 0.0) + float(line.rpartition(b" ")[2])
            engines.add(labels.partition(b'engine="')[2].partition(b'"')[0])
    if len(sums) < 2:
        return None
    return Load(sums[b"vllm:num_requests_running"], sums[b"vllm:num_requests_waiting"], len(engines))
