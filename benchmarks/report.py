"""Figures, and how they are shown: a table for people, Markdown for the documentation, JSON for programs."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Bar:
    """What a figure's median has to reach."""

    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


def at_most(limit: float) -> Bar:
    return Bar(limit)


def at_least(limit: float) -> Bar:
    return Bar(limit, at_least=True)


@dataclass(frozen=True)
class Figure:
    """One quantity, with a sample for each repetition. Without a bar it is there to read the others by."""

    benchmark: str
    name: str
    unit: str
    samples: tuple[float, ...]
    bar: Bar | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        return "yes" if self.bar.met(self.median) else "NO"

    def cells(self) -> tuple[str, ...]:
        spread = ""
        if len(self.samples) > 1:
            spread = f"{_short(min(self.samples))} to {_short(max(self.samples))}"
        median = f"{_short(self.median)} {self.unit}".rstrip()
        return (self.benchmark, self.name, median, spread, str(self.bar or ""), self.verdict)

    def record(self) -> dict[str, Any]:
        """The figure as JSON; samples in the order in which they were taken."""
        return {
            "benchmark": self.benchmark,
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "samples": self.samples,
            "bar": str(self.bar) if self.bar else None,
            "met": self.bar.met(self.median) if self.bar else None,
        }


_HEAD = ("benchmark", "figure", "median", "min to max", "bar", "met")


def text(figures: Sequence[Figure]) -> str:
    """An aligned table."""
    rows = [_HEAD, *(figure.cells() for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def markdown(figures: Sequence[Figure]) -> str:
    rows = [_HEAD, ("---",) * len(_HEAD), *(figure.cells() for figure in figures)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary(figures: Sequence[Figure]) -> str:
    barred = [figure for figure in figures if figure.bar]
    return f"{sum(figure.verdict == 'yes' for figure in barred)} of {len(barred)} bars met"


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": models[0] if models else platform.machine(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


def _short(value: float) -> str:
    """Three significant digits, without an exponent."""
    size = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(3, max(0, 2 - size))}f}"
