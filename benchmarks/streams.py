"""64 streams at once, through the gateway and without it: what is lost, and what a chunk costs the gateway."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from benchmarks import load
from benchmarks.report import Figure, at_least, at_most
from benchmarks.service import Bench, cpu_seconds

NAME = "streams"
STREAMS = load.AT_ONCE
TOKENS = 64


@dataclass(frozen=True)
class Round:
    """64 streams of 64 tokens from their first byte sent to their last one read."""

    tokens_per_second: float
    cpu_per_chunk: float  # ms of the gateway's


def measure(bench: Bench) -> list[Figure]:
    """Tokens a second are exact: the end token is switched off, so each stream has all of its tokens."""
    serving = bench.serving()

    async def run() -> list[tuple[Round, Round]]:
        async with load.gateway(serving.service.url) as ours, load.engine(serving.engine_socket) as bare:
            for session in (ours, bare):
                await _round(session, serving.worker, tokens=8)
            return await load.interleaved(
                bench.pairs, lambda: _round(ours, serving.worker), lambda: _round(bare, serving.worker)
            )

    pairs = asyncio.run(run())
    ratios = tuple(ours.tokens_per_second / bare.tokens_per_second for ours, bare in pairs)
    return [
        Figure(NAME, "tokens/s, gateway to bare engine", "", ratios, at_least(0.95)),
        Figure(NAME, "gateway CPU a chunk", "ms", tuple(ours.cpu_per_chunk for ours, _ in pairs), at_most(0.15)),
        Figure(NAME, "through the gateway", "tokens/s", tuple(ours.tokens_per_second for ours, _ in pairs)),
        Figure(NAME, "bare engine", "tokens/s", tuple(bare.tokens_per_second for _, bare in pairs)),
    ]


async def _round(session: load.Session, worker: int, tokens: int = TOKENS) -> Round:
    bodies = [load.stream_body(prompt, tokens) for prompt in load.prompts(STREAMS)]
    before = cpu_seconds(worker)
    result = await load.timed(load.all_at_once(load.stream, session, bodies))
    spent = cpu_seconds(worker) - before
    return Round(STREAMS * tokens / result.seconds, spent * 1e3 / sum(result.value))
