"""The picture of a run: memory, latency and load over its time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from soak.faults import Happened
from soak.ledger import Entry
from soak.record import Run
from soak.sampler import Process
from soak.verdicts import Outcome

matplotlib.use("agg")
SLICE = 10.0
"""Seconds of which a latency is the median."""


def draw(run: Run, path: Path) -> None:
    """Write the picture as PNG."""
    figure = Figure(figsize=(12, 10), layout="constrained")
    ours, engine, latency, load = figure.subplots(4, 1, sharex=True)
    _memory(ours, [sample for sample in run.processes if sample.role.startswith(("supervisor", "worker"))])
    _memory(engine, [sample for sample in run.processes if sample.role.startswith("engine")])
    _latency(latency, run.entries)
    _load(load, run)
    for axes in (ours, engine, latency, load):
        _faults(axes, run.faults)
    load.set_xlabel("minutes")
    figure.suptitle(
        f"make soak, seed {run.plan.seed}" + (", control" if run.plan.control else "; red: an engine was lost")
    )
    figure.savefig(path, dpi=100)


def _faults(axes: Axes, faults: Sequence[Happened]) -> None:
    """A grey band from each fault to its recovery; red where an engine was lost."""
    for fault in faults:
        colour = "tab:red" if fault.kind.restarts else "tab:gray"
        axes.axvspan(fault.at / 60, fault.ended / 60, color=colour, alpha=0.15, linewidth=0)


def _memory(axes: Axes, samples: Sequence[Process]) -> None:
    """A line for each process; the processes of one part have its colour."""
    colours = {role: f"C{index}" for index, role in enumerate(sorted({sample.role for sample in samples}))}
    named: set[str] = set()
    for role, pid in dict.fromkeys((sample.role, sample.pid) for sample in samples):
        of_process = [sample for sample in samples if (sample.role, sample.pid) == (role, pid)]
        axes.plot(
            [sample.at / 60 for sample in of_process],
            [sample.memory / 1e6 for sample in of_process],
            color=colours[role],
            label=None if role in named else role,
        )
        named.add(role)
    axes.set_ylabel("resident MB")
    axes.set_ylim(0, 1.1 * max((sample.memory for sample in samples), default=1e6) / 1e6)
    _legend(axes)


def _latency(axes: Axes, entries: Sequence[Entry]) -> None:
    for client in ("chat", "stream", "table"):
        slices: dict[int, list[float]] = {}
        for entry in entries:
            if entry.client == client and entry.verdict.outcome is Outcome.ANSWERED:
                slices.setdefault(int(entry.ended // SLICE), []).append(entry.seconds)
        times = sorted(slices)
        axes.plot(
            [(time + 0.5) * SLICE / 60 for time in times],
            [statistics.median(slices[time]) for time in times],
            ".-",
            linewidth=0.5,
            label=client,
        )
    axes.set_ylabel(f"seconds, median of {SLICE:.0f} s")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    _legend(axes)


def _load(axes: Axes, run: Run) -> None:
    """The line of the engine has gaps where there is none."""
    times = [gauges.at / 60 for gauges in run.gauges]
    inside = [math.nan if gauges.engine is None else gauges.engine for gauges in run.gauges]
    axes.plot(times, [gauges.open for gauges in run.gauges], label="asked, open")
    axes.plot(times, inside, label="in the engine")
    axes.set_ylabel("requests and rows")
    _legend(axes)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
