"""`python -m soak`: run, report, and exit with 1 when a check fails. See docs/reliability-soak.md."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path

from soak.checks import checks
from soak.plot import draw
from soak.record import Plan
from soak.report import report
from soak.run import perform
from soak.service import Options

ROOT = Path(__file__).parent.parent
HANG_TIMEOUT, CONTROL_HANG_TIMEOUT = 20, 30
"""Seconds of --hang-timeout; the product's own 120 would make a fault of three minutes, and the control easier."""


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def _plan() -> Plan:
    parser = argparse.ArgumentParser(prog="python -m soak", description="Load and faults for the real service.")
    engine = os.environ.get("VLLM_DROPIN_ENGINE_PYTHON") or ROOT / ".venv-engine" / "bin" / "python"
    parser.add_argument("--minutes", type=float, default=20.0, metavar="N", help="minutes of load (default: 20)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of load and faults (default: 1)")
    parser.add_argument("--control", action="store_true", help="saturate the engine and do nothing to it")
    parser.add_argument("--hang-timeout", type=int, metavar="SECONDS", help="of the service (default: 20, control: 30)")
    parser.add_argument(
        "--output", type=Path, default=Path("soak-report"), metavar="DIR", help="(default: soak-report)"
    )
    parser.add_argument("--engine-python", type=Path, default=Path(engine), metavar="FILE", help="Python with vLLM")
    arguments = parser.parse_args()
    if not 0 < arguments.minutes <= 24 * 60:
        parser.error(f"--minutes {arguments.minutes:g}: more than 0, a day at most")
    if not arguments.engine_python.exists():
        parser.error(f"{arguments.engine_python} is missing: make soak sets it up")
    if arguments.hang_timeout is not None and arguments.hang_timeout <= 0:
        parser.error(f"--hang-timeout {arguments.hang_timeout}: more than 0, as hangs are a part of it")
    hang = arguments.hang_timeout or (CONTROL_HANG_TIMEOUT if arguments.control else HANG_TIMEOUT)
    options = Options(arguments.engine_python.absolute(), hang)
    if arguments.control:
        options = Options(arguments.engine_python.absolute(), hang, max_in_flight=256, max_queue=256)
    arguments.output.mkdir(parents=True, exist_ok=True)
    return Plan(arguments.minutes, arguments.seed, arguments.control, arguments.output.absolute(), options)


def main() -> int:
    """0: all checks passed; 1: one failed; 130: ended early, and all that could be checked passed."""
    plan = _plan()
    try:
        run = asyncio.run(perform(plan, say))
    except KeyboardInterrupt:
        say("stopped, without a report; nothing is left running")
        return 130
    found = checks(run)
    page = report(run, found)
    (plan.output / "report.md").write_text(page, encoding="utf-8")
    draw(run, plan.output / "soak.png")
    print(page)
    say(f"report: {plan.output / 'report.md'}, soak.png and events.jsonl beside it")
    if not all(check.passed for check in found):
        return 1
    return 130 if run.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
