"""Ten times the load that the service can carry: how soon it refuses, and how long those wait whom it admits.

Once in front of an engine whose service time is fixed, so that its capacity is known, and once of the real one.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from tests.contract.drivers import free_port

from benchmarks import arrivals, load
from benchmarks.arrivals import Report
from benchmarks.report import Bar, Figure, at_least, at_most
from benchmarks.service import Bench, memory, worker_of

NAME = "overload"
ROUNDS = 3
TIMES = 10
PLACES = 256  # --max-in-flight, by default
SERVICE_TIME = 2.0
REAL_PLACES = 64  # the example's --max-num-seqs
REAL_WARM_UP = 8.0  # seconds, twice what an answer takes there
SPAN = 10.0  # seconds after the warm-up, of which the times of the admitted are taken
SEED = 7
TIME_LIMIT = 300.0
START_LIMIT = 60.0
ROOT = Path(__file__).parent.parent
FAKE_ENGINE = ROOT / "tests" / "fake_engine.py"


@dataclass(frozen=True)
class Site:
    """A service with so many places at its engine, which under any load is steady after `warm_up` seconds."""

    name: str
    url: str
    supervisor: int
    places: int
    warm_up: float
    bodies: Path


@dataclass(frozen=True)
class Round:
    """All places taken and nobody waiting, which is the capacity: `rate` chats a second. Then ten times as many.

    `resident`: each process's megabytes (10^6) afterwards.
    """

    rate: float
    full: Report
    storm: Report
    resident: dict[str, float]


def measure(bench: Bench) -> list[Figure]:
    """Three rounds for each engine. A request's time runs from the moment at which it was due to its last byte."""
    with _fixed(bench) as site:
        figures = _figures(bench, site)
    return figures + _figures(bench, _real(bench))


@contextmanager
def _fixed(bench: Bench) -> Iterator[Site]:
    """Our service in front of an engine that takes two seconds for every chat, however many there are."""
    folder = bench.scratch / NAME
    (folder / "model").mkdir(parents=True)
    engine, public = free_port(), free_port()
    command = [str(Path(sys.executable).with_name("vllm-dropin")), "serve", str(folder / "model")]
    command += ["--runtime-dir", str(folder), "--address", f"127.0.0.1:{public}"]
    command += ["--upstream", f"http://127.0.0.1:{engine}"]
    with (folder / "log").open("wb") as log:
        processes = [
            subprocess.Popen([sys.executable, FAKE_ENGINE, "--port", str(engine)], stdout=log),
            subprocess.Popen(command, stdout=log, stderr=log),
        ]
    try:
        url = f"http://127.0.0.1:{public}"
        _wait(lambda: _status(url)["phase"] == "ready")
        bodies = folder / "bodies"
        bodies.write_bytes(load.chat_body(f"hi delay={SERVICE_TIME}"))
        yield Site("fixed time", url, processes[1].pid, PLACES, 2 * SERVICE_TIME, bodies)
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


def _real(bench: Bench) -> Site:
    """The example. Answers have 8 to 56 tokens: of one length, all places would be free and taken at the same times."""
    serving = bench.serving()
    source = random.Random(SEED)
    bodies = (load.chat_body(prompt, source.randint(8, 56), ignore_eos=True) for prompt in load.prompts(400))
    (file := bench.scratch / "bodies").write_bytes(b"\n".join(bodies))
    return Site("real engine", serving.service.url, serving.supervisor, REAL_PLACES, REAL_WARM_UP, file)


def _figures(bench: Bench, site: Site) -> list[Figure]:
    before = _resident(site)
    rounds = []
    for number in range(ROUNDS):
        full = _load(site, "--clients", site.places)
        rate = _answered(site, full)
        bench.say(f"{site.name}, round {number + 1}: answers {rate:.1f} chats a second, {TIMES * rate:.0f} come now")
        rounds.append(Round(rate, full, _load(site, "--rate", TIMES * rate), _resident(site)))

    def figure(name: str, unit: str, value: Callable[[Round], float], bar: Bar | None = None) -> Figure:
        return Figure(NAME, f"{site.name}: {name}", unit, tuple(value(one) for one in rounds), bar)

    def slowest(report: Report) -> float:
        return _p(99, _admitted(site, report))

    return [
        figure("refused, p50", "ms", lambda one: _p(50, _refused(one.storm)) * 1e3),
        figure("refused, p99", "ms", lambda one: _p(99, _refused(one.storm)) * 1e3, at_most(100)),
        figure("admitted, p99 at capacity", "s", lambda one: slowest(one.full)),
        figure("admitted, p99 at 10 times", "s", lambda one: slowest(one.storm)),
        figure("the same, 10 times to capacity", "", lambda one: slowest(one.storm) / slowest(one.full), at_most(2)),
        figure("answers at capacity", "a second", lambda one: one.rate),
        figure("answers at 10 times", "a second", lambda one: _answered(site, one.storm)),
        figure("200s and 429s as they should be", "%", lambda one: _sound(one.full, one.storm), at_least(100)),
        figure("generator late, p99", "ms", lambda one: _p(99, [asked.late for asked in one.storm.asked]) * 1e3),
        figure("generator's share of a core", "%", lambda one: 100 * one.storm.core),
        *(
            Figure(NAME, f"{site.name}: {name} before and after", "MB", (size, *(one.resident[name] for one in rounds)))
            for name, size in before.items()
        ),
        figure("gained since the first round", "MB", lambda one: _gained(rounds[0], one), at_most(8)),
    ]


def _load(site: Site, how: str, number: float) -> Report:
    """A process of its own sends the load; afterwards nothing is left in the service."""
    command = [sys.executable, "-m", "benchmarks.arrivals", how, str(number), site.url, str(site.bodies)]
    command.append(str(site.warm_up + SPAN))
    printed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=TIME_LIMIT).stdout
    _wait(lambda: not any(_status(site.url)["load"].values()))
    return arrivals.read(printed)


def _refused(report: Report) -> list[float]:
    return [asked.took for asked in report.asked if asked.status == 429]


def _admitted(site: Site, report: Report) -> list[float]:
    """What those waited who came when places and queue had had the time to fill."""
    return [asked.took for asked in report.asked if asked.status == 200 and asked.due > site.warm_up]


def _answered(site: Site, report: Report) -> float:
    """Completions a second, once the service was steady and as long as requests came."""
    ends = [asked.due + asked.took for asked in report.asked if asked.status == 200]
    return sum(site.warm_up < end < site.warm_up + SPAN for end in ends) / SPAN


def _sound(*reports: Report) -> float:
    asked = [one for report in reports for one in report.asked]
    return 100 * sum(one.sound for one in asked) / len(asked)


def _gained(first: Round, later: Round) -> float:
    return max(later.resident[name] - first.resident[name] for name in first.resident)


def _p(percent: int, values: Sequence[float]) -> float:
    """The value that so many percent do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[math.ceil(percent / 100 * len(ordered)) - 1]


def _resident(site: Site) -> dict[str, float]:
    processes = {"supervisor": site.supervisor, "gateway worker": worker_of(site.supervisor)}
    return {name: memory(pid).now / 1e6 for name, pid in processes.items()}


def _status(url: str) -> dict[str, Any]:
    try:
        with urlopen(f"{url}/status", timeout=10) as response:
            status: dict[str, Any] = json.load(response)
            return status
    except OSError:
        return {"phase": "not there", "load": {"in_flight": 1}}


def _wait(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_LIMIT
    while not happens():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the service is not where it should be after {START_LIMIT:.0f} s")
        time.sleep(0.05)
