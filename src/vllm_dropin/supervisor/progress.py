"""How far the engine's start has come, read from its log: vLLM tells it nowhere else."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass

from vllm_dropin.gateway.state import Phase


@dataclass(frozen=True)
class Progress:
    """`phase` None: the one before goes on. `stage` is for people; `fraction` (0 to 1) only where the log gives one."""

    phase: Phase | None
    stage: str
    fraction: float | None = None


_SHARDS = re.compile(r"Loading \S+ checkpoint shards:\s+(\d+)% Completed \| (\d+)/(\d+)")
_STEPS: tuple[tuple[str, Phase | None, str], ...] = (
    ("Resolved architecture", Phase.LOADING, "model configuration read"),
    ("Initializing a V1 LLM engine", Phase.LOADING, "engine core starting"),
    ("Starting to load model", Phase.LOADING, "loading weights"),
    ("Loading weights took", Phase.LOADING, "weights loaded"),
    ("torch.compile took", Phase.COMPILING, "compiled"),
    ("Start compiling", Phase.COMPILING, "compiling"),
    ("Dynamo bytecode transform", Phase.COMPILING, "compiling"),
    ("Capturing CUDA graphs", Phase.COMPILING, "capturing CUDA graphs"),
    ("KV cache size", None, "KV cache sized"),
    ("Warming up model for the compilation", None, "warming up"),
    ("init engine (", None, "engine core ready"),
    ("Application startup complete", None, "HTTP front end ready"),
)
_TELLING = 1000
"""Characters of a line that are looked at: the search takes the square of a line's length, and an engine may print
whole prompts."""
_FATAL = re.compile(
    r"(?:^|\s)((?:[A-Za-z_]+\.)*[A-Z][A-Za-z]*(?:Error|Exception|Interrupt)\b: .+|.*\berror: .+|Killed)"
)


def read_progress(line: str) -> Progress | None:
    """What one line of the engine's log says about its start; None for most lines."""
    if shards := _SHARDS.search(line):
        percent, done, total = shards.groups()
        return Progress(Phase.LOADING, f"loading weights: {done} of {total} shards", int(percent) / 100)
    for mark, phase, stage in _STEPS:
        if mark in line:
            return Progress(phase, stage)
    return None


class Cause:
    """Remembers the most telling line of an engine's log, to be quoted when it dies.

    `recent`: seconds; older errors are not quoted. An engine that serves logs what was wrong with clients' requests,
    which is neither why it dies nor for everybody to read.
    """

    def __init__(self, recent: float = math.inf) -> None:
        self._recent = recent
        self._errors: list[tuple[float, str]] = []
        self._last = ""

    def read(self, line: str) -> None:
        line = line[:_TELLING]
        text = re.sub(r"^(\([^)]*\) )?((ERROR|INFO|WARNING) \S+ \S+ (\[[^]]*\] )?)?", "", line).strip()
        if not text:
            return
        self._last = text[:500]
        if match := _FATAL.search(text):
            self._errors.append((time.monotonic(), match.group(1).strip()[:500]))
            del self._errors[:-20]

    def line(self) -> str:
        """The first specific error seen, else the last line.

        vLLM's last error is nearly always the wrapper `Engine core initialization failed. See root cause above`.
        """
        since = time.monotonic() - self._recent
        for error in (error for at, error in self._errors if at >= since):
            if "See root cause above" not in error and "Engine core initialization failed" not in error:
                return error
        return self._last or "the engine said nothing"
