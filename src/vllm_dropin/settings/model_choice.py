"""Which model is served: engine arguments > a non-empty `vllm/` > the `model` parameter (contract, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm_dropin.engine.command import ModelChoice
from vllm_dropin.errors import ConfigurationError, ModelError
from vllm_dropin.model.folder import WEIGHTS, ModelFolder
from vllm_dropin.settings.cascade import Candidate, Setting

_NONE = (
    "Name one in any of these ways: --model in the args of engine_config.json; weights in the folder vllm/; "
    "the runtime parameter `model`; a load_model in custom.py that writes vllm/."
)


@dataclass(frozen=True)
class ModelPlan:
    """Who may name the model. `vllm/` is looked at when the choice is made: a hook may have written it by then."""

    arguments: tuple[Candidate, ...] = ()
    """From engine arguments, strongest first."""
    parameter: Candidate | None = None

    def choose(self, folder: ModelFolder, hook_pending: bool) -> ModelChoice:
        """Settle it. While a hook may still bring the model, a missing one is no error yet.

        Raises ModelError when there is none, ConfigurationError when a folder that was named is not there.
        """
        candidates = self._candidates(folder)
        if not candidates:
            if hook_pending:
                return ModelChoice(None, "custom.py")
            raise ModelError(f"there is no model to serve in {folder.path}", _NONE)
        reference, source = str(candidates[0].value), candidates[0].source
        local = _find(reference, folder.path)
        if local is None and _is_path(reference) and not hook_pending:
            raise ConfigurationError(
                f"model {reference} ({source}) does not exist", "Correct the path, or name a model of the hub."
            )
        return ModelChoice(str(local) if local else reference, source, local)

    def setting(self, folder: ModelFolder, hook_pending: bool) -> Setting:
        """The same choice as a line of the report, with what lost."""
        choice, losers = self.choose(folder, hook_pending), self._candidates(folder)[1:]
        value = choice.reference or f"{WEIGHTS}/, once custom.py has written it"
        return Setting("model", value, choice.source, tuple(str(loser) for loser in losers))

    def _candidates(self, folder: ModelFolder) -> list[Candidate]:
        weights = folder.find_weights()
        found = [Candidate(str(weights), f"{WEIGHTS}/")] if weights else []
        return [*self.arguments, *found, *([self.parameter] if self.parameter else [])]


def _is_path(reference: str) -> bool:
    return reference.startswith(("/", "./", "../", "~"))


def _find(reference: str, folder: Path) -> Path | None:
    """The model on this machine, where the reference names one: absolute, in the model folder, or where we run."""
    if "://" in reference:
        return None
    try:
        path = Path(reference).expanduser()
        return next((place.absolute() for place in (folder / path, path) if place.exists()), None)
    except (RuntimeError, OSError):  # the home folder of nobody; a name that no file can have
        return None
