"""Run the contract suite against ours and against the incumbent, side by side, and print what came out.

    python scripts/check_contract.py [--only ours|incumbent] [--engine stub|real] [--drum PATH] [--docs]

Both are given the same stub engine, then the same build of vLLM and the same model. The incumbent (proprietary: it is
installed to be run, nothing of it is shipped) lives in .venv-incumbent, made from requirements/incumbent.lock.

What is expected to come out different is data: tests/contract/differences.toml. Exit code 1 when ours fails anything,
when the incumbent fails what the data does not know, or passes what the data says it fails. `--docs` writes the last
section of docs/http.md from the data instead. What `--only` and `--engine` leave out is read from its last run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / ".cache" / "contract"
DIFFERENCES = ROOT / "tests" / "contract" / "differences.toml"
PAGE = ROOT / "docs" / "http.md"
BEGIN = "<!-- begin: made by `python scripts/check_contract.py --docs` from tests/contract/differences.toml -->"
END = "<!-- end -->"
VENV = ROOT / ".venv-incumbent"
ENGINE = Path(os.environ.get("VLLM_DROPIN_ENGINE_PYTHON") or ROOT / ".venv-engine" / "bin" / "python3")
EXAMPLE = ROOT / "examples" / "smollm2"
ENGINES = {"stub": "not e2e", "real": "e2e"}
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same: which tests show it, and both sides in words."""

    tests: tuple[str, ...]
    kind: str
    what: str
    incumbent: str
    ours: str
    why: str

    def covers(self, test: str) -> bool:
        """Whether a test belongs here: by its name, with or without its parameters in brackets."""
        return test in self.tests or test.partition("[")[0] in self.tests


@dataclass
class Test:
    """What one test asked, and how it ended for each product."""

    asks: str = ""
    outcomes: dict[str, str] = field(default_factory=dict)


