"""The engine's plan: its flags, its model, its parallel size, from all sources."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Literal

from vllm_dropin.engine.arguments import ParsedArgs
from vllm_dropin.engine.command import EnginePlan, PlannedFlag
from vllm_dropin.engine.flags import FlagTable, load_table
from vllm_dropin.engine.gpus import Gpu, visible_gpus
from vllm_dropin.engine.interpreter import EnginePython
from vllm_dropin.engine.parallelism import choose_parallelism, read_shape
from vllm_dropin.engine.quirks import FlagQuirk
from vllm_dropin.errors import ConfigurationError, FlagError
from vllm_dropin.model.contract import CONTRACT
from vllm_dropin.model.folder import ModelFolder
from vllm_dropin.model.parameters import ParameterValue, ParameterValues
from vllm_dropin.model.secret import Secret
from vllm_dropin.settings import engine_flags
from vllm_dropin.settings.cascade import Candidate, Setting
from vllm_dropin.settings.engine_flags import COMMAND_LINE, ENGINE_CONFIG, Claim
from vllm_dropin.settings.environment import HUB_TOKENS, for_engine
from vllm_dropin.settings.model_choice import ModelPlan

_OURS = frozenset({"model", "served_model_name", "hf_token"})
_NO_MODELS = frozenset({"true", "false", "null", "none", "nan", "inf"})  # as JSON and YAML values become text
_FILES = ("chat_template", "tool_parser_plugin", "reasoning_parser_plugin", "log_config_file")
_MEANINGS = {parameter.name: parameter.meaning for parameter in CONTRACT}
_PARALLEL = frozenset({"tensor_parallel_size", "pipeline_parallel_size"})


@dataclass(frozen=True)
class Planned:
    """A plan with what is to be said about it."""

    plan: EnginePlan
    model: ModelPlan
    settings: tuple[Setting, ...]
    warnings: tuple[str, ...]


def plan_engine(
    folder: ModelFolder,
    parameters: ParameterValues,
    command_line: Sequence[str],
    python: EnginePython,
    environ: Mapping[str, str],
    state_dir: Path,
    tcp: tuple[str, int] | None,
    quirks: Sequence[FlagQuirk],
) -> Planned:
    """Bring together what the command line, engine_config.json and the parameters say, and our own `quirks`.

    Raises FlagError for a flag that is unknown, malformed or ours; ModelError when there is no model.
    """
    table = load_table(python.version, state_dir / "flags", python.path, environ)
    config = folder.engine_config.args if folder.engine_config else ()
    given = (
        (COMMAND_LINE, engine_flags.read_args(table, command_line, COMMAND_LINE, folder.path)),
        (ENGINE_CONFIG, engine_flags.read_args(table, config, ENGINE_CONFIG, folder.path)),
    )
    warnings = [table.note] if table.note else []
    warnings += [warning for _, parsed in given for warning in parsed.warnings]
    spoken = [
        [claim for claim in engine_flags.claims(parsed, source) if claim.dest not in _OURS] for source, parsed in given
    ]
    spoken.append(_parameter_claims(table, parameters, warnings))
    used = frozenset(claim.dest for layer in spoken for claim in layer)
    flags, flag_settings = engine_flags.merge([*spoken, engine_flags.applicable(quirks, table, python.cpu, used)])
    model = ModelPlan(_named_models(given, warnings), _candidate(parameters.get("model")))
    pending = folder.hook is not None and folder.hook.runs
    names, names_setting = _served_names(given, parameters)
    token, token_setting = _hub_token(given, parameters, environ)
    plan = with_parallel(
        EnginePlan(
            python=python,
            model=model.choose(folder, pending),
            served_model_names=names,
            flags=flags,
            environ=for_engine(environ, parameters),
            parallelism=_parallelism(used, parameters),
            hub_token=token,
            cache_dir=state_dir / "vllm",
            tcp=tcp,
        )
    )
    warnings += [*_remarks(plan), *_missing_files(plan, folder.path)]
    credential = parameters.credential("HuggingFaceToken")
    if credential is not None and credential.token() is None:
        warnings.append("the credential HuggingFaceToken has no field apiToken: the hub is asked without it")
    settings = [model.setting(folder, pending), names_setting, token_setting, *flag_settings]
    if plan.parallel is not None:
        size = plan.parallel.tokens[1] if plan.parallel.tokens else "1"
        settings.append(Setting(plan.parallel.dest, size, plan.parallel.source))
    _warn_of_lost_params(settings, warnings)
    return Planned(plan, model, tuple(settings), tuple(warnings))


Given = tuple[tuple[str, ParsedArgs], ...]


def _parameter_claims(table: FlagTable, parameters: ParameterValues, warnings: list[str]) -> list[Claim]:
    """The parameters that are flags of the engine, where they have a value."""
    claims = []
    for name in ("max_model_len", "gpu_memory_utilization", "trust_remote_code"):
        value = parameters.get(name)
        if value.value is None or not value.given:
            continue
        if table.spec(name) is None:
            warnings.append(f"parameter {name} is ignored: vLLM {table.version} has no such flag")
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value.value, bool):
            tokens: tuple[str, ...] = (flag,) if value.value else ()
        else:
            tokens = (flag, str(value.value))
            _check_parameter(table, tokens, value)
        claims.append(Claim(name, tokens, value.value, value.source, overrode=value.overrode))
    return claims


def _check_parameter(table: FlagTable, tokens: tuple[str, ...], value: ParameterValue) -> None:
    """Raises ConfigurationError, in the words of somebody who never wrote a flag."""
    try:
        table.parse(tokens, value.source)
    except FlagError:
        raise ConfigurationError(
            f"parameter {value.name} ({value.source}): vLLM does not take '{value.value}' for {tokens[0]}",
            _MEANINGS[value.name],
        ) from None


def _named_models(given: Given, warnings: list[str]) -> tuple[Candidate, ...]:
    """--model, or the word without a flag, of each source. With both, vLLM's API server takes --model.

    Raises FlagError for a stray number or truth: `"--max-num-seqs", "4", "16"` would make 16 the model.
    """
    found = []
    for source, parsed in given:
        word = next(iter(parsed.positionals), None)
        if word is not None and (word.lower() in _NO_MODELS or not any(map(str.isalpha, word))):
            raise FlagError(
                f"the word {word!r} in {source} belongs to no flag and is no model",
                "Remove it, or write it right after the flag that it is meant for.",
            )
        use = parsed.last("model")
        if use and word:
            warnings.append(f"the word {word!r} in {source} belongs to no flag and is ignored: --model names the model")
        name = use.values[0] if use else word
        if name:
            found.append(Candidate(name, source))
    return tuple(found)


def _candidate(value: ParameterValue) -> Candidate | None:
    return Candidate(value.value, value.source) if value.value else None


def _served_names(given: Given, parameters: ParameterValues) -> tuple[tuple[str, ...], Setting]:
    """The contract's name first, the user's flags as further names: clients know the first (decision 14)."""
    first = parameters.get("served_model_name")
    names, sources = [str(first.value)], [first.source]
    for source, parsed in given:
        use = parsed.last("served_model_name")
        if use is not None:
            names += [name for name in use.values if name not in names]
            sources.append(source)
            break
    return tuple(names), Setting("served_model_name", " ".join(names), " and ".join(sources), first.overrode)


def _hub_token(given: Given, parameters: ParameterValues, environ: Mapping[str, str]) -> tuple[Secret | None, Setting]:
    """The token travels by the environment, never on a command line, where other users can read it."""
    value = parameters.get("HuggingFaceToken")
    credential = parameters.credential("HuggingFaceToken")
    token = credential.token() if credential else None
    found = [
        Candidate(Secret(use.values[0]), f"--hf-token, {source}")
        for source, parsed in given
        if (use := parsed.last("hf_token")) is not None and use.values
    ]
    found += [Candidate(token, value.source)] if token else []
    inherited = [Candidate(Secret(environ[name]), name) for name in HUB_TOKENS if environ.get(name)]
    if not found and not inherited:
        return None, Setting("HuggingFaceToken", None, "default")
    winner, *losers = [*found, *inherited]
    setting = Setting("HuggingFaceToken", winner.value, winner.source, tuple(map(str, losers)))
    return (winner.value if found else None), setting


def _parallelism(used: frozenset[str], parameters: ParameterValues) -> Literal["tp", "pp"] | None:
    """Which size we may add. A user's own is never doubled, nor multiplied by the other kind."""
    if used & _PARALLEL:
        return None
    return "pp" if parameters.text("default_parallelism") == "pp" else "tp"


