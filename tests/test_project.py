"""Lock files and set-up: what a fresh clone relies on."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))


def pins(lock: Path) -> dict[str, str]:
    """Normalised project name to version."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", lock.read_text(), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_requirement_is_pinned_and_hashed(lock: Path) -> None:
    logical_lines = lock.read_text().replace("\\\n", " ").splitlines()
    loose = [line for line in logical_lines if not re.match(r"\S+==\S+ .*--hash=sha256:[0-9a-f]{64}", line)]
    assert logical_lines
    assert loose == []


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_names_no_place(lock: Path) -> None:
    assert re.findall(r"://|file:|--index|--extra-index|--find-links|(?<=\s)/\S+", lock.read_text()) == []


def test_runtime_dependencies_are_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.match(r"[A-Za-z0-9-]+", line)[0].lower() for line in project["dependencies"]}  # type: ignore[index]
    locked = pins(ROOT / "requirements" / "product.lock")
    assert wanted <= locked.keys()
    # What the product is developed with is what it ships with.
    developed = pins(ROOT / "requirements" / "dev.lock")
    assert locked == {name: developed.get(name) for name in locked}
    assert "torch" not in locked


def test_the_engine_lock_leaves_out_what_breaks_it() -> None:
    listed = (ROOT / "requirements" / "cpu-excluded.txt").read_text().splitlines()
    excluded = {line for line in listed if not line.startswith("#")}
    assert "torchvision" in excluded
    assert excluded.isdisjoint(pins(ROOT / "requirements" / "cpu.lock"))


def test_accepted_complaints_are_about_what_is_excluded() -> None:
    excluded = (ROOT / "requirements" / "cpu-excluded.txt").read_text().splitlines()
    accepted = (ROOT / "requirements" / "pip-check-accepted.txt").read_text().splitlines()
    locked = pins(ROOT / "requirements" / "cpu.lock")
    for line in accepted:
        name, version, missing = re.fullmatch(r"(\S+) (\S+) requires (\S+), which is not installed\.", line).groups()  # type: ignore[union-attr]
        assert locked[name] == version
        assert missing in excluded


@pytest.mark.parametrize("target", ["serve", "test", "test-fast", "lint", "check-contract", "bench"])
def test_make_knows_the_target(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_an_engine_of_ones_own_is_not_built() -> None:
    command = ["make", "--dry-run", "--always-make", "serve", "VLLM_DROPIN_ENGINE_PYTHON=/opt/python"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert "vllm-dropin serve examples/smollm2" in done.stdout
    assert ".venv-engine" not in done.stdout


def test_set_up_names_what_is_missing(tmp_path: Path) -> None:
    command = [ROOT / "scripts" / "venv.sh", "dev", str(tmp_path / "venv")]
    done = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "PYTHON": "/nowhere/python"}, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    assert "no usable Python among: /nowhere/python" in done.stderr
    assert "CPython 3.11 or 3.12" in done.stderr
    assert not (tmp_path / "venv").exists()
