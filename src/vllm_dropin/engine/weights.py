"""Checks a folder of weights before vLLM is started on it.

A truncated shard takes minutes to fail in vLLM, and some broken ones load and answer garbage. Only headers are read,
so a folder of hundreds of gigabytes takes milliseconds.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vllm_dropin.errors import ModelError

_HEADER_LIMIT = 100_000_000
"""Bytes; safetensors' own limit for its header."""

_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Width of each safetensors dtype."""

_LFS = b"version https://git-lfs"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.safetensors|\.bin|\.gguf)")
_JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "params.json")
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "*.tiktoken",
)
_UNFINISHED = (".incomplete", ".part", ".tmp", ".aria2", ".crdownload")
_AGAIN = "Copy or download the file again."

Format = Literal["safetensors", "pickle", "gguf"]


@dataclass(frozen=True)
class WeightReport:
    """What a folder of weights holds."""

    format: Format
    files: tuple[str, ...]
    tensors: int
    """0 where only loading would tell (pickles, GGUF)."""
    bytes: int
    warnings: tuple[str, ...] = field(default=())


def check_weights(folder: Path) -> WeightReport:
    """Check that the model in a folder is whole, as far as headers tell.

    Raises ModelError, which names the file and what is wrong with it: missing, truncated, a Git LFS pointer, an index
    and shards that disagree, a config.json that is missing or not JSON. What vLLM may well serve is only a warning.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder")
    try:
        return _check(folder)
    except OSError as error:
        raise ModelError(f"{error.filename or folder} can't be read: {error.strerror}") from error


def _check(folder: Path) -> WeightReport:
    names = sorted(path.name for path in folder.iterdir() if not path.is_dir())
    _refuse_pointers(folder, names)
    for name in _JSON_FILES:
        if name in names:
            _read_json(folder / name)
    chosen, weights = _choose(folder, names)
    _require_config(folder, names, chosen)
    _require_all_shards(folder, weights)
    warnings = [*_general_warnings(folder, names)]
    tensors = 0
    if chosen == "safetensors":
        weights, tensors = _check_safetensors(folder, weights, warnings)
    elif chosen == "gguf":
        for name in weights:
            _check_gguf(folder / name)
        warnings.append(f"{weights[0]}: vLLM loads GGUF only with a plugin: prefer safetensors")
    else:
        _check_pickles(folder, names, weights)
        warnings.append(f"{weights[0]} is a Python pickle, which can run code when it is loaded: prefer safetensors")
    return WeightReport(chosen, tuple(weights), tensors, sum(_size(folder / n) for n in weights), tuple(warnings))


def _choose(folder: Path, names: list[str]) -> tuple[Format, list[str]]:
    """The files that vLLM loads: safetensors, else pickles, else GGUF. Mistral's second copy does not count."""
    safetensors = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth")) and "training_args" not in name]
    gguf = [name for name in names if name.endswith(".gguf")]
    if safetensors:
        main = [name for name in safetensors if not name.startswith("consolidated")]
        return "safetensors", main or safetensors
    if pickles:
        return "pickle", pickles
    if gguf:
        return "gguf", gguf
    inner = next((path.parent for path in sorted(folder.glob("*/config.json"))), None)
    if inner is not None:
        raise ModelError(f"{folder} has no weights", f"They are one level down, in {inner.name}/: move them up.")
    remedy = "Expected *.safetensors beside config.json. Is a download unfinished?"
    raise ModelError(f"{folder} has no weights", remedy)


def _require_config(folder: Path, names: list[str], chosen: Format) -> None:
    if "config.json" in names or chosen == "gguf" or "params.json" in names:
        return
    if "adapter_config.json" in names:
        remedy = "Serve its base model, and the adapter with --enable-lora --lora-modules NAME=PATH."
        raise ModelError(f"{folder} holds a LoRA adapter, not a model", remedy)
    raise ModelError(f"{folder / 'config.json'} is missing", "Copy it from where the weights came from.")


def _require_all_shards(folder: Path, weights: Iterable[str]) -> None:
    """`model-00002-of-00003` says how many there must be, with or without an index."""
    present: dict[tuple[str, int, str], set[int]] = {}
    for name in weights:
        if match := _SHARD.fullmatch(name):
            family = (match["stem"], int(match["total"]), match["suffix"])
            present.setdefault(family, set()).add(int(match["number"]))
    for (stem, total, suffix), numbers in present.items():
        first = 0 if 0 in numbers else 1  # a few publishers count from 0
        for number in range(first, first + total):
            if number not in numbers:
                missing = f"{stem}-{number:05}-of-{total:05}{suffix}"
                raise ModelError(f"{folder / missing} is missing; its name and the others' say so", _AGAIN)


def _check_safetensors(folder: Path, weights: list[str], warnings: list[str]) -> tuple[list[str], int]:
    """Each shard by itself, then against the index. Gives the files that vLLM loads and their number of tensors."""
    found = {name: _read_header(folder / name, warnings) for name in weights}
    family = "consolidated" if weights[0].startswith("consolidated") else "model"
    index = folder / f"{family}.safetensors.index.json"
    if index.exists():
        shards = _check_index(index, found)
        if extra := sorted(set(found) - shards):
            warnings.append(f"{', '.join(extra)}: not in {index.name}, so not loaded")
        found = {name: tensors for name, tensors in found.items() if name in shards}
    tensors = sum(len(names) for names in found.values())
    if tensors == 0:
        raise ModelError(f"{folder / next(iter(found))} holds no tensors", _AGAIN)
    return list(found), tensors


