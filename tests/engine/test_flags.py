"""The flag tables, and reading of arguments: against written-down cases, and against vLLM's own parser."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dropin.engine import flags, interpreter
from vllm_dropin.engine.flags import FlagSpec, FlagTable, ParsedArgs
from vllm_dropin.errors import ConfigurationError, FlagError

TABLE = FlagTable.load("0.32.0")
CHILDREN = Path(flags.__file__).parent.parent / "children"


def parse(*args: object) -> ParsedArgs:
    return TABLE.parse(args, "engine_config.json")


@pytest.mark.parametrize(
    ("args", "dest", "values"),
    [
        (["--model=x"], "model", ("x",)),
        (["--model", "x"], "model", ("x",)),
        (["--max_model_len", "4096"], "max_model_len", ("4096",)),
        (["--max_model_len=4096"], "max_model_len", ("4096",)),
        (["--max-model-len", 4096], "max_model_len", ("4096",)),
        (["--max-model-len", "1k"], "max_model_len", ("1k",)),
        (["--max-model-len", "25.6k"], "max_model_len", ("25.6k",)),
        (["--max-model-len", "auto"], "max_model_len", ("auto",)),
        (["--max-model-len", -1], "max_model_len", ("-1",)),
        (["--max-model-l", "5"], "max_model_len", ("5",)),
        (["--max_model_l=5"], "max_model_len", ("5",)),
        (["-tp", "2"], "tensor_parallel_size", ("2",)),
        (["-tp=2"], "tensor_parallel_size", ("2",)),
        (["--tensor-parallel-size", 2], "tensor_parallel_size", ("2",)),
        (["-qawq"], "quantization", ("awq",)),
        (["-O3"], "optimization_level", ("3",)),
        (["-O=3"], "optimization_level", ("3",)),
        (["-O", "3"], "optimization_level", ("3",)),
        (["--gpu-memory-utilization", 0.85], "gpu_memory_utilization", ("0.85",)),
        (["--served-model-name", "a", "b"], "served_model_name", ("a", "b")),
        (["--cudagraph-capture-sizes", 1, 2, 4], "cudagraph_capture_sizes", ("1", "2", "4")),
        (["--hf-token"], "hf_token", ()),
        (["--enforce-eager"], "enforce_eager", ()),
        (["--compilation-config", '{"mode": 3}'], "compilation_config", ('{"mode": 3}',)),
        (["--kv-transfer-config", '{"cpu_bytes_to_use": 80g}'], "kv_transfer_config", ('{"cpu_bytes_to_use": 80g}',)),
        (["--max-model-len", "1", "--max-model-len", "2"], "max_model_len", ("2",)),
        (["--revision="], "revision", ("",)),
    ],
)
def test_spellings(args: list[object], dest: str, values: tuple[str, ...]) -> None:
    use = parse(*args).last(dest)
    assert use is not None
    assert use.values == values
    assert use.canonical == "--" + dest.replace("_", "-")


def test_tokens_are_kept_as_written() -> None:
    parsed = parse(
        "--max_model_len=4k", "-tp", 2, "--no-enable-prefix-caching", "--cc.mode".replace("--", "-"), "3", "org/m"
    )
    assert [use.tokens for use in parsed.uses] == [
        ("--max_model_len=4k",),
        ("-tp", "2"),
        ("--no-enable-prefix-caching",),
        ("-cc.mode", "3"),
    ]
    assert [use.option for use in parsed.uses] == ["--max_model_len", "-tp", "--no-enable-prefix-caching", "-cc"]
    assert [use.index for use in parsed.uses] == [0, 1, 3, 4]
    assert [use.off for use in parsed.uses] == [False, False, True, False]
    assert parsed.positionals == ("org/m",)


@pytest.mark.parametrize(
    ("args", "key", "value"),
    [
        (["--compilation-config.mode", "3"], "mode", "3"),
        (["--compilation_config.pass_config.fuse=true"], "pass_config.fuse", "true"),
        (["--compilation-config.sizes+", "1,2"], "sizes+", "1,2"),
        (["--comp.mode", True], "mode", "true"),
    ],
)
def test_dotted_keys(args: list[object], key: str, value: str) -> None:
    use = parse(*args).last("compilation_config")
    assert use is not None
    assert (use.key, use.values) == (key, (value,))


def test_dotted_keys_win_wherever_they_stand() -> None:
    use = parse("-cc.mode", "3", "--compilation-config", "{}").last("compilation_config")
    assert use is not None
    assert use.key == "mode"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--foo", "1"], ["unknown flag --foo", "args[0]", "no vLLM from 0.26", "remove it"]),
        (["m", "--max-modle-len", "1"], ["unknown flag --max-modle-len", "args[1]", "did you mean --max-model-len?"]),
        (["--calculate-kv-scales"], ["unknown flag", "vLLM 0.28 removed it"]),
        (["-tp2"], ["unknown flag -tp2"]),
        (["-O", "x"], ["unknown flag -O"]),
        (["--nope.key", "1"], ["unknown flag --nope"]),
        (["--data-par", "1"], ["ambiguous", "--data-parallel-address"]),
        (["--enforce-eager=true"], ["takes no value", "--no-enforce-eager"]),
        (["--enforce-eager", "true"], ["'true' after --enforce-eager", "args[1]", "the model"]),
        (["--no-enforce-eager", False], ["'false' after --no-enforce-eager"]),
        (["--config=f.yaml"], ["ignores", '"--config", "f.yaml"']),
        (["--config", "f.json"], ["YAML"]),
        (["--max-model-len 4096"], ["in one argument", '"--max-model-len", "4096"']),
        (["--model Qwen/Qwen2.5-7B"], ["in one argument", '"--model", "Qwen/Qwen2.5-7B"']),
        (["--max-model-len"], ["needs one value but has none"]),
        (["--served-model-name", "--enforce-eager"], ["needs one value or more"]),
        (["--max-num-seqs", "many"], ["'many' is not a whole number", "args[0]"]),
        (["--gpu-memory-utilization", "most"], ["'most' is not a number"]),
        (["--max-model-len", "1.5K"], ["takes no decimals", "'1.5k'"]),
        (["--dtype", "bf16"], ["'bf16' is not one of", "bfloat16"]),
        (["--max-lora-rank", "7"], ["'7' is not one of", "16"]),
        (["--compilation-config", "{mode: 3}"], ["not JSON"]),
        (["--max-model-len.x", "1"], ["takes no keys"]),
        (["--compilation-config.mode"], ["has no value"]),
        (["a", "b"], ["stray value 'b'", "args[1]"]),
        (["--seed", -0.5], ["negative fraction", "--flag=-0.5"]),
        (["--help"], ["prints help"]),
        (["--max-model-len", None], ["not null", "args[1]"]),
        ([{"a": 1}], ["not dict", "args[0]"]),
    ],
)
def test_refused(args: list[object], words: list[str]) -> None:
    with pytest.raises(FlagError) as caught:
        parse(*args)
    text = str(caught.value)
    assert "engine_config.json" in text
    for word in words:
        assert word in text


def test_new_flag_names_its_version() -> None:
    with pytest.raises(FlagError, match=r"vLLM 0\.\d+ introduced it and this is 0\.26\.0"):
        FlagTable.load("0.26.0").parse(["--reasoning-config.x", "1", "--grpc-port", "1"], "the command line")


@pytest.mark.parametrize("arg", ["--hf-token hf_s3cret", "--hf_token hf_s3cret", "--api-key s3cret"])
def test_a_secret_in_one_argument_with_its_flag_is_not_shown(arg: str) -> None:
    with pytest.raises(FlagError, match="in one argument") as caught:
        parse(arg)
    assert "s3cret" not in str(caught.value)


def test_bad_json_value_is_not_shown() -> None:
    with pytest.raises(FlagError) as caught:
        parse("--kv-transfer-config", '{"key": "s3cret"')
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "warns"),
    [
        (["--served-model-name", "a", "b", "org/model"], True),
        (["--hf-token", "org/model"], True),
        (["--served-model-name", "org/alias"], False),
        (["org/model", "--served-model-name", "a", "org/alias"], False),
        (["--model", "org/model", "--served-model-name", "a", "org/alias"], False),
    ],
)
def test_swallowed_model_warns(args: list[str], warns: bool) -> None:
    assert any("--model" in warning for warning in parse(*args).warnings) is warns


def test_deprecated_flags_warn() -> None:
    (warning,) = parse("--log-config-file", "x.json", "--config", "c.yaml").warnings
    assert "--log-config-file in engine_config.json is deprecated" in warning


def test_shipped_tables() -> None:
    versions = flags.shipped_versions()
    assert versions[0] == "0.26.0"
    assert [int(version.split(".")[1]) for version in versions] == list(range(26, 26 + len(versions)))
    for version in versions:
        table = FlagTable.load(version)
        assert (table.version, table.note) == (version, "")
        assert len(table.specs) > 270
        model_len = table.spec("max_model_len")
        assert model_len is not None
        assert model_len.options == ("--max-model-len",)
        # The canonical name is made from dest: each flag must have it among its spellings.
        assert all(f"--{spec.dest.replace('_', '-')}" in spec.options for spec in table.specs if spec.options)


def test_spec_fields() -> None:
    eager = TABLE.spec("enforce_eager")
    assert eager == FlagSpec(
        "enforce_eager", ("--enforce-eager", "--no-enforce-eager"), 0, default=False, off=("--no-enforce-eager",)
    )
    assert eager.boolean
    assert TABLE.spec("nothing") is None


def test_another_patch_release_is_noted() -> None:
    table = FlagTable.load("0.32.7+cpu")
    assert table.version == "0.32.0"
    assert "0.32.7+cpu" in table.note


def test_local_and_post_versions_are_the_same_release() -> None:
    assert FlagTable.load("0.32.0.post2+cu130").note == ""


def test_version_without_table() -> None:
    with pytest.raises(ConfigurationError, match=r"0\.12\.0.*0\.26\.0, .*0\.32\.0"):
        FlagTable.load("0.12.0")


def test_unknown_flag_is_told_fast_and_without_torch() -> None:
    program = (
        "import sys, time; start = time.monotonic()\n"
        "from vllm_dropin.engine.flags import FlagTable\n"
        "try: FlagTable.load('0.32.0').parse(['--foo'], 'x')\n"
        "except Exception as error: print(error)\n"
        "assert time.monotonic() - start < 1, time.monotonic() - start\n"
        "assert not {'torch', 'vllm'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "unknown flag --foo" in done.stdout


def stand_in(folder: Path, version_module: str) -> dict[str, str]:
    """A tiny package named vllm whose parser lives where vLLM's does; returns the environment that finds it."""
    package = folder / "vllm"
    for name in ("", "utils", "entrypoints", "entrypoints/openai"):
        (package / name).mkdir(parents=True, exist_ok=True)
        (package / name / "__init__.py").touch()
    (package / "utils/argparse_utils.py").write_text(
        "import argparse\nclass FlexibleArgumentParser(argparse.ArgumentParser): pass\n"
    )
    (package / "entrypoints/openai/cli_args.py").write_text(version_module)
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_table_is_asked_of_the_engine_once(tmp_path: Path) -> None:
    environ = stand_in(
        tmp_path,
        "print('noise')\n"
        "def make_arg_parser(parser):\n"
        "    parser.add_argument('--odd-flag', '-of', type=int, default=3)\n"
        "    return parser\n",
    )
    kept = tmp_path / "state" / "flags"
    python = Path(sys.executable)
    table = flags.load_table("9.9.9", kept, python, environ)
    assert table.spec("odd_flag") == FlagSpec("odd_flag", ("--odd-flag", "-of"), type="int", default=3)
    assert [file.name for file in kept.iterdir()] == ["flags-9.9.9.json"]
    (tmp_path / "vllm" / "entrypoints" / "openai" / "cli_args.py").unlink()
    assert flags.load_table("9.9.9", kept, python, environ) == table
    (kept / "flags-9.9.9.json").write_text("{")
    with pytest.raises(ConfigurationError, match="did not tell its flags: none of"):
        flags.load_table("9.9.9", kept, python, environ)


