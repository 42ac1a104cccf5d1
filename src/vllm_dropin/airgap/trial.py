"""The trial: a model folder is served where no network is, is asked, and is stopped.

`hold` runs on our side. It starts this module as a program under a guardian, so that nothing outlives us; the program
enters the namespaces, starts `vllm-dropin serve` in them, asks over loopback and writes down what happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import errno
import functools
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from vllm_dropin.airgap import image_root, isolation
from vllm_dropin.airgap.isolation import Contact
from vllm_dropin.errors import EngineError
from vllm_dropin.supervisor.process import GuardedProcess

PORT = 8080
"""The image's. Nobody else is in this network."""
_HOST = "127.0.0.1"
_POLL = 0.1
"""Seconds between two looks at /status."""
_STOP_SECONDS = 60.0
_ANSWER_SECONDS = 300.0
_KEPT_LINES = 40
_WHO = {"starting": "the service", "hook": "custom.py", "downloading": "the download", "failed": "the service"}
"""Whose phase it is; all others are the engine's."""


@dataclass(frozen=True)
class Plan:
    """What is to be tried. `seconds` are for the start, the hook included; `root` is an image's, else ours is used."""

    argv: tuple[str, ...]
    folder: Path
    question: str
    column: str
    seconds: float
    root: Path | None = None
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Wanted:
    """A host that somebody wanted, and the phase of the service at that time: in `hook` it was custom.py."""

    host: str
    phase: str

    def __str__(self) -> str:
        return f"{_WHO.get(self.phase, 'the engine')} wanted {self.host}"


@dataclass(frozen=True)
class Outcome:
    """How it went. Without `isolated` nothing was started, and `why` says why; with `problem` it did not serve."""

    isolated: bool
    why: str = ""
    shielded: bool = False
    """Whether what was written into the folder was kept out of it."""
    problem: str = ""
    remedy: str = ""
    phase: str = ""
    """The last that was seen."""
    ready_seconds: float | None = None
    answer: str | None = None
    prediction: str | None = None
    exit_code: int | None = None
    wanted: tuple[Wanted, ...] = ()
    log: tuple[str, ...] = field(default=(), repr=False)
    """The last lines that were said."""


def hold(plan: Plan, scratch: Path) -> Outcome:
    """Try the folder; `scratch` takes what is written. Everything that was started has ended when this returns.

    Raises EngineError when the trial itself breaks down, SystemExit after SIGTERM.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        return asyncio.run(_hold(plan, scratch))
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


async def _hold(plan: Plan, scratch: Path) -> Outcome:
    task = asyncio.current_task()
    assert task is not None
    # An exception out of a signal's handler would end the loop before all that was started has ended.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    plan_file, result = scratch / "plan.json", scratch / "outcome.json"
    # The environment, which has secrets, travels as one, not in a file.
    told = {**asdict(plan), "folder": str(plan.folder), "root": str(plan.root) if plan.root else None, "environ": {}}
    plan_file.write_text(json.dumps(told), encoding="utf-8")
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    argv = (sys.executable, "-P", "-m", __name__, str(plan_file), str(result))
    process = await GuardedProcess.start(argv, plan.environ, Path.cwd(), lines.append)
    try:
        async with asyncio.timeout(plan.seconds + 2 * _ANSWER_SECONDS + 2 * _STOP_SECONDS):
            status = await process.wait()
    except TimeoutError:
        raise EngineError("the trial did not end in time and was killed") from None
    finally:
        if not process.ended:
            await asyncio.shield(process.stop())
    if not result.exists():
        raise EngineError("\n".join([f"the trial ended without a result ({status})", *list(lines)[-5:]]))
    found = json.loads(result.read_text(encoding="utf-8"))
    found["wanted"] = tuple(Wanted(**wanted) for wanted in found["wanted"])
    return Outcome(**{**found, "log": tuple(lines)})


class _Fault(Exception):
    """The service does not do what it should."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


