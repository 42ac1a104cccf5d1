from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dropin import __version__
from vllm_dropin.cli.main import COMMANDS
from vllm_dropin.settings.options import OPTIONS

SCRIPT = Path(sys.executable).with_name("vllm-dropin")
HEAVY = {"pydantic", "yaml", "aiohttp", "granian", "asyncio", "datarobot", "requests"}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *words], capture_output=True, text=True, timeout=60)


def test_help_names_the_commands() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)


def test_version() -> None:
    assert run("--version").stdout == f"vllm-dropin {__version__}\n"


@pytest.mark.parametrize("command", ["check", "serve"])
def test_help_of_a_command_names_every_option_and_its_variable(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    text = "".join(done.stdout.split())
    assert [option.flag for option in OPTIONS if option.flag not in text] == []
    assert [option.variable for option in OPTIONS if option.variable not in text] == []
    assert "--param" in text


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str) -> None:
    done = run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: vllm-dropin {command}" in done.stdout


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys\nfrom vllm_dropin.cli.main import main\n"
        f"try:\n    main([{command!r}, '--help'])\nexcept SystemExit:\n    pass\n"
        f"print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "[]\n"


def test_flags_of_vllm_before_the_dashes_are_explained() -> None:
    done = run("check", ".", "--max-model-len", "5")
    assert done.returncode == 2
    assert "flags of vLLM go after a bare --" in done.stderr


@pytest.mark.parametrize("words", [[], ["nothing"]])
def test_usage_errors_exit_2(words: list[str]) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    check = [str(SCRIPT), "check", str(tmp_path), "--upstream", "http://localhost:1"]
    process = subprocess.Popen(check, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert "Traceback" not in errors
