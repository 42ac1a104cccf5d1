"""Contract, section 2: how the engine's command is made of folder and parameters, or why it can't be."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.conftest import READY, Start
from tests.contract.drivers import Service, envelopes
from tests.contract.folders import make_weights

LENGTH = ("--max-model-len",)
MEMORY = ("--gpu-memory-utilization",)
MODEL = ("--model",)
TENSOR = ("--tensor-parallel-size", "-tp")
PIPELINE = ("--pipeline-parallel-size", "-pp")
SAY_NO = 15.0  # seconds in which a product must have said that it can't start; the incumbent imports for 6

# What the incumbent's start script sets on a host with two GPUs, and what the driver would show us of them.
TWO_GPUS = {"GPU_COUNT": "2", "CUDA_VISIBLE_DEVICES": "0,1"}


def assert_refused(service: Service, *mentioned: str) -> None:
    """The product has ended by itself with an error code, and its last words name the culprit."""
    code = service.exit_code(SAY_NO)
    assert code is not None, f"still running after {SAY_NO} s\n{service.output()[-1500:]}"
    assert code != 0
    for word in mentioned:
        assert word in service.output(), service.output()[-1500:]


def test_command(launch: Start) -> None:
    """2: one launch, with the weights of vllm/ and the default served name."""
    command = launch().launch()
    assert [value.rpartition("/")[2] for value in command.values(*MODEL)] == ["vllm"]
    assert command.values("--served-model-name") == ["datarobot-deployed-llm"]


def test_parameters_become_flags(launch: Start) -> None:
    """2: max_model_len and gpu_memory_utilization become flags; served_model_name is the served name."""
    command = launch(
        parameters={
            "max_model_len": ("numeric", 1024),
            "gpu_memory_utilization": ("numeric", 0.5),
            "served_model_name": ("string", "falcon"),
        }
    ).launch()
    assert command.values(*LENGTH) == ["1024"]
    assert [float(value) for value in command.values(*MEMORY)] == [0.5]
    assert "falcon" in command.argv


def test_length_as_a_string(launch: Start) -> None:
    """1: max_model_len declared as a string, as the published README has it, works as well."""
    assert launch(parameters={"max_model_len": ("string", "1024")}).launch().values(*LENGTH) == ["1024"]


def test_zero_means_unset(launch: Start) -> None:
    """1: 0 means unset for max_model_len."""
    assert launch(parameters={"max_model_len": ("numeric", 0)}).launch().values(*LENGTH) == []


def test_engine_args_are_kept(launch: Start) -> None:
    """2: engine_config.json's args reach the engine in their order."""
    argv = launch(args=["--dtype", "float32", "--max-num-seqs", "4"]).launch().argv
    assert "--dtype float32 --max-num-seqs 4" in " ".join(argv)


def test_model_of_the_engine_args_wins(launch: Start, tmp_path: Any) -> None:
    """2: --model in the engine args wins over vllm/ and the model parameter."""
    mine = str(make_weights(tmp_path / "mine"))
    command = launch(args=["--model", mine], parameters={"model": ("string", "some/hub-id")}).launch()
    assert command.values(*MODEL) == [mine]


def test_weights_folder_beats_the_parameter(launch: Start) -> None:
    """2: a non-empty vllm/ wins over the model parameter."""
    command = launch(parameters={"model": ("string", "some/hub-id")}).launch()
    assert command.values(*MODEL)[0].endswith("/vllm")


def test_model_parameter(launch: Start, tmp_path: Any) -> None:
    """2: without vllm/ the model parameter, here a local folder, is the model."""
    mine = str(make_weights(tmp_path / "mine"))
    command = launch(weights=False, parameters={"model": ("string", mine)}).launch()
    assert command.values(*MODEL) == [mine]


def test_weights_of_the_hook(launch: Start) -> None:
    """2: weights that load_model puts into vllm/ are the model, though vllm/ was not there at the start."""
    hook = (
        "import json, pathlib, struct\n"
        "def load_model(code_dir):\n"
        "    folder = pathlib.Path(code_dir, 'vllm')\n"
        "    folder.mkdir()\n"
        "    (folder / 'config.json').write_text(json.dumps({'model_type': 'llama', 'num_attention_heads': 8,"
        " 'architectures': ['LlamaForCausalLM'], 'num_key_value_heads': 4, 'num_hidden_layers': 1,"
        " 'hidden_size': 64, 'vocab_size': 64, 'max_position_embeddings': 2048}))\n"
        "    head = json.dumps({'w': {'dtype': 'BF16', 'shape': [4], 'data_offsets': [0, 8]}}).encode()\n"
        "    (folder / 'model.safetensors').write_bytes(struct.pack('<Q', len(head)) + head + bytes(8))\n"
        "    return 'loaded'\n"
    )
    assert launch(weights=False, custom=hook).launch().values(*MODEL)[0].endswith("/vllm")


