"""Manifests: what is accepted, what differs, and which hashes are computed again."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.folders import make_folder
from vllm_dropin.errors import ModelError
from vllm_dropin.model.hashes import cache_file, digest_files
from vllm_dropin.model.manifest import FILE_NAME, FileRecord, Manifest, Source, read_manifest, verify, visible_files

FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000, "parts/org--tok/tokenizer.json": b"{}"}


def manifest_of(files: Mapping[str, bytes]) -> Manifest:
    records = {
        name: FileRecord(sha256=hashlib.sha256(data).hexdigest(), size=len(data)) for name, data in files.items()
    }
    source = Source(kind="hub", name="org/llama", revision="c0ffee")
    return Manifest(created_by="vllm-dropin test", source=source, files=records)


def make_weights(path: Path, files: Mapping[str, bytes] = FILES) -> Path:
    """A folder of weights with its manifest."""
    return make_folder(path, {**files, FILE_NAME: manifest_of(files).render()})


def grow_old() -> None:
    """Wait until a file that has just been written is old enough for its hash to be remembered."""
    time.sleep(0.12)


def problem(folder: Path) -> str:
    with pytest.raises(ModelError) as raised:
        verify(folder)
    assert raised.value.exit_code == 78
    assert raised.value.remedy
    return raised.value.message


def test_a_folder_that_is_as_it_was(tmp_path: Path) -> None:
    found = verify(make_weights(tmp_path / "vllm"))
    assert found is not None
    assert (found.manifest.source.name, found.manifest.source.revision) == ("org/llama", "c0ffee")
    assert (found.computed, found.manifest.bytes) == (3, sum(map(len, FILES.values())))


def test_a_folder_without_a_manifest_is_not_verified(tmp_path: Path) -> None:
    assert verify(make_folder(tmp_path / "vllm", FILES)) is None
    assert verify(tmp_path / "nowhere") is None


def test_hidden_files_and_what_python_leaves_do_not_count(tmp_path: Path) -> None:
    folder = make_weights(tmp_path / "vllm")
    make_folder(folder, {".gitkeep": "", ".cache/huggingface/x": "x", "parts/__pycache__/plugin.cpython-311.pyc": "x"})
    assert verify(folder) is not None


def test_the_same_content_is_the_same_text() -> None:
    backwards = dict(reversed(FILES.items()))
    assert manifest_of(FILES).render() == manifest_of(backwards).render()
    assert Manifest.model_validate_json(manifest_of(FILES).render()) == manifest_of(FILES)


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 6999)


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[3000] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def grow(folder: Path) -> None:
    with (folder / "config.json").open("ab") as file:
        file.write(b"\n")


def add_linked_folder(folder: Path) -> None:
    other = make_folder(folder.parent / "other", {"modeling.py": "evil"})
    (folder / "code").symlink_to(other)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut, ["model.safetensors has 6,999 bytes (cut short)", "says 7,000"]),
        (flip, ["model.safetensors has not the content"]),
        (grow, ["config.json has 3 bytes;", "says 2"]),
        (lambda folder: (folder / "config.json").unlink(), ["config.json is missing"]),
        (lambda folder: (folder / "parts/org--tok/tokenizer.json").unlink(), ["tokenizer.json is missing"]),
        (lambda folder: (folder / "parts/modeling.py").write_text("evil"), ["parts/modeling.py is not in"]),
        (add_linked_folder, ["vllm/code is not in"]),
    ],
)
def test_what_differs_is_named(tmp_path: Path, harm: Any, words: list[str]) -> None:
    folder = make_weights(tmp_path / "vllm")
    harm(folder)
    message = problem(folder)
    assert [word for word in words if word not in message] == []
    assert str(folder) in message


def test_many_differences_are_told_in_short(tmp_path: Path) -> None:
    folder = make_weights(tmp_path / "vllm")
    for at in range(10):
        (folder / f"extra-{at}").touch()
    message = problem(folder)
    assert message.count("is not in") == 3
    assert "and 7 more" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": {"../outside": {"sha256": "0" * 64, "size": 1}}}, ["../outside", "leads out of the folder"]),
        ({"files": {"/etc/passwd": {"sha256": "0" * 64, "size": 1}}}, ["leads out of the folder"]),
        ({"files": {"a/../b": {"sha256": "0" * 64, "size": 1}}}, ["leads out of the folder"]),
        ({"files": {"a\nb": {"sha256": "0" * 64, "size": 1}}}, ["is no file name"]),
        ({"files": {}}, ["files"]),
        ({"files": {"a": {"sha256": "0" * 63, "size": 1}}}, ["files.a.sha256"]),
        ({"files": {"a": {"sha256": "0" * 64, "size": -1}}}, ["files.a.size"]),
        ({"files": {"a": {"sha256": "0" * 64, "size": "1"}}}, ["files.a.size"]),
        ({"licence": "../LICENSE"}, ["licence", "leads out of the folder"]),
        ({"version": 2}, ["version"]),
        ({"colour": "red"}, ["colour"]),
    ],
)
def test_a_manifest_that_is_none_of_ours(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    folder = make_weights(tmp_path / "vllm")
    document = json.loads((folder / FILE_NAME).read_text())
    (folder / FILE_NAME).write_text(json.dumps({**document, **change}))
    message = problem(folder)
    assert [word for word in [FILE_NAME, *words] if word not in message] == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"a": ' * 5000])
def test_a_damaged_manifest_is_no_reason_not_to_verify(tmp_path: Path, text: str) -> None:
    folder = make_weights(tmp_path / "vllm")
    (folder / FILE_NAME).write_text(text)
    assert FILE_NAME in problem(folder)


def test_a_manifest_of_any_size_is_not_read(tmp_path: Path) -> None:
    folder = make_weights(tmp_path / "vllm")
    with (folder / FILE_NAME).open("wb") as file:
        file.truncate(1 << 40)
    assert "is larger than 16 MiB" in problem(folder)


def test_a_manifest_that_can_not_be_read(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(ModelError, match="can't be read"):
        read_manifest(tmp_path)


def test_a_hash_is_computed_once_for_each_state_of_a_file(tmp_path: Path) -> None:
    folder, cache = make_weights(tmp_path / "vllm"), tmp_path / "state" / "hashes.json"

    def computed() -> int:
        found = verify(folder, cache)
        assert found is not None
        return found.computed

    grow_old()
    assert computed() == 3
    assert computed() == 0
    (folder / "config.json").touch()
    grow_old()
    assert computed() == 1
    assert computed() == 0
    data = (folder / "config.json").read_bytes()
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(data)
    grow_old()
    assert computed() == 1


def test_a_change_that_keeps_size_and_time_is_seen(tmp_path: Path) -> None:
    """Files of a bundle all have the same mtime, so it can't tell one from the next that is unpacked over it."""
    folder, cache = make_weights(tmp_path / "vllm"), tmp_path / "hashes.json"
    for name in FILES:
        os.utime(folder / name, (315532800, 315532800))
    grow_old()
    assert verify(folder, cache) is not None
    flip(folder)
    os.utime(folder / "model.safetensors", (315532800, 315532800))
    with pytest.raises(ModelError, match="has not the content"):
        verify(folder, cache)


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path) -> None:
    path, cache = tmp_path / "a", tmp_path / "hashes.json"
    path.write_bytes(b"new")
    assert digest_files([path], cache).computed == 1
    assert digest_files([path], cache).computed == 1


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '{"a": [[1], "x"]}'])
def test_a_damaged_cache_is_done_without(tmp_path: Path, content: str) -> None:
    folder, cache = make_weights(tmp_path / "vllm"), tmp_path / "hashes.json"
    cache.write_text(content)
    grow_old()
    found = verify(folder, cache)
    assert found is not None
    assert found.computed == 3
    again = verify(folder, cache)
    assert again is not None
    assert again.computed == 0


def test_a_cache_that_can_not_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert verify(make_weights(tmp_path / "vllm"), tmp_path / "file" / "hashes.json") is not None


def test_each_folder_has_a_cache_of_its_own(tmp_path: Path) -> None:
    assert cache_file(tmp_path, tmp_path / "a") != cache_file(tmp_path, tmp_path / "b")


def test_progress_comes_to_the_end_and_can_stop_the_work(tmp_path: Path) -> None:
    folder = make_weights(tmp_path / "vllm", {f"{at}.bin": bytes(5 << 20) for at in range(8)})
    seen: list[tuple[int, int]] = []
    verify(folder, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (40 << 20, 40 << 20)
    threads = threading.active_count()
    with pytest.raises(InterruptedError):
        digest_files([path for _, path in visible_files(folder)], on_progress=_interrupt)
    assert threading.active_count() == threads


def _interrupt(done: int, total: int) -> None:
    raise InterruptedError
