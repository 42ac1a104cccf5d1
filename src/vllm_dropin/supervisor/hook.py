"""Runs custom.py in a process of its own, once per start, and brings back what it changed in the environment.

The hook runs under the guardian like the engine does, so that a deadline, a cancellation or our own death ends it and
everything it started; what it leaves running when load_model has returned is ended too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_dropin import children, compat
from vllm_dropin.errors import HookError, InputOutputError
from vllm_dropin.logging import REDACTOR, get
from vllm_dropin.supervisor.process import ExitStatus, GuardedProcess

log = get("hook")

PROGRAM = Path(children.__file__).parent / "hook.py"
SHIM = Path(compat.__file__).parent
"""Last on the hook's path: `datarobot_drum.RuntimeParameters` where the real package is absent."""

TRACEBACK_WIDTH = 300
"""Characters of a line of the traceback in the error: it goes to the log, to /status and into an event."""

_OWNED_PREFIXES = ("VLLM_DROPIN_", "MLOPS_RUNTIME_PARAM_", "DATAROBOT_", "MLOPS_")
_OWNED = frozenset(
    {
        "CODE_DIR", "ADDRESS", "TARGET_NAME", "TARGET_TYPE", "URL_PREFIX", "RUNTIME_PARAMS_FILE",
        "WITH_ERROR_SERVER", "MAX_WORKERS", "CUSTOM_MODEL_WORKERS", "OPENAI_HOST", "OPENAI_PORT", "GPU_COUNT",
        "DEPLOYMENT_CONFIG",
    }
)  # fmt: skip
"""Names of the contract (section 1) that have been read before the hook runs: a change would come too late."""


@dataclass(frozen=True)
class HookRequest:
    """What to run, and where. `timeout` in seconds; `extra_paths` come after site-packages on the hook's path."""

    python: Path
    hook_file: Path
    code_dir: Path
    environ: Mapping[str, str] = field(repr=False)
    timeout: float
    runtime_dir: Path
    extra_paths: tuple[Path, ...] = ()

    @property
    def report(self) -> Path:
        return self.runtime_dir / "hook.json"

    @property
    def argv(self) -> tuple[str, ...]:
        paths = (self.hook_file.absolute(), self.code_dir.absolute(), self.report.absolute(), *self.extra_paths, SHIM)
        # faulthandler: a crash inside a compiled library says where.
        return (str(self.python), "-u", "-X", "faulthandler", str(PROGRAM), *map(str, paths))


@dataclass(frozen=True)
class HookResult:
    """What the hook changed: added or changed names with their value, deleted ones with None.

    `ignored` are names that belong to us; they were warned of.
    """

    environ_changes: Mapping[str, str | None] = field(repr=False)
    ignored: tuple[str, ...] = ()


async def run_hook(request: HookRequest, on_line: Callable[[str], None]) -> HookResult:
    """Run `init(code_dir=…)` where it is defined, then `load_model(code_dir)`.

    `on_line` gets each line of its output, without known secrets. Raises HookError, with the traceback's last lines,
    when the hook raises, leaves early, dies of a signal or passes the deadline. A cancellation kills it.
    """
    environ = {name: value for name, value in request.environ.items() if name != "DATAROBOT_API_TOKEN"}
    environ["CODE_DIR"] = str(request.code_dir.absolute())
    request.report.unlink(missing_ok=True)
    try:
        status = await _run(request, environ, lambda line: on_line(REDACTOR.hide(line)))
        report = _read_report(request.report)
    finally:
        request.report.unlink(missing_ok=True)
    if report.get("status") != "finished":
        raise _failure(request, status, report)
    return _sort_changes(report["changes"])


async def _run(request: HookRequest, environ: Mapping[str, str], on_line: Callable[[str], None]) -> ExitStatus | None:
    """How the process ended; None when the deadline came first."""
    process = await GuardedProcess.start(request.argv, environ, request.code_dir, on_line)
    try:
        async with asyncio.timeout(request.timeout):
            return await process.wait()
    except TimeoutError:
        return None
    finally:
        if not process.ended:
            await process.kill()


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {"status": "running", "stage": "start"}
    return report


def _failure(request: HookRequest, status: ExitStatus | None, report: Mapping[str, Any]) -> HookError:
    where = f"{request.hook_file.name}: {report['stage']}"
    if report["status"] == "failed":
        lines = [REDACTOR.hide(line)[:TRACEBACK_WIDTH] for line in report["traceback"]]
        return HookError(
            "\n".join([f"{where} failed: {lines[-1]}", *lines]),
            "Mend custom.py; the log has its whole output.",
        )
    if status is None:
        return HookError(
            f"{where} ran past its deadline of {request.timeout:g} s and was killed",
            "Find in the log what it waited for, or raise --hook-timeout.",
        )
    if report["stage"] == "start":
        return HookError(f"custom.py could not be started ({status})", f"Check that {request.python} runs.")
    remedy = "It must return from load_model; os._exit ends it before its work is known to be done."
    if status.code == -9:
        remedy = "SIGKILL usually comes from the kernel when memory runs out: give it more memory, or let it need less."
    elif status.code is not None and status.code < 0:
        remedy = "A compiled library crashed: the log may have its stack."
    return HookError(f"{where} ended early ({status})", remedy)


def _sort_changes(changes: Mapping[str, str | None]) -> HookResult:
    kept: dict[str, str | None] = {}
    ignored = []
    for name, value in changes.items():
        if name in _OWNED or name.startswith(_OWNED_PREFIXES):
            ignored.append(name)
            log.warning("custom.py changed %s, which has been read before and is not passed on", name)
        else:
            kept[name] = value
    return HookResult(kept, tuple(sorted(ignored)))


class HookState:
    """Whether the last run of the hook finished: one JSON file in the state folder, replaced atomically.

    A start runs the hook whatever it says (contract, section 4); it lets us warn of half-written weights.
    """

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "hook.json"

    @property
    def unfinished(self) -> bool:
        """A run was started and never came to its end."""
        try:
            record = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return False
        except ValueError:
            return True
        return not (isinstance(record, dict) and record.get("finished"))

    def started(self) -> None:
        """Record the beginning of a run. Raises InputOutputError when the state folder can't be written."""
        self._write({"started": _now(), "finished": None})

    def finished(self) -> None:
        """Record the good end of a run. Raises InputOutputError when the state folder can't be written."""
        record = {"started": None}
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(self._path.read_bytes())
        self._write({**record, "finished": _now()})

    def _write(self, record: Mapping[str, str | None]) -> None:
        temporary = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(record), encoding="utf-8")
            temporary.replace(self._path)
        except OSError as error:
            raise InputOutputError(
                f"cannot write {self._path}: {error.strerror}", "Give a writable folder with --state-dir."
            ) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
