"""One process under its guardian (engine, hook, download): start it, hear it, know its end, stop all of it."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vllm_dropin import children
from vllm_dropin.children.guardian import descendants, is_tracker, stat_fields
from vllm_dropin.errors import EngineError
from vllm_dropin.logging import REDACTOR, get

log = get("process")

GUARDIAN = Path(children.__file__).parent / "guardian.py"
LINE_LIMIT = 16 << 10
SECRET_LIMIT = 8 << 10
"""Characters of an endless line that are held back, so that a secret in it is cut only if it is longer than this."""
SECOND_TERM_AFTER = 3.0
"""Seconds: vLLM swallows a SIGTERM that comes while it loads; a second one works."""
KILL_AFTER = 8.0
"""Seconds from the first SIGTERM after which the whole session is killed."""
GUARDIAN_POLL = 0.25
"""Seconds between looks at whether the guardian lives."""
PF_EXITING = 0x4
"""Of a process' flags in /proc: include/linux/sched.h."""


@dataclass(frozen=True)
class ExitStatus:
    """How the engine ended. vLLM's own codes mean nothing (0 after a crash), so this is for the log alone."""

    code: int | None

    def __str__(self) -> str:
        if self.code is None:
            return "lost with its guardian"
        if self.code < 0:
            names = {number.value: number.name for number in signal.Signals}
            return f"killed by {names.get(-self.code, f'signal {-self.code}')}"  # real-time signals have no name
        return f"exit code {self.code}"


