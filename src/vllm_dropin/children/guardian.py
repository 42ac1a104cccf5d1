"""Keeps one engine from outliving us: starts it in a session of its own and kills all of it when we are gone.

    guardian.py LIFELINE_FD REPORT_FD COMMAND...

LIFELINE_FD is the read end of a pipe whose write end only the supervisor holds: end of file means that the supervisor
is dead, however it died. REPORT_FD takes two lines: `started PID`, then `exited STATUS` (a wait status) as soon as the
engine's first process has ended; what that leaves behind is killed then, and our own end says that it is gone. The
guardian is the engine's subreaper, so that what the engine leaves behind becomes our child and is found by its parent.

Standard library only, and few imports: this process lives as long as the engine does. (Own session, subreaper and
PDEATHSIG in the supervisor are not enough: forks do not inherit PDEATHSIG, and the subreaper is what died.)
"""

import ctypes
import os
import select
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LEFT_BEHIND = 2.5
"""Seconds that what a dead engine left behind gets to die of SIGKILL. A driver may hold a process for longer, but the
next engine imports for longer still before it touches a GPU, and should not wait."""

TRACKERS = 1.0
"""Seconds that Python's resource trackers get, once they are alone, to remove the shared memory of the dead. Killed
with the others they would leave up to 250 MB of it behind for each engine (vLLM's queues between its processes)."""


def become_subreaper() -> None:
    """Make orphaned descendants our children. Raises OSError where the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def stat_fields(pid: int | str) -> list[str]:
    """/proc/PID/stat behind the name: state, parent, group, session, and so on. Raises OSError when it has ended."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


def descendants(root: int) -> list[int]:
    """The pids of all living descendants of `root`, parents before children."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            state, parent = stat_fields(entry)[:2]
        except OSError:
            continue  # it ended while we looked
        if state != "Z":
            children.setdefault(int(parent), []).append(int(entry))
    found: list[int] = []
    queue = [root]
    while queue:
        for pid in children.get(queue.pop(0), ()):
            found.append(pid)
            queue.append(pid)
    return found


def is_tracker(pid: int) -> bool:
    """Whether this is multiprocessing's resource tracker, which ends by itself when all who use it have ended."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"multiprocessing.resource_tracker" in file.read()
    except OSError:
        return False


def reap() -> dict[int, int]:
    """Collect every child that has ended: pid to wait status."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = status


def kill_all(deadline: float = 10.0) -> None:
    """Kill every descendant, again until none is left: one may fork while we look. Bounded by `deadline` seconds."""
    end = time.monotonic() + deadline
    spared_until = end
    while time.monotonic() < end:
        pids = descendants(os.getpid())
        if not pids:
            break
        others = [pid for pid in pids if not is_tracker(pid)]
        if others:
            spared_until = time.monotonic() + TRACKERS
        elif time.monotonic() >= spared_until:
            others = pids
        for pid in others:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)
        reap()
    reap()


def start(command: list[str], keep_closed: tuple[int, ...]) -> int:
    """Fork and exec `command` in a session of its own, with default signal handling. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        for descriptor in keep_closed:
            os.close(descriptor)
        os.execvpe(command[0], command, os.environ)
    except OSError as error:
        os.write(2, f"cannot start {command[0]}: {error.strerror}\n".encode())
    os._exit(127)


def tell(report: int, line: str) -> None:
    """Tell the supervisor. That it may be dead is the lifeline's to say: we must live on to end the engine."""
    try:
        os.write(report, f"{line}\n".encode())
    except OSError:
        return


def main(arguments: list[str]) -> int:
    lifeline, report = int(arguments[0]), int(arguments[1])
    become_subreaper()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Only the lifeline ends us: the engine must not lose its guardian first.
        signal.signal(number, signal.SIG_IGN)
    engine = start(arguments[2:], (lifeline, report, wake_read, wake_write))
    tell(report, f"started {engine}")
    poller = select.poll()
    poller.register(lifeline, select.POLLIN)
    poller.register(wake_read, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poller.poll()}
        if lifeline in ready:
            kill_all()
            return 0
        if wake_read in ready:
            os.read(wake_read, 4096)
        ended = reap()
        if engine in ended:
            tell(report, f"exited {ended[engine]}")
            kill_all(LEFT_BEHIND)
            return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
