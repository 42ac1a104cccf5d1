"""Model folders for the suite: small enough to make one per test, complete enough to be served by the stub."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METADATA = """\
name: contract
type: inference
targetType: {target_type}
"""

# A Llama shape whose head counts divide by 2 and 4, so that parallel sizes in tests are legal.
MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 262144,
    "vocab_size": 128,
    "torch_dtype": "bfloat16",
}


def make_weights(folder: Path) -> Path:
    """Write a config.json and a safetensors file of one small tensor, both well formed."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG))
    (folder / "tokenizer_config.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    return folder


def make_folder(
    folder: Path,
    *,
    args: Sequence[Any] | None = None,
    engine_config: str = "",
    weights: bool = True,
    custom: str = "",
    metadata: str = "",
    target_type: str = "textgeneration",
) -> Path:
    """A model folder: engine_config.json by its args or as text, weights in `vllm/`, custom.py, metadata lines."""
    folder.mkdir(parents=True)
    (folder / "model-metadata.yaml").write_text(METADATA.format(target_type=target_type) + metadata)
    if args is not None:
        (folder / "engine_config.json").write_text(json.dumps({"args": list(args)}))
    if engine_config:
        (folder / "engine_config.json").write_text(engine_config)
    if weights:
        make_weights(folder / "vllm")
    if custom:
        (folder / "custom.py").write_text(custom)
    return folder
