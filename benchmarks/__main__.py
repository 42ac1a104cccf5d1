"""`python -m benchmarks [NAME…]`: measure, print one table. See docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import incumbent, latency, memory, overload, report, rows, scale, score, startup, streams
from benchmarks.service import Bench

ROOT = Path(__file__).parent.parent
# Memory is last: its peak is that of the whole run.
BENCHMARKS: dict[str, Callable[[Bench], list[report.Figure]]] = {
    module.NAME: module.measure
    for module in (startup, latency, streams, rows, incumbent, score, scale, overload, memory)
}


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=report.__doc__)
    engine = os.environ.get("VLLM_DROPIN_ENGINE_PYTHON") or ROOT / ".venv-engine" / "bin" / "python"
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--pairs", type=int, default=5, metavar="N", help="repetitions of each side (default: 5)")
    parser.add_argument("--rows", type=int, default=200_000, metavar="N", help="rows of `scale` (default: 200000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--engine-python", type=Path, default=Path(engine), metavar="FILE", help="Python with vLLM")
    parser.add_argument("--drum", type=Path, metavar="FILE", help="DRUM's script (default: install .venv-incumbent)")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(BENCHMARKS)):
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if not arguments.engine_python.exists():
        parser.error(f"{arguments.engine_python} is missing: make bench sets it up")
    return arguments


def main() -> int:
    """Measure and print. The exit code says that it ran, not that every bar was met."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is stopped
    machine = report.machine()
    if machine["load_before"] > 0.5 * machine["cores"]:
        say(f"the machine is busy (load {machine['load_before']:.1f} on {machine['cores']} cores): expect noise")
    figures: list[report.Figure] = []
    with Bench(arguments.engine_python.absolute(), arguments.drum, arguments.pairs, arguments.rows, say) as bench:
        for name, measure in BENCHMARKS.items():
            if not arguments.names or name in arguments.names:
                say(f"measuring {name}")
                measured = measure(bench)
                figures += measured
                for line in report.text(measured).splitlines()[1:]:
                    say(f"  {line}")  # the table comes minutes later
    print(report.markdown(figures) if arguments.markdown else report.text(figures))
    say(f"{report.summary(figures)} on {machine['cores']} cores ({machine['cpu']}), Python {machine['python']}")
    if arguments.json:
        record = {"machine": machine, "pairs": arguments.pairs, "figures": [figure.record() for figure in figures]}
        arguments.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
