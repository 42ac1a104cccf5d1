"""A client of another kind: `vllm-dropin score --url`, one file after the other."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from soak.ledger import Entry, Events, Ledger
from soak.requests import Author, Table
from soak.verdicts import Outcome, Verdict, judge_file

KEY = "soak-batch"
"""A key of its own, which is always accepted: `score` reads its key once."""
ROWS = 100
AT_ONCE = 4
AWAY, AGAIN = 74, 3
"""The exit code of `score` when the server does not answer, and how often it is started again then."""
LIMIT = 900.0
"""Seconds for one file."""


class Batches:
    """Scores files until it is told to stop; the one that has begun is scored to its end."""

    def __init__(self, url: str, ledger: Ledger, events: Events, seed: int) -> None:
        self._url = url
        self._ledger = ledger
        self._events = events
        self._author = Author(f"{seed} score")

    async def run(self, stop: asyncio.Event) -> None:
        with tempfile.TemporaryDirectory(prefix="soak-score-") as folder:
            while not stop.is_set():
                await self._score(self._author.table(ROWS, broken_share=0.0), Path(folder))

    async def _score(self, table: Table, folder: Path) -> None:
        source, output = folder / "rows.csv", folder / "answers.csv"
        source.write_bytes(table.body())
        output.unlink(missing_ok=True)
        started = self._events.now
        with self._ledger.asking("score", AT_ONCE):
            for _ in range(1 + AGAIN):
                code, words = await self._command(source, output)
                if code != AWAY:  # for that it says itself: every answered row is kept, give the same command again
                    break
        if code:
            shutil.rmtree(f"{output}.partial", ignore_errors=True)  # or the next file would be refused for this one
            verdict = Verdict(Outcome.WRONG, f"score ended with {code}: {words[-300:]}")
        else:
            verdict = judge_file(table, output.read_text(encoding="utf-8"))
        self._ledger.add(Entry("score", table.number, started, None, self._events.now, code, verdict))

    async def _command(self, source: Path, output: Path) -> tuple[int | None, str]:
        """Exit code and last words. Nothing of it is left, however this ends."""
        process = await asyncio.create_subprocess_exec(
            Path(sys.executable).with_name("vllm-dropin"), "score", "--url", f"{self._url}/v1", source, "-o", output,
            "--concurrency", str(AT_ONCE), "--params", "max_tokens=24", "--params", "temperature=0",
            env={**os.environ, "OPENAI_API_KEY": KEY},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            words, _ = await asyncio.wait_for(process.communicate(), LIMIT)
        except TimeoutError:
            return None, f"not done within {LIMIT:.0f} s"
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        return process.returncode, words.decode(errors="replace")