def test_a_state_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    environ = stand_in(tmp_path, "def make_arg_parser(parser): return parser\n")
    (tmp_path / "file").touch()
    assert flags.load_table("9.9.9", tmp_path / "file" / "flags", Path(sys.executable), environ).version == "9.9.9"


def test_development_builds_never_take_a_shipped_table(tmp_path: Path) -> None:
    environ = stand_in(tmp_path, "def make_arg_parser(parser): return parser\n")
    table = flags.load_table("0.32.1.dev5+gabc", tmp_path / "state", Path(sys.executable), environ)
    assert [spec.dest for spec in table.specs] == ["help"]
    assert flags.load_table("0.32.1", tmp_path / "state", None).version == "0.32.0"


def test_broken_engine_is_told(tmp_path: Path) -> None:
    environ = stand_in(tmp_path, "import a_module_that_is_missing\n")
    with pytest.raises(ConfigurationError, match="a_module_that_is_missing"):
        flags.load_table("9.9.9", None, Path(sys.executable), environ)


@pytest.fixture(scope="module")
def engine() -> interpreter.EnginePython:
    if not os.environ.get(interpreter.VARIABLE):
        pytest.skip(f"{interpreter.VARIABLE} is not set")
    return interpreter.find(None, os.environ)


@pytest.mark.e2e
def test_shipped_table_is_the_installed_versions(engine: interpreter.EnginePython) -> None:
    shipped = FlagTable.load(engine.version)
    if shipped.note:
        pytest.skip(shipped.note)
    records = [json.loads(line) for line in flags.dump(engine.path, os.environ)]
    asked = flags._read(json.dumps({"version": shipped.version, "actions": records}))
    assert asked.specs == shipped.specs


