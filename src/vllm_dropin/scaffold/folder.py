"""A new model folder: which files it has, and writing them without touching what is there."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from vllm_dropin.errors import ConfigurationError, InputOutputError
from vllm_dropin.model import engine_config, hooks
from vllm_dropin.model import metadata as metadata_file
from vllm_dropin.model.contract import Parameter
from vllm_dropin.scaffold import metadata, schema

SCHEMAS = ".vllm-dropin/schemas"
"""Where editors find the schemas: in the folder itself, so that it can be moved. Hidden, so that it is not pushed."""

_TEMPLATES = resources.files("vllm_dropin.scaffold")


@dataclass(frozen=True)
class Variant:
    """One way to bring the weights."""

    meaning: str
    scheme: str = ""
    """How a model_location begins; empty where it is a path, or not used."""
    parameters: tuple[Parameter, ...] = ()

    @property
    def located(self) -> bool:
        return any(parameter.name == "model_location" for parameter in self.parameters)


def _location(example: str) -> Parameter:
    return Parameter("model_location", "string", f"Where the weights are, such as {example}.")


VARIANTS: dict[str, Variant] = {
    "none": Variant("no custom.py: the service fetches the model from the hub, or serves what is in vllm/"),
    "hub": Variant(
        "custom.py fetches from the Hugging Face hub",
        parameters=(Parameter("model_revision", "string", "Branch, tag or commit of the model on the hub."),),
    ),
    "s3": Variant(
        "custom.py fetches from S3 or a store that speaks its protocol", "s3",
        (
            _location("s3://bucket/folder"),
            Parameter("s3_credential", "credential", "Keys for S3. Unset: what boto3 finds by itself."),
            Parameter("s3_endpoint_url", "string", "Address of a store other than AWS."),
        ),
    ),
    "azure": Variant(
        "custom.py fetches from Azure Blob Storage", "az",
        (
            _location("az://container/folder"),
            Parameter("azure_credential", "credential", "A connection string of the storage account."),
        ),
    ),
    "gcs": Variant(
        "custom.py fetches from Google Cloud Storage", "gs",
        (
            _location("gs://bucket/folder"),
            Parameter("gcp_credential", "credential", "Key of a service account. Unset: what the client finds."),
        ),
    ),
    "local": Variant("custom.py copies from a folder of the machine", "", (_location("/mnt/models/my-model"),)),
}  # fmt: skip


def plan(folder: Path, model: str | None, hook: str) -> dict[str, str]:
    """The files of the new folder by relative path. Raises ConfigurationError for a model that the hook can't fetch."""
    variant = VARIANTS[hook]
    name = folder.absolute().name or "model"
    defaults = _defaults(model, hook)
    files = {
        metadata_file.FILE_NAME: metadata.render(
            f"{SCHEMAS}/{schema.SCHEMA_FILE.name}", name, defaults, variant.parameters
        ),
        engine_config.FILE_NAME: _engine_config(),
        "README.md": _readme(name, model, hook, variant),
        f"{SCHEMAS}/{schema.SCHEMA_FILE.name}": schema.SCHEMA_FILE.read_text(encoding="utf-8"),
        f"{SCHEMAS}/{engine_config.SCHEMA_FILE.name}": engine_config.SCHEMA_FILE.read_text(encoding="utf-8"),
    }
    if hook != "none":
        files[hooks.FILE_NAME] = (_TEMPLATES / "hooks" / f"{hook}.py").read_text(encoding="utf-8")
    return files


def _defaults(model: str | None, hook: str) -> dict[str, str]:
    if model is None:
        return {}
    variant, scheme = VARIANTS[hook], urlsplit(model).scheme
    if not model.strip() or any(ord(letter) < 32 for letter in model):
        raise ConfigurationError("--model is empty or has control characters", "Give a hub id, a path or a URL.")
    if not variant.located:
        right = next((name for name, other in VARIANTS.items() if other.scheme and other.scheme == scheme), None)
        if right:
            raise ConfigurationError(f"--model {model}: the hook '{hook}' does not fetch that", f"Use --hook {right}.")
        return {"model": model}
    expected = f"{variant.scheme}://" if variant.scheme else "/"
    if not model.startswith(expected):
        raise ConfigurationError(
            f"--model {model}: the hook '{hook}' fetches what begins with {expected}", "Or choose another --hook."
        )
    return {"model_location": model}


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Write all files or none; what is there already is left as it is.

    Raises ConfigurationError when a file of the same name, or another custom.py, is there; InputOutputError when the
    disk says no.
    """
    _refuse_existing(folder, files)
    made: list[Path] = []
    try:
        for name, text in files.items():
            path = folder / PurePosixPath(name)
            _make_parents(path.parent, made)
            _create(path, text)
            made.append(path)
    except FileExistsError as error:  # somebody else was quicker
        _undo(made)
        raise ConfigurationError(f"{error.filename2 or error.filename} is there already", _ELSEWHERE) from None
    except OSError as error:
        _undo(made)
        raise InputOutputError(f"{error.filename or folder} can't be written: {error.strerror}") from None


_ELSEWHERE = "Nothing was written. Move it away, or name another folder."


def _refuse_existing(folder: Path, files: Mapping[str, str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{folder} is there and is not a folder", "Name another.")
    there = [name for name in files if os.path.lexists(folder / name)]
    if there:
        raise ConfigurationError(f"{folder} already has {', '.join(there)}", _ELSEWHERE)
    if hooks.FILE_NAME in files and folder.is_dir():
        hook = hooks.find_hook(folder)
        if hook is not None:
            raise ConfigurationError(f"{hook.file} is a hook already, and there can be only one", _ELSEWHERE)


def _make_parents(folder: Path, made: list[Path]) -> None:
    for parent in reversed([folder, *folder.parents]):
        if not parent.is_dir():
            parent.mkdir()
            made.append(parent)


def _create(path: Path, text: str) -> None:
    """Whole or not at all, and never over another: a link, unlike a rename, fails where a file is."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    try:
        path.hardlink_to(draft)
    finally:
        draft.unlink()


def _undo(made: list[Path]) -> None:
    for path in reversed(made):
        with contextlib.suppress(OSError):  # a folder that others use by now stays
            path.rmdir() if path.is_dir() else path.unlink()


def _engine_config() -> str:
    document = {"$schema": f"{SCHEMAS}/{engine_config.SCHEMA_FILE.name}", "args": []}
    return json.dumps(document, indent=2) + "\n"


def _readme(name: str, model: str | None, hook: str, variant: Variant) -> str:
    if hook == "none":
        weights = f"`{model}` is fetched at the start." if model else "Put them into `vllm/`, or set `model`."
    else:
        weights = f"{variant.meaning[0].upper()}{variant.meaning[1:]}, once, and leaves them in `vllm/`."
        weights += " What it needs to know are runtime parameters, credentials too: none belongs into a file here."
    text = (_TEMPLATES / "README.md").read_text(encoding="utf-8")
    custom = "| `custom.py` | brings the weights before the engine starts |\n" if hook != "none" else ""
    return text.replace("{name}", name).replace("{weights}", weights).replace("{custom}", custom)
