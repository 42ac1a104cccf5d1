import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_dropin.supervisor.process import LINE_LIMIT, GuardedProcess, read_lines

# An engine that ignores SIGTERM and has a child and an orphaned grandchild, all printing their pids.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def family():
    if os.fork() == 0:
        if os.fork() == 0:
            os.write(1, b"pid %d\\n" % os.getpid())
            time.sleep(60)
        os._exit(0)
    if os.fork() == 0:
        os.write(1, b"pid %d\\n" % os.getpid())
        time.sleep(60)
    os.write(1, b"pid %d\\n" % os.getpid())
    time.sleep(60)
family()
"""


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


async def start(code: str, lines: list[str]) -> GuardedProcess:
    return await GuardedProcess.start((sys.executable, "-c", code), dict(os.environ), Path("/"), lines.append)


async def pids_in(lines: list[str], count: int) -> list[int]:
    for _ in range(500):
        found = [int(line.split()[1]) for line in lines if line.startswith("pid ")]
        if len(found) == count:
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(f"only these lines came: {lines}")


def test_an_exit_code_and_the_last_line_arrive():
    async def scenario():
        lines: list[str] = []
        process = await start("print('hello'); raise SystemExit(3)", lines)
        status = await asyncio.wait_for(process.wait(), 10)
        return status.code, lines

    assert asyncio.run(scenario()) == (3, ["hello"])


def test_a_signal_is_told_apart_from_an_exit_code():
    async def scenario():
        process = await start("import os; os.kill(os.getpid(), 9)", [])
        return await asyncio.wait_for(process.wait(), 10)

    status = asyncio.run(scenario())
    assert status.code == -signal.SIGKILL
    assert str(status) == "killed by SIGKILL"


def test_a_command_that_does_not_exist_ends_with_127():
    async def scenario():
        lines: list[str] = []
        process = await GuardedProcess.start(("/no/such/engine",), {}, Path("/"), lines.append)
        return (await asyncio.wait_for(process.wait(), 10)).code, lines

    code, lines = asyncio.run(scenario())
    assert code == 127
    assert lines == ["cannot start /no/such/engine: No such file or directory"]


def test_what_a_dead_engine_left_behind_is_killed():
    async def scenario():
        lines: list[str] = []
        process = await start(STUBBORN, lines)
        pids = await pids_in(lines, 3)
        os.kill(process.pid, signal.SIGKILL)
        status = await asyncio.wait_for(process.wait(), 10)
        return status, pids

    status, pids = asyncio.run(scenario())
    assert status.code == -signal.SIGKILL
    assert not [pid for pid in pids if alive(pid)]


def test_kill_ends_the_whole_session():
    async def scenario():
        lines: list[str] = []
        process = await start(STUBBORN, lines)
        pids = await pids_in(lines, 3)
        await asyncio.wait_for(process.kill(), 15)
        return pids

    assert not [pid for pid in asyncio.run(scenario()) if alive(pid)]


def test_stop_sends_term_twice():
    code = """
import signal, sys, time
seen = []
def on_term(*_):
    seen.append(1)
    print("term", len(seen), flush=True)
    if len(seen) == 2:
        sys.exit(0)
signal.signal(signal.SIGTERM, on_term)
print("pid 1", flush=True)
time.sleep(1); time.sleep(60)
"""

    async def scenario():
        lines: list[str] = []
        process = await start(code, lines)
        await pids_in(lines, 1)
        await asyncio.wait_for(process.stop(), 20)
        return (await process.wait()).code, lines

    assert asyncio.run(scenario()) == (0, ["pid 1", "term 1", "term 2"])


def test_a_dead_guardian_takes_the_engine_with_it():
    async def scenario():
        lines: list[str] = []
        process = await start(STUBBORN, lines)
        pids = await pids_in(lines, 3)
        os.kill(process.guardian_pid, signal.SIGKILL)
        status = await asyncio.wait_for(process.wait(), 10)
        return status.code, pids

    code, pids = asyncio.run(scenario())
    assert code is None
    assert until(lambda: not [pid for pid in pids if alive(pid)])


def test_a_supervisor_killed_by_sigkill_leaves_no_engine(tmp_path):
    script = tmp_path / "supervisor.py"
    script.write_text(
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from vllm_dropin.supervisor.process import GuardedProcess\n"
        "async def main():\n"
        f"    p = await GuardedProcess.start((sys.executable, '-c', {STUBBORN!r}), dict(os.environ), Path('/'), "
        "lambda line: print(line, flush=True))\n"
        "    print('pid', p.guardian_pid, flush=True)\n"
        "    await p.wait()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        pids = [int(supervisor.stdout.readline().split()[1]) for _ in range(4)]
        assert all(alive(pid) for pid in pids)
        supervisor.kill()
    assert until(lambda: not [pid for pid in pids if alive(pid)])


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"no newline", ["no newline"]),
        (b"10%\r50%\r100%\n", ["10%", "50%", "100%"]),
        (b"\n\n \n", []),
        (b"caf\xc3\xa9 \xff\n", ["café \ufffd"]),
    ],
)
def test_lines(data, lines):
    async def scenario():
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        found: list[str] = []
        await read_lines(reader, found.append)
        return found

    assert asyncio.run(scenario()) == lines


def test_an_endless_line_is_cut():
    async def scenario():
        reader = asyncio.StreamReader()
        reader.feed_data(b"x" * (5 * LINE_LIMIT))
        reader.feed_eof()
        found: list[str] = []
        await read_lines(reader, found.append)
        return found

    found = asyncio.run(scenario())
    assert max(map(len, found)) <= LINE_LIMIT
    assert len(found) > 1
