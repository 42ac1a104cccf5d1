"""custom.py in a process of its own: what it gets, what it gives back, and every way in which it can fail."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vllm_dropin.errors import HookError, InputOutputError
from vllm_dropin.logging import REDACTOR
from vllm_dropin.supervisor.hook import HookRequest, HookResult, HookState, run_hook

TOKEN = "platform-token-canary"


class Hook:
    """One folder with a custom.py, run on demand; `lines` is what it said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runtime = folder / "runtime"
        self.runtime.mkdir()
        self.file = folder / "nested" / "custom.py"
        self.file.parent.mkdir()
        self.lines: list[str] = []

    def write(self, code: str) -> None:
        self.file.write_text(textwrap.dedent(code))

    def request(self, timeout: float = 20.0, **environ: str) -> HookRequest:
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        given = {**kept, "DATAROBOT_API_TOKEN": TOKEN, **environ}
        return HookRequest(Path(sys.executable), self.file, self.folder, given, timeout, self.runtime)

    def run(self, code: str, timeout: float = 20.0, **environ: str) -> HookResult:
        self.write(code)
        return asyncio.run(asyncio.wait_for(run_hook(self.request(timeout, **environ), self.lines.append), 60))

    def fail(self, code: str, timeout: float = 20.0) -> HookError:
        with pytest.raises(HookError) as raised:
            self.run(code, timeout)
        assert raised.value.remedy
        assert list(self.runtime.iterdir()) == []
        return raised.value


@pytest.fixture
def hook(tmp_path: Path) -> Hook:
    return Hook(tmp_path)


