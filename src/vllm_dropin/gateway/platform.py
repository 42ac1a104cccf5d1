"""What people and platforms ask about the service itself: probes, contract information, /status, /metrics."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from vllm_dropin import __version__
from vllm_dropin.gateway import metrics
from vllm_dropin.gateway.config import GatewayConfig
from vllm_dropin.gateway.engine_client import EngineClient
from vllm_dropin.gateway.errors import (
    PIPELINE_ERROR,
    EngineUnavailable,
    HttpError,
    message_error,
    retry_after,
    send_bytes,
    send_json,
)
from vllm_dropin.gateway.request import DRUM_VERSION, Request
from vllm_dropin.gateway.state import Phase, SharedState

METRICS_TIMEOUT = 2.0
_MEBI = 1 << 20

Handler = Callable[[Request], Awaitable[None]]


class RowTimes:
    """How long row requests took in this worker, in seconds, since the last look (contract: `time_info`)."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=10_000)

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def take(self) -> dict[str, float | None]:
        """The report; counting starts anew, as the incumbent's does."""
        seconds = list(self._seconds)
        self._seconds.clear()
        if not seconds:
            return {"avg": None, "min": None, "max": None, "total": None, "samples": 0}
        total = sum(seconds)
        return {
            "avg": round(total / len(seconds), 6),
            "min": round(min(seconds), 6),
            "max": round(max(seconds), 6),
            "total": round(total, 6),
            "samples": len(seconds),
        }


class Platform:
    """Handlers by path; the app decides who may call them."""

    def __init__(self, config: GatewayConfig, state: SharedState, engine: EngineClient) -> None:
        self._config = config
        self._state = state
        self._engine = engine
        self._parent = os.getppid()
        self.row_times = RowTimes()
        self.operations: dict[str, Handler] = {
            "/livez": self.live,
            "/readyz": self.ready,
            "/startupz": self.started,
            "/status": self.status,
            "/metrics": self.metrics,
            "/version": self.version,
        }
        self.contract: dict[str, Handler] = {
            "/": self.health,
            "/ping": self.health,
            "/health": self.health,
            "/info": self.info,
            "/capabilities": self.capabilities,
            "/stats": self.stats,
        }

    async def health(self, request: Request) -> None:
        """Contract, section 3: 200 ready, 503 not yet or no more, 513 crashed for good."""
        phase = self._state.phase
        if phase is Phase.FAILED:
            await send_json(request.send, PIPELINE_ERROR, message_error(self._cause()))
        elif phase is Phase.READY and not self._state.draining:
            await send_json(request.send, 200, message_error("OK"))
        else:
            await send_json(request.send, 503, message_error(self._unready()), [retry_after(5)])

    async def live(self, request: Request) -> None:
        """200 while the supervisor lives."""
        alive = os.getppid() == self._parent
        await send_json(request.send, 200 if alive else 503, message_error("alive" if alive else "orphaned"))

    async def ready(self, request: Request) -> None:
        """200 while new work is taken, else 503 with the phase."""
        ready = self._state.phase is Phase.READY and not self._state.draining
        await self._probe(request, ready)

    async def started(self, request: Request) -> None:
        """200 once the engine has answered for the first time; a restart does not undo it."""
        await self._probe(request, self._state.phase in (Phase.READY, Phase.RESTARTING, Phase.DRAINING))

    async def _probe(self, request: Request, good: bool) -> None:
        phase = "draining" if self._state.draining else self._state.phase.label
        payload = {"message": "OK" if good else self._unready(), "phase": phase}
        await send_json(request.send, 200 if good else 503, payload)

    def _unready(self) -> str:
        if self._state.draining:
            return "the server is shutting down"
        return f"the engine is not ready: {self._state.phase.label}"

    def _cause(self) -> str:
        """Why the engine failed. Public routes name no detail where keys guard the rest (decision 15)."""
        error = self._state.read_status().error
        if error is None or self._config.api_keys:
            return "the engine has failed; /status says why"
        return error.message

    async def status(self, request: Request) -> None:
        """Decision 14."""
        told = self._state.read_status().model_dump()
        load = {"in_flight": self._state.total("in_flight"), "queued": self._state.total("queued")}
        settings = [setting.model_dump() for setting in self._config.settings]
        await send_json(request.send, 200, {**told, "load": load, "settings": settings})

    async def metrics(self, request: Request) -> None:
        """Ours, and the engine's when it answers."""
        engine_text: bytes | None = None
        if self._state.phase in (Phase.READY, Phase.DRAINING):
            try:
                async with self._engine.request("GET", "/metrics", timeout=METRICS_TIMEOUT) as response:
                    text = await response.read()
                    engine_text = text if response.status == 200 else b""
            except (EngineUnavailable, TimeoutError):
                engine_text = None
        await send_bytes(request.send, 200, metrics.exposition(self._state, engine_text), metrics.CONTENT_TYPE)

    async def version(self, request: Request) -> None:
        """Of this service and of the engine that it runs."""
        engine = self._state.read_status().engine.version
        await send_json(request.send, 200, {"version": __version__, "engine": {"version": engine}})

    async def info(self, request: Request) -> None:
        """Contract, section 3."""
        payload = {
            "codeDir": self._config.code_dir,
            "targetType": self._config.target_type,
            "language": "other",
            "drumVersion": DRUM_VERSION,
            "drumServer": "vllm-dropin",
            "modelMetadata": self._config.model_metadata,
        }
        await send_json(request.send, 200, payload)

    async def capabilities(self, request: Request) -> None:
        """Contract, section 3."""
        payload = {"supported_payload_formats": {"csv": None}, "supported_methods": {"chat": True}}
        await send_json(request.send, 200, payload)

    async def stats(self, request: Request) -> None:
        """Contract, section 3. Memory in MiB; cgroup v2, v1 or none."""
        processes = _processes()
        payload = {
            "mem_info": {**_memory(), "drum_rss": sum(process["mem"] for process in processes)},
            "drum_info": processes,
            "time_info": {"run_predictor_total": self.row_times.take()},
        }
        await send_json(request.send, 200, payload)

    async def unstructured(self, request: Request) -> None:
        """The model is a text generation model: its rows go to /predict/."""
        raise HttpError(422, "ERROR: this is a text generation model; send a CSV to POST /predict/ instead")