async def read_lines(stream: asyncio.StreamReader, on_line: Callable[[str], None]) -> None:
    """Call `on_line` for each line of `stream` until its end; carriage returns (progress bars) end lines too.

    A line over 16 KiB comes in pieces, so that a child can't fill our memory. Known secrets are hidden before it is
    cut: half of one would not be recognised afterwards. An `on_line` that raises is logged and called again: a pipe
    that nobody reads would stop the child.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    while chunk := await stream.read(LINE_LIMIT):
        *lines, rest = (rest + decoder.decode(chunk)).replace("\r", "\n").split("\n")
        for line in lines:
            _say(line, on_line)
        if len(rest) > LINE_LIMIT + SECRET_LIMIT:
            rest = REDACTOR.hide(rest)
            _say(rest[:LINE_LIMIT], on_line)
            rest = rest[LINE_LIMIT:]
    _say(rest + decoder.decode(b"", final=True), on_line)


def _say(line: str, on_line: Callable[[str], None]) -> None:
    text = REDACTOR.hide(line).rstrip()
    for at in range(0, len(text), LINE_LIMIT):
        try:
            on_line(text[at : at + LINE_LIMIT])
        except Exception:  # whatever a caller's handler raises: the pipe must be read on, or the child blocks on it
            log.exception("a line of a child's output could not be handled")


def kill_session(session: int) -> None:
    """SIGKILL every process of a session: the way out when the guardian itself is dead.

    But for Python's trackers, which remove the shared memory of the dead and then end by themselves.
    """
    killed: set[int] = set()
    # again until no new one is found: one may fork while we look
    while found := {pid for pid in _members(session) - killed if not is_tracker(pid)}:
        for pid in found:
            with contextlib.suppress(OSError):  # it ended meanwhile
                os.kill(pid, signal.SIGKILL)
        killed |= found


def is_dying(pid: int) -> bool:
    """Whether a process of ours has begun to exit, or is gone: its flags say so before its files are closed."""
    try:
        fields = stat_fields(pid)
    except OSError:
        return True
    return fields[0] in "ZX" or bool(int(fields[6]) & PF_EXITING)


def _members(session: int) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended while we looked
                fields = stat_fields(entry.name)
                if int(fields[3]) == session and fields[0] != "Z":
                    found.add(int(entry.name))
    return found


class PipeReader:
    """The read end of a pipe whose write end children hold, as a stream of our own.

    asyncio's own PIPE would do, but for one thing: its `Process.wait` returns only when the pipe is closed by everyone,
    and an engine's orphan can hold it for ever.
    """

    def __init__(self, stream: asyncio.StreamReader, transport: asyncio.BaseTransport, write_end: int) -> None:
        self.stream = stream
        self.write_end = write_end
        self._transport = transport

    @classmethod
    async def open(cls) -> PipeReader:
        read_end, write_end = os.pipe()
        stream = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(read_end, "rb", buffering=0)
        )
        return cls(stream, transport, write_end)

    def started(self) -> None:
        """Close our copy of the write end: from now on, end of file means that the children are gone."""
        os.close(self.write_end)

    def close(self) -> None:
        self._transport.close()


class GuardedProcess:
    """A started engine, hook or download. `pid` leads its session.

    `fell` is set when its first process has ended: that is the end of its work. `wait` returns when all of it is gone,
    which may take seconds longer.
    """

    guardians: ClassVar[set[int]] = set()
    """Guardians that somebody waits for, so that the reaper of orphans leaves them alone."""

    def __init__(
        self, guardian: asyncio.subprocess.Process, lifeline: int, report: PipeReader, output: PipeReader, pid: int
    ) -> None:
        self.pid = pid
        self.guardian_pid = guardian.pid
        self._guardian = guardian
        self._lifeline: int | None = lifeline
        self._report = report
        self._output = output
        self.fell = asyncio.Event()
        self._end = asyncio.create_task(self._watch(), name="engine-watch")
        self._log: asyncio.Task[None] | None = None
        self.guardians.add(guardian.pid)

    @classmethod
    async def start(
        cls, argv: Sequence[str], environ: Mapping[str, str], cwd: Path, on_line: Callable[[str], None]
    ) -> GuardedProcess:
        """Start `argv` under a guardian. Raises EngineError when even the guardian can't be started."""
        report, output = await PipeReader.open(), await PipeReader.open()
        lifeline_read, lifeline_write = os.pipe()
        command = (sys.executable, "-I", "-S", str(GUARDIAN), str(lifeline_read), str(report.write_end), *argv)
        try:
            guardian = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output.write_end,
                stderr=output.write_end,
                env=dict(environ),
                cwd=cwd,
                pass_fds=(lifeline_read, report.write_end),
                start_new_session=True,
            )
        except BaseException as error:
            os.close(lifeline_write)
            report.close()
            output.close()
            if isinstance(error, OSError):
                raise EngineError(f"cannot start the engine's guardian: {error.strerror}") from error
            raise
        finally:
            os.close(lifeline_read)
            report.started()
            output.started()
        try:
            first = (await report.stream.readline()).split()
            if len(first) != 2:
                await guardian.wait()
                raise EngineError("the engine's guardian ended before it started the engine")
        except BaseException:  # a cancellation too: without its lifeline the guardian ends what it has started
            os.close(lifeline_write)
            await asyncio.wait({asyncio.create_task(guardian.wait())}, timeout=12.0)
            report.close()
            output.close()
            raise
        process = cls(guardian, lifeline_write, report, output, int(first[1]))
        process._log = asyncio.create_task(read_lines(output.stream, on_line), name="engine-log")
        return process

    async def _watch(self) -> ExitStatus:
        line = (await self._last_report()).split()
        self.fell.set()
        if len(line) != 2:
            kill_session(self.pid)
        await self._guardian.wait()
        self.guardians.discard(self.guardian_pid)
        self._report.close()
        self._drop_lifeline()
        if self._log is not None:
            await asyncio.wait({self._log}, timeout=1.0)  # the last words are worth a moment
            self._log.cancel()
        self._output.close()
        return ExitStatus(os.waitstatus_to_exitcode(int(line[1])) if len(line) == 2 else None)

    async def _last_report(self) -> bytes:
        """What the guardian says of the engine's end; nothing when it is dead itself.

        A dead guardian's end of the pipe may stay open: once, it did for nine seconds, in which the engine had nobody.
        So the process is looked at too.
        """
        report = asyncio.create_task(self._report.stream.readline(), name="engine-report")
        try:
            while not report.done() and not (self._guardian.returncode is not None or is_dying(self.guardian_pid)):
                await asyncio.wait({report}, timeout=GUARDIAN_POLL)
            await asyncio.wait({report}, timeout=GUARDIAN_POLL)  # what it wrote before it died
            return report.result() if report.done() else b""
        finally:
            report.cancel()

    async def wait(self) -> ExitStatus:
        """Wait for the end; by then the log has been read too."""
        return await asyncio.shield(self._end)

    @property
    def ended(self) -> bool:
        return self._end.done()

    def family(self) -> list[int]:
        """The living processes of the engine, parents before children; all of them are below the guardian."""
        return descendants(self.guardian_pid)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the engine's first process, unless it has ended: its pid may be another's by then."""
        if not self.fell.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _drop_lifeline(self) -> None:
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    async def kill(self) -> None:
        """End the whole session now. When the guardian does not manage it, do it from here."""
        self._drop_lifeline()
        done, _ = await asyncio.wait({self._end}, timeout=12.0)
        if not done:
            log.warning("the engine's guardian %d does not answer; killing it and the engine", self.guardian_pid)
            with contextlib.suppress(ProcessLookupError):
                self._guardian.kill()
            kill_session(self.pid)
        await self.wait()

    async def stop(self) -> None:
        """Ask for an orderly end: TERM, TERM again after 3 s, then kill the session."""
        self.signal(signal.SIGTERM)
        done, _ = await asyncio.wait({self._end}, timeout=SECOND_TERM_AFTER)
        if not done:
            self.signal(signal.SIGTERM)
            done, _ = await asyncio.wait({self._end}, timeout=KILL_AFTER - SECOND_TERM_AFTER)
        if not done:
            log.warning("the engine did not stop within %.0f s of SIGTERM; killing it", KILL_AFTER)
        await self.kill()
