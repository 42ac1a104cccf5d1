"""The model side of an air gap: a whole model folder, with everything in it that an engine needs without a network.

FOLDER ── custom.py, or the model's name ──► weights ── checked, hashed ──► vllm/ with its manifest
  └────── its other files ─────────────────────────────────────────────────┴──► one tar archive, or a folder
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from vllm_dropin import __version__, logging
from vllm_dropin.airgap import archive, contents
from vllm_dropin.airgap.archive import Entry, Written
from vllm_dropin.airgap.engine_args import Rewritten, rewrite
from vllm_dropin.airgap.model import Model, bring, run_hook
from vllm_dropin.airgap.progress import Progress
from vllm_dropin.engine.flags import load_table
from vllm_dropin.engine.weights import check_weights
from vllm_dropin.errors import ConfigurationError, InputOutputError, ModelError
from vllm_dropin.model import engine_config, hashes, manifest
from vllm_dropin.model.folder import WEIGHTS
from vllm_dropin.model.manifest import FileRecord, Manifest, Part
from vllm_dropin.settings.engine_flags import ENGINE_CONFIG, read_args
from vllm_dropin.settings.options import Flags
from vllm_dropin.settings.resolve import load
from vllm_dropin.settings.settings import Settings
from vllm_dropin.supervisor.runtime import RuntimeFolder
from vllm_dropin.supervisor.supervisor import prepare_state_dir


@dataclass(frozen=True)
class BundleRequest:
    """What is asked for beside the settings."""

    output: Path
    allow_pickle: bool = False
    keep_hook: bool = False


@dataclass(frozen=True)
class Bundle:
    """What was written. `notes` say what differs from the model folder."""

    written: Written
    manifest: Manifest
    files: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def bundle(request: BundleRequest, flags: Flags, environ: Mapping[str, str], progress: Progress) -> Bundle:
    """Make a bundle of a model folder.

    Raises ConfigurationError and ModelError (78) for what can't be bundled, HookError and DownloadError (78),
    InputOutputError (74) for disk and network. What was fetched is kept for the next run; no output is half-written.
    """
    settings = load(flags, environ)
    logging.setup(settings.log_level)
    logging.REDACTOR.learn(settings.secrets())
    if settings.engine is None:
        raise ConfigurationError("an upstream is served, so there is no model to bundle", "Leave the upstream out.")
    archive.check_output(request.output, settings.folder.path)
    prepare_state_dir(settings.paths.state_dir)
    runtime = RuntimeFolder.create(settings.paths.runtime_dir)
    try:
        settings, model = asyncio.run(_gather(settings, runtime, request, progress))
    finally:
        runtime.remove()
    try:
        return _write(settings, model, request, progress)
    finally:
        if model.stage is not None:
            model.stage.release()


def _write(settings: Settings, model: Model, request: BundleRequest, progress: Progress) -> Bundle:
    if not request.allow_pickle:
        contents.refuse_pickles({f"{WEIGHTS}/{name}": path for name, path in model.files.items()})
    warnings = _check(settings, model)
    try:
        draft = _assemble(settings, model, request, progress)
    except OSError as error:
        raise InputOutputError(f"{error.filename or settings.folder.path} can't be read: {error.strerror}") from error
    progress.say(f"writing {request.output}")
    written = archive.write(draft.entries, request.output, progress.counting("writing"))
    if model.stage is not None:
        model.stage.remove()
    return Bundle(written, draft.manifest, len(draft.entries), draft.notes, (*warnings, *draft.warnings))


async def _gather(
    settings: Settings, runtime: RuntimeFolder, request: BundleRequest, progress: Progress
) -> tuple[Settings, Model]:
    settings = await run_hook(settings, runtime, request.keep_hook, progress)
    return settings, await bring(settings, request.allow_pickle, progress)


def _check(settings: Settings, model: Model) -> tuple[str, ...]:
    """Warnings about the weights. Raises ModelError for those that no engine could load."""
    plan = settings.engine
    assert plan is not None  # an upstream is refused above
    weights = replace(plan, model=replace(plan.model, local=model.folder)).weights
    return check_weights(weights).warnings if weights is not None else ()


@dataclass(frozen=True)
class _Draft:
    entries: tuple[Entry, ...]
    manifest: Manifest
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def _assemble(settings: Settings, model: Model, request: BundleRequest, progress: Progress) -> _Draft:
    """Decide what goes in, refuse what must not, hash the rest."""
    folder = settings.folder.path
    notes, without = [], [model.inside] if model.inside else []
    if settings.hook is not None and not request.keep_hook:
        without.append(settings.hook.file)
        notes.append(f"{settings.hook.file.name} is left out: it has run, and would run again; --keep-hook keeps it")
    if settings.folder.find_weights() not in (None, model.folder):
        notes.append(f"{WEIGHTS}/ of the folder is left out: {model.source.name} is what is served")
    files: dict[str, Path | bytes] = {**contents.folder_files(folder, without)}
    rewritten = _engine_args(settings, model)
    weights, parts = _with_gathered(model, rewritten)
    notes += [f"{engine_config.FILE_NAME}: {note}" for note in rewritten.notes]
    if rewritten.args is not None:
        files[engine_config.FILE_NAME] = engine_config.render(rewritten.args).encode()
    files.update({f"{WEIGHTS}/{name}": path for name, path in weights.items()})
    _require(rewritten.gathered.needed, files)
    if not request.allow_pickle:
        contents.refuse_pickles({name: path for name, path in files.items() if isinstance(path, Path)})
    contents.refuse_secrets(files, settings.secrets())
    progress.say("hashing")
    hashed = hashes.digest_files(
        tuple({path for path in files.values() if isinstance(path, Path)}),
        hashes.cache_file(settings.paths.state_dir, folder),
        progress.counting("hashing"),
    )
    entries = {name: _entry(name, content, hashed.by_file) for name, content in files.items()}
    licence = contents.find_licence(weights)
    found = _manifest(model, parts, licence, {name: entries[f"{WEIGHTS}/{name}"] for name in weights})
    place = f"{WEIGHTS}/{manifest.FILE_NAME}"
    entries[place] = _entry(place, found.render().encode(), {})
    return _Draft(tuple(entries.values()), found, tuple(notes), tuple(_warnings(settings, files, rewritten, licence)))


def _engine_args(settings: Settings, model: Model) -> Rewritten:
    """The folder's engine arguments for the other side."""
    plan, folder = settings.engine, settings.folder
    assert plan is not None  # an upstream is refused above
    args = folder.engine_config.args if folder.engine_config else ()
    table = load_table(plan.python.version, settings.paths.state_dir / "flags", plan.python.path, plan.environ)
    parsed = read_args(table, args, ENGINE_CONFIG, folder.path)
    unfolded = table.parse(args, ENGINE_CONFIG).last("config") is not None
    return rewrite(parsed, folder.path, model.folder, model.repositories, unfolded)


