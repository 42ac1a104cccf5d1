"""What the gateway adds to one chat request of one token, with nothing else running."""

from __future__ import annotations

import asyncio
import statistics

from benchmarks import load
from benchmarks.report import Figure, at_most
from benchmarks.service import Bench

NAME = "latency"
REQUESTS = 100  # of each side in one pair


def measure(bench: Bench) -> list[Figure]:
    """Milliseconds at p50; the two sides take turns request by request, with one and the same body."""
    serving = bench.serving()

    async def run() -> list[tuple[float, float]]:
        async with load.gateway(serving.service.url) as ours, load.engine(serving.engine_socket) as bare:
            await _pair(ours, bare)
            return [await _pair(ours, bare) for _ in range(bench.pairs)]

    pairs = asyncio.run(run())
    return [
        Figure(NAME, "gateway adds at p50", "ms", tuple(ours - bare for ours, bare in pairs), at_most(2)),
        Figure(NAME, "p50 through the gateway", "ms", tuple(ours for ours, _ in pairs)),
        Figure(NAME, "p50 of the bare engine", "ms", tuple(bare for _, bare in pairs)),
    ]


async def _pair(ours: load.Session, bare: load.Session) -> tuple[float, float]:
    body = load.chat_body("What is the capital of France?", max_tokens=1)
    times = await load.interleaved(
        REQUESTS, lambda: load.timed(load.ask(ours, body)), lambda: load.timed(load.ask(bare, body))
    )
    medians = [statistics.median(side.seconds for side in sides) * 1e3 for sides in zip(*times, strict=True)]
    return medians[0], medians[1]
