"""How far a run is: one line that is kept up to date in a terminal, a line now and then elsewhere, JSON at the end."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TextIO

from vllm_dropin.batch.journal import Tally
from vllm_dropin.batch.pace import Load

TERMINAL_EVERY, PLAIN_EVERY = 0.2, 10.0
"""Seconds between two lines."""
_RATE_OVER = 30.0
"""Seconds over which rates are taken: long enough to be steady, short enough to show a change."""
_BAR = 24


@dataclass(frozen=True)
class Position:
    """Rows that have been read, and the bytes that they took of those there are; 0 of 0 where nobody knows."""

    rows: int
    done: int
    total: int

    def rows_in_all(self) -> float | None:
        """An estimate, as if the rows to come were as long as those that have been read."""
        if self.total <= 0 or self.done <= 0 or not self.rows:
            return None
        return self.rows * self.total / self.done


@dataclass(frozen=True)
class Summary:
    """What a run did: the document that `--json` prints."""

    rows: int
    rows_before: int
    errors: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    """From start to end, the engine's start and the writing of the output included."""
    scoring_seconds: float
    """From the first row to the last answer; rows_per_second is over this."""
    rows_per_second: float
    engine_restarts: int
    output: str


class Progress:
    """Shows the rows of one run on `stream`. `tally` counts those of earlier runs too."""

    def __init__(self, stream: TextIO, tally: Tally) -> None:
        self._stream = stream
        self._tally = tally
        self._terminal = stream.isatty()
        self._before = tally.rows
        self._started = time.monotonic()
        self._began = self._ended = self._started
        self._shown = 0.0
        self._samples: deque[tuple[float, int, int, int]] = deque()
        self._width = 0

    @property
    def rows_here(self) -> int:
        """Rows answered by this run."""
        return self._tally.rows - self._before

    def begin(self) -> None:
        """The engine is ready: rows are sent from now on."""
        self._began = self._ended = time.monotonic()

    def end(self) -> None:
        """The last answer has come."""
        self._ended = time.monotonic()

    def show(
        self, position: Position, load: Load | None, in_flight: int, *, note: str = "", now: float | None = None
    ) -> None:
        """Show the present state, if it is time to; `note` is one part more."""
        now = time.monotonic() if now is None else now
        self._samples.append((now, self._tally.rows, self._tally.prompt_tokens, self._tally.completion_tokens))
        while now - self._samples[0][0] > _RATE_OVER:
            self._samples.popleft()
        if now - self._shown < (TERMINAL_EVERY if self._terminal else PLAIN_EVERY):
            return
        self._shown = now
        self._write(self._line(position, load, in_flight, note))

    def _line(self, position: Position, load: Load | None, in_flight: int, note: str) -> str:
        since, rows, prompt, completion = self._samples[0]
        span = max(1e-9, self._samples[-1][0] - since)
        rate = (self._tally.rows - rows) / span
        parts = []
        rows_in_all = position.rows_in_all()
        if rows_in_all is not None:
            done = min(1.0, self._tally.rows / rows_in_all)
            filled = round(done * _BAR)
            parts.append(f"[{'#' * filled}{'.' * (_BAR - filled)}] {done:4.0%}")
        parts.append(f"{self._tally.rows:,} rows")
        parts.append(f"{rate:,.1f} rows/s")
        parts.append(
            f"tokens/s {(self._tally.prompt_tokens - prompt) / span:,.0f} in, "
            f"{(self._tally.completion_tokens - completion) / span:,.0f} out"
        )
        if self._tally.failed:
            parts.append(f"{self._tally.failed:,} failed")
        parts.append(f"{load.running:.0f}+{load.waiting:.0f} at the engine" if load else f"{in_flight} in flight")
        if note:
            parts.append(note)
        if rows_in_all is not None and rate > 0:
            parts.append(f"{_duration(max(0.0, rows_in_all - self._tally.rows) / rate)} left")
        return "  ".join(parts)

    def _write(self, line: str) -> None:
        if not self._terminal:
            print(line, file=self._stream, flush=True)
            return
        padding = " " * max(0, self._width - len(line))
        self._width = len(line)
        self._stream.write(f"\r{line}{padding}")
        self._stream.flush()

    def say(self, text: str) -> None:
        """A sentence on a line of its own."""
        if self._terminal and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        print(text, file=self._stream, flush=True)

    def summary(self, output: str, restarts: int) -> Summary:
        """The run as numbers."""
        scoring = self._ended - self._began
        return Summary(
            rows=self._tally.rows,
            rows_before=self._before,
            errors=dict(self._tally.errors),
            prompt_tokens=self._tally.prompt_tokens,
            completion_tokens=self._tally.completion_tokens,
            seconds=round(time.monotonic() - self._started, 3),
            scoring_seconds=round(scoring, 3),
            rows_per_second=round(self.rows_here / scoring, 3) if scoring > 0 else 0.0,
            engine_restarts=restarts,
            output=output,
        )


def closing_words(summary: Summary) -> str:
    """The end of a run in one line."""
    failed = sum(summary.errors.values())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(summary.errors.items()))
    here = summary.rows - summary.rows_before
    return (
        f"{summary.rows:,} rows{f', {failed:,} failed ({kinds})' if failed else ''}; "
        f"{here:,} of them now, in {_duration(summary.scoring_seconds)} ({summary.rows_per_second:,.1f} rows/s) "
        f"-> {summary.output}"
    )


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"