def with_parallel(plan: EnginePlan) -> EnginePlan:
    """The plan with the parallel size that its model needs, as far as the model is known by now."""
    if plan.python.cpu or plan.parallelism is None:
        return plan
    return replace(plan, parallel=parallel_flag(plan, visible_gpus(plan.environ)))


def parallel_flag(plan: EnginePlan, gpus: tuple[Gpu, ...]) -> PlannedFlag | None:
    """The flag that spreads the model over the fewest of these GPUs; None where there is no choice to make yet.

    Without tokens where one GPU is enough, or nothing more is known: `source` says which.
    """
    local = plan.model.local
    count = len(gpus) // max(1, _whole(plan, "data_parallel_size") or 1)
    if plan.parallelism is None or count < 2 or local is None or not local.is_dir():
        return None
    chosen = choose_parallelism(
        read_shape(local),
        count,
        min(gpu.memory or 0 for gpu in gpus),
        float(_value(plan, "gpu_memory_utilization") or 0.9),
        plan.parallelism,
        _whole(plan, "max_model_len"),
    )
    kind, size = ("pipeline", chosen.pipeline) if plan.parallelism == "pp" else ("tensor", chosen.tensor)
    # One GPU is no flag, but the reason is worth telling where there are several.
    tokens = (f"--{kind}-parallel-size", str(size)) if size > 1 else ()
    return PlannedFlag(f"{kind}_parallel_size", tokens, f"default: {chosen.reason}")