WORDS = (
    "x",
    "org/model",
    "a b",
    "4096",
    "-1",
    "1k",
    "2K",
    "1.5",
    "auto",
    "true",
    "",
    "None",
    "{}",
    "[1, 2]",
    "a=b",
    "-x",
)


def valid_value(chance: random.Random, spec: FlagSpec) -> str:
    if spec.choices:
        return str(chance.choice(spec.choices))
    kind = (spec.type or "str").removeprefix("optional(").rstrip(")")
    samples = {
        "int": ("0", "7", "-1", "1_000"),
        "float": ("0.5", "1", "1e-3", "-2"),
        "human_readable_int": ("4096", "4k", "4K", "25.6k"),
        "human_readable_int_or_auto": ("4096", "auto", "-1", "AUTO", "8k"),
        "json": ("{}", '{"a": 1}'),
        "parse_dataclass": ("{}",),
        "union_dict_and_str": ("{}", "x"),
    }
    return chance.choice(samples.get(kind, ("x", "org/model", "a b", "a=b", "7")))


def random_use(chance: random.Random, table: FlagTable) -> list[str]:
    """One flag in a random spelling; one in eight is given a value that may not suit it."""
    spec = chance.choice([spec for spec in table.specs if spec.options and spec.dest not in {"help", "config"}])
    option = chance.choice(spec.options)
    if option.startswith("--"):
        if chance.random() < 0.2:
            option = option[: chance.randint(max(3, len(option) - 6), len(option))]
        if chance.random() < 0.3:
            option = "--" + option[2:].replace("-", "_")
    if chance.random() < 0.03:
        return [chance.choice(["--nope", "-zz", "--max-model-lenn=1", "-tp2", "-O2", "-O=1", "-O", "stray"])]
    if chance.random() < 0.06:
        return [f"{option}.{chance.choice(['a', 'b_c', 'a.b'])}", chance.choice(["1", "word", "2k", "[1]"])]
    if spec.boolean:
        return [option if chance.random() < 0.9 else f"{option}=true"]
    count = {None: 1, "?": chance.randint(0, 1)}.get(spec.nargs, chance.randint(1, 3))  # type: ignore[call-overload]
    wild = chance.random() < 0.12
    values = [chance.choice(WORDS) if wild else valid_value(chance, spec) for _ in range(count)]
    if len(values) == 1 and chance.random() < 0.4:
        return [f"{option}={values[0]}"]
    return [option, *values]


