"""Fetches the model from the Hugging Face hub into vllm/ before the engine starts.

Runtime parameters: model (the hub's id of it), model_revision, HuggingFaceToken. Without this file the service would
fetch the model by itself; here you can choose what is fetched.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datarobot_drum import RuntimeParameters

IGNORED = ("original/*", "consolidated*")  # copies of the weights in other formats


def load_model(code_dir: str) -> None:
    """Called once, before the engine starts."""
    into_place(Path(code_dir) / "vllm", fetch)


def fetch(folder: Path) -> None:
    model = parameter("model")
    if not model:
        raise ValueError("the runtime parameter model is not set: it names the model on the hub")
    from huggingface_hub import snapshot_download

    credential = parameter("HuggingFaceToken") or {}
    snapshot_download(
        model,
        revision=parameter("model_revision") or None,
        token=credential.get("apiToken"),
        local_dir=folder,
        ignore_patterns=IGNORED,
    )
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's notes for resuming


def parameter(name: str) -> Any:
    """A runtime parameter; None when the folder does not define it, or nobody set it."""
    return RuntimeParameters.get(name) if RuntimeParameters.has(name) else None


def into_place(target: Path, fetch: Callable[[Path], None]) -> None:
    """Fill `target` by `fetch`, all or nothing: it writes into a draft beside it, which is renamed when it is whole.

    A start that is cut off leaves no half model behind, and two starts at once don't write into each other.
    """
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # goes with the process, however it ends
        if target.is_dir() and any(not entry.name.startswith(".") for entry in target.iterdir()):
            print(f"{target} has weights already: nothing is fetched")
            return
        for leftover in target.parent.glob(".vllm-draft-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(prefix=".vllm-draft-", dir=target.parent))
        try:
            fetch(draft)
            if not any(draft.iterdir()):
                raise FileNotFoundError("there are no files at the place that model_location names")
            draft.chmod(0o755)  # the engine may run as another user
            shutil.rmtree(target, ignore_errors=True)  # nothing in it but hidden files, as seen above
            draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        print(f"weights are in {target}")
    finally:
        os.close(descriptor)
