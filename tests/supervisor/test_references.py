"""Which repositories the engine's flags name."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_dropin.supervisor.references import Flags, references

AUTO = ("consolidated*.safetensors", "*.safetensors", "*.bin", "*.pt")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [("org/m", None, True)]),
        ({"revision": "v1"}, [("org/m", "v1", True)]),
        ({"tokenizer": "org/t"}, [("org/m", None, True), ("org/t", None, False)]),
        ({"tokenizer": "org/m"}, [("org/m", None, True)]),
        ({"tokenizer_revision": "v2"}, [("org/m", None, True), ("org/m", "v2", False)]),
        ({"hf_config_path": "org/c", "revision": "v1"}, [("org/m", "v1", True), ("org/c", "v1", False)]),
        ({"generation_config": "auto"}, [("org/m", None, True)]),
        ({"generation_config": "org/g"}, [("org/m", None, True), ("org/g", None, False)]),
        ({"code_revision": "v3"}, [("org/m", None, True)]),
        ({"code_revision": "v3", "trust_remote_code": ""}, [("org/m", None, True), ("org/m", "v3", False)]),
        ({"lora_modules": ["a=org/a", '{"name": "b", "path": "org/b"}']},
         [("org/m", None, True), ("org/a", None, True), ("org/b", None, True)]),
        ({"lora_modules": "a=org/a"}, [("org/m", None, True), ("org/a", None, True)]),
        ({"default_mm_loras": '{"audio": "org/a"}'}, [("org/m", None, True), ("org/a", None, True)]),
        ({"speculative_config": '{"model": "org/d", "revision": "v4"}'},
         [("org/m", None, True), ("org/d", "v4", True)]),
        ({"speculative_config.model": "org/d"}, [("org/m", None, True), ("org/d", None, True)]),
        ({"spec_model": "org/d"}, [("org/m", None, True), ("org/d", None, True)]),
        ({"speculative_config": '{"method": "ngram", "model": "ngram"}'}, [("org/m", None, True)]),
        ({"speculative_config": '{"method": "mtp", "model": "org/m"}'}, [("org/m", None, True)]),
        ({"speculative_config": "{broken"}, [("org/m", None, True)]),
        ({"load_format": "dummy"}, [("org/m", None, False)]),
    ],
)  # fmt: skip
def test_every_flag_that_names_a_repository_counts(flags: Flags, expected: list[tuple[str, str | None, bool]]) -> None:
    found = references("org/m", flags)
    assert [(reference.repo, reference.revision, reference.weights) for reference in found] == expected
    assert not any(reference.left for reference in found)


def test_local_folders_are_no_references(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    assert references(str(tmp_path / "vllm"), {}) == ()
    assert references("vllm", {}, base=tmp_path) == ()
    assert references("./gone", {"tokenizer": "~/words", "lora_modules": "a=/adapters/a"}) == ()


@pytest.mark.parametrize(
    ("model", "flags", "reason"),
    [
        ("s3://bucket/m", {}, "another storage"),
        ("gs://bucket/m", {}, "another storage"),
        ("org/m:Q4_K_M", {}, "single file"),
        ("org/m/file.gguf", {}, "single file"),
        ("org/m", {"load_format": "runai_streamer"}, "runai_streamer"),
    ],
)
def test_what_vllm_must_fetch_says_why(model: str, flags: Flags, reason: str) -> None:
    (reference,) = references(model, flags)
    assert reason in reference.left


def test_weights_follow_the_load_format() -> None:
    assert references("org/m", {})[0].patterns == AUTO
    assert references("org/m", {"load_format": "safetensors"})[0].patterns == ("*.safetensors",)
    assert references("org/m", {"ignore_patterns": ["a*", "b*"]})[0].ignore == ("a*", "b*")


@pytest.mark.parametrize(("flags", "tokenizer"), [({}, True), ({"skip_tokenizer_init": ""}, False)])
def test_a_model_needs_a_tokenizer_unless_told_otherwise(flags: Flags, tokenizer: bool) -> None:
    assert references("org/m", flags)[0].tokenizer is tokenizer
