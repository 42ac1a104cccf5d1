"""A run that has lost something fails the check that is there for it, and no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from soak.checks import ABORTED_WITHIN, CUT_WITHIN, checks
from soak.faults import Happened
from soak.growth import JUDGED_AFTER
from soak.ledger import Entry
from soak.record import Ending, Plan, Run
from soak.report import longest_stall, report
from soak.sampler import OURS, Gauges, Probe, Process
from soak.schedule import Kind
from soak.service import Options
from soak.verdicts import Outcome, Verdict

READY, END = 60.0, 60.0 + JUDGED_AFTER + 300.0
QUIET = dict.fromkeys(OURS, 0)
KILL = Happened(Kind.KILL_CORE, 200.0, 240.0, last_ready=0.2, ready_again=35.0)
STOP = Happened(Kind.STOP_CORE, 300.0, 360.0, last_ready=28.0, ready_again=140.0)
FAILED_ROW = Verdict(Outcome.ANSWERED, "row 1: the engine crashed on this row", rows=4, failed_rows=1, named=3)
WORKER = Happened(Kind.KILL_WORKER, 400.0, 401.0)


def entry(client: str, ended: float, outcome: Outcome = Outcome.ANSWERED, problem: str = "", rows: int = 0) -> Entry:
    verdict = Verdict(outcome, problem, rows=rows, named=outcome is Outcome.ANSWERED)
    return Entry(client, 1, ended - 1.0, ended - 0.5, ended, 200, verdict)


def memory(role: str, pid: int, grown: int = 0) -> list[Process]:
    times = [READY + 5.0 * index for index in range(int((END - READY) / 5))]
    return [Process(at, pid, role, 50_000_000 + (grown if at > END - 100 else 0), 30, 4) for at in times]


def run(control: bool) -> Run:
    """One that passes."""
    looks = [READY + second for second in range(int(END - READY))]
    return Run(
        Plan(8.0, 7, control, Path("report"), Options(Path("/usr/bin/python3"), 20)),
        ready=READY,
        load_ended=END,
        asked=3,
        entries=[entry("chat", 100.0), entry("table", 110.0, rows=4), entry("farewell", END + 5)],
        processes=[*memory("supervisor", 1), *memory("worker 0", 2), *memory("engine core", 3, grown=90_000_000)],
        probes=[Probe(at, at + 0.01, 200) for at in looks],
        gauges=[Gauges(at, 5, 9, QUIET) for at in looks],
        faults=[] if control else [KILL, STOP, WORKER],
        hang_reports=0 if control else 1,
        told=0 if control else 2,
        ending=Ending(quiet=Gauges(END, 0, 0, QUIET), restarts=0 if control else 2, exit_code=0, exit_seconds=3.0),
    )


def add(run: Run, *entries: Entry) -> None:
    run.asked += len(entries)
    run.entries += entries


def failed(made: Run) -> list[str]:
    return [check.name for check in checks(made) if not check.passed]


@pytest.mark.parametrize("control", [True, False])
def test_a_good_run_passes(control: bool) -> None:
    assert failed(run(control)) == []


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda run: add(run, entry("chat", 90.0, Outcome.WRONG, "1 tokens of 2")), "every request"),
        (lambda run: add(run, entry("chat", 90.0, Outcome.FAILED)), "failed, but"),
        (lambda run: add(run, entry("chat", 300.0, Outcome.REFUSED)), "refused with 429"),
        (lambda run: add(run, entry("chat", WORKER.at + CUT_WITHIN + 1.1, Outcome.CUT)), "cut without"),
        (lambda run: add(run, entry("chat", KILL.at + 0.5, Outcome.CUT)), "cut without"),
        (lambda run: add(run, entry("farewell", END + 5, Outcome.LEFT)), "answers whole"),
        (lambda run: setattr(run, "asked", 4), "every request"),
        (lambda run: add(run, replace(entry("chat", WORKER.at + 10.0, Outcome.CUT), started=WORKER.at)), "cut without"),
        (lambda run: add(run, replace(entry("table", 195.0), verdict=FAILED_ROW)), "failed, but"),
        (lambda run: run.processes.extend(memory("worker 1", 4, grown=40_000_000)), "growth of memory"),
        (lambda run: run.gauges.append(replace(run.gauges[-1], engine=10)), "requests in the engine"),
        (lambda run: run.faults.append(replace(WORKER, problem="no other worker 0")), "faults that were not"),
        (lambda run: run.faults.__setitem__(0, replace(KILL, last_ready=1.2)), "ready was last answered after a kill"),
        (lambda run: run.faults.__setitem__(1, replace(STOP, last_ready=36.0)), "ready was last answered after a stop"),
        (lambda run: run.faults.__setitem__(0, replace(KILL, ready_again=130.0)), "from not ready"),
        (lambda run: setattr(run.ending, "restarts", 3), "restarts of the engine"),
        (lambda run: setattr(run, "told", 1), "restarts that the platform"),
        (lambda run: setattr(run, "told", 3), "restarts that the platform"),
        (lambda run: setattr(run, "hang_reports", 2), "hangs reported"),
        (lambda run: setattr(run.ending, "late", 1), "clients that came to no end"),
        (lambda run: setattr(run.ending, "quiet", Gauges(END, 0, 0, {**QUIET, "in_flight": 1})), "gauges when"),
        (lambda run: setattr(run.ending, "quiet", Gauges(END, 1, 0, QUIET)), "gauges when"),
        (lambda run: setattr(run.ending, "exit_code", 75), "the end after SIGTERM"),
        (lambda run: setattr(run.ending, "left", ["guardian (4711)"]), "processes and folders"),
        (lambda run: setattr(run.ending, "folders", ["vllm-dropin-x"]), "processes and folders"),
        (lambda run: setattr(run, "failure", "the service has ended"), "the run came to its end"),
    ],
)
def test_what_is_wrong_is_found(spoil: Callable[[Run], object], name: str) -> None:
    made = run(control=False)
    spoil(made)
    found = failed(made)
    assert len(found) == 1, found
    assert found[0].startswith(name)


def test_a_table_out_of_order_is_named_as_such() -> None:
    made = run(control=False)
    add(made, entry("table", 90.0, Outcome.WRONG, "row 2 has the answer of row 3"))
    assert "no row lost, doubled or out of order" in failed(made)


@pytest.mark.parametrize(
    ("outcome", "ended"),
    [(Outcome.FAILED, KILL.ended + 0.5), (Outcome.CUT, WORKER.at + CUT_WITHIN), (Outcome.LEFT, 90.0)],
)
def test_what_a_fault_explains_is_no_failure(outcome: Outcome, ended: float) -> None:
    made = run(control=False)
    add(made, entry("chat", ended, outcome))
    assert failed(made) == []


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda run: add(run, entry("chat", 90.0, Outcome.REFUSED)), "nothing failed"),
        (lambda run: run.gauges.append(Gauges(END - 1, 0, 9, QUIET)), "the engine always had work"),
        (lambda run: run.gauges.append(Gauges(END - 1, None, 9, QUIET)), "the engine always had work"),
        (lambda run: run.gauges.clear(), "the engine always had work"),
        (lambda run: run.probes.append(Probe(END - 1, END, 503)), "probes of /readyz"),
        (lambda run: setattr(run.ending, "restarts", 1), "restarts of the engine"),
        (lambda run: setattr(run, "hang_reports", 1), "hangs reported"),
    ],
)
def test_what_the_control_does_not_bear(spoil: Callable[[Run], object], name: str) -> None:
    made = run(control=True)
    spoil(made)
    found = failed(made)
    assert len(found) == 1, found
    assert found[0].startswith(name)


def test_a_row_may_fail_in_a_table_that_was_open_when_an_engine_was_lost() -> None:
    made = run(control=False)
    add(made, replace(entry("table", KILL.ended + 20.0), started=KILL.at - 5.0, verdict=FAILED_ROW))
    assert failed(made) == []


def test_what_was_left_may_be_in_the_engine_for_a_while() -> None:
    made = run(control=False)
    left = [Gauges(END + second, 5, 0, QUIET) for second in range(8)]
    made.gauges += left[: int(ABORTED_WITHIN)]
    assert failed(made) == []
    made.gauges += left[int(ABORTED_WITHIN) :]
    assert failed(made) == ["requests in the engine that nobody waits for"]


def test_a_run_too_short_to_judge_growth_is_not_failed_for_it() -> None:
    made = run(control=False)
    made.load_ended = READY + 60.0
    assert failed(made) == []


def test_a_run_without_any_load_says_that_alone() -> None:
    made = Run(run(control=False).plan, failure="the service does not get ready")
    assert [(check.found, check.passed) for check in checks(made)] == [("the service does not get ready", False)]


def test_the_report_says_what_failed_and_with_which_seed() -> None:
    made = run(control=False)
    assert "**Passed**" in report(made, checks(made))
    made.ending.restarts = 3
    page = report(made, checks(made))
    assert "**FAILED: restarts of the engine**" in page
    assert "seed 7" in page
    assert "| 140 | SIGKILL of the engine core | 0.20 | 35.0 |" in page


def test_the_longest_stall_is_the_soaks_own() -> None:
    """A slow answer is the service's; a probe that is sent late is not."""
    probes = [Probe(0.0, 3.0, 200), Probe(3.2, 3.3, 200), Probe(39.5, 39.6, 200)]
    assert longest_stall(probes) == pytest.approx(36.0)
    assert longest_stall([]) == 0.0
