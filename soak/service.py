"""The service under test: `vllm-dropin serve examples/smollm2` with the real engine, and every process of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
from benchmarks.load import gateway
from tests.contract.drivers import Engine, Ours, Service, start

from soak.batches import KEY as BATCH_KEY

EXAMPLE = Path(__file__).parent.parent / "examples" / "smollm2"
START_LIMIT = 600.0
"""Seconds for the first start: on a new checkout the example's hook unpacks the weights."""
GET_LIMIT = 5.0
DRAIN = 60.0
"""Seconds of `--drain-timeout`."""
_ROLES = (
    (b"vllm_dropin.gateway.worker", "worker"),
    (b"guardian.py", "guardian"),
    (b"EngineCore", "engine core"),
    (b"VLLM::Worker", "engine worker"),
    (b"vllm.entrypoints", "engine front end"),
)


@dataclass(frozen=True)
class Options:
    """How the service is started. Seconds, and numbers of requests."""

    engine_python: Path
    hang_timeout: int
    workers: int = 2
    max_in_flight: int = 32
    max_queue: int = 32

    def flags(self, scratch: Path) -> list[str]:
        flags = {
            "--api-key-file": scratch / "keys",
            "--runtime-dir": scratch / "run",
            "--state-dir": scratch / "state",
            "--workers": self.workers,
            "--max-in-flight": self.max_in_flight,
            "--max-queue": self.max_queue,
            "--hang-timeout": self.hang_timeout,
            "--drain-timeout": int(DRAIN),
        }
        # More faults than the budget has restarts, and no longer pauses with each of them.
        parameters = ("--param", "max_watchdog_restarts=1000", "--param", "max_watchdog_backoff_sec=1")
        return [*(str(part) for pair in flags.items() for part in pair), *parameters]


@dataclass
class _Command:
    """The driver of tests/contract, with our options."""

    flags: list[str]
    name: str = "soak"

    def command(self, folder: Path, engine: Engine, port: int, scratch: Path) -> list[str]:
        return [*Ours().command(folder, engine, port, scratch), *self.flags]

    def environ(self, engine: Engine) -> dict[str, str]:
        return {}


class Target:
    """One service from its start to the last of its processes. A context manager, which leaves nothing behind.

    Its log is the file `log` in `output`; everything else is in a temporary folder.
    """

    def __init__(self, options: Options, output: Path, environ: dict[str, str] | None = None) -> None:
        self.options = options
        self._output = output
        self._environ = environ or {}
        # Short, because a unix socket's path has at most 107 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix="vds-", dir="/tmp", ignore_cleanup_errors=True)
        self._scratch = Path(self._folder.name)
        self.key = "soak-0"
        """The key that clients use; `write_keys` says which are accepted."""
        self._session: aiohttp.ClientSession | None = None
        self._service: Service | None = None

    async def __aenter__(self) -> Self:
        self.write_keys([self.key])
        command = _Command(self.options.flags(self._scratch))
        self._service = start(command, EXAMPLE, Engine(self.options.engine_python), self._output, self._environ)
        self._session = await gateway(self._service.url).__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._require_session().close()
        await asyncio.to_thread(self.end)

    def end(self) -> None:
        """Stop whatever is left of the service, and take its folder away."""
        if self._service is not None:
            self._service.stop()
        self._folder.cleanup()

    @property
    def service(self) -> Service:
        assert self._service, "a target is used as a context manager"
        return self._service

    @property
    def url(self) -> str:
        return self.service.url

    @property
    def supervisor(self) -> int:
        assert self.service.process
        return self.service.process.pid

    @property
    def running(self) -> bool:
        assert self.service.process
        return self.service.process.poll() is None

    def write_keys(self, keys: Iterable[str]) -> None:
        """Replace the key file: these, and the one of `score`. The service reads it at SIGHUP."""
        new = self._scratch / "keys.new"
        new.touch(mode=0o600)
        new.write_text("".join(f"{key}\n" for key in (*keys, BATCH_KEY)))
        new.replace(self._scratch / "keys")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the supervisor."""
        os.kill(self.supervisor, number)

    def processes(self) -> dict[int, str]:
        """Every live process of the service, with its part in it."""
        return {pid: self._role(pid) for pid in self.service.processes()}

    def _role(self, pid: int) -> str:
        if pid == self.supervisor:
            return "supervisor"
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return "other"
        role = next((role for mark, role in _ROLES if mark in command), "other")
        return f"worker {command.split(bytes(1))[5].decode()}" if role == "worker" else role

    def runtime_folders(self) -> list[str]:
        """What the service has not taken away of its runtime folder."""
        return [path.name for path in (self._scratch / "run").glob("*")]

    def log(self) -> str:
        return self.service.output()

    async def get(self, path: str, key: str | None = None, *, fresh: bool = False) -> tuple[int | None, bytes]:
        """GET, perhaps on a connection of its own; status None when there is no answer within five seconds."""
        headers = {"Authorization": f"Bearer {key or self.key}"}
        if fresh:
            headers["Connection"] = "close"
        try:
            async with (
                asyncio.timeout(GET_LIMIT),
                self._require_session().get(path, headers=headers) as response,
            ):
                return response.status, await response.read()
        except (aiohttp.ClientError, OSError):  # TimeoutError is an OSError
            return None, b""

    async def status(self) -> dict[str, Any]:
        """/status. Raises RuntimeError when there is no answer, asked three times."""
        for _ in range(3):
            status, body = await self.get("/status")
            if status == 200:
                told: dict[str, Any] = json.loads(body)
                return told
        raise RuntimeError(f"/status answers {status}: {body[:200]!r}")

    async def wait_ready(self, seconds: float) -> None:
        """Until it is ready. Raises RuntimeError with the end of its log when it ends, or is not ready in time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while (await self.get("/readyz"))[0] != 200:
            if not self.running or loop.time() > deadline:
                raise RuntimeError(f"the service does not get ready\n{self.log()[-3000:]}")
            await asyncio.sleep(0.1)

    async def exit_code(self, seconds: float) -> int | None:
        """Its exit code; None when it still runs after that time."""
        return await asyncio.to_thread(self.service.exit_code, seconds)

    def _require_session(self) -> aiohttp.ClientSession:
        assert self._session, "a target is used as a context manager"
        return self._session