def gone(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not Path(f"/proc/{pid}").exists()


def test_init_runs_before_load_model_and_both_get_the_folder(hook: Hook) -> None:
    hook.run(
        """
        import os, pathlib
        def init(code_dir):
            print("init", code_dir)
        def load_model(code_dir):
            print("load_model", code_dir, os.environ["CODE_DIR"], os.getcwd())
            pathlib.Path(code_dir, "vllm").mkdir()
        """
    )
    folder = str(hook.folder)
    assert hook.lines == [f"init {folder}", f"load_model {folder} {folder} {folder}"]
    assert (hook.folder / "vllm").is_dir()


def test_a_hook_without_functions_is_imported_and_nothing_more(hook: Hook) -> None:
    assert hook.run("print('imported')").environ_changes == {}
    assert hook.lines == ["imported"]


def test_its_own_folder_comes_first_on_the_path(hook: Hook) -> None:
    (hook.file.parent / "download.py").write_text("WHO = 'mine'")  # a file of this name lies beside our program too
    hook.run("import download\nprint(download.WHO, __name__)")
    assert hook.lines == ["mine custom"]


def test_changes_of_the_environment_come_back(hook: Hook) -> None:
    result = hook.run(
        """
        import os
        os.environ["AT_IMPORT"] = "1"
        def load_model(code_dir):
            os.environ["HF_HOME"] = "/somewhere"
            os.environ["CHANGED"] = "new"
            os.environ["SAME"] = "same"
            os.environb[b"BYTES"] = bytes([0xff])
            del os.environ["GONE"]
        """,
        CHANGED="old",
        SAME="same",
        GONE="x",
    )
    assert result.environ_changes == {
        "AT_IMPORT": "1", "HF_HOME": "/somewhere", "CHANGED": "new", "BYTES": "\udcff", "GONE": None,
    }  # fmt: skip
    assert result.ignored == ()
    assert list(hook.runtime.iterdir()) == []


def test_names_of_ours_are_not_passed_on(hook: Hook, caplog: pytest.LogCaptureFixture) -> None:
    names = ["CODE_DIR", "DATAROBOT_ENDPOINT", "MLOPS_DEPLOYMENT_ID", "MLOPS_RUNTIME_PARAM_n", "VLLM_DROPIN_WORKERS"]
    result = hook.run(f"import os\nfor name in {names}: os.environ[name] = 'mine'")
    assert result.environ_changes == {}
    assert result.ignored == tuple(names)
    assert all(name in caplog.text for name in names)


def test_it_sees_everything_but_the_platforms_token(hook: Hook) -> None:
    hook.run("import os\nprint('DATAROBOT_API_TOKEN' in os.environ, os.environ['AWS_SECRET'])", AWS_SECRET="s3")
    assert hook.lines == ["False s3"]


def test_the_report_is_private(hook: Hook) -> None:
    hook.run("import os, sys\nprint(oct(os.stat(os.path.join('runtime', 'hook.json')).st_mode))")
    assert hook.lines == [oct(stat.S_IFREG | 0o600)]


def test_runtime_parameters_come_by_the_shim(hook: Hook) -> None:
    hook.run(
        """
        from datarobot_drum import RuntimeParameters
        def load_model(code_dir):
            print(RuntimeParameters.has("n"), RuntimeParameters.get("n"))
        """,
        MLOPS_RUNTIME_PARAM_n='{"type": "numeric", "payload": 3}',
    )
    assert hook.lines == ["True 3"]


def test_a_real_package_wins_over_the_shim(hook: Hook) -> None:
    package = hook.folder / "installed" / "datarobot_drum"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("RuntimeParameters = 'the real one'")
    hook.run(
        "import datarobot_drum\nprint(datarobot_drum.RuntimeParameters)", PYTHONPATH=str(hook.folder / "installed")
    )
    assert hook.lines == ["the real one"]


def test_output_is_streamed_line_by_line_and_bounded(hook: Hook) -> None:
    hook.run(
        """
        import sys, logging
        print("out"); print("err", file=sys.stderr); logging.getLogger("x").warning("logged")
        print("x" * 100_000)
        sys.stdout.write("no newline")
        """
    )
    assert hook.lines[:3] == ["out", "err", "logged"]
    assert hook.lines[-1].endswith("no newline")
    assert max(map(len, hook.lines)) <= 32 << 10


def test_lines_come_while_it_runs(hook: Hook) -> None:
    hook.write("import time\ndef load_model(code_dir):\n    print('begun')\n    time.sleep(60)\n")

    async def hear_and_cancel() -> float:
        heard = asyncio.Event()
        task = asyncio.create_task(run_hook(hook.request(), lambda _: heard.set()))
        await asyncio.wait_for(heard.wait(), 20)
        begin = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - begin

    assert asyncio.run(hear_and_cancel()) < 5


def test_known_secrets_are_hidden_in_lines_and_errors(hook: Hook) -> None:
    REDACTOR.learn(["canary-4711"])
    error = hook.fail("print('canary-4711')\ndef load_model(code_dir): raise ValueError('canary-4711')")
    assert hook.lines[0] == "***"
    assert "canary-4711" not in str(error)
    assert "ValueError: ***" in error.message


def test_a_secret_is_hidden_before_a_traceback_is_cut(hook: Hook) -> None:
    secret = "canary-" + "0123456789" * 5
    REDACTOR.learn([secret])
    error = hook.fail(f"def load_model(code_dir): raise ValueError('x' * 250 + {secret!r})")
    assert "canary" not in error.message + "".join(hook.lines)


@pytest.mark.parametrize(
    ("code", "stage", "reason"),
    [
        ("import nowhere", "import", "No module named 'nowhere'"),
        ("def init(code_dir): 1 / 0", "init", "ZeroDivisionError"),
        ("def load_model(code_dir): raise KeyError('HF')", "load_model", "KeyError: 'HF'"),
        ("def load_model(code_dir): raise SystemExit(0)", "load_model", "SystemExit"),
        ("def load_model(): pass", "load_model", "positional argument"),
    ],
)
def test_an_exception_tells_its_stage_and_its_last_lines(hook: Hook, code: str, stage: str, reason: str) -> None:
    error = hook.fail(code)
    assert error.exit_code == 78
    assert error.message.startswith(f"custom.py: {stage} failed: ")
    assert reason in error.message.splitlines()[0]
    assert "children" not in error.message, "our own frames say nothing to the author"
    assert any(reason in line for line in hook.lines), "the log has it too"


def test_a_long_traceback_is_cut(hook: Hook) -> None:
    error = hook.fail("def load_model(n):\n    if n == 0: raise ValueError('x' * 100_000)\n    load_model(0)\n")
    assert "load_model(0)" in error.message
    assert len(error.message) < 6000


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os\ndef load_model(code_dir): os._exit(0)", "load_model ended early (exit code 0)"),
        ("import os\nos._exit(3)", "import ended early (exit code 3)"),
        ("import os\ndef init(code_dir): os.kill(os.getpid(), 9)", "init ended early (killed by SIGKILL)"),
        ("import os\ndef init(code_dir): os.kill(os.getpid(), 11)", "init ended early (killed by SIGSEGV)"),
    ],
)
def test_leaving_early_is_a_failure(hook: Hook, code: str, reason: str) -> None:
    assert reason in hook.fail(code).message


