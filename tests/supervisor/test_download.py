"""Downloads from a stand-in of the hub, by the real huggingface_hub of the engine's Python."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.supervisor.fake_hub import FakeHub, Repo, serve
from vllm_dropin.children.download import Reference, lacking, weight_files
from vllm_dropin.errors import DownloadError, InputOutputError
from vllm_dropin.supervisor.download import DownloadRequest, DownloadResult, Progress, download
from vllm_dropin.supervisor.references import references

TOKEN = "hf_canary_0123456789"
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
LLAMA = {
    "config.json": b'{"is": "config"}',
    "generation_config.json": b'{"is": "generation"}',
    "tokenizer.json": b'{"is": "tokenizer"}',
    "tokenizer_config.json": b'{"is": "tokenizer config"}',
    "README.md": b"# hello",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-00001-of-00002.safetensors": b"1" * 200_000,
    "model-00002-of-00002.safetensors": b"2" * 100_000,
    "pytorch_model.bin": b"pickle",
    "original/model.safetensors": b"original",
    "onnx/model.onnx": b"onnx",
    ".gitattributes": b"",
}
WANTED = set(LLAMA) - {
    "README.md", "pytorch_model.bin", "original/model.safetensors", "onnx/model.onnx", ".gitattributes",
}  # fmt: skip


@functools.cache
def hub_python() -> Path:
    """A Python that has huggingface_hub: the engine's, else ours."""
    for candidate in (os.environ.get("VLLM_DROPIN_ENGINE_PYTHON"), sys.executable):
        check = [candidate or "false", "-c", "import huggingface_hub"]
        if candidate and subprocess.run(check, capture_output=True, check=False).returncode == 0:
            return Path(candidate)
    pytest.skip("no Python with huggingface_hub: set VLLM_DROPIN_ENGINE_PYTHON")


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serve({"org/llama": Repo(dict(LLAMA))}) as running:
        yield running


