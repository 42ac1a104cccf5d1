"""The model folder: everything that a user brings (contract, section 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model import engine_config as engine_config_file
from vllm_dropin.model import metadata as metadata_file
from vllm_dropin.model.engine_config import EngineConfig, read_engine_config
from vllm_dropin.model.hooks import Hook, find_hook
from vllm_dropin.model.metadata import Metadata, read_metadata

WEIGHTS = "vllm"


@dataclass(frozen=True)
class ModelFolder:
    """What was found. `metadata_data` is the metadata as written, for `/info/`."""

    path: Path
    metadata: Metadata | None
    engine_config: EngineConfig | None
    hook: Hook | None
    metadata_data: Mapping[str, Any] | None = field(default=None, repr=False)
    warnings: tuple[str, ...] = ()

    def find_weights(self) -> Path | None:
        """The `vllm/` folder when it has something in it. Looked up anew each time: a hook may have written it.

        Hidden files do not count: a folder that holds only `.gitkeep` has no weights.
        """
        folder = self.path / WEIGHTS
        try:
            filled = folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())
        except OSError as error:
            raise _unreadable(error, folder) from None
        return folder if filled else None


def read_folder(path: Path) -> ModelFolder:
    """Read a model folder. Raises ConfigurationError for what can't be served as it is."""
    folder = path.absolute()
    try:
        return _read(folder)
    except OSError as error:
        raise _unreadable(error, folder) from None


def _unreadable(error: OSError, folder: Path) -> ConfigurationError:
    return ConfigurationError(
        f"{error.filename or folder} can't be read: {error.strerror}", "The user that serves has to be able to read it."
    )


def _read(folder: Path) -> ModelFolder:
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise ConfigurationError(
            f"the model folder {folder} {problem}", "Name the folder that has model-metadata.yaml or vllm/ in it."
        )
    metadata, data, warnings = None, None, list(_warnings(folder))
    if (folder / metadata_file.FILE_NAME).is_file():
        metadata, data, more = read_metadata(folder / metadata_file.FILE_NAME)
        warnings += more
    config = None
    if (folder / engine_config_file.FILE_NAME).is_file():
        config = read_engine_config(folder / engine_config_file.FILE_NAME)
    hook = find_hook(folder)
    if hook is not None and not hook.runs:
        warnings.append(f"{hook.file.name} has neither load_model nor init: nothing in it is run")
    return ModelFolder(folder, metadata, config, hook, data, tuple(warnings))


def _warnings(folder: Path) -> list[str]:
    warnings = []
    if (folder / "custom_flask.py").exists():
        warnings.append(
            "custom_flask.py is ignored: it extends a Flask server, and this one is not Flask (ASGI). "
            "Move its start-up work into load_model of custom.py; routes of your own belong in a proxy in front"
        )
    if (folder / "moderation_config.yaml").exists():
        warnings.append("moderation_config.yaml is ignored: guards are not applied to a vLLM service, here or in DRUM")
    if (folder / "model-metadata.yml").exists() and not (folder / metadata_file.FILE_NAME).exists():
        warnings.append("model-metadata.yml is ignored: the name has to be model-metadata.yaml")
    return warnings
