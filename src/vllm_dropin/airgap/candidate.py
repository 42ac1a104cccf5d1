"""The model folder that is to be proven: read as `serve` reads it, and its weights looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_dropin.airgap.report import Finding, NotChecked
from vllm_dropin.engine.interpreter import EnginePython
from vllm_dropin.engine.weights import check_weights
from vllm_dropin.errors import ModelError
from vllm_dropin.logging import REDACTOR
from vllm_dropin.model import hashes, manifest
from vllm_dropin.model.folder import read_folder
from vllm_dropin.model.parameters import read_parameters
from vllm_dropin.settings.options import Flags
from vllm_dropin.settings.resolve import load


@dataclass(frozen=True)
class Candidate:
    """A folder that can be read. `engine` is this machine's; None where an image has its own."""

    folder: Path
    column: str
    """The prompt column of its rows."""
    hook: bool
    weights: Path | None
    """The folder of weights that is there before the hook runs."""
    engine: EnginePython | None = None
    elsewhere: str | None = None
    """The model that it names, when that is not in the folder."""
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = ["custom.py" if self.hook else "no custom.py"]
        parts += [f"{self.engine.distribution} {self.engine.version}"] if self.engine else ["the image's engine"]
        parts += [f"model {self.elsewhere}, which is not in the folder"] if self.elsewhere else []
        return ", ".join(parts)


def read(flags: Flags, environ: Mapping[str, str]) -> Candidate:
    """The folder of these flags, for this machine's engine. Raises ConfigurationError."""
    settings = load(flags, environ)
    REDACTOR.learn(settings.secrets())
    engine = settings.engine
    return Candidate(
        folder=settings.folder.path,
        column=settings.generation.prompt_column_name,
        hook=settings.hook is not None,
        weights=engine.weights if engine else None,
        engine=engine.python if engine else None,
        elsewhere=engine.model.hub_id if engine else None,
        warnings=settings.warnings,
    )


def read_for_image(folder: Path, params: tuple[str, ...], environ: Mapping[str, str]) -> Candidate:
    """The folder, as far as it can be read without an engine: an image's can only be asked inside it.

    Raises ConfigurationError.
    """
    found = read_folder(folder)
    parameters = read_parameters(found.metadata, environ, params=params)
    REDACTOR.learn(parameters.secrets())
    return Candidate(
        folder=found.path,
        column=parameters.text("prompt_column_name") or "promptText",
        hook=found.hook is not None and found.hook.runs,
        weights=found.find_weights(),
        warnings=(*found.warnings, *parameters.warnings),
    )


def look_at_weights(candidate: Candidate, state_dir: Path) -> Finding:
    """Whether the weights are whole. Raises ModelError; NotChecked where they are not there yet."""
    folder = candidate.weights
    if folder is None:
        raise NotChecked("custom.py brings them" if candidate.hook else "they are not in the folder")
    try:
        bundled = manifest.verify(folder, hashes.cache_file(state_dir, folder))
        found = check_weights(folder)
    except ModelError as error:
        if not candidate.hook:
            raise
        raise NotChecked(f"{error.message}; custom.py runs first and may repair it") from None
    whole = f"whole by {manifest.FILE_NAME}" if bundled else "whole by their headers"
    detail = f"{found.format}, {len(found.files)} file(s), {found.bytes / 1e6:,.1f} MB: {whole}"
    return Finding(detail, warnings=found.warnings)
