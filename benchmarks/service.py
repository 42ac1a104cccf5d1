"""What is measured: `vllm-dropin serve` on the example, the engine that it starts, and DRUM on an engine of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import aiohttp
from scripts.check_contract import install_incumbent
from tests.contract.drivers import Driver, Engine, Incumbent, Ours, Service, envelopes, start
from tests.contract.folders import make_folder

from benchmarks.load import ROW_TOKENS, SYSTEM_PROMPT, Session, engine, gateway

EXAMPLE = Path(__file__).parent.parent / "examples" / "smollm2"
START_LIMIT = 600.0
_POLL = 0.02
_WORKER = b"vllm_dropin.gateway.worker"
_TICKS = os.sysconf("SC_CLK_TCK")

# Both products get the same parameters, whatever the folder's defaults are.
PARAMETERS = envelopes(
    {
        "system_prompt": ("string", SYSTEM_PROMPT),
        "max_tokens": ("numeric", ROW_TOKENS),
        "temperature": ("numeric", 0),
        "n": ("numeric", 1),
    }
)
# What `vllm-dropin` sets on a CPU by itself, for the engine of the other.
INCUMBENT_ENGINE = ("--enforce-eager",)
INCUMBENT_ENVIRON = {"VLLM_CPU_KVCACHE_SPACE": "2"}


@dataclass(frozen=True)
class Memory:
    """Resident bytes of a process: now, and the most it ever had."""

    now: int
    peak: int


@dataclass(frozen=True)
class Serving:
    """Our service, ready. `lag`: seconds from the engine's first healthy answer to our first ready one."""

    service: Service
    engine_socket: Path
    lag: float
    supervisor_when_ready: Memory
    worker_when_ready: Memory

    @property
    def supervisor(self) -> int:
        assert self.service.process
        return self.service.process.pid

    @property
    def worker(self) -> int:
        """The gateway process: there is one, by default."""
        return worker_of(self.supervisor)


class Bench:
    """What the benchmarks share: the options, and services that are started when first asked for. A context manager."""

    def __init__(
        self, engine_python: Path, drum: Path | None, pairs: int, rows: int, say: Callable[[str], None]
    ) -> None:
        self.engine_python = engine_python
        self.drum = drum
        self.pairs = pairs
        self.rows = rows
        self.say = say
        self._stack = ExitStack()
        self._serving: Serving | None = None

    def __enter__(self) -> Bench:
        # Short, because a unix socket's path has at most 107 bytes.
        self.scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vdb-", dir="/tmp")))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start_ours(self, name: str) -> Service:
        """Start our product on the example, in a folder of this name below scratch; the caller stops it."""
        scratch = self._folder(name)
        environ = {**PARAMETERS, "VLLM_DROPIN_RUNTIME_DIR": str(scratch / "run")}
        return self._start(Ours(), EXAMPLE, scratch, environ)

    def _start(self, driver: Driver, folder: Path, scratch: Path, environ: dict[str, str]) -> Service:
        # Where this is set, each process would compile our sources anew; an installed product has them compiled.
        environ = {**environ, "PYTHONDONTWRITEBYTECODE": ""}
        return start(driver, folder, Engine(self.engine_python), scratch, environ)

    def _folder(self, name: str) -> Path:
        folder = self.scratch / name
        folder.mkdir()
        return folder

    def serving(self) -> Serving:
        """Our service, ready, the same for all benchmarks."""
        if self._serving is None:
            self.say("starting the service and its engine")
            service = self.start_ours("ours")
            self._stack.callback(service.stop)
            self._serving = asyncio.run(_ready(service, self.scratch / "ours" / "run"))
        return self._serving

    def incumbent(self) -> Service:
        """DRUM, ready, on the same model, engine build and engine flags. The caller stops it."""
        with redirect_stdout(sys.stderr):  # only the table belongs to stdout
            drum = self.drum or install_incumbent()
        self.say("starting DRUM and its engine")
        scratch = self._folder("drum")
        arguments = json.loads((EXAMPLE / "engine_config.json").read_text(encoding="utf-8"))["args"]
        folder = make_folder(scratch / "model", weights=False, args=[*arguments, *INCUMBENT_ENGINE])
        (folder / "vllm").symlink_to(EXAMPLE / "vllm")
        environ = {**PARAMETERS, **INCUMBENT_ENVIRON}
        service = self._start(Incumbent(drum), folder, scratch, environ)
        try:
            return service.wait_ready(START_LIMIT)
        except BaseException:
            service.stop()
            raise


async def _ready(service: Service, runtime: Path) -> Serving:
    """Watch the engine's health and our readiness side by side, each asked every 20 ms."""
    assert service.process
    deadline = time.monotonic() + START_LIMIT

    async def first_success(session: Session, path: str) -> float:
        while time.monotonic() < deadline:
            try:
                async with session.get(path) as response:
                    if response.status == 200:
                        return time.perf_counter()
            except aiohttp.ClientError:
                pass  # not listening yet
            if service.process and service.process.poll() is not None:
                break
            await asyncio.sleep(_POLL)
        raise RuntimeError(f"the service does not get ready\n{service.output()[-3000:]}")

    async with gateway(service.url) as public:
        ready = asyncio.create_task(first_success(public, "/readyz"))
        while not (sockets := list(runtime.glob("vllm-dropin-*/engine.sock"))):
            if ready.done():
                await ready
                raise RuntimeError(f"ready without an engine socket in {runtime}")
            await asyncio.sleep(_POLL)
        async with engine(sockets[0]) as bare:
            healthy_at = await first_success(bare, "/health")
        ready_at = await ready
    worker = worker_of(service.process.pid)
    return Serving(service, sockets[0], ready_at - healthy_at, memory(service.process.pid), memory(worker))


def worker_of(supervisor: int) -> int:
    """The gateway worker among the supervisor's children."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text(encoding="utf-8").split()
    return next(int(pid) for pid in children if _WORKER in Path(f"/proc/{pid}/cmdline").read_bytes())


def memory(pid: int) -> Memory:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    fields = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    return Memory(*(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")))


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all of its threads; steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
