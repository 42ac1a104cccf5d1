"""A stop signal at the very beginning, before there is an event loop that could hear it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.test_main import SCRIPT
from tests.conftest import wait_until
from tests.folders import engine_environ, make_folder


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether this process has a handler of its own for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(mask >> (number - 1) & 1)


def has_event_loop(pid: int) -> bool:
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            if "eventpoll" in str(file.readlink()):
                return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_before_anything_has_started_is_an_orderly_end(tmp_path: Path, number: signal.Signals) -> None:
    folder = make_folder(tmp_path / "m", {"custom.py": "import time\ndef load_model(code_dir):\n    time.sleep(60)\n"})
    environ = engine_environ(tmp_path / "python")
    words = ("serve", str(folder), "--address", "127.0.0.1:0", "--runtime-dir", str(tmp_path / "run"))
    for delay in (0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3):
        with subprocess.Popen([SCRIPT, *words], env=environ, stderr=subprocess.PIPE, text=True) as process:
            try:
                wait_until(lambda process=process: catches(process.pid, signal.SIGTERM), 5, every=0.001)
                if not delay:
                    assert not has_event_loop(process.pid), "the stop signal was deadly until now"
                time.sleep(delay)
                for _ in range(2):
                    process.send_signal(number)
                _, errors = process.communicate(timeout=15)
            finally:
                process.kill()
        assert process.returncode == 0, (delay, errors)
        assert "Traceback" not in errors
        assert not list(tmp_path.glob("run/*"))