def _processes() -> list[dict[str, Any]]:
    """This worker and the supervisor: pid, command line and resident MiB."""
    return [process for pid in (os.getppid(), os.getpid()) if (process := _process(pid))]


def _process(pid: int) -> dict[str, Any] | None:
    folder = Path("/proc") / str(pid)
    try:
        cmdline = (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        pages = int((folder / "statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    words = [word.decode("utf-8", "replace") for word in cmdline]
    return {"pid": pid, "cmdline": words, "mem": round(pages * os.sysconf("SC_PAGE_SIZE") / _MEBI, 1)}


def _memory() -> dict[str, float | None]:
    host = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        host[name] = int(rest.split()[0]) / 1024
    limit, used, most = _cgroup_memory()
    available = host.get("MemAvailable")
    if limit is not None and used is not None:
        available = limit - used
    return {
        "total": host.get("MemTotal"),
        "avail": available,
        "free": host.get("MemFree"),
        "container_limit": limit,
        "container_max_used": most,
        "container_used": used,
    }


def _cgroup_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[float | None, float | None, float | None]:
    """Limit, current use and peak of the container in MiB; None where the kernel does not say or there is no limit."""
    v2 = [_mebibytes(root / f"memory.{name}") for name in ("max", "current", "peak")]
    if any(value is not None for value in v2):
        return v2[0], v2[1], v2[2]
    v1 = root / "memory"
    limit = _mebibytes(v1 / "memory.limit_in_bytes")
    unlimited = limit is not None and limit > 1 << 40  # v1 says "none" with a number near 2**63
    return (
        None if unlimited else limit,
        _mebibytes(v1 / "memory.usage_in_bytes"),
        _mebibytes(v1 / "memory.max_usage_in_bytes"),
    )


def _mebibytes(path: Path) -> float | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return round(int(text) / _MEBI, 1) if text.isdigit() else None