def _check_index(index: Path, found: dict[str, set[str]]) -> set[str]:
    """Every tensor is in the shard that the index names. Gives the shards named."""
    document = _read_json(index)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: weight_map is missing or empty", _AGAIN)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or shard not in found:
            raise ModelError(f"{index.parent / str(shard)} is missing; {index.name} lists it", _AGAIN)
        if tensor not in found[shard]:
            remedy = "The index and the shards are of different models or versions. Copy all of them again."
            raise ModelError(f"{index.parent / shard}: tensor {tensor} is missing; {index.name} lists it", remedy)
    return set(weight_map.values())


def _read_header(path: Path, warnings: list[str]) -> set[str]:
    """The names of a safetensors file's tensors, after checking that its header accounts for every byte."""
    size = _size(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ModelError(f"{path} is truncated: {size} bytes hold no header", _AGAIN)
        (length,) = struct.unpack("<Q", prefix)
        if length > _HEADER_LIMIT:
            raise ModelError(f"{path} is not a safetensors file: its header would be {length} bytes long", _AGAIN)
        raw = file.read(length)
    if len(raw) < length:
        missing = length - len(raw)
        raise ModelError(f"{path} is truncated: {missing} bytes of its header and all data are missing", _AGAIN)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is corrupt: its header is not JSON ({error})", _AGAIN) from None
    if not isinstance(header, dict):
        raise ModelError(f"{path} is corrupt: its header is not a JSON object", _AGAIN)
    header.pop("__metadata__", None)
    end = _check_extents(path, header, warnings)
    if (missing := 8 + length + end - size) > 0:
        raise ModelError(f"{path} is truncated: {missing:,} of {size + missing:,} bytes are missing", _AGAIN)
    if missing < 0:
        raise ModelError(f"{path} is corrupt: {-missing:,} bytes follow its last tensor", _AGAIN)
    return set(header)


def _check_extents(path: Path, header: dict[str, Any], warnings: list[str]) -> int:
    """Tensors lie one after the other from 0, each as long as its shape says. Gives the end of the last."""
    extents = []
    for tensor, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            dtype, shape = entry["dtype"], entry["shape"]
            numbers = [begin, end, *shape]
        except (KeyError, TypeError, ValueError):
            raise ModelError(f"{path} is corrupt: the header's entry of {tensor} is malformed", _AGAIN) from None
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ModelError(f"{path} is corrupt: {tensor} has an offset or size that is no count", _AGAIN)
        if dtype not in _BITS:
            warnings.append(f"{path.name}: {tensor} is of type {dtype}, which is not known here")
        elif (needed := _tensor_bytes(dtype, shape)) != end - begin:
            problem = f"{tensor} has {end - begin} bytes, its shape {shape} of {dtype} needs {needed}"
            raise ModelError(f"{path} is corrupt: {problem}", _AGAIN)
        extents.append((begin, end, tensor))
    position = 0
    for begin, end, tensor in sorted(extents):
        if begin != position:
            problem = "overlaps the one before" if begin < position else f"leaves {begin - position} bytes unused"
            raise ModelError(f"{path} is corrupt: {tensor} {problem}", _AGAIN)
        position = end
    return position


def _tensor_bytes(dtype: str, shape: list[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return -(-count * _BITS[dtype] // 8)


def _check_pickles(folder: Path, names: list[str], weights: list[str]) -> None:
    for name in names:
        if name.endswith(".bin.index.json"):
            shards = _read_json(folder / name).get("weight_map")
            for shard in sorted({str(shard) for shard in shards.values()}) if isinstance(shards, dict) else []:
                if shard not in names:
                    raise ModelError(f"{folder / shard} is missing; {name} lists it", _AGAIN)
    for name in weights:
        path = folder / name
        # torch.save writes a zip, whose directory is at its end: a truncated one has lost it.
        if _head(path, 4) == b"PK\x03\x04" and not zipfile.is_zipfile(path):
            raise ModelError(f"{path} is truncated: the end of its archive is missing", _AGAIN)
        if _size(path) == 0:
            raise ModelError(f"{path} is empty", _AGAIN)


def _check_gguf(path: Path) -> None:
    if _head(path, 4) != b"GGUF" or _size(path) < 24:
        raise ModelError(f"{path} is not a GGUF file: it does not begin with its header", _AGAIN)


def _refuse_pointers(folder: Path, names: list[str]) -> None:
    """A clone without Git LFS holds notes of 130 bytes instead of weights; a broken link holds nothing."""
    for name in names:
        path = folder / name
        if not path.exists():
            raise ModelError(f"{path} is a link to {path.readlink()}, which does not exist", _AGAIN)
        if _head(path, len(_LFS)) == _LFS:
            raise ModelError(f"{path} is a Git LFS pointer, not the file itself", "Run `git lfs pull` in the clone.")


def _general_warnings(folder: Path, names: list[str]) -> Iterable[str]:
    if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZERS):
        yield f"{folder} has no tokenizer: vLLM needs one, here or by --tokenizer"
    for name in names:
        if name.endswith(_UNFINISHED):
            yield f"{name} looks like an unfinished download"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}", _AGAIN) from None
    if not isinstance(document, dict):
        raise ModelError(f"{path} is not a JSON object", _AGAIN)
    return document


def _head(path: Path, length: int) -> bytes:
    with path.open("rb") as file:
        return file.read(length)


def _size(path: Path) -> int:
    return path.stat().st_size
