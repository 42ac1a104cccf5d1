"""What `verify` found: steps, each ok, failed or not checked, and what follows from them."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_dropin.errors import ConfigurationError, DropinError, InputOutputError


class Verdict(enum.StrEnum):
    """Of a step. What could not be looked at is not ok."""

    OK = "ok"
    FAILED = "failed"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True)
class Problem:
    """Something that would go wrong in the cluster. `message` names the file, `remedy` says what to do."""

    message: str
    remedy: str = ""


@dataclass(frozen=True)
class Finding:
    """What one step found out. `facts` are for programs."""

    detail: str
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class NotChecked(Exception):
    """A step can't be taken; the text says why, and how it could."""


@dataclass(frozen=True)
class Step:
    """One step that was taken, or not."""

    name: str
    verdict: Verdict
    detail: str
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0
    exit_code: int = 0


def take(name: str, work: Callable[[], Finding]) -> Step:
    """Take a step. An error that it raises is what it found."""
    began = time.monotonic()
    code = ConfigurationError.exit_code
    try:
        found = work()
    except NotChecked as reason:
        return Step(name, Verdict.NOT_CHECKED, str(reason))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        found = Finding("", (Problem(f"{place}{error.strerror or error}", "Check the disk and the permissions."),))
        code = InputOutputError.exit_code
    except DropinError as error:
        found = Finding("", (Problem(error.message, error.remedy),))
        code = error.exit_code if isinstance(error, InputOutputError) else code
    seconds = round(time.monotonic() - began, 2)
    if found.problems:
        detail = found.detail or found.problems[0].message.partition("\n")[0]
        return Step(name, Verdict.FAILED, detail, found.problems, found.warnings, found.facts, seconds, code)
    return Step(name, Verdict.OK, found.detail, (), found.warnings, found.facts, seconds)


@dataclass(frozen=True)
class Report:
    """All steps, in their order."""

    steps: tuple[Step, ...]

    def of(self, verdict: Verdict) -> tuple[Step, ...]:
        """The steps with this verdict."""
        return tuple(step for step in self.steps if step.verdict is verdict)

    def exit_code(self, strict: bool = False) -> int:
        """0 when nothing failed (and, when strict, nothing was left unchecked); 74 when only the disk was at fault."""
        codes = {step.exit_code for step in self.of(Verdict.FAILED)}
        if strict and self.of(Verdict.NOT_CHECKED):
            codes.add(ConfigurationError.exit_code)
        return max(codes, default=0)

    def document(self, strict: bool = False) -> dict[str, Any]:
        """For programs. Keys are only ever added."""
        return {
            "ok": self.exit_code(strict) == 0,
            "complete": not self.of(Verdict.NOT_CHECKED),
            "steps": [{**asdict(step), "verdict": str(step.verdict)} for step in self.steps],
        }
