"""What a hanging engine was doing, for the log, before it is killed (decision 8).

Two looks. The kernel's, from outside: state and wait channel of each thread. And Python's own: an engine is started
with PYTHONFAULTHANDLER set, so SIGABRT makes each of its processes write the stack of every thread to the engine's log,
the interpreter's lock held or not. It dies of that, which is what comes next anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from pathlib import Path

from vllm_dropin.children.guardian import is_tracker
from vllm_dropin.logging import REDACTOR, get
from vllm_dropin.supervisor.process import GuardedProcess

log = get("stacks")

STEP = 0.05
ONE_WRITES, ALL_WRITE = 0.5, 5.0
"""Seconds that one process gets to write its stacks, and all of them together."""


async def write_stacks(process: GuardedProcess) -> None:
    """Log what each process of an engine waits for, then let it write its Python stacks, which ends it."""
    family = process.family()
    for pid in family:
        if line := describe(pid):
            log.error("%s", REDACTOR.hide(line))
    # A tracker has shared memory to remove, and is not what hangs. The others stand still until it is their turn: those
    # of vLLM kill all that they find when one of them dies, the tracker and who has not written yet.
    pids = [pid for pid in family if not is_tracker(pid)]
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGSTOP)
    clock = asyncio.get_running_loop().time
    deadline = clock() + ALL_WRITE
    # One at a time, or their words are mixed; the first process last: at its end the guardian kills the others.
    for pid in reversed(pids):
        if clock() > deadline or not _abort(pid):
            continue
        for _ in range(round(ONE_WRITES / STEP)):
            if process.ended or not describe(pid):
                break
            await asyncio.sleep(STEP)


def describe(pid: int) -> str:
    """One line: command, state of the process, and its threads by state and wait channel. Empty when it is gone."""
    folder = Path("/proc") / str(pid)
    try:
        words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").split()
        state = _field(folder / "status", "State:")
        threads = Counter(_thread(thread) for thread in (folder / "task").iterdir())
    except OSError:
        return ""
    command = " ".join(words)[:120]
    told = ", ".join(f"{count}x {what}" for what, count in threads.most_common())
    if state.startswith("Z"):
        return ""
    return f"process {pid} ({command}): state {state}, wchan {_wait_channel(folder)}; threads: {told}"


def _thread(folder: Path) -> str:
    try:
        return f"{_field(folder / 'status', 'State:')[:1]} {_wait_channel(folder)}"
    except OSError:
        return "ended"


def _wait_channel(folder: Path) -> str:
    """The kernel function that it sleeps in; `-` when it runs, or when the kernel does not tell."""
    with contextlib.suppress(OSError):
        name = (folder / "wchan").read_text().strip()
        if name not in ("", "0"):
            return name
    return "-"


def _field(path: Path, name: str) -> str:
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith(name):
            return line.removeprefix(name).strip()
    return "?"


def _abort(pid: int) -> bool:
    """SIGABRT, and SIGCONT for a stopped process; without the memory of a GPU host in a core file."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/coredump_filter").write_text("0")
    try:
        os.kill(pid, signal.SIGABRT)
        os.kill(pid, signal.SIGCONT)
    except OSError:
        return False
    return True
