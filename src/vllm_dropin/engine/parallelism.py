"""Over how many GPUs a model must be spread: the fewest that hold it, never all of them blindly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_dropin.engine.gpus import count_gpus, visible_gpus

__all__ = [
    "ModelShape",
    "Parallelism",
    "choose_parallelism",
    "count_gpus",
    "legal_tensor_sizes",
    "read_shape",
    "shape_of",
    "smallest_parallel_size",
    "visible_gpus",
]

_ACTIVATION_BYTES = 2 << 30
"""What vLLM needs on each GPU beside weights and KV cache: activations, CUDA graphs, the CUDA context."""

_BYTES_PER_VALUE = {"float32": 4, "float": 4, "float64": 8}
"""Of the KV cache, by the model's dtype; all others are two bytes wide."""


@dataclass(frozen=True)
class ModelShape:
    """What decides how a model can be split. Zero means unknown."""

    attention_heads: int = 0
    kv_heads: int = 0
    layers: int = 0
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    """Of all layers and heads together."""
    max_model_len: int = 0
    shared_kv: bool = False
    """Multi-head latent attention: its one KV cache is copied to every GPU instead of split over them."""

    @property
    def known(self) -> bool:
        return min(self.attention_heads, self.layers, self.weight_bytes) > 0


@dataclass(frozen=True)
class Parallelism:
    """Over how many GPUs a model is spread, and why."""

    tensor: int = 1
    pipeline: int = 1
    reason: str = ""


def read_shape(folder: Path) -> ModelShape:
    """The shape of a model from its config.json and the sizes of its weight files; zeros where they do not tell."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ModelShape()
    return shape_of(config, _weight_bytes(folder)) if isinstance(config, dict) else ModelShape()


def shape_of(config: dict[str, Any], weight_bytes: int) -> ModelShape:
    """The shape in a Hugging Face config; that of a multimodal model's text part counts, as vLLM splits by it."""
    text = next((config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict)), config)

    def number(*names: str) -> int:
        values = (text.get(name) for name in names)
        return next((value for value in values if isinstance(value, int) and value > 0), 0)

    heads = number("num_attention_heads", "n_head", "n_heads", "num_heads")
    kv_heads = number("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
    if text.get("multi_query") is True and not text.get("new_decoder_architecture"):
        kv_heads = 1
    layers = number("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    width = number("head_dim") or (number("hidden_size", "n_embd", "d_model") // heads if heads else 0)
    latent = number("kv_lora_rank")
    values_per_layer = latent + number("qk_rope_head_dim") if latent else 2 * (kv_heads or heads) * width
    dtype = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype"))
    return ModelShape(
        attention_heads=heads,
        kv_heads=kv_heads or heads,
        layers=layers,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=values_per_layer * layers * _BYTES_PER_VALUE.get(dtype.removeprefix("torch."), 2),
        max_model_len=number("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
        shared_kv=bool(latent),
    )


def _weight_bytes(folder: Path) -> int:
    """Bytes of the weights that vLLM would load: safetensors, else pickles; not Mistral's second copy."""
    for pattern in ("*.safetensors", "*.bin", "*.pt"):
        files = [path for path in folder.glob(pattern) if path.is_file() and "training_args" not in path.name]
        main = [path for path in files if not path.name.startswith("consolidated")]
        if files:
            return sum(path.stat().st_size for path in main or files)
    return 0


def legal_tensor_sizes(shape: ModelShape, gpus: int) -> list[int]:
    """The tensor parallel sizes that vLLM accepts: they divide the attention heads, and divide the KV heads or are
    a multiple of them (then heads are copied). 1 always is.
    """

    def legal(size: int) -> bool:
        if size == 1:
            return True
        heads, kv = shape.attention_heads, shape.kv_heads
        return heads > 0 and heads % size == 0 and (kv % size == 0 or size % kv == 0)

    return [size for size in range(1, max(gpus, 1) + 1) if legal(size)]


def smallest_parallel_size(
    shape: ModelShape,
    gpus: int,
    memory_per_gpu: int | None,
    utilization: float,
    max_model_len: int | None = None,
) -> int:
    """The smallest tensor parallel size whose weights and one full-length sequence fit.

    `memory_per_gpu` is bytes, `utilization` the share of them that vLLM may use. The largest legal size when none
    fits; 1 when the shape or the memory is unknown: more GPUs than needed cost more than they give.
    """
    return choose_parallelism(shape, gpus, memory_per_gpu, utilization, "tp", max_model_len).tensor


def choose_parallelism(
    shape: ModelShape,
    gpus: int,
    memory_per_gpu: int | None,
    utilization: float,
    default: Literal["tp", "pp"] = "tp",
    max_model_len: int | None = None,
) -> Parallelism:
    """As `smallest_parallel_size`, in the direction of `default_parallelism`, with the reason in words."""
    if gpus <= 1:
        return Parallelism(reason="one GPU" if gpus == 1 else "no GPU")
    if not shape.known or not memory_per_gpu:
        return Parallelism(reason="the model's size or the GPUs' memory is not known; set the size to use more")
    pipelines = list(range(1, min(gpus, shape.layers) + 1))
    sizes = pipelines if default == "pp" else legal_tensor_sizes(shape, gpus)
    tokens = max_model_len or shape.max_model_len
    room = memory_per_gpu * utilization - _ACTIVATION_BYTES
    size = next((size for size in sizes if _bytes_per_gpu(shape, size, tokens, default) <= room), None)
    if size is None:
        reason = f"{_gib(shape.weight_bytes)} of weights and {tokens} tokens may not fit in {gpus} GPUs"
    else:
        reason = f"the fewest GPUs that hold {_gib(shape.weight_bytes)} of weights and {tokens} tokens"
    chosen = size or sizes[-1]
    return Parallelism(pipeline=chosen, reason=reason) if default == "pp" else Parallelism(chosen, 1, reason)


def _bytes_per_gpu(shape: ModelShape, size: int, tokens: int, default: str) -> float:
    cache = shape.kv_bytes_per_token * tokens
    if default == "pp":  # whole layers: the fullest stage counts
        return (shape.weight_bytes + cache) * -(-shape.layers // size) / shape.layers
    parts = 1 if shape.shared_kv else min(size, shape.kv_heads)
    return shape.weight_bytes / size + cache / parts


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
