"""Resident memory of our own processes: when ready, and at their peak after 64 streams and 256 rows."""

from __future__ import annotations

import asyncio

from benchmarks import load
from benchmarks.report import Figure, at_most
from benchmarks.rows import ROWS
from benchmarks.service import Bench, memory

NAME = "memory"
_LIMIT = at_most(90)


def measure(bench: Bench) -> list[Figure]:
    """Megabytes (10^6). The peak covers all that this run has asked of the service before."""
    serving = bench.serving()

    async def use() -> None:
        async with load.gateway(serving.service.url) as ours:
            bodies = [load.stream_body(prompt, load.ROW_TOKENS) for prompt in load.prompts(load.AT_ONCE)]
            await load.all_at_once(load.stream, ours, bodies)
            await load.predict(ours, load.prompts(ROWS))

    asyncio.run(use())
    amounts = {
        "supervisor, when ready": serving.supervisor_when_ready.now,
        "supervisor, peak under load": memory(serving.supervisor).peak,
        "gateway worker, when ready": serving.worker_when_ready.now,
        "gateway worker, peak under load": memory(serving.worker).peak,
    }
    return [Figure(NAME, name, "MB", (amount / 1e6,), _LIMIT) for name, amount in amounts.items()]