def _with_gathered(model: Model, rewritten: Rewritten) -> tuple[dict[str, Path], tuple[Part, ...]]:
    """The files below `vllm/`, with those that only flags name."""
    weights, parts = dict(model.files), list(model.parts)
    for place, path in rewritten.gathered.paths.items():
        more = {place: path}
        if path.is_dir():
            more = {f"{place}/{name}": file for name, file in contents.weight_files(path).items()}
            parts.append(Part(kind="folder", name=str(path), path=place))
        for name, file in more.items():
            if weights.setdefault(name, file) != file:
                raise ConfigurationError(f"{file} and {weights[name]} would be one file of the bundle", "Rename one.")
    return weights, tuple(parts)


def _require(needed: Mapping[str, str], files: Mapping[str, Path | bytes]) -> None:
    for place, flag in needed.items():
        if place not in files and not any(name.startswith(f"{place}/") for name in files):
            raise ConfigurationError(
                f"{flag} in {engine_config.FILE_NAME} names {place}, which is not in the bundle: it is hidden, a "
                "cache, or in a folder of weights that is not served",
                "Move it to another place in the model folder.",
            )


def _entry(name: str, content: Path | bytes, digests: Mapping[Path, str]) -> Entry:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"the file name {name!r} is not UTF-8", "Rename it.") from None
    if isinstance(content, bytes):
        return Entry(name, content, len(content), hashes.digest_bytes(content))
    # Weights are data whatever a store has made of their modes.
    executable = not name.startswith(f"{WEIGHTS}/") and contents.is_executable(content)
    return Entry(name, content, content.stat().st_size, digests[content], executable)


def _manifest(model: Model, parts: tuple[Part, ...], licence: str | None, entries: Mapping[str, Entry]) -> Manifest:
    records = {name: FileRecord(sha256=entry.sha256, size=entry.size) for name, entry in sorted(entries.items())}
    by_place = sorted(parts, key=lambda part: part.path)
    try:
        return Manifest(
            created_by=f"vllm-dropin {__version__}",
            source=model.source,
            licence=licence,
            parts=tuple(by_place),
            files=records,
        )
    except ValidationError as error:
        raise ModelError(
            f"{model.folder} has files that no manifest can list: {error.errors()[0]['msg']}", "Rename them."
        ) from None


def _warnings(
    settings: Settings, files: Mapping[str, Path | bytes], rewritten: Rewritten, licence: str | None
) -> list[str]:
    plan = settings.engine
    assert plan is not None  # an upstream is refused above
    warnings = []
    on_disk = {name: content for name, content in files.items() if isinstance(content, Path)}
    tokenizer = rewritten.gathered.tokenizer
    if plan.last("chat_template") is None and not contents.has_chat_template(on_disk, tokenizer):
        warnings.append(
            f"there is no chat template, neither with the tokenizer in {tokenizer}/ nor by --chat-template in "
            f"{engine_config.FILE_NAME}: chat requests and rows will fail"
        )
    if licence is None:
        warnings.append("there is no licence file beside the weights: say at the other side how the model may be used")
    return warnings
