"""What `resolve` makes: every value of one service, frozen, by who needs it. Sizes in bytes, times in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from vllm_dropin.engine.command import EnginePlan
from vllm_dropin.model.folder import ModelFolder
from vllm_dropin.model.parameters import ParameterValues
from vllm_dropin.model.secret import Secret
from vllm_dropin.settings import environment
from vllm_dropin.settings.cascade import Setting
from vllm_dropin.settings.engine import with_parallel
from vllm_dropin.settings.environment import HUB_TOKENS
from vllm_dropin.settings.model_choice import ModelPlan


@dataclass(frozen=True)
class Tls:
    """A certificate chain and its private key: the files, and what was in them, checked together, as one PEM text."""

    cert: Path
    key: Path
    pem: Secret


@dataclass(frozen=True)
class Keys:
    """Who may ask: all keys, and where they are read again from. `fixed` are those of the environment."""

    accepted: tuple[Secret, ...] = ()
    fixed: tuple[Secret, ...] = ()
    file: Path | None = None


@dataclass(frozen=True)
class Listen:
    """The public address and who may use it (decision 15). `url_prefix` is "" or "/a/b"; no `tls` means plain HTTP."""

    host: str
    port: int
    url_prefix: str
    workers: int
    auth: Literal["key", "none"]
    keys: Keys = Keys()
    tls: Tls | None = None

    @property
    def api_keys(self) -> tuple[Secret, ...]:
        return self.keys.accepted


@dataclass(frozen=True)
class Generation:
    """Defaults for rows, and for chats that leave them unset. None: left to the engine (contract, section 1)."""

    system_prompt: str | None
    prompt_column_name: str
    max_tokens: int | None
    n: int | None
    temperature: float | None
    chat_defaults: bool


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients may ask (decisions 7 and 14)."""

    max_in_flight: int
    max_queue: int
    row_concurrency: int
    json_body: int
    row_body: int
    max_n: int
    idle_timeout: float
    request_timeout: float
    direct_access_timeout: float


@dataclass(frozen=True)
class Deployment:
    """The part of DEPLOYMENT_CONFIG that shapes row answers (contract, section 3)."""

    target_name: str
    class_mapping: tuple[str, ...] = ()


@dataclass(frozen=True)
class Platform:
    """Where status events go. None of them is sent unless endpoint, token and deployment id are all there."""

    endpoint: str | None
    token: Secret | None
    deployment_id: str | None
    verify_ssl: bool


@dataclass(frozen=True)
class HookSettings:
    """custom.py, when it defines something to run. `extra_paths` come after the engine's packages on its path."""

    file: Path
    has_init: bool
    has_load_model: bool
    timeout: float
    extra_paths: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Supervision:
    """How long we wait and how often we try again. `start_timeout` None: as long as the engine lives."""

    max_restarts: int
    max_backoff: float
    drain_timeout: float
    hang_timeout: float | None  # None: not watched (decision 8)
    start_timeout: float | None
    error_server: bool


@dataclass(frozen=True)
class Paths:
    """`state_dir` outlives us (caches, hook state); `runtime_dir` holds sockets and secrets of this process."""

    state_dir: Path
    runtime_dir: Path | None


@dataclass(frozen=True)
class Environments:
    """The environment of each kind of child (decision 9). Never printed: they hold secrets.

    The hook's has everything but the platform's token and the clients' keys, the parameters as envelopes and CODE_DIR.
    The engine's is in its plan. The download's has the hub token and no other secret.
    """

    hook: Mapping[str, str] = field(repr=False)
    gateway: Mapping[str, str] = field(repr=False)
    download: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class Settings:
    """Everything about one service. `engine` is None when an upstream is served instead of an engine of ours.

    `upstream_key_file` is where its key is read again from.
    """

    folder: ModelFolder
    target_type: str
    listen: Listen
    generation: Generation
    row_errors: Literal["report", "fail"]
    error_status: Literal["openai", "drum"]
    limits: Limits
    deployment: Deployment | None
    platform: Platform
    supervision: Supervision
    paths: Paths
    hook: HookSettings | None
    engine: EnginePlan | None
    model: ModelPlan | None
    upstream: str | None
    upstream_key: Secret | None
    upstream_key_file: Path | None
    served_model_names: tuple[str, ...]
    environments: Environments
    parameters: ParameterValues
    log_level: str
    settings: tuple[Setting, ...]
    warnings: tuple[str, ...]

    def after_hook(self, changes: Mapping[str, str | None]) -> Settings:
        """The same service once custom.py has run, or without one: its environment changes are in (None deletes), and
        the model is settled, with the weights that it may have written to `vllm/`.

        Raises ModelError when no model is known, and ConfigurationError when it names a folder that is not there.
        """
        if self.engine is None or self.model is None:
            return self
        engine = replace(
            self.engine,
            environ=environment.merge(self.engine.environ, changes),
            model=self.model.choose(self.folder, hook_pending=False),
        )
        download = environment.merge(self.environments.download, changes)
        return replace(self, engine=with_parallel(engine), environments=replace(self.environments, download=download))

    def after_download(self, folder: Path | None, complete: bool) -> Settings:
        """The same service once the hub's files are in `folder`. Only a `complete` model starts offline."""
        if self.engine is None:
            return self
        engine = replace(self.engine, model=replace(self.engine.model, local=folder), offline=complete)
        return replace(self, engine=with_parallel(engine))

    def secrets(self) -> tuple[str, ...]:
        """Every text that must not be in a log: credentials, keys, the platform's token."""
        token = self.engine.hub_token if self.engine else None
        single = (*self.listen.api_keys, self.platform.token, self.upstream_key, token)
        # The hook's may differ: a credential replaces the one that the engine and the download would inherit.
        children = (self.environments.download, self.environments.hook)
        inherited = (environ.get(name) for environ in children for name in HUB_TOKENS)
        return (
            *self.parameters.secrets(),
            *(secret.reveal() for secret in single if secret),
            *(text for text in inherited if text),
        )
