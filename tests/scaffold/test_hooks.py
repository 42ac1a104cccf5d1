"""Each custom.py of `init`, run as the service runs hooks, against a store on 127.0.0.1.

S3: moto's server. Azure and Google: the official clients against tests/scaffold/stores.py. The hub: huggingface_hub is
replaced by a module with the one function that the hook calls.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.batch.s3 import S3Server
from tests.folders import envelope
from tests.scaffold.stores import Azure, Gcs
from vllm_dropin import children, compat
from vllm_dropin.scaffold import folder as scaffold

HOOK = Path(children.__file__).with_name("hook.py")
COMPAT = Path(compat.__file__).parent
FILES = {"config.json": b"{}", "model.safetensors": b"\x01" * 100_000, "sub/more.txt": b"more"}
OBJECTS = {f"llama/{name}": data for name, data in FILES.items()}
KEY = "c2VjcmV0LWNhbmFyeQ=="  # base64 of a canary, as Azure's keys are


class Folder:
    """A folder that `init` made, with its hook to be run."""

    def __init__(self, path: Path, hook: str) -> None:
        self.path = path
        scaffold.write(path, scaffold.plan(path, None, hook))

    def load(self, environ: dict[str, str] | None = None, **parameters: Any) -> subprocess.CompletedProcess[str]:
        given = {
            f"MLOPS_RUNTIME_PARAM_{name}": envelope("credential" if isinstance(value, dict) else "string", value)
            for name, value in parameters.items()
        }
        env = {"PATH": "/usr/bin:/bin", "HOME": str(self.path.parent), **given, **(environ or {})}
        report = self.path.parent / "report"
        argv = [sys.executable, str(HOOK), str(self.path / "custom.py"), str(self.path), str(report), str(COMPAT)]
        return subprocess.run(argv, env=env, cwd=self.path, capture_output=True, text=True, timeout=60)

    def weights(self) -> dict[str, bytes]:
        root = self.path / "vllm"
        return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}

    def assert_untouched(self) -> None:
        assert not (self.path / "vllm").exists()
        assert list(self.path.glob(".vllm-draft-*")) == []


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Folder:
    return Folder(tmp_path / "m", request.param)


def of(hook: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("folder", [hook], indirect=True)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


def credential(**fields: str) -> dict[str, Any]:
    return {"credentialType": "x", **fields}


AWS = credential(awsAccessKeyId="AKIACANARY", awsSecretAccessKey="secret-canary")
REGION = {"AWS_DEFAULT_REGION": "us-east-1"}


@of("s3")
def test_s3(folder: Folder, s3: S3Server) -> None:
    client = boto3.client(
        "s3", endpoint_url=s3.url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    )
    client.create_bucket(Bucket="models")
    for name, data in {**OBJECTS, "llama-2/other": b"no", "llama/": b""}.items():
        client.put_object(Bucket="models", Key=name, Body=data)
    given = {"model_location": "s3://models/llama", "s3_endpoint_url": s3.url, "s3_credential": AWS}
    done = folder.load(REGION, **given)
    assert done.returncode == 0, done.stderr
    assert folder.weights() == FILES
    assert "canary" not in done.stdout.lower()
    again = folder.load(REGION, **given)
    assert "has weights already" in again.stdout
    client.close()


@of("s3")
def test_s3_without_the_bucket(folder: Folder, s3: S3Server) -> None:
    given = {"model_location": "s3://nothing/here", "s3_endpoint_url": s3.url, "s3_credential": AWS}
    done = folder.load(REGION, **given)
    assert done.returncode == 1
    assert "NoSuchBucket" in done.stderr
    folder.assert_untouched()


@of("azure")
def test_azure(folder: Folder) -> None:
    with Azure({**OBJECTS, "llama-2/other": b"no"}).serving() as store:
        assert isinstance(store, Azure)
        text = store.connection_string(KEY)
        done = folder.load(model_location="az://models/llama/", azure_credential=credential(azureConnectionString=text))
        assert done.returncode == 0, done.stderr
        assert folder.weights() == FILES
        assert all(header.startswith("SharedKey acct:") for header in store.seen)
        assert KEY not in done.stdout


@of("azure")
def test_azure_that_fails_half_way(folder: Folder) -> None:
    store = Azure(OBJECTS)
    store.broken = frozenset({"llama/model.safetensors"})
    with store.serving():
        text = store.connection_string(KEY)
        done = folder.load(model_location="az://models/llama", azure_credential=credential(azureConnectionString=text))
    assert done.returncode == 1
    folder.assert_untouched()


@pytest.fixture(scope="module")
def private_key() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()


@of("gcs")
@pytest.mark.parametrize("as_text", [True, False])
def test_gcs(folder: Folder, private_key: str, as_text: bool) -> None:
    with Gcs({**OBJECTS, "llama-2/other": b"no"}).serving() as store:
        account = {
            "type": "service_account", "project_id": "p", "private_key_id": "1", "private_key": private_key,
            "client_email": "a@b", "client_id": "1", "token_uri": f"{store.url}/token",
        }  # fmt: skip
        key: Any = json.dumps(account) if as_text else account
        done = folder.load(
            {"STORAGE_EMULATOR_HOST": store.url},
            model_location="gs://models/llama", gcp_credential={"credentialType": "gcp", "gcpKey": key},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert folder.weights() == FILES
        assert "Bearer gcs-token" in store.seen


@of("local")
def test_local(folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "share"
    for name, data in {**FILES, ".hidden": b""}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    (folder.path / ".vllm-draft-killed").mkdir()
    (folder.path / "vllm").mkdir()
    (folder.path / "vllm" / ".gitkeep").touch()
    done = folder.load(model_location=str(source))
    assert done.returncode == 0, done.stderr
    assert folder.weights() == FILES
    assert list(folder.path.glob(".vllm-draft-*")) == []


@of("hub")
def test_hub(folder: Folder) -> None:
    (folder.path / "huggingface_hub.py").write_text(
        "def snapshot_download(*names, local_dir, **given):\n"
        "    (local_dir / '.cache').mkdir()\n"
        "    (local_dir / 'config.json').write_text(repr((names, sorted(given.items()))))\n"
    )
    done = folder.load(model="org/model", model_revision="v1", HuggingFaceToken=credential(apiToken="hf_canary"))
    assert done.returncode == 0, done.stderr
    assert folder.weights() == {
        "config.json": b"(('org/model',), [('ignore_patterns', ('original/*', 'consolidated*')), "
        b"('revision', 'v1'), ('token', 'hf_canary')])"
    }


@pytest.mark.parametrize(
    ("folder", "given", "words"),
    [
        ("s3", {}, "model_location is not set"),
        ("azure", {"model_location": "az://models/x"}, "azure_credential is not set"),
        ("gcs", {"model_location": "/mnt/x"}, "has to look like gs://"),
        ("s3", {"model_location": "gs://models/x"}, "has to look like s3://"),
        ("local", {"model_location": "relative"}, "absolute path of a folder"),
        ("local", {"model_location": "/nowhere"}, "absolute path of a folder"),
        ("hub", {}, "model is not set"),
    ],
    indirect=["folder"],
)
def test_what_is_missing_is_said(folder: Folder, given: dict[str, str], words: str) -> None:
    done = folder.load(**given)
    assert done.returncode == 1
    assert words in done.stderr
    folder.assert_untouched()


@of("azure")
def test_a_name_that_leads_elsewhere_is_refused(folder: Folder) -> None:
    with Azure({"llama/../../evil": b"x"}).serving() as store:
        assert isinstance(store, Azure)
        text = store.connection_string(KEY)
        done = folder.load(model_location="az://models/llama", azure_credential=credential(azureConnectionString=text))
    assert done.returncode == 1
    assert "outside of the model folder" in done.stderr
    assert not (folder.path.parent / "evil").exists()


@of("local")
def test_an_empty_place_is_an_error(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = folder.load(model_location=str(tmp_path / "empty"))
    assert done.returncode == 1
    assert "no files at the place" in done.stderr
    folder.assert_untouched()


def test_the_shared_part_is_the_same_in_all() -> None:
    hooks = Path(scaffold.__file__).with_name("hooks")
    texts = {name: (hooks / f"{name}.py").read_text() for name in scaffold.VARIANTS if name != "none"}
    assert len({text[text.index("def parameter(") :] for text in texts.values()}) == 1
    remote = {texts[name][texts[name].index("def location(") :] for name in ("s3", "azure", "gcs")}
    assert len(remote) == 1
