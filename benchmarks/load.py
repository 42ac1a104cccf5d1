"""The load: the same requests for the gateway and for the bare engine, and a plain generator that sends them."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

MODEL = "datarobot-deployed-llm"
SYSTEM_PROMPT = "You tell long stories."
ROW_TOKENS = 64
AT_ONCE = 64
COLUMN = "promptText"
CHAT = "/v1/chat/completions"

T = TypeVar("T")
Session = aiohttp.ClientSession
_numbers = itertools.count(10_000)


def gateway(url: str) -> AbstractAsyncContextManager[Session]:
    """Connections to a service."""
    return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(600))


def engine(socket: Path) -> AbstractAsyncContextManager[Session]:
    """Connections to the engine behind it, around the gateway."""
    connector = aiohttp.UnixConnector(path=str(socket), limit=0)
    return aiohttp.ClientSession("http://engine", connector=connector, timeout=aiohttp.ClientTimeout(600))


def prompts(count: int) -> list[str]:
    """Prompts that were never asked before, so that no side finds the other's in the prefix cache; all of one length.

    They ask for a story because a row can't switch the end token off: it has to run into max_tokens by itself.
    """
    return [f"Write a very long story about the number {number}." for number in itertools.islice(_numbers, count)]


def chat_body(prompt: str, max_tokens: int = ROW_TOKENS, **fields: Any) -> bytes:
    """A chat request that says itself what the service would add: both sides give the engine the same work."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": prompt}]
    body = {"model": MODEL, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "n": 1, **fields}
    return json.dumps(body).encode()


def stream_body(prompt: str, max_tokens: int) -> bytes:
    """A streaming chat request that gives exactly `max_tokens` tokens."""
    return chat_body(prompt, max_tokens, stream=True, ignore_eos=True)


async def ask(session: Session, body: bytes) -> bytes:
    """One chat request, whole. Raises when it is not answered with 200."""
    async with session.post(CHAT, data=body, headers={"Content-Type": "application/json"}) as response:
        answer = await response.read()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {answer[:500]!r}")
        return answer


async def stream(session: Session, body: bytes) -> int:
    """One chat request as a stream; the number of its events, [DONE] included. Raises when it broke off."""
    events, tail = 0, b""
    async with session.post(CHAT, data=body, headers={"Content-Type": "application/json"}) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.read()!r}")
        async for chunk in response.content.iter_any():
            events += chunk.count(b"data: ")
            tail = (tail + chunk)[-32:]
    if not tail.endswith(b"data: [DONE]\n\n"):
        raise RuntimeError(f"a stream broke off: {tail!r}")
    return events


async def all_at_once(
    send: Callable[[Session, bytes], Awaitable[T]], session: Session, bodies: Iterable[bytes], at_once: int = AT_ONCE
) -> list[T]:
    """Send every body, never more than `at_once` together."""
    waiting: Iterator[bytes] = iter(bodies)

    async def sender() -> list[T]:
        return [await send(session, body) for body in waiting]

    return [answer for answers in await asyncio.gather(*(sender() for _ in range(at_once))) for answer in answers]


async def predict(session: Session, rows: Sequence[str]) -> list[str]:
    """Score rows as one CSV. Raises when a row has no answer."""
    csv = "\n".join([COLUMN, *rows, ""]).encode()
    async with session.post("/predict/", data=csv, headers={"Content-Type": "text/csv"}) as response:
        answer = await response.read()
    predictions: list[str] = json.loads(answer).get("predictions", [])
    if len(predictions) != len(rows) or not all(predictions):
        raise RuntimeError(f"{response.status}: {answer[:500]!r}")
    return predictions


async def generated(session: Session) -> float:
    """How many tokens the engine has generated so far, by its own metrics."""
    async with session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))


@dataclass(frozen=True)
class Timed:
    """What something gave, and the seconds that it took."""

    seconds: float
    value: Any = None


async def timed(work: Awaitable[Any]) -> Timed:
    started = time.perf_counter()
    value = await work
    return Timed(time.perf_counter() - started, value)


async def interleaved(
    pairs: int, ours: Callable[[], Awaitable[T]], other: Callable[[], Awaitable[T]]
) -> list[tuple[T, T]]:
    """`pairs` results of both sides, one after the other, the first of each pair taking turns."""
    results = []
    for number in range(pairs):
        if number % 2:
            second = await other()
            results.append((await ours(), second))
        else:
            first = await ours()
            results.append((first, await other()))
    return results
