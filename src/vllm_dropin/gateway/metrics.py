"""Prometheus text: our counters, summed over all workers, then the engine's own text (decision 16)."""

from __future__ import annotations

from vllm_dropin.gateway.state import Gauge, Phase, SharedState, Total

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_GAUGES: tuple[tuple[Gauge, str], ...] = (
    ("in_flight", "Requests that the engine is working on."),
    ("waiting", "Reads from the engine that have not come back yet."),
    ("queued", "Requests waiting for a place."),
    ("rows_in_flight", "Rows of accepted requests that are not answered yet."),
    ("rows_at_engine", "Rows that the engine is working on."),
    ("held_bytes", "Bytes of bodies and answers held for clients."),
)
_TOTALS: tuple[tuple[Total, str], ...] = (
    ("requests", "Requests received."),
    ("errors", "Responses with status 5xx, and streams that broke off."),
    ("refused", "Requests refused with 429."),
    ("rows", "Rows scored, failed ones included."),
    ("row_errors", "Rows that failed."),
    ("engine_retries", "Requests sent to the engine again."),
    ("chunks", "Pieces of completions read from the engine."),
)


def exposition(state: SharedState, engine_text: bytes | None) -> bytes:
    """The text; `engine_text` is None while the engine is down."""
    lines: list[str] = []

    def sample(name: str, kind: str, text: str, value: float, labels: str = "") -> None:
        lines.append(f"# HELP vllm_dropin_{name} {text}")
        lines.append(f"# TYPE vllm_dropin_{name} {kind}")
        lines.append(f"vllm_dropin_{name}{labels} {value}")

    sample("engine_up", "gauge", "Whether the engine answers.", int(engine_text is not None))
    sample("ready", "gauge", "Whether new work is taken.", int(state.phase is Phase.READY and not state.draining))
    sample("draining", "gauge", "Whether the service is shutting down.", int(state.draining))
    sample("engine_starts_total", "counter", "Engines started so far.", state.generation)
    lines.append("# HELP vllm_dropin_phase Where the service stands; the current phase is 1.")
    lines.append("# TYPE vllm_dropin_phase gauge")
    current = state.phase
    lines.extend(f'vllm_dropin_phase{{phase="{phase.label}"}} {int(phase is current)}' for phase in Phase)
    for gauge, text in _GAUGES:
        sample(gauge, "gauge", text, state.total(gauge))
    for total, text in _TOTALS:
        sample(f"{total}_total", "counter", text, state.total(total))
    return "\n".join(lines).encode() + b"\n" + (engine_text or b"")
