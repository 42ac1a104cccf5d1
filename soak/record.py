"""What one run is asked to do, and all that was seen in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from soak.faults import Happened
from soak.ledger import Entry
from soak.sampler import Gauges, Probe, Process
from soak.service import Options


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    minutes: float
    seed: int
    control: bool
    output: Path
    options: Options


@dataclass
class Ending:
    """How the service ended. `late`: clients that did not come to an end; `quiet`: our gauges when all had."""

    late: int = 0
    quiet: Gauges | None = None
    restarts: int | None = None
    exit_code: int | None = None
    exit_seconds: float = 0.0
    left: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)


@dataclass
class Run:
    """All that was seen. Times in seconds since its begin. `failure`: what ended it before its time, if anything did.

    `told`: how often the platform was told of a new engine, and took it.
    `ready` is when the load began, `load_ended` when the clients were told to ask nothing more.
    """

    plan: Plan
    ready: float = 0.0
    load_ended: float = 0.0
    interrupted: bool = False
    failure: str = ""
    asked: int = 0
    entries: list[Entry] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    gauges: list[Gauges] = field(default_factory=list)
    faults: list[Happened] = field(default_factory=list)
    hang_reports: int = 0
    told: int = 0
    ending: Ending = field(default_factory=Ending)
