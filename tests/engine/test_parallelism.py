"""Parallel sizes of well-known models, from what their config.json says."""

import json
from pathlib import Path

import pytest

from vllm_dropin.engine import parallelism
from vllm_dropin.engine.parallelism import ModelShape, Parallelism, choose_parallelism, smallest_parallel_size

GIB = 1 << 30
LLAMA_8B = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
LLAMA_70B = {**LLAMA_8B, "num_attention_heads": 64, "num_hidden_layers": 80, "hidden_size": 8192}
SMOLLM2 = {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "max_position_embeddings": 8192,
}


def shape(config: dict[str, object], gib: float) -> ModelShape:
    return parallelism.shape_of(config, int(gib * GIB))


@pytest.mark.parametrize(
    ("config", "gib", "gpus", "memory", "length", "size"),
    [
        (LLAMA_8B, 15, 8, 80, None, 1),  # 15 GiB and a cache of 16 GiB: one of eight
        (LLAMA_8B, 15, 8, 24, None, 2),  # each holds 7.5 of weights and 8 of cache
        (LLAMA_8B, 15, 8, 24, 8192, 1),
        (LLAMA_70B, 131, 8, 80, 8192, 2),
        (LLAMA_70B, 131, 8, 80, None, 4),
        (LLAMA_70B, 131, 3, 80, None, 2),  # 3 divides nothing
        (LLAMA_70B, 131, 8, 8, None, 8),  # fits nowhere: the most that is legal
        (SMOLLM2, 0.25, 8, 80, None, 1),
        (SMOLLM2, 200, 8, 80, None, 3),  # 9 heads: 1 and 3 only
    ],
)
def test_smallest_size(
    config: dict[str, object], gib: float, gpus: int, memory: int, length: int | None, size: int
) -> None:
    assert smallest_parallel_size(shape(config, gib), gpus, memory * GIB, 0.9, length) == size


@pytest.mark.parametrize(
    ("heads", "kv_heads", "gpus", "legal"),
    [
        (32, 8, 8, [1, 2, 4, 8]),
        (32, 8, 16, [1, 2, 4, 8, 16]),  # KV heads are copied above 8
        (9, 3, 8, [1, 3]),
        (28, 4, 8, [1, 2, 4]),
        (12, 2, 8, [1, 2, 4, 6]),  # 3 divides 12 but neither divides 2 nor is a multiple of it
        (71, 1, 8, [1]),
        (0, 0, 8, [1]),
    ],
)
def test_legal_sizes(heads: int, kv_heads: int, gpus: int, legal: list[int]) -> None:
    assert parallelism.legal_tensor_sizes(ModelShape(heads, kv_heads), gpus) == legal


@pytest.mark.parametrize("known", [ModelShape(), shape(LLAMA_8B, 0)])
def test_unknown_models_get_one_gpu(known: ModelShape) -> None:
    assert smallest_parallel_size(known, 8, 80 * GIB, 0.9) == 1


def test_unknown_memory_gets_one_gpu() -> None:
    assert smallest_parallel_size(shape(LLAMA_70B, 131), 8, None, 0.9) == 1


def test_pipeline() -> None:
    chosen = choose_parallelism(shape(LLAMA_70B, 131), 3, 80 * GIB, 0.9, "pp", 8192)
    assert (chosen.tensor, chosen.pipeline) == (1, 2)
    assert choose_parallelism(shape(LLAMA_70B, 131), 3, 70 * GIB, 0.9, "pp", 8192).pipeline == 3


def test_reasons_are_words() -> None:
    assert choose_parallelism(shape(LLAMA_8B, 15), 0, None, 0.9) == Parallelism(reason="no GPU")
    assert "15.0 GiB" in choose_parallelism(shape(LLAMA_8B, 15), 2, 80 * GIB, 0.9).reason
    assert "may not fit" in choose_parallelism(shape(LLAMA_70B, 131), 2, 8 * GIB, 0.9).reason


def test_shape_of_a_multimodal_model_is_its_texts() -> None:
    outer = {"vision_config": {"num_attention_heads": 16}, "text_config": LLAMA_8B, "torch_dtype": "bfloat16"}
    assert parallelism.shape_of(outer, 1) == parallelism.shape_of(LLAMA_8B, 1)


def test_cache_bytes() -> None:
    assert shape(LLAMA_8B, 1).kv_bytes_per_token == 2 * 8 * 128 * 32 * 2
    assert shape({**LLAMA_8B, "torch_dtype": "float32"}, 1).kv_bytes_per_token == 2 * 8 * 128 * 32 * 4
    latent = shape({**LLAMA_8B, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 1)
    assert (latent.kv_bytes_per_token, latent.shared_kv) == (576 * 32 * 2, True)


def test_read_shape(tmp_path: Path) -> None:
    assert parallelism.read_shape(tmp_path) == ModelShape()
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"x" * 5)
    (tmp_path / "consolidated.safetensors").write_bytes(b"x" * 15)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 15)
    found = parallelism.read_shape(tmp_path)
    assert (found.weight_bytes, found.attention_heads, found.layers) == (15, 32, 32)


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_unreadable_config_is_an_unknown_shape(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert parallelism.read_shape(tmp_path) == ModelShape()