def places(plan: EnginePlan | None) -> tuple[int, str]:
    """How many requests the engine runs at once, and how we know; more would wait in a queue of its own, unseen.

    Without a flag it is vLLM's default: 128 on a CPU, 256 on a GPU (1,024 on those of 70 GB and more, which is more
    than a first guess should let in). An upstream's is not known.
    """
    named = _whole(plan, "max_num_seqs") if plan else None
    if plan and named:
        return named * (_whole(plan, "data_parallel_size") or 1), "default: the engine's max_num_seqs"
    return (128, "default: vLLM's on a CPU") if plan and plan.python.cpu else (256, "default")


def _value(plan: EnginePlan, dest: str) -> str | None:
    """The single value of a flag, however it was written."""
    flag = plan.last(dest)
    if flag is None or not flag.tokens:
        return None
    return flag.tokens[-1] if len(flag.tokens) > 1 else flag.tokens[0].partition("=")[2] or None


def _whole(plan: EnginePlan, dest: str) -> int | None:
    """A flag's value where it is a plain number; vLLM's own spellings (`16k`, `auto`) are not read here."""
    value = _value(plan, dest)
    return int(value) if value is not None and value.isdigit() else None


def _remarks(plan: EnginePlan) -> list[str]:
    """What is allowed and dangerous."""
    remarks = []
    if plan.on("trust_remote_code"):
        remarks.append("trust_remote_code is on: Python code that comes with the model runs with the engine's rights")
    if plan.on("enable_log_requests"):
        remarks.append("--enable-log-requests is on: prompts are written to the log")
    if (_whole(plan, "api_server_count") or 1) > 1 and not plan.python.command:
        remarks.append(f"--api-server-count has no effect: {plan.python.distribution} starts one API server only")
    if plan.python.outdated:
        remarks.append(f"vLLM {plan.python.version} lacks fixes of its published advisories: 0.32 or newer has them")
    return remarks


def _missing_files(plan: EnginePlan, folder: Path) -> Iterator[str]:
    """Files that flags name and that are not there: vLLM notices only when the model is loaded.

    `/opt/code/…` is how folders spell themselves in an image: elsewhere a relative path would find the same file.
    """
    for dest in _FILES:
        flag, value = plan.last(dest), _value(plan, dest)
        if flag is None or value is None or not value.startswith("/") or os.path.lexists(value):
            continue
        near = folder / PurePath(value).name
        hint = f"; the model folder has {near.name}: a relative path starts there" if os.path.exists(near) else ""  # noqa: PTH110
        yield f"{flag.tokens[0].partition('=')[0]} ({flag.source}) names {value}, and there is no such file yet{hint}"


def _warn_of_lost_params(settings: Sequence[Setting], warnings: list[str]) -> None:
    """Somebody typed `--param` and it has no effect: say so (decision 9)."""
    warnings += [
        f"--param {setting.name} has no effect: {setting.value} from {setting.source} wins"
        for setting in settings
        if any(loser.endswith("(--param)") for loser in setting.overrode)
    ]
