"""What shapes the answers, as names and values: a run that goes on has to be about the same (journal.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from vllm_dropin.batch.inputs import InputFile
from vllm_dropin.engine.command import EnginePlan
from vllm_dropin.settings.settings import Settings

_SPREAD = frozenset(
    {"tensor_parallel_size", "pipeline_parallel_size", "gpu_memory_utilization", "max_num_seqs", "api_server_count"}
)
"""Flags that say how the work is spread: another machine may go on with other ones."""


def inputs_fingerprint(files: Sequence[InputFile]) -> dict[str, object]:
    """Content and order of the input. Blocking: reads all of each local file."""
    return {f"input {place}": f"{file.name} {file.fingerprint()}" for place, file in enumerate(files, 1)}


def engine_fingerprint(settings: Settings, model: str | None) -> dict[str, object]:
    """What answers: a model and the flags that change its words; of a server at a URL the name that it is asked for."""
    plan = settings.engine
    if plan is None:
        return {"model": model or "the server's first"}
    hook = settings.hook
    if hook is not None:
        weights = f"custom.py {hashlib.blake2b(hook.file.read_bytes(), digest_size=16).hexdigest()}"
    else:
        weights = f"{plan.model.reference} {_weights(plan.model.local)}".strip()
    return {"model": weights, "engine flags": _flags(plan)}


def _weights(folder: Path | None) -> str:
    """Names and sizes of a local folder's files: to read them all would take minutes, and swaps change sizes."""
    if folder is None or not folder.is_dir():
        return ""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    listing = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
    return hashlib.blake2b(listing.encode(), digest_size=16).hexdigest()


def _flags(plan: EnginePlan) -> str:
    return " ".join(" ".join(flag.tokens) for flag in plan.flags if flag.dest not in _SPREAD)