def test_a_deadline_ends_it_and_what_it_started(hook: Hook) -> None:
    error = hook.fail(
        """
        import pathlib, subprocess, time
        def load_model(code_dir):
            daemon = subprocess.Popen(["sleep", "600"], start_new_session=True)
            print(daemon.pid)
            time.sleep(600)
        """,
        timeout=2.0,
    )
    assert "load_model ran past its deadline of 2 s" in error.message
    assert gone(int(hook.lines[0]))


def test_what_it_leaves_running_is_ended(hook: Hook) -> None:
    hook.run("import subprocess\nprint(subprocess.Popen(['sleep', '600'], start_new_session=True).pid)")
    assert gone(int(hook.lines[0]))


def test_it_does_not_outlive_us(hook: Hook, tmp_path: Path) -> None:
    """A supervisor that is killed by SIGKILL takes its hook with it."""
    hook.write("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)")
    program = tmp_path / "supervisor.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import asyncio, os, pathlib, sys
            from vllm_dropin.supervisor.hook import HookRequest, run_hook
            path = pathlib.Path
            request = HookRequest(path(sys.executable), path({str(hook.file)!r}), path({str(hook.folder)!r}),
                                  dict(os.environ), 60.0, path({str(hook.runtime)!r}))
            asyncio.run(run_hook(request, lambda line: print(line, flush=True)))
            """
        )
    )

    async def kill() -> int:
        process = await asyncio.create_subprocess_exec(sys.executable, program, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        pid = int(await asyncio.wait_for(process.stdout.readline(), 20))
        process.kill()
        await process.wait()
        return pid

    assert gone(asyncio.run(kill()))


def test_threads_and_exit_handlers_do_not_hold_it(hook: Hook) -> None:
    """A temporary folder that the hook made for the weights is still there when it has ended."""
    begin = time.monotonic()
    hook.run(
        """
        import atexit, tempfile, threading, time
        threading.Thread(target=time.sleep, args=(600,)).start()
        folder = tempfile.TemporaryDirectory(dir=".")
        print(folder.name)
        """
    )
    assert time.monotonic() - begin < 10
    assert Path(hook.folder, hook.lines[0]).is_dir()


def test_a_python_that_is_not_there_is_named(hook: Hook) -> None:
    hook.write("")
    request = HookRequest(Path("/nowhere/python"), hook.file, hook.folder, {}, 10.0, hook.runtime)
    with pytest.raises(HookError, match="could not be started") as raised:
        asyncio.run(run_hook(request, hook.lines.append))
    assert "/nowhere/python" in raised.value.remedy


def test_state_knows_a_run_that_did_not_finish(tmp_path: Path) -> None:
    state = HookState(tmp_path / "state")
    assert not state.unfinished
    state.started()
    assert HookState(tmp_path / "state").unfinished
    state.finished()
    assert not HookState(tmp_path / "state").unfinished
    (tmp_path / "state" / "hook.json").write_text("{torn")
    assert state.unfinished


def test_a_state_folder_that_can_not_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputOutputError, match=r"cannot write .*hook\.json") as raised:
        HookState(tmp_path / "file").started()
    assert "--state-dir" in raised.value.remedy
