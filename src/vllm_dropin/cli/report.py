"""What `check` found, and its two forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dropin.cli import output
from vllm_dropin.engine.command import EngineCommand, build
from vllm_dropin.engine.weights import WeightReport, check_weights
from vllm_dropin.errors import DropinError, ModelError
from vllm_dropin.logging import REDACTOR
from vllm_dropin.model import hashes, manifest
from vllm_dropin.model.manifest import Verification
from vllm_dropin.settings.environment import stripped
from vllm_dropin.settings.options import Flags
from vllm_dropin.settings.resolve import load
from vllm_dropin.settings.settings import Settings
from vllm_dropin.supervisor.references import bundled

_SOCKET = "engine.sock"


@dataclass(frozen=True)
class Report:
    """The outcome for a folder whose settings could be resolved. `error`: its weights can't be served."""

    settings: Settings
    command: EngineCommand | None
    removed: tuple[str, ...]
    weights: WeightReport | None
    warnings: tuple[str, ...]
    error: DropinError | None = None
    verification: Verification | None = None


def make(flags: Flags, environ: Mapping[str, str], on_progress: hashes.Progress | None = None) -> Report:
    """Resolve and look at the weights. Raises DropinError for what `serve` would refuse at once.

    `on_progress` hears of the bytes that are compared with a manifest.
    """
    settings = load(flags, environ)
    REDACTOR.learn(settings.secrets())
    warnings, weights, error = list(settings.warnings), None, None
    command, verification = None, None
    if settings.engine is not None:
        if (folder := settings.engine.weights) is not None:
            try:
                cache = hashes.cache_file(settings.paths.state_dir, folder)
                verification = manifest.verify(folder, cache, on_progress)
                weights = check_weights(folder)
                warnings += weights.warnings
            except ModelError as found:
                if settings.hook is None:
                    error = found
                else:
                    warnings.append(f"{found.message}; custom.py runs first and may repair it")
        command = _command(settings, verified=verification is not None)
    removed = stripped(environ, settings.parameters)
    return Report(settings, command, removed, weights, tuple(warnings), error, verification)


def _command(settings: Settings, verified: bool) -> EngineCommand | None:
    """The exact command but for the socket's folder, which is made at the start."""
    engine = settings.engine
    if engine is None or engine.model.reference is None:
        return None  # only custom.py, when it has run, can tell the model
    if verified:
        engine = bundled(engine, settings.folder.path)
    return build(engine, (settings.paths.runtime_dir or Path("/run/vllm-dropin")) / _SOCKET)


def as_text(report: Report) -> str:
    """For people."""
    settings = report.settings
    rows = [
        (setting.name, output.show(setting.value), setting.source, _lost(setting.overrode))
        for setting in settings.settings
        if setting.value is not None
    ]
    parts = [f"Model folder  {settings.folder.path}"]
    if settings.engine:
        python = settings.engine.python
        parts[0] += f"\nEngine        {python.distribution} {python.version} ({python.path})"
        if settings.hook:
            parts[0] += f"\nHook          {settings.hook.file}"
    else:
        parts[0] += f"\nUpstream      {settings.upstream}"
    if report.weights:
        found = report.weights
        size = f"{found.bytes / (1 << 20):,.0f} MiB"
        parts[0] += f"\nWeights       {found.format}, {len(found.files)} file(s), {size}: whole"
    if report.verification:
        parts[0] += f"\nManifest      verified: {report.verification}"
    parts.append(f"Settings\n{output.table(rows)}")
    if report.command:
        variables = [(v.name, v.value, v.source) for v in report.command.variables]
        parts.append(f"Engine command\n{output.shell(report.command.argv)}")
        parts.append(f"Engine environment, added\n{output.table(variables)}")
        if report.removed:
            parts.append(f"Engine environment, taken away\n  {', '.join(report.removed)}")
    elif settings.engine:
        parts.append("Engine command\n  known once custom.py has written vllm/")
    if report.warnings:
        parts.append("Warnings\n" + "\n".join(f"  - {warning}" for warning in report.warnings))
    return REDACTOR.hide("\n\n".join(parts))


def _lost(overrode: tuple[str, ...]) -> str:
    return f"instead of {', '.join(output.show(loser) for loser in overrode)}" if overrode else ""


def as_json(report: Report) -> str:
    """For programs. Keys are only ever added."""
    settings, command = report.settings, report.command
    engine = settings.engine
    document: dict[str, Any] = {
        "ok": report.error is None,
        "error": _error(report.error),
        "folder": str(settings.folder.path),
        "engine": engine and {
            "python": str(engine.python.path),
            "distribution": engine.python.distribution,
            "version": engine.python.version,
            "cpu": engine.python.cpu,
        },
        "upstream": settings.upstream,
        "hook": settings.hook and {
            "file": str(settings.hook.file),
            "init": settings.hook.has_init,
            "load_model": settings.hook.has_load_model,
        },
        "weights": report.weights and {
            "format": report.weights.format,
            "files": list(report.weights.files),
            "bytes": report.weights.bytes,
            "manifest": report.verification and {
                "source": report.verification.manifest.source.model_dump(),
                "licence": report.verification.manifest.licence,
                "files": len(report.verification.manifest.files),
                "bytes": report.verification.manifest.bytes,
                "computed": report.verification.computed,
            },
        },
        "settings": [
            {"name": item.name, "value": _plain(item.value), "source": item.source, "overrode": list(item.overrode)}
            for item in settings.settings
        ],
        "command": list(command.argv) if command else None,
        "environment": {
            "added": [{"name": v.name, "value": v.value, "source": v.source} for v in command.variables],
            "removed": list(report.removed),
        }
        if command
        else None,
        "warnings": list(report.warnings),
    }  # fmt: skip
    return output.to_json(document)


def failure_json(error: DropinError) -> str:
    """The same document for settings that could not be resolved: only `ok` and `error`."""
    return output.to_json({"ok": False, "error": _error(error)})


def _error(error: DropinError | None) -> dict[str, str] | None:
    if error is None:
        return None
    return {"code": error.code, "message": error.message, "remedy": error.remedy}


def _plain(value: object) -> object:
    """A value that JSON has; a secret is its stars."""
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