def environ(hub: FakeHub, home: Path, **more: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return {**kept, "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": hub.url, **more}


def fetch(
    hub: FakeHub,
    home: Path,
    model: str = "org/llama",
    flags: dict[str, str | list[str]] | None = None,
    progress: list[Progress] | None = None,
    download_dir: Path | None = None,
    **more: str,
) -> DownloadResult:
    request = DownloadRequest(
        hub_python(), references(model, flags or {}), environ(hub, home, **more), home, download_dir
    )
    seen = [] if progress is None else progress
    return asyncio.run(asyncio.wait_for(download(request, seen.append), 60))


def environments() -> Iterator[str]:
    """The environment of every process that we may look at."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            yield path.read_text(errors="replace")


def names(folder: Path | None) -> set[str]:
    assert folder is not None
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_takes_what_the_engine_reads_and_nothing_else(hub: FakeHub, tmp_path: Path) -> None:
    seen: list[Progress] = []
    result = fetch(hub, tmp_path, progress=seen)
    assert result.complete
    assert result.missing == ()
    assert names(result.folder) == WANTED
    assert result.folder is not None
    assert (result.folder / "model-00001-of-00002.safetensors").read_bytes() == b"1" * 200_000
    assert seen[-1].done == seen[-1].total > 300_000
    assert seen[-1].fraction == 1.0
    assert {progress.total for progress in seen} == {seen[-1].total}
    fetched = hub.fetched()
    assert max(fetched.index(name) for name in WANTED if not name.startswith("model-")) < min(
        fetched.index(name) for name in WANTED if name.startswith("model-")
    ), "weights come last: complete weights mean that the rest is there"


def test_a_complete_cache_needs_no_network(hub: FakeHub, tmp_path: Path) -> None:
    first = fetch(hub, tmp_path)
    hub.requests.clear()
    assert fetch(hub, tmp_path) == first
    assert fetch(hub, tmp_path, HF_HUB_OFFLINE="1") == first
    assert hub.requests == []


def test_what_was_fetched_serves_an_offline_engine(hub: FakeHub, tmp_path: Path) -> None:
    """vLLM's own calls when HF_HUB_OFFLINE is set: find the snapshot by its branch, read it as a folder."""
    result = fetch(hub, tmp_path)
    hub.requests.clear()
    program = (
        "import huggingface_hub as h\n"
        "print(h.snapshot_download('org/llama', ignore_patterns='*', local_files_only=True))\n"
        "print(h.hf_hub_download('org/llama', 'config.json'))\n"
    )
    completed = subprocess.run(
        [hub_python(), "-c", program],
        env=environ(hub, tmp_path, HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert completed.stdout.splitlines() == [str(result.folder), f"{result.folder}/config.json"]
    assert hub.requests == []


def test_a_missing_shard_alone_is_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    first = fetch(hub, tmp_path)
    assert first.folder is not None
    (first.folder / "model-00002-of-00002.safetensors").resolve().unlink()
    hub.requests.clear()
    assert fetch(hub, tmp_path) == first
    assert hub.fetched() == ["model-00002-of-00002.safetensors"]


def test_a_broken_connection_is_taken_up_where_it_stopped(hub: FakeHub, tmp_path: Path) -> None:
    weights = os.urandom(12 << 20)  # huggingface_hub counts in steps of 10 MiB
    hub.repos["org/llama"].files["model-00001-of-00002.safetensors"] = weights
    hub.cut["model-00001-of-00002.safetensors"] = 11 << 20
    result = fetch(hub, tmp_path)
    assert result.folder is not None
    assert (result.folder / "model-00001-of-00002.safetensors").read_bytes() == weights
    assert f"bytes={10 << 20}-" in [request.range for request in hub.requests]


def test_progress_moves_while_a_file_is_on_its_way(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["org/llama"].files["model-00001-of-00002.safetensors"] = os.urandom(35 << 20)
    hub.pause = 0.1
    seen: list[Progress] = []
    fetch(hub, tmp_path, progress=seen)
    on_its_way = {progress.done for progress in seen if progress.files == 7 and progress.files_done == 6}
    assert len(on_its_way) >= 2, seen
    assert "GB" in str(seen[0])


def test_a_cancellation_leaves_no_process_and_no_partial_file(hub: FakeHub, tmp_path: Path) -> None:
    hub.pause = 0.5
    request = DownloadRequest(hub_python(), references("org/llama", {}), environ(hub, tmp_path), tmp_path)

    async def cancel_midway() -> None:
        task = asyncio.create_task(download(request, lambda _: None))
        partials: list[Path] = []
        while not partials:
            await asyncio.sleep(0.05)
            partials = list((tmp_path / "hf").rglob("*.incomplete"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(cancel_midway(), 60))
    assert list((tmp_path / "hf").rglob("*.incomplete")) == []
    assert not [environ for environ in environments() if f"HF_HOME={tmp_path}" in environ]


def test_partial_files_of_killed_processes_are_removed(hub: FakeHub, tmp_path: Path) -> None:
    blobs = tmp_path / "hf/hub/models--org--llama/blobs"
    blobs.mkdir(parents=True)
    stale, live = blobs / "aa.12345678.incomplete", blobs / "bb.12345678.incomplete"
    stale.touch()
    live.touch()
    os.utime(stale, (0, 0))
    fetch(hub, tmp_path)
    assert not stale.exists()
    assert live.exists()


@pytest.mark.parametrize(
    ("files", "load_format", "expected"),
    [
        (["model.safetensors", "consolidated.safetensors"], "auto", ["consolidated.safetensors"]),
        (["model.safetensors", "consolidated.safetensors"], "hf", ["model.safetensors"]),
        (["pytorch_model.bin", "training_args.bin", "optimizer.pt"], "auto", ["pytorch_model.bin"]),
        (["model.safetensors", "pytorch_model.bin"], "npcache", ["pytorch_model.bin"]),
        (["model.safetensors", "pytorch_model.bin"], "mistral", []),
        (["model.safetensors", "original/model.safetensors"], "auto", ["model.safetensors"]),
        (["a.safetensors", "2_Dense/model.safetensors"], "auto", ["2_Dense/model.safetensors", "a.safetensors"]),
        (["model.safetensors"], "dummy", []),
    ],
)
def test_weights_are_chosen_as_vllm_does(files: list[str], load_format: str, expected: list[str]) -> None:
    asked = references("org/m", {"load_format": load_format})[0].asked()
    assert weight_files(files, Reference(**asked), {}) == expected


@pytest.mark.parametrize(
    ("present", "lacks"),
    [
        (["config.json", "tokenizer.json", "model.safetensors"], ()),
        (["config.json", "tokenizer.json"], ("weights",)),
        (["tokenizer.json", "model.safetensors"], ("config",)),
        (["config.json", "pytorch_model.bin"], ("tokenizer",)),
        (["config.json", "tokenizer.json", "model-00001-of-00002.safetensors"], ("weights",)),
        ([], ("config", "weights", "tokenizer", "files")),
    ],
)
def test_a_cached_snapshot_is_judged_by_its_files(tmp_path: Path, present: list[str], lacks: tuple[str, ...]) -> None:
    for name in present:
        (tmp_path / name).touch()
    reference = Reference(**references("org/m", {})[0].asked())
    assert lacking(tmp_path, reference, tmp_path) == lacks


def test_every_repository_that_the_flags_name_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"adapter"}
    custom = {**LLAMA, "config.json": json.dumps({"auto_map": {"AutoConfig": "org/code--configuration.C"}}).encode()}
    hub.repos |= {
        "org/custom": Repo(custom),
        "org/code": Repo({"configuration.py": b"class C: ...", "model.safetensors": b"no"}, commit="d" * 40),
        "org/words": Repo({"tokenizer.json": b"{}", "model.safetensors": b"no"}, commit="e" * 40),
        "org/adapter": Repo(adapter, commit="f" * 40),
        "org/draft": Repo({"config.json": b"{}", "model.safetensors": b"draft"}, commit="a" * 40),
    }
    flags: dict[str, str | list[str]] = {
        "tokenizer": "org/words",
        "lora_modules": ["sql=org/adapter"],
        "speculative_config": '{"model": "org/draft"}',
        "trust_remote_code": "",
    }
    assert fetch(hub, tmp_path, "org/custom", flags).complete
    homes = (tmp_path / "hf/hub").glob("models--*")
    found = {home.name.removeprefix("models--"): names(next((home / "snapshots").iterdir())) for home in homes}
    assert found == {
        "org--custom": WANTED,
        "org--code": {"configuration.py"},
        "org--words": {"tokenizer.json"},
        "org--adapter": set(adapter),
        "org--draft": {"config.json", "model.safetensors"},
    }


def test_download_dir_gets_the_weights_and_keeps_the_engine_online(hub: FakeHub, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    result = fetch(hub, tmp_path, download_dir=weights)
    assert not result.complete
    assert "--download-dir" in result.missing[0]
    (snapshot,) = (weights / "models--org--llama/snapshots").iterdir()
    assert names(snapshot) == {name for name in WANTED if name.startswith("model")}
    hub.requests.clear()
    fetch(hub, tmp_path, download_dir=weights)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("model", "more", "reason"),
    [
        ("s3://bucket/model", {}, "another storage"),
        ("org/llama:Q4_K_M", {}, "single file"),
        ("org/llama", {"VLLM_USE_MODELSCOPE": "true"}, "VLLM_USE_MODELSCOPE"),
    ],
)
def test_other_sources_are_left_to_the_engine(
    hub: FakeHub, tmp_path: Path, model: str, more: dict[str, str], reason: str
) -> None:
    result = fetch(hub, tmp_path, model, **more)
    assert not result.complete
    assert result.folder is None
    assert reason in result.missing[0]
    assert hub.requests == []


def test_the_token_is_sent_and_never_on_a_command_line(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["org/llama"].needs_token = TOKEN
    assert fetch(hub, tmp_path, HF_TOKEN=TOKEN).complete
    assert {request.authorization for request in hub.requests} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("model", "gated", "more", "message", "remedy"),
    [
        ("org/none", False, {}, "no model org/none", "HuggingFaceToken"),
        ("org/llama", True, {}, "gated", "HuggingFaceToken"),
        ("org/llama", True, {"HF_TOKEN": TOKEN}, "gated", "Accept its terms on the hub, with the account"),
        ("org/llama", False, {"HF_HUB_OFFLINE": "1"}, "lacks files", "Unset HF_HUB_OFFLINE"),
        ("org/lla ma", False, {}, "no model id", "local folder"),
    ],
)
def test_a_refusal_says_what_to_do(
    hub: FakeHub, tmp_path: Path, model: str, gated: bool, more: dict[str, str], message: str, remedy: str
) -> None:
    hub.repos["org/llama"].gated = gated
    with pytest.raises(DownloadError) as raised:
        fetch(hub, tmp_path, model, **more)
    assert message in raised.value.message
    assert remedy in raised.value.remedy
    assert TOKEN not in str(raised.value)


def test_an_unknown_revision_is_named(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="org/llama has no revision v9"):
        fetch(hub, tmp_path, flags={"revision": "v9"})


def test_a_model_without_weights_is_named(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["org/empty"] = Repo({"config.json": b"{}"})
    with pytest.raises(DownloadError, match=r"org/empty has no weights .* no file matches"):
        fetch(hub, tmp_path, "org/empty")


def test_a_hub_that_can_not_be_reached_is_an_error(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="could not be fetched") as raised:
        fetch(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "HF_ENDPOINT" in raised.value.remedy


def test_a_dead_hub_does_not_stop_a_model_that_can_be_started(hub: FakeHub, tmp_path: Path) -> None:
    first = fetch(hub, tmp_path)
    assert first.folder is not None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (first.folder / name).unlink()
    assert fetch(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9").complete


def test_a_disk_that_is_too_small_is_said_first(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["org/llama"].announced["model-00001-of-00002.safetensors"] = 10**17
    with pytest.raises(InputOutputError, match=r"100000000\.0 GB are needed"):
        fetch(hub, tmp_path)
    assert hub.fetched() == ["model.safetensors.index.json"]


def test_a_cache_that_can_not_be_written_is_said(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises((InputOutputError, DownloadError)) as raised:
        fetch(hub, tmp_path, HF_HOME="/proc/nowhere")
    assert "/proc" in raised.value.message


def test_a_python_without_huggingface_hub_is_said(hub: FakeHub, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    request = DownloadRequest(bare, references("org/llama", {}), environ(hub, tmp_path), tmp_path)
    with pytest.raises(DownloadError, match="ended early") as raised:
        asyncio.run(download(request, lambda _: None))
    assert "huggingface_hub" in raised.value.message


def test_a_token_does_not_leave_over_http(hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The name resolves to nothing: the warning shows that the child was not even given the token."""
    with pytest.raises(DownloadError):
        fetch(hub, tmp_path, HF_TOKEN=TOKEN, HF_ENDPOINT="http://hub.invalid")
    assert "not sent" in caplog.text
    assert TOKEN not in caplog.text


def fetch_with(hub: FakeHub, home: Path, **changes: object) -> DownloadResult:
    """As a bundle asks: with further files, perhaps without pickles."""
    asked = tuple(replace(reference, **changes) for reference in references("org/llama", {}))  # type: ignore[arg-type]
    request = DownloadRequest(hub_python(), asked, environ(hub, home), home)
    return asyncio.run(asyncio.wait_for(download(request, lambda _: None), 60))


def test_further_files_are_fetched_though_the_cache_is_complete(hub: FakeHub, tmp_path: Path) -> None:
    (plain,) = fetch(hub, tmp_path).snapshots
    assert (plain.repo, plain.commit, set(plain.files)) == ("org/llama", hub.repos["org/llama"].commit, WANTED)
    hub.repos["org/llama"].files["LICENSE"] = b"as you like"
    (snapshot,) = fetch_with(hub, tmp_path, also=("README.md", "LICENSE*")).snapshots
    assert set(snapshot.files) == {*WANTED, "README.md", "LICENSE"}
    assert (snapshot.folder / "LICENSE").read_bytes() == b"as you like"
    hub.status = 503
    assert fetch_with(hub, tmp_path, also=("README.md",)).snapshots[0].files == tuple(sorted({*WANTED, "README.md"}))


def test_what_else_the_cache_holds_is_not_told(hub: FakeHub, tmp_path: Path) -> None:
    first = fetch(hub, tmp_path)
    assert first.folder is not None
    (first.folder / "pytorch_model.bin").write_bytes(b"left by somebody else")
    assert set(fetch(hub, tmp_path).snapshots[0].files) == WANTED


def test_weights_that_are_pickles_are_refused_before_they_are_fetched(hub: FakeHub, tmp_path: Path) -> None:
    files = hub.repos["org/llama"].files
    for name in [name for name in files if name.endswith((".safetensors", ".index.json"))]:
        del files[name]
    with pytest.raises(DownloadError, match=r"as Python pickles \(pytorch_model.bin\).*") as raised:
        fetch_with(hub, tmp_path, pickles=False)
    assert "--allow-pickle" in raised.value.remedy
    assert "pytorch_model.bin" not in hub.fetched()
    assert "pytorch_model.bin" in fetch(hub, tmp_path).snapshots[0].files
