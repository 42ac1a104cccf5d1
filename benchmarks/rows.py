"""A CSV of 256 rows against a load generator that sends the same kind of prompts to the bare engine, 64 at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

from benchmarks import load
from benchmarks.report import Figure, at_least
from benchmarks.service import Bench

NAME = "rows"
ROWS = 256


@dataclass(frozen=True)
class Round:
    """All rows, once."""

    rows_per_second: float
    tokens_per_row: float  # by the engine's metrics: temperature 0 and one prompt length, but no row must reach 64


def measure(bench: Bench) -> list[Figure]:
    """Rows a second of both, on one engine."""
    serving = bench.serving()

    async def run() -> list[tuple[Round, Round]]:
        async with load.gateway(serving.service.url) as ours, load.engine(serving.engine_socket) as bare:

            async def score(rows: int = ROWS) -> Round:
                return await _round(load.predict(ours, load.prompts(rows)), bare, rows)

            async def generate(rows: int = ROWS) -> Round:
                bodies = [load.chat_body(prompt) for prompt in load.prompts(rows)]
                return await _round(load.all_at_once(load.ask, bare, bodies), bare, rows)

            await score(load.AT_ONCE)
            await generate(load.AT_ONCE)
            return await load.interleaved(bench.pairs, score, generate)

    pairs = asyncio.run(run())
    ratios = tuple(ours.rows_per_second / bare.rows_per_second for ours, bare in pairs)
    return [
        Figure(NAME, "rows/s, /predict/ to load generator", "", ratios, at_least(0.95)),
        Figure(NAME, "/predict/", "rows/s", tuple(ours.rows_per_second for ours, _ in pairs)),
        Figure(NAME, "load generator", "rows/s", tuple(bare.rows_per_second for _, bare in pairs)),
        Figure(NAME, "/predict/", "tokens/row", tuple(ours.tokens_per_row for ours, _ in pairs)),
        Figure(NAME, "load generator", "tokens/row", tuple(bare.tokens_per_row for _, bare in pairs)),
    ]


async def _round(work: Awaitable[Any], engine: load.Session, rows: int) -> Round:
    before = await load.generated(engine)
    result = await load.timed(work)
    tokens = await load.generated(engine) - before
    return Round(rows / result.seconds, tokens / rows)
