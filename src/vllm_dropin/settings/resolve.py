"""`resolve`: the only reader of the environment in the parent. See cascade.py for the order of the sources."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast
from urllib.parse import urlsplit

from vllm_dropin.engine.interpreter import find
from vllm_dropin.engine.quirks import FLAGS, FlagQuirk
from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.folder import ModelFolder, read_folder
from vllm_dropin.model.parameters import ParameterValues, read_parameters
from vllm_dropin.model.secret import Secret
from vllm_dropin.settings import choices, environment
from vllm_dropin.settings.access import read_keys, read_listen
from vllm_dropin.settings.cascade import Setting
from vllm_dropin.settings.choices import Choices, unknown_variables
from vllm_dropin.settings.engine import Planned, places, plan_engine
from vllm_dropin.settings.options import Flags
from vllm_dropin.settings.settings import (
    Deployment,
    Environments,
    Generation,
    HookSettings,
    Limits,
    Paths,
    Platform,
    Settings,
    Supervision,
)

TARGET_TYPE = "textgeneration"
_ENGINE_PARAMETERS = frozenset(
    {
        "model", "served_model_name", "max_model_len", "gpu_memory_utilization", "trust_remote_code",
        "HuggingFaceToken", "default_parallelism",
    }
)  # fmt: skip


def load(flags: Flags, environ: Mapping[str, str], quirks: Sequence[FlagQuirk] = FLAGS) -> Settings:
    """Find the model folder, read it and resolve. `quirks`: engine flags of our own. Raises ConfigurationError."""
    options = Choices(flags, environ)
    named = flags.folder or options.text("code_dir")
    if not named:
        raise ConfigurationError("no model folder is given", "Name it: vllm-dropin serve FOLDER, or set CODE_DIR.")
    return resolve(read_folder(choices.expanded(named, "the model folder")), flags, environ, quirks)


def resolve(
    folder: ModelFolder, flags: Flags, environ: Mapping[str, str], quirks: Sequence[FlagQuirk] = FLAGS
) -> Settings:
    """Everything about one service. Raises ConfigurationError (FlagError, ModelError) for what can't be served."""
    options = Choices(flags, environ)
    warnings = [*folder.warnings, *unknown_variables(environ)]
    verbose = options.switch("verbose")
    log_level = "DEBUG" if verbose else options.read("logging_level", choices.level)
    _check_target_type(folder, options)
    parameters = read_parameters(folder.metadata, environ, options.file("runtime_params_file"), flags.params)
    warnings += parameters.warnings
    listen = read_listen(options, environ, warnings)
    generation = _generation(parameters)
    upstream, upstream_key_file = _upstream(options, environ), options.path("upstream_key_file")
    upstream_key = read_keys(upstream_key_file, warnings)[0] if upstream and upstream_key_file else None
    paths = Paths(_state_dir(options, environ), options.path("runtime_dir"))
    hook_timeout = options.read("hook_timeout", choices.seconds)
    hook_paths = options.folders("hook_path")
    options.text("engine_python")
    planned: Planned | None = None
    if upstream is None:
        python = find(flags.options.get("engine_python"), environ)
        tcp = _tcp(environ)
        planned = plan_engine(folder, parameters, flags.engine_args, python, environ, paths.state_dir, tcp, quirks)
        warnings += planned.warnings
    else:
        warnings += _ignored_by_upstream(folder, flags)
    limits = _limits(options, parameters, generation, places(planned.plan if planned else None))
    supervision = _supervision(options, parameters, environ, planned, warnings)
    platform = _platform(environ, parameters, warnings)
    child = environment.for_engine(environ, parameters)
    token = planned.plan.hub_token if planned else None
    served = parameters.get("served_model_name")
    return Settings(
        folder=folder,
        target_type=TARGET_TYPE,
        listen=listen,
        generation=generation,
        row_errors=cast(Literal["report", "fail"], parameters.text("row_errors")),
        error_status=cast(Literal["openai", "drum"], parameters.text("error_status")),
        limits=limits,
        deployment=_deployment(environ),
        platform=platform,
        supervision=supervision,
        paths=paths,
        hook=_hook(folder, hook_timeout, hook_paths) if planned else None,
        engine=planned.plan if planned else None,
        model=planned.model if planned else None,
        upstream=upstream,
        upstream_key=upstream_key,
        upstream_key_file=upstream_key_file if upstream else None,
        served_model_names=(
            planned.plan.served_model_names if planned else (str(served.value),) if served.given else ()
        ),
        environments=Environments(
            hook=environment.for_hook(environ, parameters, str(folder.path)),
            gateway=environment.for_gateway(environ, parameters),
            download={**child, "HF_TOKEN": token.reveal()} if token else child,
        ),
        parameters=parameters,
        log_level=log_level,
        settings=_report(options, parameters, planned),
        warnings=tuple(warnings),
    )