def test_environment_of_the_hook(launch: Start) -> None:
    """1: what a hook puts into os.environ reaches the engine."""
    hook = "import os\ndef load_model(code_dir):\n    os.environ['HF_HOME'] = '/of/the/hook'\n    return 1\n"
    assert launch(custom=hook).launch().environ["HF_HOME"] == "/of/the/hook"


def test_hub_token(launch: Start) -> None:
    """2: the credential HuggingFaceToken becomes the engine's HF_TOKEN, and is never on its command line."""
    credential = {"credentialType": "api_token", "apiToken": "hf_secret"}
    command = launch(parameters={"HuggingFaceToken": ("credential", credential)}).launch()
    assert command.environ["HF_TOKEN"] == "hf_secret"
    assert not any("hf_secret" in token for token in command.argv)


def test_hub_token_is_inherited(launch: Start) -> None:
    """2: without the credential HF_TOKEN is inherited."""
    assert launch(environ={"HF_TOKEN": "inherited"}).launch().environ["HF_TOKEN"] == "inherited"


def test_platform_token_stays_out_of_the_engine(launch: Start) -> None:
    """2: the platform's token and the parameters' credentials are not in the engine's environment."""
    credential = {"credentialType": "s3", "awsAccessKeyId": "id", "awsSecretAccessKey": "canary-key"}
    command = launch(
        environ={"DATAROBOT_API_TOKEN": "canary-token"}, parameters={"bucket": ("credential", credential)}
    ).launch()
    assert not [name for name, value in command.environ.items() if "canary" in value]


@pytest.mark.parametrize(
    "args", [["--max-model-len=512"], ["--max_model_len", "512"], ["--max-model-len", "512"]], ids=" ".join
)
def test_args_beat_parameters_in_any_spelling(launch: Start, args: list[str]) -> None:
    """2.1: --max-model-len in the engine args wins over the parameter in every spelling."""
    command = launch(args=args, parameters={"max_model_len": ("numeric", 1024)}).launch()
    assert command.values(*LENGTH)[-1] == "512"


def test_model_with_an_equals_sign(launch: Start, tmp_path: Any) -> None:
    """2.1: --model=PATH in the engine args wins over vllm/."""
    mine = str(make_weights(tmp_path / "mine"))
    assert launch(args=[f"--model={mine}"]).launch().values(*MODEL)[-1] == mine


def test_length_is_said_once(launch: Start) -> None:
    """2.1: a flag that engine args and parameters both give is on the command once."""
    command = launch(args=["--max-model-len=512"], parameters={"max_model_len": ("numeric", 1024)}).launch()
    assert len(command.values(*LENGTH)) == 1


@pytest.mark.parametrize("args", [["-tp", "2"], ["--tensor-parallel-size=2"], ["-tp=2"]], ids=" ".join)
def test_tensor_parallel_size_is_the_users(launch: Start, args: list[str]) -> None:
    """2.2: a user's tensor parallel size is the only one, however many GPUs are counted."""
    command = launch(args=args, environ={"GPU_COUNT": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}).launch()
    assert command.values(*TENSOR) == ["2"]


def test_pipeline_parallel_size_is_not_multiplied(launch: Start) -> None:
    """2.2: a user's pipeline parallel size is not multiplied by a tensor parallel size of ours."""
    command = launch(args=["-pp", "2"], environ=TWO_GPUS).launch()
    assert (command.values(*PIPELINE), command.values(*TENSOR)) in ((["2"], []), (["2"], ["1"]))


def test_visible_devices_bound_the_gpu_count(launch: Start) -> None:
    """2.3: with one visible GPU of two there is no parallel size above 1."""
    command = launch(environ={"GPU_COUNT": "2", "CUDA_VISIBLE_DEVICES": "0"}).launch()
    assert set(command.values(*TENSOR) + command.values(*PIPELINE)) <= {"1"}


def test_a_small_model_stays_on_one_gpu(launch: Start) -> None:
    """2: with two GPUs a model that fits on one is not spread over both."""
    command = launch(environ=TWO_GPUS).launch()
    assert set(command.values(*TENSOR) + command.values(*PIPELINE)) <= {"1"}


def test_unknown_parallelism_is_refused(launch: Start) -> None:
    """2.3: a default_parallelism that is neither tp nor pp is refused by name."""
    service = launch(environ=TWO_GPUS, parameters={"default_parallelism": ("string", "zz")})
    assert_refused(service, "default_parallelism")


