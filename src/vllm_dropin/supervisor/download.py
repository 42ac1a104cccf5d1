"""Downloads from the hub before the engine starts: with progress, with clear failures, and only what is not there.

vLLM downloads in silence. So a child of ours fetches every repository that the flags name (decision 11); when all of
it is there, the engine can be started offline. What we can't or should not fetch is left to vLLM, and said.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_dropin import children
from vllm_dropin.errors import DownloadError, DropinError, InputOutputError
from vllm_dropin.logging import REDACTOR, get
from vllm_dropin.supervisor.process import ExitStatus, GuardedProcess
from vllm_dropin.supervisor.references import HubReference

log = get("download")

PROGRAM = Path(children.__file__).parent / "download.py"
_MARK = "@download "


@dataclass(frozen=True)
class DownloadRequest:
    """What to fetch. `environ` holds the token (HF_TOKEN) and the hub's own variables (HF_HOME, HF_HUB_OFFLINE, …).

    `download_dir` is vLLM's flag of that name: where it looks for weights when it is online.
    """

    python: Path
    references: tuple[HubReference, ...]
    environ: Mapping[str, str] = field(repr=False)
    cwd: Path
    download_dir: Path | None = None


@dataclass(frozen=True)
class Progress:
    """Bytes and files that are on the disk, of those known to be needed so far."""

    done: int
    total: int
    files_done: int
    files: int

    @property
    def fraction(self) -> float | None:
        """0 to 1; None while nothing is known."""
        return self.done / self.total if self.total else None

    def __str__(self) -> str:
        return f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, {self.files_done} of {self.files} files"


@dataclass(frozen=True)
class Snapshot:
    """One repository at one commit in the hub's cache; `files` are those of it that were asked for."""

    repo: str
    folder: Path
    files: tuple[str, ...]

    @property
    def commit(self) -> str:
        """By the layout of the hub's cache."""
        return self.folder.name


