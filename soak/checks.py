"""What a run has to show: each check is a line of the report."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from soak.faults import Happened
from soak.growth import JUDGED_AFTER, Life, lives
from soak.ledger import Entry
from soak.record import Run
from soak.run import EXIT_LIMIT
from soak.sampler import GAUGES_EVERY, Gauges
from soak.schedule import RESTARTING, Kind
from soak.verdicts import Outcome

GROWTH, DESCRIPTORS, THREADS = 32_000_000, 64, 8
"""The most that one of our processes may grow by: bytes, open files, threads."""
NAMED = 0.9
"""The least share of completions that say their own number: below it, the check of the order is blind."""
SATURATED_AFTER = 60.0
"""Seconds of load after which an engine that has nothing to do is none that is saturated."""
UNREADY_WITHIN, READY_WITHIN, CUT_WITHIN = 1.0, 120.0, 2.0
"""Seconds after an engine's death: to say so, to have another; and after a worker's, for its connections to break."""
ABORTED_WITHIN = 5.0
"""Seconds in which the engine has to drop what a client has left."""


@dataclass(frozen=True)
class Check:
    """`found` is what was seen, `bar` what it is held against."""

    name: str
    found: str
    bar: str
    passed: bool


def checks(run: Run) -> list[Check]:
    """All checks that this run can be held against; of one that never had any load, that alone."""
    if not run.load_ended:
        return [_ran(run)]
    found = [_ran(run), _answered(run.asked, run.entries), _rows(run.entries), _named(run.entries)]
    found += [_undisturbed(run.entries), *_saturated(run)] if run.plan.control else _disturbed(run)
    found.append(_for_somebody(run.gauges))
    if run.load_ended - run.ready >= JUDGED_AFTER:
        found += _grown(lives(run.processes))
    return found if run.failure else [*found, *_ended(run)]


def _ran(run: Run) -> Check:
    minutes = (run.load_ended or run.ready) - run.ready
    told = run.failure.partition("\n")[0] or f"{minutes / 60:.1f} minutes of load"
    if run.interrupted:
        told += ", ended early by a signal"
    return Check("the run came to its end", told, f"{run.plan.minutes:g} minutes", not run.failure)


def _answered(asked: int, entries: Sequence[Entry]) -> Check:
    """In full, or with an explicit failure, or a refusal with a body of ours."""
    wrong = _of(entries, Outcome.WRONG)
    found = f"{asked} requests, {asked - len(entries)} without an end, {len(wrong)} wrong{_first(wrong)}"
    name = "every request answered in full, failed explicitly or refused with a reason"
    return Check(name, found, "0, 0", not wrong and asked == len(entries))


def _rows(entries: Sequence[Entry]) -> Check:
    tables = [entry for entry in entries if entry.verdict.rows]
    rows = sum(entry.verdict.rows for entry in tables)
    failed = sum(entry.verdict.failed_rows for entry in tables)
    broken = sum(entry.verdict.broken_rows for entry in tables)
    wrong = [entry for entry in _of(entries, Outcome.WRONG) if "row" in entry.verdict.problem]
    rest = f"{len(wrong)} tables wrong{_first(wrong)}"
    found = f"{rows} rows in {len(tables)} tables, {broken} of them broken, {failed} others failed; {rest}"
    return Check("no row lost, doubled or out of order", found, "0 wrong, some rows", not wrong and rows > 0)


def _named(entries: Sequence[Entry]) -> Check:
    named = sum(entry.verdict.named for entry in entries)
    unnamed = sum(entry.verdict.unnamed for entry in entries)
    share = named / (named + unnamed) if named + unnamed else 0.0
    return Check("completions that say their own number", f"{share:.1%}", f"≥ {NAMED:.0%}", share >= NAMED)


def _undisturbed(entries: Sequence[Entry]) -> Check:
    bad = [*_of(entries, Outcome.FAILED, Outcome.REFUSED, Outcome.CUT), *_with_failed_rows(entries)]
    return Check("nothing failed, was refused or cut", f"{len(bad)}{_first(bad)}", "0", not bad)


def _saturated(run: Run) -> list[Check]:
    begin, end = run.ready + SATURATED_AFTER, run.load_ended or run.ready
    work = [gauges.engine for gauges in run.gauges if begin <= gauges.at <= end]
    idle = sum(not requests for requests in work)
    known = sorted(requests for requests in work if requests is not None)
    most = f"; requests in it: {known[0]} to {known[-1]}, median {known[len(known) // 2]}" if known else ""
    unready = [probe for probe in run.probes if begin <= probe.sent <= end and probe.status != 200]
    restarts = run.ending.restarts
    return [
        Check("the engine always had work", f"idle at {idle} of {len(work)} looks{most}", "0", bool(work) and not idle),
        Check("restarts of the engine", "unknown" if restarts is None else str(restarts), "0", restarts == 0),
        Check("hangs reported", str(run.hang_reports), "0", run.hang_reports == 0),
        Check("probes of /readyz that were not 200", f"{len(unready)} of {len(run.probes)}", "0", not unready),
    ]


def _disturbed(run: Run) -> list[Check]:
    """What is explained by a fault, and how the service took each of them."""
    faults = run.faults
    cut = _unexplained(_of(run.entries, Outcome.CUT), faults, {Kind.KILL_WORKER}, CUT_WITHIN)
    failed = _unexplained(_of(run.entries, Outcome.FAILED), faults, RESTARTING)
    lost = [(fault.at, fault.ended) for fault in faults if fault.kind in RESTARTING]
    failed += [entry for entry in _with_failed_rows(run.entries) if not any(entry.overlaps(*time) for time in lost)]
    refused = _unexplained(_of(run.entries, Outcome.REFUSED), faults, {Kind.BURST})
    killed = [fault for fault in faults if fault.kind in RESTARTING - {Kind.STOP_CORE}]
    stopped = [fault for fault in faults if fault.kind is Kind.STOP_CORE]
    problems = [f"{fault.kind}: {fault.problem}" for fault in faults if fault.problem]
    asked = sum(fault.kind.restarts for fault in faults)
    away = sum(fault.kind is Kind.PLATFORM_AWAY for fault in faults)
    hang = run.plan.options.hang_timeout * 1.5 + 5.0
    return [
        Check("cut without a word, but by a killed gateway worker", f"{len(cut)}{_first(cut)}", "0", not cut),
        Check("failed, but by an engine that was away", f"{len(failed)}{_first(failed)}", "0", not failed),
        Check("refused with 429, but by a burst", f"{len(refused)}{_first(refused)}", "0", not refused),
        Check("faults that were not taken well", _joined(problems), "none", not problems),
        _within("ready was last answered after a kill", [fault.last_ready for fault in killed], UNREADY_WITHIN),
        _within("ready was last answered after a stop", [fault.last_ready for fault in stopped], hang),
        _within("from not ready to ready again", [fault.away for fault in faults], READY_WITHIN),
        Check(
            "restarts of the engine", str(run.ending.restarts), f"{asked}, as asked for", run.ending.restarts == asked
        ),
        Check(
            "restarts that the platform took notice of",
            str(run.told),
            f"{asked - away} to {asked}",
            asked - away <= run.told <= asked,
        ),
        Check("hangs reported", str(run.hang_reports), f"{len(stopped)}, as caused", run.hang_reports == len(stopped)),
    ]


def _unexplained(
    entries: Iterable[Entry], faults: Sequence[Happened], kinds: Collection[Kind], seconds: float | None = None
) -> list[Entry]:
    """Those that no such fault explains: they did not end during one, or within so many seconds of its begin."""
    times = [
        (fault.at, fault.ended + 1.0 if seconds is None else fault.at + seconds)
        for fault in faults
        if fault.kind in kinds
    ]
    return [entry for entry in entries if not any(begin <= entry.ended <= end for begin, end in times)]


def _within(name: str, seconds: Iterable[float | None], bar: float) -> Check:
    known = sorted(value for value in seconds if value is not None)
    if not known:
        return Check(name, "did not come up", f"≤ {bar:g} s", True)
    median = known[len(known) // 2]
    return Check(name, f"{known[-1]:.2f} s at most, median {median:.2f} s", f"≤ {bar:g} s", known[-1] <= bar)


def _joined(problems: Sequence[str]) -> str:
    return "; ".join(problems) or "none"


def _for_somebody(gauges: Sequence[Gauges]) -> Check:
    """The engine never has more requests than our clients have had open in the last seconds."""
    worst = 0
    for index, look in enumerate(gauges):
        if look.engine is not None:
            near = gauges[max(0, index - round(ABORTED_WITHIN / GAUGES_EVERY)) : index + 1]
            before = (other for other in near if look.at - other.at <= ABORTED_WITHIN)
            worst = max(worst, look.engine - max(other.open for other in before))
    return Check("requests in the engine that nobody waits for", str(worst), "0", worst <= 0)


def _grown(found: Iterable[Life]) -> list[Check]:
    """Per process, as each gateway worker that was killed has a successor with a life of its own."""
    ours = [life for life in found if life.role == "supervisor" or life.role.startswith("worker")]
    judged = [life for life in ours if life.memory is not None]
    told = f"in {len(judged)} of {len(ours)} processes that lived long enough"
    made = []
    for what, unit, scale, limit, values in (
        ("memory", " MB", 1e6, GROWTH, [life.memory for life in judged]),
        ("open files", "", 1, DESCRIPTORS, [life.descriptors for life in judged]),
        ("threads", "", 1, THREADS, [life.threads for life in judged]),
    ):
        most = max((value for value in values if value is not None), default=None)
        shown = "nothing to judge" if most is None else f"{most / scale:.3g}{unit} at most, {told}"
        bar = f"≤ {limit / scale:.3g}{unit}"
        made.append(Check(f"growth of {what}, supervisor and workers", shown, bar, most is not None and most <= limit))
    return made


def _ended(run: Run) -> list[Check]:
    ending, last = run.ending, [entry for entry in run.entries if entry.client == "farewell"]
    busy = None
    if ending.quiet is not None:
        busy = {name: value for name, value in ending.quiet.ours.items() if value}
        if ending.quiet.engine:
            busy["engine"] = ending.quiet.engine
    whole = sum(entry.verdict.outcome is Outcome.ANSWERED for entry in last)
    code = f"exit code {ending.exit_code} after {ending.exit_seconds:.1f} s"
    left = ", ".join((*ending.left, *ending.folders)) or "nothing"
    return [
        Check("clients that came to no end", str(ending.late), "0", ending.late == 0),
        Check(
            "gauges when all clients had ended",
            f"{busy or 'all 0' if busy is not None else 'unknown'}",
            "all 0",
            busy == {},
        ),
        Check(
            "answers whole that were open at SIGTERM",
            f"{whole} of {len(last)}",
            "all",
            bool(last) and whole == len(last),
        ),
        Check("the end after SIGTERM", code, f"0 within {EXIT_LIMIT:.0f} s", ending.exit_code == 0),
        Check("processes and folders left over", left, "nothing", left == "nothing" and ending.exit_code is not None),
    ]


def _of(entries: Iterable[Entry], *outcomes: Outcome) -> list[Entry]:
    return [entry for entry in entries if entry.verdict.outcome in outcomes]


def _with_failed_rows(entries: Iterable[Entry]) -> list[Entry]:
    """Tables with a sound row that has an error."""
    return [entry for entry in entries if entry.verdict.failed_rows]


def _first(entries: Sequence[Entry]) -> str:
    """The first of what is wrong, with the seconds at which it ended."""
    if not entries:
        return ""
    entry = entries[0]
    return f"; the first: {entry.client} at {entry.ended:.0f} s: {entry.verdict.problem[:200]}"