@pytest.mark.parametrize("flag", ["--port", "--host", "--api-key"])
def test_flags_that_break_the_proxy_are_refused(launch: Start, flag: str) -> None:
    """2.4: --port, --host and --api-key in the engine args are refused by name, not half applied."""
    assert_refused(launch(args=[flag, "1"]), flag)


def test_served_name_in_the_engine_args(launch: Start) -> None:
    """2.4: --served-model-name in the engine args keeps rows and chat working."""
    service = launch(args=["--served-model-name", "mine"], ready=True)
    with service.client() as client:
        assert client.post("/predict/", content=b"promptText\nHello\n").status_code == 200
        for name in ("mine", "datarobot-deployed-llm"):
            chat = {"model": name, "messages": [{"role": "user", "content": "Hello"}]}
            assert client.post("/chat/completions", json=chat).status_code == 200, name


def test_numbers_in_the_engine_args(launch: Start) -> None:
    """2.5: a number in the engine args counts as its text, or is refused by the name of its file; never silence."""
    service = launch(args=["--max-model-len", 512])
    if service.launches():
        assert service.launch().values(*LENGTH) == ["512"]
    else:
        assert_refused(service, "engine_config.json")


def test_null_served_name(launch: Start) -> None:
    """2.5: a null served_model_name means the default name."""
    command = launch(parameters={"served_model_name": ("string", None)}).launch()
    assert command.values("--served-model-name") == ["datarobot-deployed-llm"]


def test_credential_without_a_token(launch: Start) -> None:
    """2.5: a HuggingFaceToken credential of another kind does not stop the launch, or is refused by name."""
    credential = {"credentialType": "basic", "user": "me", "password": "hf_secret"}
    service = launch(parameters={"HuggingFaceToken": ("credential", credential)})
    if service.launches():
        assert "HF_TOKEN" not in service.launch().environ
    else:
        assert_refused(service, "HuggingFaceToken")


def test_temperature_zero(launch: Start) -> None:
    """2.6: the parameter temperature 0 means 0."""
    service = launch(ready=True, parameters={"temperature": ("numeric", 0)})
    with service.client() as client:
        client.post("/predict/", content=b"promptText\ncold\n")
    assert '"temperature":0' in service.asked("cold")[-1]["body"].replace(" ", "")


@pytest.mark.parametrize("name", ["max_tokens", "n", "temperature", "max_model_len"])
def test_null_numbers(launch: Start, name: str) -> None:
    """2.6: a null numeric parameter means unset."""
    service = launch(ready=True, parameters={name: ("numeric", None)})
    with service.client() as client:
        assert client.post("/predict/", content=b"promptText\nHello\n").status_code == 200


def test_missing_model(launch: Start) -> None:
    """2.7: without any model the product ends and says so."""
    assert_refused(launch(weights=False), "model")


def test_failing_hook(launch: Start) -> None:
    """2.7: a load_model that raises ends the product, and its words are in the log."""
    service = launch(custom="def load_model(code_dir):\n    raise OSError('the bucket is gone')\n")
    assert_refused(service, "the bucket is gone")


@pytest.mark.parametrize(
    ("text", "mentioned"), [('{"args": [', "engine_config.json"), ('{"args": "--model x"}', "args")]
)
def test_bad_engine_config(launch: Start, text: str, mentioned: str) -> None:
    """1: an engine_config.json that is no JSON, or whose args are no list, ends the product and names the file."""
    assert_refused(launch(engine_config=text), mentioned)


def test_dead_status_endpoint(launch: Start) -> None:
    """2.8: with an unreachable status endpoint the engine is launched all the same."""
    platform = {
        "DATAROBOT_ENDPOINT": "https://127.0.0.1:9/api/v2",
        "DATAROBOT_API_TOKEN": "token",
        "MLOPS_DEPLOYMENT_ID": "5f0000000000000000000000",
    }
    assert launch(environ=platform).wait_ready(READY).launch().argv


@pytest.mark.parametrize("style", ["flow", "empty list", "unknown key"])
def test_valid_yaml_is_accepted(launch: Start, style: str) -> None:
    """1: metadata in any valid YAML is accepted: flow style, empty lists, keys of tomorrow."""
    lines = {
        "flow": "runtimeParameterDefinitions: [{fieldName: model, type: string}]\n",
        "empty list": "runtimeParameterDefinitions: []\n",
        "unknown key": "keyOfTomorrow: 1\n",
    }
    assert launch(metadata=lines[style]).launch().argv


def test_parameters_are_read_from_envelopes_only(launch: Start) -> None:
    """1: a bare variable of a parameter's name is not read."""
    bare = {"max_model_len": "99", **envelopes({"gpu_memory_utilization": ("numeric", 0.5)})}
    assert launch(environ=bare).launch().values(*LENGTH) == []