def judged_by_vllm_alone(parsed: ParsedArgs, table: FlagTable) -> bool:
    """Whether a value is of a kind that ours lets pass unread, so that vLLM may still refuse the list."""
    for use in parsed.uses:
        spec = table.spec(use.dest)
        assert spec is not None
        kind = (spec.type or "str").removeprefix("optional(").rstrip(")")
        plain = kind in {"str", "int", "float", "json"} or kind.startswith("human_readable_int")
        if use.key or not plain or spec.dest in {"lora_modules", "mm_processor_device"}:
            return True
    return False


def meaning(parsed: ParsedArgs, table: FlagTable) -> dict[str, object]:
    """Ours in the oracle's terms: what each flag that is used is set to."""
    told: dict[str, object] = {"model_tag": parsed.positionals[0]} if parsed.positionals else {}
    for dest in {use.dest for use in parsed.uses}:
        spec, use = table.spec(dest), parsed.last(dest)
        assert spec is not None
        assert use is not None
        if use.key is not None:
            told[dest] = "dotted"
        elif spec.boolean:
            told[dest] = not use.off
        elif spec.nargs == "?":
            told[dest] = use.values[0] if use.values else True
        else:
            told[dest] = use.values[0] if spec.nargs is None else list(use.values)
    return told


@pytest.mark.e2e
def test_parser_agrees_with_vllm(engine: interpreter.EnginePython) -> None:
    """On 600 random lists: what vLLM takes, ours takes with the same meaning; what it refuses, ours refuses."""
    table = FlagTable.load(engine.version)
    chance = random.Random(20)
    lists = []
    for _ in range(600):
        args = [word for _ in range(chance.randint(1, 5)) for word in random_use(chance, table)]
        place = chance.choice([0, len(args), None])
        lists.append(args if place is None else [*args[:place], "org/model", *args[place:]])
    done = subprocess.run(
        [engine.path, Path(__file__).parent / "oracle.py", CHILDREN],
        input=json.dumps(lists),
        capture_output=True,
        text=True,
        timeout=180,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout)
    agreed, wrong = 0, []
    for args, answer in zip(lists, answers, strict=True):
        try:
            parsed = table.parse(args, "test")
        except FlagError as error:
            # --boolean.key v: vLLM sets the flag and takes the JSON of the keys for the model.
            if answer is not None and not ("takes no keys" in str(error) and answer.get("model_tag", "{")[0] == "{"):
                wrong.append(f"vLLM takes {args} as {answer}, ours says {error}")
            continue
        ours = meaning(parsed, table)
        if answer is None:
            if not judged_by_vllm_alone(parsed, table):
                wrong.append(f"vLLM refuses {args}, ours takes it as {ours}")
            continue
        # vLLM has turned keys into one JSON text, and the values of two flags into something of its own.
        own = {dest for dest, value in ours.items() if value == "dotted"} | {"middleware", "lora_modules"}
        for dest in own & set(ours):
            answer[dest] = ours[dest]
        agreed += ours == answer
        if ours != answer:
            wrong.append(f"vLLM takes {args} as {answer}, ours as {ours}")
    assert wrong == [], "\n".join(wrong)
    assert agreed > 100