@dataclass(frozen=True)
class DownloadResult:
    """`complete`: the engine can be started offline. `folder` is the model's snapshot, when it was ours to fetch.

    `missing` says what was left to vLLM, and why: then the engine stays online. `snapshots` are those of the
    references, in their order, then those of code that they name.
    """

    complete: bool
    folder: Path | None
    missing: tuple[str, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()


async def download(request: DownloadRequest, on_progress: Callable[[Progress], None]) -> DownloadResult:
    """Fetch every reference into the hub's cache; without network when all is there.

    Raises DownloadError when the hub refuses or can't be reached, and InputOutputError when the disk is full or can't
    be written. A cancellation ends the child; finished files stay.
    """
    ours, missing = _share(request)
    if not ours:
        return DownloadResult(not missing, None, missing)
    conversation = _Conversation(on_progress)
    status = await _run(request, ours, conversation.hear)
    if conversation.refusal is not None:
        raise _failure(conversation.refusal, bool(request.environ.get("HF_TOKEN")))
    if conversation.snapshots is None:
        raise DownloadError(
            "\n".join([f"the download ended early ({status})", *conversation.last_lines]),
            f"Check that {request.python} has huggingface_hub, and the log above.",
        )
    for reference in ours:
        if reference.patterns and request.download_dir is not None:
            missing += (f"{reference.repo}: the engine looks in --download-dir only when it is online",)
    folder = conversation.snapshots[0].folder if request.references[0] == ours[0] else None
    return DownloadResult(not missing, folder, missing, conversation.snapshots)


def _share(request: DownloadRequest) -> tuple[tuple[HubReference, ...], tuple[str, ...]]:
    """What we fetch, and what is left to vLLM."""
    if request.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true"):
        return (), tuple(f"{reference.repo}: VLLM_USE_MODELSCOPE is set" for reference in request.references)
    ours = tuple(reference for reference in request.references if not reference.left)
    left = tuple(f"{reference.repo}: {reference.left}" for reference in request.references if reference.left)
    return ours, left


class _Conversation:
    """What the child says."""

    def __init__(self, on_progress: Callable[[Progress], None]) -> None:
        self._on_progress = on_progress
        self.refusal: Mapping[str, Any] | None = None
        self.snapshots: tuple[Snapshot, ...] | None = None
        self.last_lines: list[str] = []

    def hear(self, line: str) -> None:
        if not line.startswith(_MARK):
            line = REDACTOR.hide(line)
            log.info("%s", line)
            self.last_lines = [*self.last_lines[-4:], line[:300]]
            return
        said = json.loads(line.removeprefix(_MARK))
        match said.pop("event"):
            case "progress":
                self._on_progress(Progress(**said))
            case "refusal":
                self.refusal = said
            case "finished":
                self.snapshots = tuple(
                    Snapshot(entry["repo"], Path(entry["folder"]), tuple(entry["files"])) for entry in said["snapshots"]
                )


async def _run(
    request: DownloadRequest, references: Sequence[HubReference], on_line: Callable[[str], None]
) -> ExitStatus:
    asked = {
        "references": [reference.asked() for reference in references],
        "download_dir": str(request.download_dir) if request.download_dir else None,
    }
    argv = (str(request.python), "-u", str(PROGRAM), json.dumps(asked))
    process = await GuardedProcess.start(argv, _without_exposed_token(request.environ), request.cwd, on_line)
    try:
        return await process.wait()
    finally:
        if not process.ended:
            await asyncio.shield(process.stop())


def _without_exposed_token(environ: Mapping[str, str]) -> dict[str, str]:
    """A token does not travel over plain http to another machine (docs: failure modes, security defaults)."""
    kept = dict(environ)
    parts = urlsplit(kept.get("HF_ENDPOINT", ""))
    host = parts.hostname or ""
    if parts.scheme == "http" and not (host in ("localhost", "::1") or host.startswith("127.")):
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            if kept.pop(name, None):
                log.warning("HF_ENDPOINT is http: the hub token would travel in the clear and is not sent")
        kept |= {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    return kept


def _failure(refusal: Mapping[str, Any], token: bool) -> DropinError:
    repo, detail, cache = refusal["repo"], REDACTOR.hide(str(refusal["detail"])), refusal["cache"]
    how_to_set = "Set the HuggingFaceToken runtime parameter to a token of an account that may read it."
    other_account = "Use a HuggingFaceToken of an account that may read it."
    match refusal["kind"]:
        case "gated":
            return DownloadError(
                f"the hub does not let us download {repo}: it is gated",
                "Accept its terms on the hub, with the account that the token belongs to."
                if token
                else f"Accept its terms on the hub, then: {how_to_set}",
            )
        case "repository":
            return DownloadError(
                f"the hub has no model {repo}, or it is private",
                f"Check the name{'' if token else ' (a local folder that does not exist looks like one, too)'}. "
                f"If it is private: {other_account if token else how_to_set}",
            )
        case "forbidden":
            return DownloadError(
                f"the hub refuses {repo}: {detail}",
                "Check that the HuggingFaceToken is valid and may read it." if token else how_to_set,
            )
        case "revision":
            return DownloadError(f"{repo} has no revision {refusal['revision']}", "Check --revision and its like.")
        case "name":
            return DownloadError(
                f"{repo!r} is no model id: {detail}", "Give a local folder or a hub id such as org/name."
            )
        case "weights":
            return DownloadError(f"{repo} has no weights to load: {detail}", "Check the model id and --load-format.")
        case "pickle":
            return DownloadError(
                f"{repo} has its weights as Python pickles ({detail}), which can run code when they are loaded",
                "Choose a model that has safetensors, or add --allow-pickle.",
            )
        case "offline":
            return DownloadError(
                f"{repo} is not complete in {cache} (lacks {detail}), and HF_HUB_OFFLINE forbids fetching it",
                "Unset HF_HUB_OFFLINE for one start, or fill the cache by `hf download` on a machine with network.",
            )
        case "disk":
            return InputOutputError(
                f"the disk can't hold {repo}: {detail}",
                "Free some space, or set HF_HOME to a larger disk; finished files are kept.",
            )
        case "cache":
            return InputOutputError(f"the hub's cache can't be written: {detail}", "Set HF_HOME to a writable folder.")
        case _:
            return DownloadError(
                f"{repo} could not be fetched from the hub: {detail}",
                "Check the network, a proxy and HF_ENDPOINT; finished files are kept for the next start.",
            )