def read_differences() -> list[Difference]:
    entries = tomllib.loads(DIFFERENCES.read_text(encoding="utf-8"))["difference"]
    return [Difference(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def install_incumbent() -> Path:
    """Make .venv-incumbent once and return its `drum`."""
    lock = ROOT / "requirements" / "incumbent.lock"
    stamp = VENV / ".complete"
    if not stamp.exists() or stamp.read_bytes() != lock.read_bytes():
        print("check-contract: installing the incumbent into .venv-incumbent (about 2 minutes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
        pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*pip, "-r", str(lock)], check=True)
        stamp.write_bytes(lock.read_bytes())
    return VENV / "bin" / "drum"


def unpack_example() -> None:
    """Let the example's own hook make its weights, if they are not there yet."""
    if not (EXAMPLE / "vllm").exists():
        code = "import custom, os; custom.load_model(os.getcwd())"
        environ = {**os.environ, "CODE_DIR": str(EXAMPLE)}
        subprocess.run([str(ENGINE), "-c", code], cwd=EXAMPLE, env=environ, check=True)


def run_suite(report: Path, driver: str, engine: str, environ: Mapping[str, str]) -> None:
    """Run the suite against one product on one engine into a junit file. Failures are results here, not errors."""
    report.unlink(missing_ok=True)
    print(f"check-contract: running the suite against {driver} on the {engine} engine", flush=True)
    # xunit1: the newer family has no room for a test's properties.
    command = [sys.executable, "-m", "pytest", "tests/contract", "-m", ENGINES[engine], "-q", "--tb=no", "-r", "N"]
    command += ["-o", "junit_family=xunit1", f"--junitxml={report}"]
    environ = {**os.environ, **environ, "CONTRACT_DRIVER": driver}
    done = subprocess.run(command, cwd=ROOT, env=environ, check=False)
    if done.returncode not in (0, 1) or not report.exists():
        raise SystemExit(f"check-contract: pytest ended with {done.returncode}")


def read_report(report: Path, driver: str, tests: dict[str, Test]) -> None:
    """Add one product's outcomes to `tests`, whose keys are `module::test[parameters]`."""
    # The file was written by our own pytest a moment ago.
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        test = tests[name]
        for item in case.iter("property"):
            if item.get("name") == "asks":
                test.asks = item.get("value", "")
        bad = case.find("failure") is not None or case.find("error") is not None
        test.outcomes[driver] = FAILED if bad else SKIPPED if case.find("skipped") is not None else PASSED


def verdict(name: str, test: Test, differences: Sequence[Difference]) -> str:
    """equal, better or different; WORSE, BOTH FAIL or UNKNOWN where somebody has to look."""
    ours, incumbent = (test.outcomes.get(driver, SKIPPED) for driver in ("ours", "incumbent"))
    if ours == FAILED:
        return "WORSE" if incumbent == PASSED else "BOTH FAIL"
    if SKIPPED in (ours, incumbent):
        return "not run"
    if incumbent == PASSED:
        return "equal"
    return next((entry.kind for entry in differences if entry.covers(name)), "UNKNOWN")


def stale(tests: Mapping[str, Test], differences: Sequence[Difference]) -> list[Difference]:
    """The differences that were looked at and did not show."""
    found = []
    for entry in differences:
        outcomes = {test.outcomes.get("incumbent", SKIPPED) for name, test in tests.items() if entry.covers(name)}
        if PASSED in outcomes and FAILED not in outcomes:
            found.append(entry)
    return found


def print_table(tests: Mapping[str, Test], differences: Sequence[Difference]) -> bool:
    """Print one line a question (its parameters counted), and the totals. Returns whether all is as expected."""
    lines: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, test in tests.items():
        lines[(test.asks or name, verdict(name, test, differences))].append(name)
    for (asks, said), names in sorted(lines.items(), key=lambda line: (line[0][0], line[0][1])):
        times = f" (x{len(names)})" if len(names) > 1 else ""
        print(f"{said:<10} {asks}{times}")
        if said.isupper():
            print("".join(f"           {name}\n" for name in names), end="")
    totals: dict[str, int] = defaultdict(int)
    for name, test in tests.items():
        totals[verdict(name, test, differences)] += 1
    print("\n" + ", ".join(f"{count} {said}" for said, count in sorted(totals.items())))
    gone = stale(tests, differences)
    for entry in gone:
        print(f"STALE      {entry.what}: the incumbent passes now")
    return not gone and not any(said.isupper() for said in totals)


def section(differences: Sequence[Difference]) -> str:
    """The data as a section of docs/http.md."""
    parts = [
        "Every line is shown by a test of tests/contract that ours passes and DRUM 1.18.1 fails (`drum server\n"
        "--gpu-predictor=vllm`); `make check-contract` runs both side by side on the same engine.\n"
    ]
    for kind, title in (
        ("better", "Better: the same contract, kept"),
        ("different", "Different: a choice of ours that a client can see"),
    ):
        parts.append(f"\n### {title}\n\n| what | DRUM | vllm-dropin | why |\n| --- | --- | --- | --- |\n")
        for entry in differences:
            if entry.kind == kind:
                parts.append(f"| {entry.what} | {entry.incumbent} | {entry.ours} | {entry.why} |\n")
    return "".join(parts)


def with_section(page: str, differences: Sequence[Difference]) -> str:
    """The page with the section between its two marks made anew."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"check-contract: {PAGE} has lost the marks of its section on differences")
    return f"{before}{begin}\n\n{section(differences)}\n{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description="The contract suite against ours and the incumbent, side by side.")
    parser.add_argument("--only", choices=("ours", "incumbent"), help="run one product")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="run on one engine")
    parser.add_argument("--drum", type=Path, help="a `drum` that is already installed")
    parser.add_argument("--docs", action="store_true", help="write the section of docs/http.md, nothing else")
    options = parser.parse_args()
    differences = read_differences()
    if options.docs:
        PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), differences), encoding="utf-8")
        return 0
    RESULTS.mkdir(parents=True, exist_ok=True)
    environ = {"CONTRACT_ENGINE": str(ENGINE), "CONTRACT_MODEL": str(EXAMPLE / "vllm")}
    if options.engine != "stub":
        unpack_example()
    if options.only != "ours":
        environ["CONTRACT_DRUM"] = str(options.drum or install_incumbent())
    tests: dict[str, Test] = defaultdict(Test)
    for driver in ("ours", "incumbent"):
        for engine in ENGINES:
            report = RESULTS / f"{driver}-{engine}.xml"
            if options.only in (None, driver) and options.engine in (None, engine):
                run_suite(report, driver, engine, environ)
            if report.exists():
                read_report(report, driver, tests)
    return 0 if print_table(tests, differences) else 1


if __name__ == "__main__":
    sys.exit(main())
