"""engine_config.json of a bundle: nothing in it leads back over the gap."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.folders import make_folder
from vllm_dropin.airgap.engine_args import Rewritten, rewrite
from vllm_dropin.engine.flags import FlagTable
from vllm_dropin.errors import ConfigurationError
from vllm_dropin.settings.engine_flags import read_args

REPOSITORIES = {"org/model": "", "org/tok": "parts/org--tok", "org/draft": "parts/org--draft"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {"template.jinja": "{{ x }}", "adapters/a/adapter_config.json": "{}", "vllm/config.json": "{}"}
    make_folder(tmp_path / "outside", {"t.jinja": "{{ y }}", "adapter/adapter_config.json": "{}"})
    return make_folder(tmp_path / "model", files)


def rewritten(folder: Path, *args: str) -> Rewritten:
    table = FlagTable.load("0.32.0")
    parsed = read_args(table, args, "engine_config.json", folder)
    unfolded = table.parse(args, "engine_config.json").last("config") is not None
    return rewrite(parsed, folder, folder / "vllm", REPOSITORIES, unfolded)


def test_flags_that_name_nothing_stay_as_they_are(folder: Path) -> None:
    result = rewritten(
        folder, "--max_model_len=4096", "--chat-template", "template.jinja", "--generation-config", "vllm"
    )
    assert (result.args, result.notes, result.gathered.paths) == (None, (), {})
    assert result.gathered.needed == {"template.jinja": "--chat-template"}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--model", "org/model"], []),
        (["--model=org/model", "--max-num-seqs", "4"], ["--max-num-seqs", "4"]),
        (["org/model", "--max-num-seqs", "4"], ["--max-num-seqs", "4"]),
        (["--revision", "v1", "--code-revision=v1", "--tokenizer_revision", "v1"], []),
        (["--hf-token", "hf_canary"], []),
        (["--tokenizer", "org/tok"], ["--tokenizer", "vllm/parts/org--tok"]),
        (["--tokenizer=org/model"], ["--tokenizer", "vllm"]),
        (["--tokenizer", "org/elsewhere", "--hf-token=x"], ["--tokenizer", "org/elsewhere"]),
        (
            ["--speculative-config", '{"model": "org/draft", "revision": "v1", "num_speculative_tokens": 3}'],
            ["--speculative-config", '{"model": "vllm/parts/org--draft", "num_speculative_tokens": 3}'],
        ),
        (
            ["--speculative-config.model", "org/draft", "--speculative-config.revision=v1"],
            ["--speculative-config.model", "vllm/parts/org--draft"],
        ),
        (
            ["--lora-modules", "one=org/tok", '{"name": "two", "path": "org/draft"}'],
            ["--lora-modules", "one=vllm/parts/org--tok", '{"name": "two", "path": "vllm/parts/org--draft"}'],
        ),
        (
            ["--default-mm-loras", '{"audio": "org/tok"}'],
            ["--default-mm-loras", '{"audio": "vllm/parts/org--tok"}'],
        ),
        (["--chat-template", "/opt/code/template.jinja"], ["--chat-template", "template.jinja"]),
        (["--chat-template", "{OUTSIDE}/t.jinja"], ["--chat-template", "vllm/parts/t.jinja"]),
        (["--chat-template", "../outside/t.jinja"], ["--chat-template", "vllm/parts/t.jinja"]),
        (["--chat-template", "{FOLDER}/template.jinja"], ["--chat-template", "template.jinja"]),
        (["--lora-modules", "a={FOLDER}/adapters/a"], ["--lora-modules", "a=adapters/a"]),
        (["--lora-modules", "a={OUTSIDE}/adapter"], ["--lora-modules", "a=vllm/parts/adapter"]),
    ],
)
def test_what_is_far_away_becomes_a_part_of_the_bundle(folder: Path, args: list[str], expected: list[str]) -> None:
    here = [word.replace("{FOLDER}", str(folder)).replace("{OUTSIDE}", str(folder.parent / "outside")) for word in args]
    result = rewritten(folder, *here)
    assert result.args == tuple(expected)
    assert result.notes
    assert "hf_canary" not in " ".join(result.notes)
    read_args(FlagTable.load("0.32.0"), result.args, "engine_config.json", folder)


def test_copies_of_the_same_name_get_places_of_their_own(folder: Path) -> None:
    other = make_folder(folder.parent / "more", {"t.jinja": "{{ z }}"}) / "t.jinja"
    outside = folder.parent / "outside" / "t.jinja"
    result = rewritten(folder, "--chat-template", str(outside), "--log-config-file", str(other))
    assert result.gathered.paths == {"parts/t.jinja": outside, "parts/2-t.jinja": other}
    assert result.args == ("--chat-template", "vllm/parts/t.jinja", "--log-config-file", "vllm/parts/2-t.jinja")


def test_a_template_that_stands_in_the_flag_stays(folder: Path) -> None:
    assert rewritten(folder, "--chat-template", "{{ messages[0].content }}").args is None


@pytest.mark.parametrize("flag", ["--chat-template", "--tool-parser-plugin", "--tokenizer"])
def test_a_path_that_is_not_there_is_refused(folder: Path, flag: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{flag} names /nowhere/x, and there is no such") as raised:
        rewritten(folder, flag, "/nowhere/x")
    assert "engine_config.json" in raised.value.remedy


def test_flags_of_a_config_file_are_written_out(folder: Path) -> None:
    (folder / "more.yaml").write_text("tokenizer: org/tok\nmax-num-seqs: 4\n")
    result = rewritten(folder, "--config", "more.yaml", "--enforce-eager")
    assert result.args == ("--tokenizer", "vllm/parts/org--tok", "--max-num-seqs", "4", "--enforce-eager")
    assert "--config is left out: its flags are written out" in result.notes


def test_json_stays_json(folder: Path) -> None:
    args = rewritten(folder, "--speculative-config", '{"model": "org/draft"}').args
    assert args is not None
    assert json.loads(args[1]) == {"model": "vllm/parts/org--draft"}
