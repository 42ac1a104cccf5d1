"""The same rows through DRUM, on an engine of its own: same build, same model, same flags."""

from __future__ import annotations

import asyncio

from benchmarks import load
from benchmarks.report import Figure, at_least
from benchmarks.rows import ROWS
from benchmarks.service import Bench

NAME = "incumbent"
PART = (
    32  # rows that DRUM gets of each 256: it asks for one after the other, so its rows/s don't depend on their number
)


def measure(bench: Bench) -> list[Figure]:
    """Rows a second of both products. While one scores, the other's engine is idle."""
    serving = bench.serving()
    drum = bench.incumbent()
    try:
        pairs = asyncio.run(_run(bench.pairs, serving.service.url, drum.url))
    finally:
        drum.stop()
    return [
        Figure(NAME, "rows/s, ours to DRUM", "", tuple(ours / other for ours, other in pairs), at_least(8)),
        Figure(NAME, "ours", "rows/s", tuple(ours for ours, _ in pairs)),
        Figure(NAME, "DRUM", "rows/s", tuple(other for _, other in pairs)),
    ]


async def _run(pairs: int, our_url: str, drum_url: str) -> list[tuple[float, float]]:
    async with load.gateway(our_url) as ours, load.gateway(drum_url) as drum:

        async def score(session: load.Session, rows: list[str]) -> float:
            return len(rows) / (await load.timed(load.predict(session, rows))).seconds

        for session in (ours, drum):
            await score(session, load.prompts(2))
        batches = [load.prompts(ROWS) for _ in range(pairs)]
        whole, parts = iter(batches), (batch[:PART] for batch in batches)
        return await load.interleaved(pairs, lambda: score(ours, next(whole)), lambda: score(drum, next(parts)))
