"""Broken weights of every kind, each named by its file before the engine starts."""

import json
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_dropin.engine.weights import check_weights
from vllm_dropin.errors import ModelError

Header = dict[str, dict[str, object]]


def tensor(begin: int, end: int, shape: list[int] | None = None, dtype: str = "BF16") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 2] if shape is None else shape, "data_offsets": [begin, end]}


def write_shard(path: Path, header: Header, data: int) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * data)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards of two tensors each, with an index."""
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "tokenizer.json").write_text("{}")
    index = {}
    for number in (1, 2):
        name = f"model-{number:05}-of-00002.safetensors"
        tensors = {f"a{number}": tensor(0, 8), f"b{number}": tensor(8, 20)}
        write_shard(tmp_path / name, {"__metadata__": {"format": "pt"}, **tensors}, 20)
        index |= dict.fromkeys(tensors, name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return tmp_path


def first(model: Path) -> Path:
    return model / "model-00001-of-00002.safetensors"


def single(model: Path, header: Header, data: int) -> Path:
    """The same model with one file of this content instead."""
    for path in model.glob("model*"):
        path.unlink()
    write_shard(model / "model.safetensors", header, data)
    return model


def test_whole_model(model: Path) -> None:
    report = check_weights(model)
    assert report.format == "safetensors"
    assert report.files == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert report.tensors == 4
    assert report.bytes == sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert report.warnings == ()


def cut(model: Path, count: int) -> None:
    data = first(model).read_bytes()
    first(model).write_bytes(data[:-count])


def overwrite(model: Path, start: int, new: bytes) -> None:
    data = bytearray(first(model).read_bytes())
    data[start : start + len(new)] = new
    first(model).write_bytes(data)


def edit_index(model: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = model / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    change(document["weight_map"])
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda m: cut(m, 5), ["model-00001-of-00002.safetensors is truncated: 5 of"]),
        (lambda m: cut(m, 25), ["truncated", "of its header"]),
        (lambda m: first(m).write_bytes(b""), ["truncated: 0 bytes"]),
        (lambda m: first(m).write_bytes(first(m).read_bytes() + b"zz"), ["2 bytes follow its last tensor"]),
        (lambda m: overwrite(m, 0, b"\xff" * 8), ["not a safetensors file"]),
        (lambda m: overwrite(m, 8, b"\0"), ["corrupt: its header is not JSON"]),
        (lambda m: first(m).unlink(), ["model-00001-of-00002.safetensors is missing"]),
        (lambda m: edit_index(m, lambda w: w.update(c="m-9.safetensors")), ["m-9.safetensors is missing", "lists it"]),
        (lambda m: edit_index(m, lambda w: w.update(c=first(m).name)), ["tensor c is missing", "index.json"]),
        (lambda m: edit_index(m, lambda w: w.update(c=["x"])), ["['x'] is missing"]),  # type: ignore[call-overload]
        (lambda m: edit_index(m, lambda w: w.clear()), ["weight_map is missing or empty"]),
        (lambda m: (m / "model.safetensors.index.json").write_text("{"), ["index.json is not JSON"]),
        (lambda m: (m / "config.json").unlink(), ["config.json is missing"]),
        (lambda m: (m / "config.json").write_text("{"), ["config.json is not JSON"]),
        (lambda m: (m / "config.json").write_text("[]"), ["config.json is not a JSON object"]),
        (lambda m: (m / "tokenizer.json").write_text('{"a": '), ["tokenizer.json is not JSON"]),
        (
            lambda m: first(m).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
            ["model-00001-of-00002.safetensors is a Git LFS pointer", "git lfs pull"],
        ),
        (lambda m: (first(m).unlink(), first(m).symlink_to("gone")), ["is a link to gone, which does not exist"]),
    ],
)  # fmt: skip
def test_damage_is_named(model: Path, damage: Callable[[Path], object], words: list[str]) -> None:
    damage(model)
    with pytest.raises(ModelError) as caught:
        check_weights(model)
    assert str(model) in caught.value.message
    for word in words:
        assert word in str(caught.value)
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(
    ("header", "data", "problem"),
    [
        ({"a": tensor(0, 8), "b": tensor(10, 20)}, 20, "b leaves 2 bytes unused"),
        ({"a": tensor(0, 8), "b": tensor(6, 20)}, 20, "b overlaps"),
        ({"a": tensor(2, 8)}, 8, "a leaves 2 bytes unused"),
        ({"a": tensor(0, 8, [5])}, 8, "a has 8 bytes, its shape [5] of BF16 needs 10"),
        ({"a": tensor(0, 8, [4], "F32")}, 8, "needs 16"),
        ({"a": {"dtype": "BF16", "shape": [4]}}, 8, "the header's entry of a is malformed"),
        ({"a": {**tensor(0, 8), "data_offsets": [0, "8"]}}, 8, "no count"),
        ({"a": {**tensor(0, 8), "shape": [-4]}}, 8, "no count"),
        ({}, 0, "holds no tensors"),
    ],
)
def test_extents(model: Path, header: Header, data: int, problem: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_weights(single(model, header, data))
    assert problem in str(caught.value)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        tensor(0, 2, [4], "F4"),
        tensor(0, 3, [4], "F6_E2M3"),
        tensor(0, 4, [4], "F8_E4M3"),
        tensor(0, 2, []),
        tensor(0, 0, [0, 4]),
    ],
)
def test_narrow_and_odd_shapes_are_fine(model: Path, entry: dict[str, object]) -> None:
    end = entry["data_offsets"][1]  # type: ignore[index]
    assert check_weights(single(model, {"a": entry}, end)).tensors == 1


def test_unknown_dtype_is_a_warning(model: Path) -> None:
    report = check_weights(single(model, {"a": tensor(0, 8, [1], "Q9")}, 8))
    assert any("Q9" in warning for warning in report.warnings)


def test_missing_shard_is_found_without_an_index(model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing"):
        check_weights(model)


def test_shards_counted_from_zero(model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()
    (model / "model-00002-of-00002.safetensors").rename(model / "model-00000-of-00002.safetensors")
    assert check_weights(model).tensors == 4


def test_shard_outside_the_index_is_a_warning(model: Path) -> None:
    write_shard(model / "extra.safetensors", {"x": tensor(0, 2)}, 2)
    report = check_weights(model)
    assert "extra.safetensors" not in report.files
    assert any("extra.safetensors" in warning for warning in report.warnings)


def test_missing_tokenizer_and_unfinished_download_are_warnings(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "model.safetensors.incomplete").touch()
    warnings = check_weights(model).warnings
    assert any("no tokenizer" in warning for warning in warnings)
    assert any("unfinished" in warning for warning in warnings)


def test_pickles_are_a_warning(model: Path) -> None:
    for path in model.glob("model*"):
        path.unlink()
    with zipfile.ZipFile(model / "pytorch_model.bin", "w") as archive:
        archive.writestr("data.pkl", "x" * 1000)
    report = check_weights(model)
    assert report.format == "pickle"
    assert any("can run code" in warning for warning in report.warnings)
    whole = (model / "pytorch_model.bin").read_bytes()
    (model / "pytorch_model.bin").write_bytes(whole[:-40])
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is truncated"):
        check_weights(model)


def test_missing_pickle_of_an_index(model: Path) -> None:
    for path in model.glob("model*"):
        path.unlink()
    (model / "part-1.bin").write_bytes(b"x")
    (model / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "part-1.bin", "b": "part-2.bin"}}')
    with pytest.raises(ModelError, match=r"part-2\.bin is missing; pytorch_model\.bin\.index\.json lists it"):
        check_weights(model)


def test_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    report = check_weights(tmp_path)
    assert report.format == "gguf"
    assert any("only with a plugin" in warning for warning in report.warnings)
    path.write_bytes(b"oops" * 10)
    with pytest.raises(ModelError, match="not a GGUF file"):
        check_weights(tmp_path)


def test_no_weights_points_at_an_inner_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no weights"):
        check_weights(tmp_path)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="inner/: move them up"):
        check_weights(tmp_path)
    with pytest.raises(ModelError, match="is not a folder"):
        check_weights(tmp_path / "nothing")


def test_adapter_alone(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="LoRA adapter"):
        check_weights(model)


def test_only_headers_are_read(model: Path) -> None:
    """A sparse file of 200 GB is checked at once."""
    size = 200_000_000_000
    header = json.dumps({"a": tensor(0, size)}).encode()
    single(model, {"a": tensor(0, 0)}, 0)
    with (model / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    start = time.monotonic()
    assert check_weights(model).bytes > size
    assert time.monotonic() - start < 1