def _report(options: Choices, parameters: ParameterValues, planned: Planned | None) -> tuple[Setting, ...]:
    """All settings: the engine's, the parameters that are not among them, then our options."""
    first = planned.settings if planned else ()
    told = {setting.name for setting in first} | (_ENGINE_PARAMETERS if planned else set())
    rest = [
        Setting(value.name, value.value, value.source, value.overrode)
        for value in parameters.by_name.values()
        if value.name not in told
    ]
    return (*first, *rest, *options.settings)


def _check_target_type(folder: ModelFolder, options: Choices) -> None:
    """A target type of the environment has to be ours, which is also the metadata's."""
    wanted = options.text("target_type")
    if wanted is not None and wanted.strip().lower() != TARGET_TYPE:
        declared = f", and {folder.path.name}/model-metadata.yaml says textGeneration" if folder.metadata else ""
        raise ConfigurationError(
            f"the target type is '{wanted}' ({options.source('target_type')}){declared}",
            "This environment serves text generation only.",
        )


def _generation(parameters: ParameterValues) -> Generation:
    generation = Generation(
        system_prompt=parameters.text("system_prompt"),
        prompt_column_name=parameters.text("prompt_column_name") or "promptText",
        max_tokens=parameters.whole("max_tokens"),
        n=parameters.whole("n"),
        temperature=parameters.number("temperature"),
        chat_defaults=parameters.truth("chat_defaults"),
    )
    if generation.n is not None and generation.n > 1 and generation.temperature == 0:
        raise ConfigurationError(
            f"n is {generation.n} ({parameters.get('n').source}) and temperature is 0 "
            f"({parameters.get('temperature').source}): greedy sampling has one answer, and vLLM refuses each request",
            "Set n to 1, or temperature above 0.",
        )
    return generation


def _limits(options: Choices, parameters: ParameterValues, generation: Generation, at_once: tuple[int, str]) -> Limits:
    max_in_flight = options.read("max_in_flight", choices.count(1), at_once)
    # Who comes when all places are taken waits for the queue in front: half as many is half an answer's time more, so
    # that overload costs those who are admitted less than twice what a full engine does (failure mode 17).
    half = ((max_in_flight + 1) // 2, "default: half of max_in_flight")
    return Limits(
        max_in_flight=max_in_flight,
        max_queue=options.read("max_queue", choices.count(0), half),
        row_concurrency=options.read("row_concurrency", choices.count(1)),
        json_body=options.read("json_body_limit", choices.size),
        row_body=options.read("row_body_limit", choices.size),
        max_n=_max_n(options, parameters, generation.n or 1),
        idle_timeout=options.read("idle_timeout", choices.count(1)),
        request_timeout=parameters.number("DRUM_OPENAI_CLIENT_TIMEOUT") or 3600,
        direct_access_timeout=parameters.number("NIM_DIRECT_ACCESS_REQUEST_TIMEOUT") or 3600,
    )


def _max_n(options: Choices, parameters: ParameterValues, n: int) -> int:
    """How many completions a request may ask for. The default gives way to the folder, whose author is trusted."""
    most = options.read("max_n", choices.count(1))
    if n <= most:
        return most
    if options.source("max_n") != "default":
        raise ConfigurationError(
            f"n is {n} ({parameters.get('n').source}) and max_n is {most} ({options.source('max_n')}): "
            "every row would be refused",
            "Lower n, or raise --max-n.",
        )
    options.tell("max_n", n, "default: the folder's n")
    return n


def _supervision(
    options: Choices,
    parameters: ParameterValues,
    environ: Mapping[str, str],
    planned: Planned | None,
    warnings: list[str],
) -> Supervision:
    hang: float | None = options.read("hang_timeout", choices.seconds) or None
    if hang and planned is None:
        hang = None  # an upstream's counters are not ours to judge by (decision 8)
    elif hang and planned and planned.plan.on("disable_log_stats"):
        hang = None
        warnings.append("a hanging engine is not noticed: --disable-log-stats takes away the counters that show it")
    return Supervision(
        max_restarts=parameters.whole("max_watchdog_restarts") or 0,
        max_backoff=parameters.number("max_watchdog_backoff_sec") or 0,
        drain_timeout=options.read("drain_timeout", choices.seconds),
        hang_timeout=hang,
        start_timeout=options.read("start_timeout", choices.seconds) or None,
        error_server=options.switch("with_error_server"),
    )


def _platform(environ: Mapping[str, str], parameters: ParameterValues, warnings: list[str]) -> Platform:
    token = environ.get(environment.PLATFORM_TOKEN)
    verify = parameters.truth("verifySSL")
    if not verify:
        warnings.append("verifySSL is false: whoever is between us and the platform can read its token")
    return Platform(
        endpoint=environ.get("DATAROBOT_ENDPOINT") or None,
        token=Secret(token) if token else None,
        deployment_id=environ.get("MLOPS_DEPLOYMENT_ID") or None,
        verify_ssl=verify,
    )


def _deployment(environ: Mapping[str, str]) -> Deployment | None:
    """DEPLOYMENT_CONFIG: JSON, or a file that holds it (contract, section 3)."""
    text = environ.get("DEPLOYMENT_CONFIG")
    if not text:
        return None
    remedy = 'It needs {"target": {"name": …, "class_mapping": […]}}.'
    try:
        if not text.lstrip().startswith("{"):
            text = Path(text).read_text(encoding="utf-8")
        config = json.loads(text)
        target = config["target"]
        name, mapping = target["name"], target.get("class_mapping") or ()
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"DEPLOYMENT_CONFIG: {error}", remedy) from None
    except (KeyError, TypeError, AttributeError):
        raise ConfigurationError("DEPLOYMENT_CONFIG has no target with a name", remedy) from None
    if not isinstance(name, str) or not isinstance(mapping, list | tuple):
        raise ConfigurationError("DEPLOYMENT_CONFIG: target.name has to be text, class_mapping a list", remedy)
    return Deployment(name, tuple(str(label) for label in mapping))


