"""A load from a process of its own: arrivals.py URL BODIES SECONDS --rate R, or --clients N.

With a rate, chats come when they come, whatever the service answers: at random times, as of many clients who know
nothing of each other. With clients, each asks the next thing when the last is answered: as many places as there are
clients are taken, and nobody waits. BODIES is a file with one body a line, which are taken in turn.

Prints what became of each request as JSON. Times count from the moment at which it was due, so a generator that is late
makes the service look worse, never better.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import uvloop

from benchmarks import load

SEED = 7
LIMIT = 120.0  # seconds for one answer


@dataclass(frozen=True)
class Asked:
    """One request. Seconds: `due` from the beginning, `late` and `took` from then until it was sent, and was answered.

    `sound`: a 200 with a completion, or a 429 with Retry-After and an error as OpenAI has it. Status 0: no answer.
    """

    due: float
    late: float
    took: float
    status: int
    sound: bool


@dataclass(frozen=True)
class Report:
    """All requests, and the share of one core that sending them took."""

    asked: list[Asked]
    core: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="arrivals.py", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("bodies", type=Path)
    parser.add_argument("seconds", type=float)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--rate", type=float)
    how.add_argument("--clients", type=int)
    options = parser.parse_args()
    bodies = itertools.cycle(options.bodies.read_bytes().splitlines())
    started = time.monotonic()
    if options.rate:
        asked = uvloop.run(arrive(options.url, list(_times(options.rate, options.seconds)), bodies))
    else:
        asked = uvloop.run(stay(options.url, options.clients, options.seconds, bodies))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    report = Report(asked, (usage.ru_utime + usage.ru_stime) / (time.monotonic() - started))
    json.dump(asdict(report), sys.stdout)
    return 0


def read(text: bytes) -> Report:
    """What `main` printed."""
    printed = json.loads(text)
    return Report([Asked(**one) for one in printed["asked"]], printed["core"])


def _times(rate: float, seconds: float) -> Iterator[float]:
    """A Poisson process; the same each time."""
    source = random.Random(SEED)
    due = source.expovariate(rate)
    while due < seconds:
        yield due
        due += source.expovariate(rate)


async def arrive(url: str, dues: list[float], bodies: Iterator[bytes]) -> list[Asked]:
    """Send each request at its time, and wait for all of the answers."""
    clock = asyncio.get_running_loop().time
    async with load.gateway(url) as session, asyncio.TaskGroup() as group:
        tasks = []
        start = clock()
        for due in dues:
            if (wait := start + due - clock()) > 0:
                await asyncio.sleep(wait)
            tasks.append(group.create_task(_ask(session, next(bodies), start, due)))
    return [task.result() for task in tasks]


async def stay(url: str, clients: int, seconds: float, bodies: Iterator[bytes]) -> list[Asked]:
    """So many clients, each with one request at a time, who begin none after `seconds`."""
    clock = asyncio.get_running_loop().time
    asked: list[Asked] = []
    async with load.gateway(url) as session:
        start = clock()

        async def client() -> None:
            while (due := clock() - start) < seconds:
                asked.append(await _ask(session, next(bodies), start, due))

        await asyncio.gather(*(client() for _ in range(clients)))
    return asked


async def _ask(session: load.Session, body: bytes, start: float, due: float) -> Asked:
    clock = asyncio.get_running_loop().time
    late = clock() - start - due
    status, sound = 0, False
    try:
        headers = {"Content-Type": "application/json"}
        async with asyncio.timeout(LIMIT), session.post(load.CHAT, data=body, headers=headers) as response:
            answer, status = await response.read(), response.status
    except (aiohttp.ClientError, TimeoutError):
        return Asked(due, late, clock() - start - due, 0, False)
    took = clock() - start - due
    if status == 429:
        error = json.loads(answer)["error"]
        sound = response.headers.get("Retry-After", "").isdecimal() and error["type"] == "rate_limit_error"
    elif status == 200:
        sound = b'"choices"' in answer
    return Asked(due, late, took, status, sound)


if __name__ == "__main__":
    sys.exit(main())
