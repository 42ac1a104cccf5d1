"""What is written about a hanging engine before it is killed."""

import asyncio
import logging
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from vllm_dropin.supervisor.process import GuardedProcess
from vllm_dropin.supervisor.stacks import describe, write_stacks

# An engine with a child; both hang, and ignore SIGTERM as a hanging engine does.
HANGING = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def hang_in_the_child():
    os.write(1, b"pid %d\\n" % os.getpid())
    while True: time.sleep(1)
def hang_in_the_parent():
    os.write(1, b"pid %d\\n" % os.getpid())
    while True: time.sleep(1)
hang_in_the_parent() if os.fork() else hang_in_the_child()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_every_process_says_where_it_hangs(caplog, stopped):
    caplog.set_level(logging.INFO)
    lines: list[str] = []

    async def scenario() -> tuple[list[int], float]:
        environ = {**os.environ, "PYTHONFAULTHANDLER": "1"}
        process = await GuardedProcess.start((sys.executable, "-c", HANGING), environ, Path("/"), lines.append)
        while len([line for line in lines if line.startswith("pid")]) < 2:
            await asyncio.sleep(0.02)
        pids = process.family()
        assert pids[0] == process.pid
        if stopped:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.1)
        begin = time.monotonic()
        await write_stacks(process)
        took = time.monotonic() - begin
        await process.kill()
        return pids, took

    pids, took = asyncio.run(asyncio.wait_for(scenario(), 20))
    assert took < 2
    for pid in pids:
        told = [record.message for record in caplog.records if f"process {pid} (" in record.message]
        assert len(told) == 1
        assert ("state T (stopped)" if stopped else "state S (sleeping)") in told[0]
        assert "threads: 1x " in told[0]
    written = "\n".join(lines)
    assert "in hang_in_the_child" in written
    assert "in hang_in_the_parent" in written
    assert written.index("in hang_in_the_child") < written.index("in hang_in_the_parent"), "one after the other"


def test_a_process_that_is_gone_is_not_described():
    assert describe(2**22 + 1) == ""