class _Service:
    """`serve` in this network, as its only client sees it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._began = time.monotonic()
        enter = functools.partial(image_root.enter, plan.root) if plan.root else None
        self._process = subprocess.Popen(plan.argv, stdin=subprocess.DEVNULL, preexec_fn=enter)
        self.status: Mapping[str, Any] = {}

    @property
    def phase(self) -> str:
        return str(self.status.get("phase", "starting"))

    def wait(self) -> float:
        """Seconds until it was ready. Raises _Fault."""
        deadline = self._began + self._plan.seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                code, body = self.ask("GET", "/status", timeout=5)
                self.status = json.loads(body) if code == 200 else self.status
            if self.phase == "ready":
                return time.monotonic() - self._began
            if error := self.status.get("error"):
                raise _Fault(error["message"], error["remedy"])
            if self._process.poll() is not None:
                raise _Fault(f"serve ended with exit code {self._process.returncode} before it was ready")
            time.sleep(_POLL)
        stage = f" ({self.status['stage']})" if self.status.get("stage") else ""
        raise _Fault(
            f"not ready after {self._plan.seconds:g} s: {self.phase}{stage}", "Find in the log what it waits for."
        )

    def chat(self) -> str:
        """What the model says to the question. Raises _Fault."""
        question = {"messages": [{"role": "user", "content": self._plan.question}], "max_tokens": 64}
        document = self._answer("/v1/chat/completions", json.dumps(question).encode(), "application/json")
        try:
            return str(document["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError):
            raise _Fault(f"/v1/chat/completions answered without a choice: {str(document)[:200]}") from None

    def predict(self) -> str:
        """What the model says to the question as a CSV row. Raises _Fault."""
        table = io.StringIO()
        csv.writer(table).writerows([[self._plan.column], [self._plan.question]])
        document = self._answer("/predict/", table.getvalue().encode(), "text/csv")
        try:
            (prediction,) = document["predictions"]
        except (KeyError, TypeError, ValueError):
            raise _Fault(f"/predict/ answered something else than one prediction: {str(document)[:200]}") from None
        return str(prediction)

    def _answer(self, path: str, body: bytes, kind: str) -> Any:
        try:
            code, answer = self.ask("POST", path, body, kind, _ANSWER_SECONDS)
            document = json.loads(answer)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _Fault(f"{path} did not answer: {error!r}") from None
        if code != 200:
            raise _Fault(f"{path} answered {code}: {answer.decode(errors='replace')[:300]}")
        return document

    def ask(self, method: str, path: str, body: bytes = b"", kind: str = "", timeout: float = 5) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(_HOST, PORT, timeout=timeout)
        try:
            connection.request(method, path, body or None, {"Content-Type": kind} if kind else {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def stop(self) -> int | None:
        """The exit code after SIGTERM, or None for one that had to be killed."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            return self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return None

    def phase_at(self, moment: float) -> str:
        """The phase at a time, by the timeline of /status."""
        phase = "starting"
        for entry in self.status.get("timeline", ()):
            if datetime.fromisoformat(entry["at"]).timestamp() > moment:
                break
            phase = entry["phase"]
        return str(phase)


def _try(plan: Plan, outcome: Outcome, watch: isolation.Watch) -> Outcome:
    """From the first to the last process of the service."""
    service: _Service | None = None
    with watch:
        try:
            service = _Service(plan)
            outcome = replace(outcome, ready_seconds=round(service.wait(), 1))
            outcome = replace(outcome, answer=service.chat())
            outcome = replace(outcome, prediction=service.predict())
        except _Fault as fault:
            outcome = replace(outcome, problem=fault.problem, remedy=fault.remedy)
        except (OSError, subprocess.SubprocessError) as error:
            outcome = replace(outcome, problem=f"{plan.argv[0]} can't be started: {error}")
        finally:
            code = service.stop() if service else None
    if service is None:
        return outcome
    wanted = tuple(_attributed(contact, service) for contact in watch.contacts)
    outcome = replace(outcome, phase=service.phase, exit_code=code, wanted=wanted)
    if not outcome.problem and code != 0:
        how = "had to be killed" if code is None else f"ended with exit code {code}"
        outcome = replace(outcome, problem=f"after SIGTERM it {how}", remedy="The log says what it could not end.")
    return outcome


def _attributed(contact: Contact, service: _Service) -> Wanted:
    return Wanted(str(contact), service.phase_at(contact.at))


def _main(plan_file: Path, result: Path) -> int:
    told = json.loads(plan_file.read_text(encoding="utf-8"))
    root = Path(told["root"]) if told["root"] else None
    plan = Plan(**{**told, "argv": tuple(told["argv"]), "folder": Path(told["folder"]), "root": root})
    signal.signal(signal.SIGTERM, _leave)
    outcome = _isolate(plan, plan_file.parent)
    if outcome.isolated:
        try:
            watch = isolation.Watch()
        except OSError as error:
            outcome = Outcome(False, f"the kernel lets nobody listen to this network ({error.strerror or error})")
        else:
            outcome = _try(plan, outcome, watch)
    draft = result.with_suffix(".new")
    draft.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    draft.replace(result)
    return 0


def _isolate(plan: Plan, scratch: Path) -> Outcome:
    """Enter the namespaces and prepare the folder there, and the image's root, where there is one."""
    if plan.root is not None and os.geteuid() != 0:
        return Outcome(False, "not root")
    try:
        isolation.enter()
    except OSError as error:
        return Outcome(False, f"the kernel refuses a network namespace ({error.strerror or error})")
    shielded = isolation.shield(plan.folder, scratch / "folder")
    if plan.root is None:
        isolation.forget_names(scratch)
    else:
        try:
            if not shielded:
                raise OSError(errno.EROFS, "no overlay can be had over the model folder")
            image_root.prepare(plan.root, plan.folder, scratch)
        except OSError as error:
            return Outcome(False, f"the image's root can't be entered ({error.strerror or error})")
    return Outcome(True, shielded=shielded)


def _leave(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), Path(sys.argv[2])))
