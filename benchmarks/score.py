"""`score` against vLLM's offline LLM.chat in one process, and against a client that sends rows as they stand."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import itertools
import json
import os
import random
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.load import COLUMN, interleaved
from benchmarks.report import Figure, at_least
from benchmarks.service import EXAMPLE, INCUMBENT_ENVIRON, Bench
from vllm_dropin.batch.asking import AskOptions
from vllm_dropin.batch.inputs import find_inputs
from vllm_dropin.batch.job import Job, JobOptions
from vllm_dropin.batch.journal import Journal
from vllm_dropin.batch.order import Order
from vllm_dropin.batch.progress import Progress
from vllm_dropin.batch.records import Source
from vllm_dropin.batch.requests import Composer, RequestOptions
from vllm_dropin.batch.server import Server, serving
from vllm_dropin.scoring.prompts import GenerationDefaults
from vllm_dropin.settings.options import Flags
from vllm_dropin.settings.resolve import load

NAME = "score"
_numbers = itertools.count(1)
_WORDS = "the quick brown fox jumps over a lazy dog and then "  # 10 words, about as many tokens
_SMALL_CACHE = ("--num-gpu-blocks-override", "192")  # of 128 tokens each


@dataclass(frozen=True)
class Work:
    """Rows of one pass."""

    prompts: tuple[str, ...]
    system: str
    max_tokens: int


def stories() -> Work:
    """512 rows that share nothing, 64 tokens each."""
    return Work(tuple(f"Row {next(_numbers)}: write a story." for _ in range(512)), "", 64)


def instructed() -> Work:
    """256 rows behind one system prompt of 500 tokens."""
    number = next(_numbers)
    system = f"Instruction {number}. " + _WORDS * 50
    return Work(tuple(f"Row {next(_numbers)}: write a story." for _ in range(256)), system, 32)


def documents() -> Work:
    """Four questions about each of 60 documents of 500 tokens, in no order: 30,000 tokens of documents, more than the
    engine's cache holds.
    """
    texts = [f"Document {next(_numbers)}. " + _WORDS * 50 for _ in range(60)]
    prompts = [f"{text}\nQuestion {number}: what happens?" for text in texts for number in range(4)]
    random.Random(next(_numbers)).shuffle(prompts)
    return Work(tuple(prompts), "", 8)


class Offline:
    """vLLM's LLM.chat in a process of its own, with the flags that the example's engine has."""

    def __init__(self, python: Path) -> None:
        arguments = {"max_model_len": 2048, "max_num_seqs": 64, "enforce_eager": True, "disable_log_stats": True}
        self._process = subprocess.Popen(
            [python, Path(__file__).with_name("offline.py"), EXAMPLE / "vllm", json.dumps(arguments)],
            env={**os.environ, **INCUMBENT_ENVIRON, "VLLM_LOGGING_LEVEL": "ERROR"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("LLM.chat ended early")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, work: Work) -> float:
        """Seconds for one pass."""
        assert self._process.stdin
        asked = {"system": work.system, "prompts": work.prompts, "max_tokens": work.max_tokens}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        assert answer["tokens"] == len(work.prompts) * work.max_tokens
        return float(answer["seconds"])

    def stop(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()  # its end
        self._process.wait(30)


@contextlib.contextmanager
def offline(bench: Bench) -> Iterator[Offline]:
    running = Offline(bench.engine_python)
    try:
        yield running
    finally:
        running.stop()


@contextlib.asynccontextmanager
async def engine(bench: Bench, name: str, *flags: str) -> AsyncIterator[Server]:
    """The example's engine as `score` starts it."""
    scratch = bench.scratch / name
    scratch.mkdir()
    options = {"engine_python": str(bench.engine_python), "state_dir": str(scratch), "runtime_dir": str(scratch)}
    settings = load(Flags(str(EXAMPLE), options, engine_args=flags), {**os.environ, **INCUMBENT_ENVIRON})
    async with serving(settings, bench.say) as server:
        yield server


async def score(
    bench: Bench, server: Server, work: Work, *, order: Order = "auto", concurrency: int | None = None
) -> float:
    """Seconds for one pass of `score`: a CSV read, every row asked, every answer in the journal."""
    folder = bench.scratch / f"pass{next(_numbers)}"
    folder.mkdir()
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([COLUMN])
        writer.writerows([prompt] for prompt in work.prompts)
    clock = asyncio.get_running_loop().time
    started = clock()
    source = Source(find_inputs([str(folder / "rows.csv")]))
    params = {"max_tokens": work.max_tokens, "temperature": 0, "ignore_eos": True}
    defaults = GenerationDefaults(system_prompt=work.system or None, prompt_column_name=COLUMN)
    composer = Composer(RequestOptions(params=params), defaults, server.model, source.format)
    composer.check(source.columns)
    with contextlib.closing(Journal.open(folder / "journal", {})) as journal:
        options = JobOptions(order=order, ask=AskOptions(concurrency))
        await Job(source, composer, journal, server, Progress(io.StringIO(), journal.tally), options).run()
        seconds = clock() - started
        assert journal.tally.completion_tokens == len(work.prompts) * work.max_tokens
    return seconds


def measure(bench: Bench) -> list[Figure]:
    """Rows a second of each, start-up apart."""
    return [*asyncio.run(_against_offline(bench)), *asyncio.run(_against_naive(bench))]


async def _against_offline(bench: Bench) -> list[Figure]:
    with offline(bench) as other:
        async with engine(bench, "score") as server:

            async def compare(make: Callable[[], Work]) -> list[tuple[float, float]]:
                async def ours() -> float:
                    work = make()
                    return len(work.prompts) / await score(bench, server, work)

                async def theirs() -> float:
                    work = make()
                    return len(work.prompts) / await asyncio.to_thread(other.run, work)

                return await interleaved(bench.pairs, ours, theirs)

            warm = Work(stories().prompts[:64], "", 16)
            await score(bench, server, warm)
            await asyncio.to_thread(other.run, warm)
            plain = await compare(stories)
            bench.say(f"  pairs of rows/s: {plain}")
            shared = await compare(instructed)
    return [
        *_figures("512 rows of 64 tokens", "LLM.chat", plain, 0.95),
        *_figures("one system prompt of 500 tokens", "LLM.chat", shared, 1.0),
    ]


async def _against_naive(bench: Bench) -> list[Figure]:
    async with engine(bench, "naive", *_SMALL_CACHE) as server:

        async def ours() -> float:
            work = documents()
            return len(work.prompts) / await score(bench, server, work)

        async def naive() -> float:
            work = documents()
            return len(work.prompts) / await score(bench, server, work, order="input", concurrency=64)

        pairs = await interleaved(bench.pairs, ours, naive)
    return _figures("mixed documents of 500 tokens", "rows in input order", pairs, 1.3)


def _figures(what: str, other: str, pairs: Sequence[tuple[float, float]], bar: float) -> list[Figure]:
    ratios = tuple(ours / theirs for ours, theirs in pairs)
    return [
        Figure(NAME, f"{what}: score to {other}", "", ratios, at_least(bar)),
        Figure(NAME, f"{what}: score", "rows/s", tuple(ours for ours, _ in pairs)),
        Figure(NAME, f"{what}: {other}", "rows/s", tuple(theirs for _, theirs in pairs)),
    ]
