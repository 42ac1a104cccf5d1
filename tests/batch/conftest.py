"""`vllm-dropin score` as a user runs it: a process of its own, asking a fake engine over loopback."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import EngineProcess, Stage
from tests.contract.drivers import free_port

COMMAND = str(Path(sys.executable).with_name("vllm-dropin"))


@dataclass
class Scoring:
    """Runs of the command in one folder, against one engine."""

    folder: Path
    engine: EngineProcess

    def command(self, *words: str) -> list[str]:
        return [COMMAND, "score", "--url", f"http://127.0.0.1:{self.engine.port}/v1", *words]

    @property
    def environ(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "VLLM_DROPIN_"))}
        return {**kept, "VLLM_DROPIN_STATE_DIR": str(self.folder / "state")}

    def start(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        return subprocess.Popen(self.command(*words), cwd=self.folder, env=self.environ, **options)

    def run(self, *words: str, code: int = 0, given: str | None = None) -> subprocess.CompletedProcess[str]:
        """To its end, which has to be this exit code."""
        done = subprocess.run(
            self.command(*words),
            cwd=self.folder,
            env=self.environ,
            input=given,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done

    def summary(self, *words: str) -> dict[str, Any]:
        """What `--json` prints at the end of a good run."""
        summary: dict[str, Any] = json.loads(self.run(*words, "--json").stdout)
        return summary

    def write_csv(self, name: str, prompts: Iterable[str]) -> None:
        with (self.folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("key", "promptText"))
            writer.writerows((f"k{place}", prompt) for place, prompt in enumerate(prompts))

    def read_csv(self, name: str) -> list[dict[str, str]]:
        with (self.folder / name).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def scoring(tmp_path: Path, stage: Stage) -> Scoring:
    return Scoring(tmp_path, stage.engine("--served-model-name", "fake", port=free_port()))


@pytest.fixture(scope="module")
def _shared_engine() -> Iterator[EngineProcess]:
    made = Stage()
    yield made.engine("--served-model-name", "fake", port=free_port())
    made.close()


@pytest.fixture
def quick(tmp_path: Path, _shared_engine: EngineProcess) -> Scoring:
    """The same on an engine that tests share and leave alone."""
    return Scoring(tmp_path, _shared_engine)
