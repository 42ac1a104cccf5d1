"""Where the model of a bundle is: found as `serve` finds it, fetched where it is not on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from vllm_dropin.airgap import contents, remote
from vllm_dropin.airgap.engine_args import PARTS
from vllm_dropin.airgap.progress import Progress
from vllm_dropin.errors import ConfigurationError, InputOutputError
from vllm_dropin.logging import REDACTOR
from vllm_dropin.model import hashes, manifest
from vllm_dropin.model.credential import is_secret_name
from vllm_dropin.model.folder import WEIGHTS
from vllm_dropin.model.manifest import Part, Source
from vllm_dropin.settings.settings import Settings
from vllm_dropin.supervisor.download import DownloadRequest, Snapshot, download
from vllm_dropin.supervisor.launch import run_custom
from vllm_dropin.supervisor.references import HubReference, flag_values, references
from vllm_dropin.supervisor.runtime import RuntimeFolder

_PAPERS = ("README.md", *(f"{stem}*" for word in ("LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY")
                          for stem in (word, word.lower(), word.capitalize())))  # fmt: skip
"""Of a repository, what says how the model may be used: the engine needs none of it."""


@dataclass(frozen=True)
class Model:
    """The model that a bundle gets: `files` by their path below its `vllm/`, and the `folder` that has the main one's.

    `repositories` are the hub's that are in it, by their place below `vllm/`. `inside` is a folder of the model folder
    that the files came from. `stage` is to be removed when the bundle is there.
    """

    source: Source
    folder: Path
    files: Mapping[str, Path]
    parts: tuple[Part, ...] = ()
    repositories: Mapping[str, str] = field(default_factory=dict)
    inside: Path | None = None
    stage: remote.Stage | None = None


async def run_hook(settings: Settings, runtime: RuntimeFolder, kept: bool, progress: Progress) -> Settings:
    """The settings once custom.py has run, where there is one: it may have written the weights.

    `kept` says that it goes into the bundle.
    """
    changes: Mapping[str, str | None] = {}
    if settings.hook is not None:
        progress.say("running custom.py")
        changes = await run_custom(settings, settings.hook, runtime)
        REDACTOR.learn(value for name, value in changes.items() if value and is_secret_name(name))
        if changes and not kept:
            progress.say(
                f"warning: custom.py set {', '.join(sorted(changes))} for the engine: set them at the other side too, "
                "or keep the hook with --keep-hook"
            )
    return settings.after_hook(changes)


async def bring(settings: Settings, allow_pickle: bool, progress: Progress) -> Model:
    """Find or fetch the model and all that the engine's flags name besides.

    Raises what a download raises, ConfigurationError for a model that can't be bundled, ModelError for a broken one.
    """
    plan = settings.engine
    assert plan is not None and plan.model.reference is not None  # settled by run_hook
    name, local = plan.model.reference, plan.model.local
    url = local is None and "://" in name
    named = references(name, flag_values(plan), settings.folder.path)
    wanted = [_with_papers(found, allow_pickle) for found in named if not (url and found.repo == name)]
    snapshots = await _download(settings, wanted, progress) if wanted else ()
    if url:
        return _from_storage(settings, name, _further(snapshots), progress)
    if local is not None:
        return _from_folder(settings, local, _further(snapshots), progress)
    main, *others = snapshots
    further = _further([snapshot for snapshot in others if snapshot.repo != main.repo])
    files = {**{file: main.folder / file for file in main.files}, **further.files}
    source = Source(kind="hub", name=main.repo, revision=main.commit)
    return Model(source, main.folder, files, further.parts, {**further.places, main.repo: ""})


@dataclass(frozen=True)
class _Further:
    """Repositories that flags name beside the model: their files and places below `vllm/`."""

    files: Mapping[str, Path]
    parts: tuple[Part, ...]
    places: Mapping[str, str]


def _further(snapshots: Sequence[Snapshot]) -> _Further:
    """Flags may name one repository several times, for different files."""
    places = {snapshot.repo: f"{PARTS}/{snapshot.repo.replace('/', '--')}" for snapshot in snapshots}
    commits = {snapshot.repo: snapshot.commit for snapshot in snapshots}
    return _Further(
        {f"{places[found.repo]}/{file}": found.folder / file for found in snapshots for file in found.files},
        tuple(Part(kind="hub", name=repo, revision=commit, path=places[repo]) for repo, commit in commits.items()),
        places,
    )


def _with_papers(reference: HubReference, allow_pickle: bool) -> HubReference:
    if reference.left:
        raise ConfigurationError(
            f"{reference.repo} can't be bundled ({reference.left})",
            "Name a whole repository of the hub or a folder, and a --load-format that reads files.",
        )
    return replace(reference, also=_PAPERS, pickles=allow_pickle)


async def _download(settings: Settings, wanted: Sequence[HubReference], progress: Progress) -> tuple[Snapshot, ...]:
    assert settings.engine is not None
    revisions: dict[str, str | None] = {}
    for reference in wanted:
        if revisions.setdefault(reference.repo, reference.revision) != reference.revision:
            raise ConfigurationError(
                f"the flags name {reference.repo} at two revisions, and a bundle holds one",
                "Let all flags of engine_config.json name the same.",
            )
    progress.say(f"fetching {', '.join(revisions)}")
    request = DownloadRequest(
        settings.engine.python.path, tuple(wanted), settings.environments.download, settings.folder.path
    )
    result = await download(request, lambda state: progress.show(f"fetching: {state}"))
    if result.missing:
        raise ConfigurationError(f"{result.missing[0]}: it can't be bundled", "Unset it, or name a folder.")
    if extra := result.snapshots[len(wanted) :]:
        raise ConfigurationError(
            f"the model takes code from another repository, {extra[0].repo}, and would ask the hub for it when it is "
            "served",
            "Put its .py files beside the weights, and take the name of the repository out of auto_map in config.json.",
        )
    return result.snapshots


def _from_storage(settings: Settings, url: str, further: _Further, progress: Progress) -> Model:
    scheme = url.partition("://")[0].lower()
    if scheme not in remote.SCHEMES:
        raise ConfigurationError(
            f"{remote.plain(url)}: {scheme}:// can't be bundled",
            f"Use a hub id, a folder, or one of {', '.join(f'{known}://' for known in remote.SCHEMES)}.",
        )
    progress.say(f"fetching {remote.plain(url)}")
    stage = remote.Stage(settings.paths.state_dir, url)
    folder = stage.fetch(progress.counting("fetching"))
    files = {**contents.weight_files(folder), **further.files}
    source = Source(kind="storage", name=remote.plain(url))
    return Model(source, folder, files, further.parts, {**further.places, url: ""}, stage=stage)


def _from_folder(settings: Settings, local: Path, further: _Further, progress: Progress) -> Model:
    folder = settings.folder.path
    if not local.is_dir():
        raise ConfigurationError(f"model {local} is a file", "Name the folder that it is in.")
    if folder.resolve().is_relative_to(local.resolve()):
        raise ConfigurationError(
            f"model {local} is the model folder itself, or around it", f"Move the weights into {WEIGHTS}/."
        )
    inside = local.is_relative_to(folder)
    source = Source(kind="folder", name=f"{PurePosixPath(local.relative_to(folder))}/" if inside else str(local))
    if settings.hook is not None and local == folder / WEIGHTS:
        source = Source(kind="hook", name=settings.hook.file.name)
    cache = hashes.cache_file(settings.paths.state_dir, local)
    found = manifest.verify(local, cache, progress.counting("verifying"))
    try:
        own = contents.weight_files(local)
    except OSError as error:
        raise InputOutputError(f"{error.filename or local} can't be read: {error.strerror}") from None
    own.pop(manifest.FILE_NAME, None)
    parts = further.parts
    if found is not None:  # a bundle of a bundle: it still comes from where it came from
        source, parts = found.manifest.source, (*found.manifest.parts, *parts)
    return Model(source, local, {**own, **further.files}, parts, further.places, inside=local if inside else None)
