"""Where the service stands, told to the gateway workers and to the log."""

from __future__ import annotations

from datetime import UTC, datetime

from vllm_dropin.errors import DropinError
from vllm_dropin.gateway.state import EngineStatus, Failure, Moment, Phase, SharedState, Status
from vllm_dropin.logging import REDACTOR, get

log = get("supervisor")

TIMELINE_LIMIT = 200
"""Entries of /status `timeline`; the first ten (the start) and the newest are kept."""


def timestamp() -> str:
    """Now, ISO-8601 in UTC with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class PhaseBoard:
    """The single writer of phase, progress, timeline and failure."""

    def __init__(self, state: SharedState, engine_version: str | None) -> None:
        self._state = state
        self._timeline: list[Moment] = []
        self._stage = ""
        self._progress: float | None = None
        self._since = timestamp()
        self._failure: Failure | None = None
        self._engine = EngineStatus(version=engine_version)
        self.enter(Phase.STARTING)

    @property
    def phase(self) -> Phase:
        return self._state.phase

    def enter(self, phase: Phase, stage: str = "", progress: float | None = None) -> None:
        """Begin a phase, or a stage of it. A repeated stage is no new entry in the timeline."""
        changed = phase != self._state.phase or not self._timeline
        if changed or stage != self._stage:
            self._timeline.append(Moment(at=timestamp(), phase=phase.label, stage=stage))
            del self._timeline[10 : max(10, len(self._timeline) - TIMELINE_LIMIT + 10)]
            log.info("%s%s", phase.label, f": {stage}" if stage else "")
        if changed:
            self._since = timestamp()
        self._stage, self._progress = stage, progress
        self._state.phase = phase
        self._publish()

    def fail(self, error: DropinError) -> None:
        """Record why the service can't serve, for /status."""
        self._failure = Failure(
            code=error.code, message=REDACTOR.hide(error.message), remedy=REDACTOR.hide(error.remedy)
        )
        self.enter(Phase.FAILED)

    def engine(self, pid: int | None, restarts: int) -> None:
        """Say which process is the engine now."""
        self._engine = self._engine.model_copy(update={"pid": pid, "restarts": restarts})
        self._publish()

    def _publish(self) -> None:
        status = Status(
            phase=self._state.phase.label,
            stage=self._stage,
            progress=self._progress,
            since=self._since,
            timeline=tuple(self._timeline),
            error=self._failure,
            engine=self._engine,
        )
        try:
            self._state.write_status(status)
        except OSError as error:  # a full disk, a cleaned folder: no reason to stop serving
            log.warning("/status can't be brought up to date: %s", error)
