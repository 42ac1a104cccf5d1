"""engine_config.json as the bundle has it: what named something far away names the bundle's own copy.

Engine arguments win over `vllm/` (contract, section 2), so a `--model` that stayed would send the other side back to
the hub. It is left out, and so are a token and revisions of what is no longer fetched; repositories and files that
flags name are put into `vllm/parts/`, and the flags point there. A file that needs none of this stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from vllm_dropin.engine.arguments import FlagUse, ParsedArgs
from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.folder import WEIGHTS

PARTS = "parts"
"""Below `vllm/`: there the manifest covers them, and no hook is looked for."""

_FILES = frozenset({"chat_template", "tool_parser_plugin", "reasoning_parser_plugin", "log_config_file"})
_MODELS = frozenset({"tokenizer", "hf_config_path", "generation_config", "spec_model"})
_REVISIONS = frozenset({"revision", "code_revision", "tokenizer_revision"})
_CODE = PurePosixPath("/opt/code")
"""Where a model folder is in an image (contract, section 1)."""


@dataclass
class Gathered:
    """What flags name outside of the model folder: files and folders by their place below `vllm/`.

    `needed` are places in the model folder that flags name: they have to be in the bundle. `tokenizer` is the folder of
    the bundle that has it.
    """

    paths: dict[str, Path] = field(default_factory=dict)
    needed: dict[str, str] = field(default_factory=dict)
    tokenizer: str = WEIGHTS


@dataclass(frozen=True)
class Rewritten:
    """The arguments to write; None where the file can stay as it is. `notes` say what was changed."""

    args: tuple[str, ...] | None
    gathered: Gathered
    notes: tuple[str, ...]


def rewrite(
    parsed: ParsedArgs, folder: Path, weights: Path, repositories: Mapping[str, str], unfolded: bool
) -> Rewritten:
    """Turn the arguments of a model folder into those of its bundle.

    `weights` is where the model is now; `repositories` are those that the bundle has, by their place below `vllm/`;
    `unfolded` says that the arguments are partly those of a `--config` file. Raises ConfigurationError for a file that
    is not there.
    """
    writer = _Writer(folder, weights, repositories)
    tokens: list[str] = []
    notes: list[str] = []
    for use in parsed.uses:
        dropped = _dropped(use)
        if dropped:
            notes.append(dropped)
        else:
            tokens += writer.tokens(use)
    notes += [f"{word} is left out: the bundle has the model in {WEIGHTS}/" for word in parsed.positionals]
    if unfolded:
        notes.append("--config is left out: its flags are written out")
    notes += writer.notes
    args = tuple(tokens) if notes else None
    return Rewritten(args, writer.gathered, tuple(notes))


def _dropped(use: FlagUse) -> str | None:
    if use.dest == "model":
        return f"{use.option} {use.values[0]} is left out: the bundle has the model in {WEIGHTS}/"
    if use.dest in _REVISIONS:
        return f"{use.option} {use.values[0]} is left out: the bundle has that revision"
    if use.dest == "hf_token":
        return f"{use.option} is left out: a bundle holds no secret, and needs none"
    return None


class _Writer:
    """Writes flags anew, where their values have to change."""

    def __init__(self, folder: Path, weights: Path, repositories: Mapping[str, str]) -> None:
        self._folder = folder
        self._weights = weights
        self._repositories = repositories
        self.gathered = Gathered()
        self.notes: list[str] = []

    def tokens(self, use: FlagUse) -> tuple[str, ...]:
        values = self._values(use)
        if values == use.values:
            return use.tokens
        option = f"{use.option}.{use.key}" if use.key else use.option
        if not values:
            self.notes.append(f"{option} is left out: the bundle has that revision")
            return ()
        self.notes.append(f"{option} is {' '.join(values)} in the bundle")
        return (option, *values)

    def _values(self, use: FlagUse) -> tuple[str, ...]:
        place = use.option
        match use.dest:
            case dest if dest in _FILES and use.values:
                return (self._file(use.values[0], place),)
            case dest if dest in _MODELS and use.values:
                model = self._model(use.values[0], place)
                if dest == "tokenizer":
                    self.gathered.tokenizer = str(PurePosixPath(model))
                return (model,)
            case "speculative_config":
                return self._speculative(use, place)
            case "lora_modules":
                return tuple(self._adapter(value, place) for value in use.values)
            case "default_mm_loras" if use.key:
                return tuple(self._model(value, place) for value in use.values)
            case "default_mm_loras":
                return tuple(
                    _in_json(
                        value,
                        lambda found: {
                            key: self._model(path, place) if isinstance(path, str) else path
                            for key, path in found.items()
                        },
                    )
                    for value in use.values
                )
            case _:
                return use.values

    def _speculative(self, use: FlagUse, place: str) -> tuple[str, ...]:
        if use.key:
            key = use.key.replace("-", "_")
            if key in _REVISIONS:
                return ()
            return tuple(self._model(value, place) for value in use.values) if key == "model" else use.values

        def replaced(found: dict[str, Any]) -> dict[str, Any]:
            model = found.get("model")
            if not isinstance(model, str) or (here := self._model(model, place)) == model:
                return found
            return {**{key: value for key, value in found.items() if key not in _REVISIONS}, "model": here}

        return tuple(_in_json(value, replaced) for value in use.values)

    def _adapter(self, value: str, place: str) -> str:
        """`name=path`, or JSON with `path`."""
        if value.lstrip().startswith("{"):
            return _in_json(value, lambda found: {**found, "path": self._model(str(found.get("path", "")), place)})
        name, equals, path = value.partition("=")
        return f"{name}={self._model(path, place)}" if equals else value

    def _model(self, name: str, place: str) -> str:
        """A repository of the bundle, or a folder of this machine; anything else (a method, `auto`) as it is."""
        if name in self._repositories:
            return _below_weights(self._repositories[name])
        if not name.startswith(("/", ".", "~")) and not (self._folder / name).exists():
            return name
        return self._local(name, place)

    def _file(self, name: str, place: str) -> str:
        """A file that a flag names; a template may stand there itself."""
        return name if "{" in name or "\n" in name else self._local(name, place)

    def _local(self, name: str, place: str) -> str:
        """The path in the bundle of something on this machine: its own in the model folder, else a copy of it."""
        path = self._find(name)
        if path is None:
            raise ConfigurationError(
                f"{place} names {name}, and there is no such file or folder",
                "Correct it in engine_config.json. A relative path starts at the model folder.",
            )
        absolute = path.resolve() if ".." in path.parts else path.absolute()
        if absolute.resolve() == self._weights.resolve():
            return name if PurePosixPath(name) == PurePosixPath(WEIGHTS) else WEIGHTS
        for inside in (absolute, absolute.resolve()):
            for root in (self._folder, self._folder.resolve()):
                if inside != root and inside.is_relative_to(root):
                    relative = str(PurePosixPath(inside.relative_to(root)))
                    self.gathered.needed[relative] = place
                    # Its own spelling stays where it already says that.
                    return name if PurePosixPath(name) == PurePosixPath(relative) else relative
        target = f"{PARTS}/{_free_name(absolute.name or 'root', self.gathered.paths, absolute)}"
        self.gathered.paths[target] = absolute
        return _below_weights(target)

    def _find(self, name: str) -> Path | None:
        places = [self._folder / Path(name).expanduser()]
        if PurePosixPath(name).is_relative_to(_CODE):
            places.append(self._folder / PurePosixPath(name).relative_to(_CODE))
        return next((place for place in places if place.exists()), None)


def _free_name(name: str, taken: Mapping[str, Path], path: Path) -> str:
    candidates = (name, *(f"{number}-{name}" for number in range(2, 1000)))
    return next(candidate for candidate in candidates if taken.get(f"{PARTS}/{candidate}", path) == path)


def _below_weights(place: str) -> str:
    return f"{WEIGHTS}/{place}" if place else WEIGHTS


def _in_json(text: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """Malformed JSON is left to the check of the flags."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    if not isinstance(found, dict):
        return text
    changed = change(found)
    return text if changed == found else json.dumps(changed)
