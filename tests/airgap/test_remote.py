"""Models in object stores: moto's S3 on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.airgap.test_bundle import MODEL, Bundler, contents, manifest
from tests.batch.s3 import S3Server
from tests.folders import engine_config, make_folder
from vllm_dropin.airgap.remote import Stage, plain
from vllm_dropin.errors import ConfigurationError, InputOutputError

LARGE = bytes(range(256)) * (20 << 12)  # 20 MiB: three blocks


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def url(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A folder in a bucket of this test, with a model in it."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ(server, tmp_path).items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    bucket = f"b{abs(hash(request.node.name))}"
    fsspec.filesystem("s3").mkdir(bucket)
    put(f"{bucket}/models/one", MODEL)
    put(f"{bucket}/models/one-more", {"config.json": b"a neighbour"})
    return f"s3://{bucket}/models/one"


def environ(server: S3Server, scratch: Path) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret-canary",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(scratch / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(scratch / "none"),
    }


def put(place: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        fsspec.filesystem("s3").pipe(f"{place}/{name}", data)


def test_the_command(tmp_path: Path, server: S3Server, url: str) -> None:
    bundler = Bundler(tmp_path)
    bundler.environ |= environ(server, tmp_path)
    folder = make_folder(tmp_path / "m", {"engine_config.json": engine_config("--model", url, "--tokenizer", url)})
    summary = bundler.summary(folder)
    assert summary["source"] == {"kind": "storage", "name": url, "revision": None}
    unpacked = bundler.unpacked()
    assert set(manifest(unpacked).files) == set(MODEL)
    assert contents(unpacked)["engine_config.json"] == b'{\n  "args": [\n    "--tokenizer",\n    "vllm"\n  ]\n}\n'
    assert b"secret-canary" not in bundler.output.read_bytes()
    assert not list((tmp_path / "state" / "bundles").iterdir()), "what was fetched is given back"
    bundler.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:1"
    message = bundler.refusal(folder, code=74)
    assert f"{url} can't be read" in message


def test_a_fetch_that_was_cut_off_goes_on(tmp_path: Path, url: str) -> None:
    put(url, {"model.safetensors": LARGE})

    def cut(done: int, total: int) -> None:
        if done > 12 << 20:
            raise InterruptedError("the cable")

    with pytest.raises(InputOutputError):
        Stage(tmp_path, url).fetch(cut)
    seen: list[tuple[int, int]] = []
    stage = Stage(tmp_path, url)
    folder = stage.fetch(lambda *state: seen.append(state))
    stage.release()
    assert seen[0][0] > 12 << 20, "what was there is not fetched again"
    assert seen[-1][0] == seen[-1][1]
    assert contents(folder) == {**MODEL, "model.safetensors": LARGE}
    seen.clear()
    stage.fetch(lambda *state: seen.append(state))
    assert seen == []
    with pytest.raises(ConfigurationError, match="another run is fetching"):
        Stage(tmp_path, url).fetch(lambda *_: None)
    stage.remove()
    assert list((tmp_path / "bundles").iterdir()) == []


def test_another_version_is_fetched_anew(tmp_path: Path, url: str) -> None:
    put(url, {"model.safetensors": LARGE})

    def cut(done: int, total: int) -> None:
        if done > 12 << 20:
            raise InterruptedError("the cable")

    with pytest.raises(InputOutputError):
        Stage(tmp_path, url).fetch(cut)
    put(url, {"model.safetensors": LARGE[::-1]})
    stage = Stage(tmp_path, url)
    assert contents(stage.fetch(lambda *_: None)) == {**MODEL, "model.safetensors": LARGE[::-1]}
    stage.release()
    fsspec.filesystem("s3").rm(f"{url}/tokenizer.json")
    assert set(contents(stage.fetch(lambda *_: None))) == {*MODEL} - {"tokenizer.json"}
    stage.release()


def test_names_that_are_no_file_of_the_model_are_left_out(tmp_path: Path, url: str) -> None:
    put(url, {"../../evil": b"x", ".hidden": b"x", "sub/": b"", "": b""})
    stage = Stage(tmp_path, url)
    assert set(contents(stage.fetch(lambda *_: None))) == set(MODEL)
    stage.release()
    assert [path.name for path in tmp_path.rglob("*evil*")] == []


def test_a_place_without_files(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigurationError, match="has no files"):
        Stage(tmp_path, f"{url}-none").fetch(lambda *_: None)


def test_credentials_in_a_url_are_not_shown() -> None:
    assert plain("s3://key:secret@bucket/a/?sig=secret#x") == "s3://bucket/a"