def _hook(folder: ModelFolder, timeout: float, extra_paths: tuple[Path, ...]) -> HookSettings | None:
    hook = folder.hook
    if hook is None or not hook.runs:
        return None
    return HookSettings(hook.file, hook.has_init, hook.has_load_model, timeout, extra_paths)


def _upstream(options: Choices, environ: Mapping[str, str]) -> str | None:
    """The server to stand in front of: --upstream, or the contract's --sidecar with OPENAI_HOST and OPENAI_PORT."""
    url, sidecar = options.text("upstream"), options.switch("sidecar")
    if url is None and sidecar:
        url = f"http://{environ.get('OPENAI_HOST') or 'localhost'}:{environ.get('OPENAI_PORT') or '9999'}"
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment or parts.username:
        plain = url.partition("?")[0]  # a key may follow, as a password may stand before an @
        shown = f"…@{plain.rpartition('@')[2]}" if "@" in plain else plain
        raise ConfigurationError(
            f"upstream '{shown}' is not a URL such as http://localhost:9999", "Give its key with --upstream-key-file."
        )
    return url.rstrip("/").removesuffix("/v1")


def _ignored_by_upstream(folder: ModelFolder, flags: Flags) -> list[str]:
    ignored = {
        "custom.py": folder.hook is not None and folder.hook.runs,
        "engine_config.json": folder.engine_config is not None,
        "the flags after --": bool(flags.engine_args),
    }
    return [f"{name} is ignored: an upstream is served and no engine is started" for name in ignored if ignored[name]]


def _tcp(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """A set OPENAI_PORT puts the engine on that port of the loopback address (decision 14)."""
    text = environ.get("OPENAI_PORT")
    if not text:
        return None
    if not text.isdecimal() or not 0 < int(text) <= 65535:
        raise ConfigurationError(f"OPENAI_PORT: '{text}' is not a port", "Give a number from 1 to 65535, or unset it.")
    return "127.0.0.1", int(text)


def _state_dir(options: Choices, environ: Mapping[str, str]) -> Path:
    """Where caches live unless --state-dir says so: the user's state folder, or one for a user without a home."""
    folder = options.path("state_dir")
    if folder is None:
        folder = _default_state_dir(environ)
        options.tell("state_dir", str(folder), "default")
    return folder


def _default_state_dir(environ: Mapping[str, str]) -> Path:
    home = environ.get("XDG_STATE_HOME") or (f"{environ['HOME']}/.local/state" if environ.get("HOME") else "")
    if home in ("", "//.local/state"):
        return Path(f"/tmp/vllm-dropin-{os.getuid()}")  # noqa: S108 (made with mode 0700 by the supervisor)
    return Path(home) / "vllm-dropin"
