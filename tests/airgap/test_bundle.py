"""`vllm-dropin bundle` as users run it: in a process of its own, from folders, hooks and a stand-in of the hub."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import vllm_dropin
from tests.conftest import wait_until
from tests.folders import definitions, engine_config, engine_environ, envelope, make_folder
from tests.supervisor.fake_hub import FakeHub, Repo, serve
from tests.supervisor.test_download import hub_python
from vllm_dropin.airgap.bundle import BundleRequest, bundle
from vllm_dropin.airgap.progress import Progress
from vllm_dropin.errors import DropinError
from vllm_dropin.model.manifest import FILE_NAME, Manifest, verify
from vllm_dropin.settings.options import Flags

PACKAGE = Path(vllm_dropin.__file__).parent
SCRIPT = Path(sys.executable).with_name("vllm-dropin")
CANARY = "hf_canary0123456789"
COMMIT = "c0ffee" * 6 + "c0de"


def safetensors(fill: int = 0, size: int = 8) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes([fill]) * size


MODEL = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}',
    "model.safetensors": safetensors(),
}
IN_VLLM = {f"vllm/{name}": data for name, data in MODEL.items()}
METADATA = definitions("fieldName: model, type: string", "fieldName: HuggingFaceToken, type: credential")


class Bundler:
    """Runs of the command in one scratch folder."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.environ = {**engine_environ(scratch / "python"), "VLLM_DROPIN_STATE_DIR": str(scratch / "state")}
        self.output = scratch / "out" / "model.tar"
        self.output.parent.mkdir()

    def start(self, folder: Path, *words: str, output: Path | None = None, **options: Any) -> subprocess.Popen[str]:
        command = [SCRIPT, "bundle", str(folder), "-o", str(output or self.output), *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.environ, **{**pipes, **options})

    def run(self, folder: Path, *words: str, code: int = 0, **options: Any) -> tuple[str, str]:
        with self.start(folder, *words, **options) as process:
            stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == code, stderr
        assert f'File "{PACKAGE}' not in stderr, "a traceback of ours"
        return stdout, stderr

    def summary(self, folder: Path, *words: str, **options: Any) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads(self.run(folder, *words, "--json", **options)[0])
        return summary

    def unpacked(self) -> Path:
        """The archive as tar unpacks it, after a look at every member."""
        target = self.scratch / "unpacked"
        shutil.rmtree(target, ignore_errors=True)
        with tarfile.open(self.output) as archive:
            members = archive.getmembers()
            assert [member.name for member in members] == sorted(member.name for member in members)
            assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {(0, 0, "", "", 315532800)}
            assert {member.mode for member in members} <= {0o644, 0o755}
            archive.extractall(target, filter="data")
        return target

    def refusal(self, folder: Path, *words: str, code: int = 78, **options: Any) -> str:
        """The message of a run that ends with this exit code and leaves nothing behind."""
        before = sorted(self.output.parent.iterdir())
        stderr = self.run(folder, *words, code=code, **options)[1]
        assert sorted(self.output.parent.iterdir()) == before
        message = stderr[stderr.index("error: ") :]
        assert "\n  " in message, "no remedy"
        return message


@pytest.fixture
def bundler(tmp_path: Path) -> Bundler:
    return Bundler(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest(folder: Path) -> Manifest:
    found = verify(folder / "vllm")
    assert found is not None
    return found.manifest


# From a folder


def test_a_bundle_is_the_folder_with_a_manifest(tmp_path: Path, bundler: Bundler) -> None:
    files = {
        **IN_VLLM,
        "model-metadata.yaml": METADATA,
        "engine_config.json": engine_config("--max-model-len", 2048),
        "vllm/LICENSE.txt": "as you like",
        "sub/helper.py": "x = 1\n",
        "run.sh": "#!/bin/sh\n",
    }
    rubbish = {
        ".git/config": "g",
        "__pycache__/a.pyc": "c",
        "sub/a.pyc": "c",
        ".env": "TOKEN=x",
        "run.sh~": "",
        "vllm/.cache/x": "",
    }
    folder = make_folder(tmp_path / "m", {**files, **rubbish})
    (folder / "run.sh").chmod(0o700)
    (folder / "vllm" / "model.safetensors").chmod(0o777)
    summary = bundler.summary(folder)
    data = bundler.output.read_bytes()
    assert (summary["size"], summary["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert (summary["source"], summary["licence"]) == (
        {"kind": "folder", "name": "vllm/", "revision": None},
        "LICENSE.txt",
    )
    assert (summary["notes"], summary["warnings"]) == ([], [])
    unpacked = bundler.unpacked()
    found = contents(unpacked)
    assert set(found) == {*files, f"vllm/{FILE_NAME}"}
    assert found["engine_config.json"] == (folder / "engine_config.json").read_bytes()
    assert {path.name for path in unpacked.rglob("*") if path.is_file() and path.stat().st_mode & 0o100} == {"run.sh"}
    assert set(manifest(unpacked).files) == {*MODEL, "LICENSE.txt"}
    check = subprocess.run([SCRIPT, "check", unpacked, "--json"], env=bundler.environ, capture_output=True, text=True)
    assert json.loads(check.stdout)["weights"]["manifest"]["licence"] == "LICENSE.txt"


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path, bundler: Bundler) -> None:
    files = {**IN_VLLM, "model-metadata.yaml": METADATA, "b/c.txt": "1", "a.txt": "2"}
    folder = make_folder(tmp_path / "m", files)
    first = bundler.summary(folder)["sha256"]
    copy = make_folder(tmp_path / "elsewhere" / "n", dict(reversed(files.items())))
    (copy / "a.txt").chmod(0o600)
    os.utime(copy / "a.txt", (1, 1))
    assert bundler.summary(copy)["sha256"] == first
    assert bundler.summary(bundler.unpacked())["sha256"] == first, "a bundle of a bundle"


def test_a_folder_instead_of_an_archive(tmp_path: Path, bundler: Bundler) -> None:
    folder = make_folder(tmp_path / "m", {**IN_VLLM, "model-metadata.yaml": METADATA})
    bundler.run(folder)
    output = tmp_path / "out" / "bundle"
    summary = bundler.summary(folder, output=output)
    assert summary["sha256"] is None
    assert contents(output) == contents(bundler.unpacked())
    assert {path.stat().st_mtime for path in [output, *output.rglob("*")]} == {315532800}
    (folder / "model-metadata.yaml").unlink()
    bundler.run(folder, output=output)
    assert set(contents(output)) == {*IN_VLLM, f"vllm/{FILE_NAME}"}
    assert sorted(path.name for path in output.parent.iterdir()) == ["bundle", "model.tar"]


def test_weights_elsewhere_on_this_machine(tmp_path: Path, bundler: Bundler) -> None:
    weights = make_folder(tmp_path / "store", MODEL)
    (weights / "model.safetensors").rename(tmp_path / "blob")
    (weights / "model.safetensors").symlink_to(tmp_path / "blob")
    files = {
        "engine_config.json": engine_config("--model", str(weights), "--seed", "1"),
        "vllm/old.safetensors": b"old",
    }
    summary = bundler.summary(make_folder(tmp_path / "m", files))
    assert summary["source"]["name"] == str(weights)
    assert f"engine_config.json: --model {weights} is left out: the bundle has the model in vllm/" in summary["notes"]
    unpacked = bundler.unpacked()
    assert set(manifest(unpacked).files) == set(MODEL)
    assert json.loads((unpacked / "engine_config.json").read_text()) == {"args": ["--seed", "1"]}
    check = subprocess.run([SCRIPT, "check", unpacked, "--json"], env=bundler.environ, capture_output=True, text=True)
    assert json.loads(check.stdout)["command"][4] == str(unpacked / "vllm")


def test_a_chat_template_that_a_flag_names(tmp_path: Path, bundler: Bundler) -> None:
    plain = {name: data for name, data in IN_VLLM.items() if name != "vllm/tokenizer_config.json"}
    folder = make_folder(tmp_path / "m", plain)
    assert "there is no chat template" in bundler.run(folder)[1]
    template = make_folder(tmp_path / "templates", {"my.jinja": "{{ messages }}"}) / "my.jinja"
    make_folder(folder, {"engine_config.json": engine_config("--chat-template", str(template))})
    assert "there is no chat template" not in bundler.run(folder)[1]
    unpacked = bundler.unpacked()
    assert "parts/my.jinja" in manifest(unpacked).files
    assert json.loads((unpacked / "engine_config.json").read_text())["args"] == [
        "--chat-template",
        "vllm/parts/my.jinja",
    ]


# By a hook

HOOK = f"""\
import os, pathlib

def load_model(code_dir):
    print("the hook runs")
    with open(code_dir + "/runs", "a") as file:
        file.write("run\\n")
    folder = pathlib.Path(code_dir, "vllm")
    folder.mkdir(exist_ok=True)
    for name, data in {MODEL!r}.items():
        (folder / name).write_bytes(data)
    os.environ["VLLM_MY_SETTING"] = "{CANARY}"
"""


def test_a_hook_runs_here_and_not_behind_the_gap(tmp_path: Path, bundler: Bundler) -> None:
    folder = make_folder(tmp_path / "m", {"custom.py": HOOK, "model-metadata.yaml": METADATA})
    stdout, stderr = bundler.run(folder, "--json")
    assert "the hook runs" in stderr
    assert "custom.py set VLLM_MY_SETTING for the engine" in stderr
    assert CANARY not in stdout + stderr
    assert json.loads(stdout)["source"] == {"kind": "hook", "name": "custom.py", "revision": None}
    assert set(contents(bundler.unpacked())) == {*IN_VLLM, f"vllm/{FILE_NAME}", "model-metadata.yaml", "runs"}
    summary = bundler.summary(folder, "--keep-hook")
    assert "custom.py" in contents(bundler.unpacked())
    assert not [note for note in summary["notes"] if "custom.py" in note]
    assert (folder / "runs").read_text() == "run\nrun\n"


def test_a_hook_that_fails(tmp_path: Path, bundler: Bundler) -> None:
    code = "def load_model(code_dir):\n    raise OSError('the share is gone')\n"
    message = bundler.refusal(make_folder(tmp_path / "m", {"custom.py": code}))
    assert "custom.py: load_model failed: OSError: the share is gone" in message


# What is refused


def link_outside(folder: Path) -> None:
    (folder / "notes.txt").symlink_to("/etc/passwd")


def link_folder(folder: Path) -> None:
    (folder / "vllm" / "more").symlink_to("/etc")


REFUSED: dict[str, tuple[Mapping[str, str | bytes], list[str], list[str]]] = {
    "pickle": ({"vllm/pytorch_model.bin": b"x"}, [], ["vllm/pytorch_model.bin", "--allow-pickle"]),
    "pickle beside": ({"extra/data.PKL": b"x"}, [], ["extra/data.PKL", "run code"]),
    "pickle in disguise": ({"vllm/notes.txt": b"\x80\x04\x95 and so on"}, [], ["vllm/notes.txt", "pickle"]),
    "truncated": ({"vllm/model.safetensors": safetensors()[:-1]}, [], ["model.safetensors is truncated"]),
    "no weights": ({"vllm/model.safetensors": b""}, [], ["model.safetensors is truncated"]),
    "a broken bundle": ({f"vllm/{FILE_NAME}": "{}"}, [], [FILE_NAME]),
    "no file": ({"engine_config.json": engine_config("--chat-template", "/no/t.jinja")}, [], ["/no/t.jinja"]),
    "hidden file": (
        {"engine_config.json": engine_config("--chat-template", ".t/t.jinja"), ".t/t.jinja": "x"}, [],
        ["--chat-template in engine_config.json names .t/t.jinja, which is not in the bundle"],
    ),
    "the folder itself": ({"engine_config.json": engine_config("--model", ".")}, [], ["is the model folder itself"]),
    "ftp": ({"engine_config.json": engine_config("--model", "ftp://u:secret@h/m")}, [], ["ftp://h/m: ftp:// can't be"]),
    "secret": (
        {"model-metadata.yaml": METADATA, "notes.txt": f"my token is {CANARY}"},
        ['HuggingFaceToken={"apiToken": "' + CANARY + '"}'],
        ["notes.txt holds a credential"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, bundler: Bundler, case: str) -> None:
    """In this process, which is quicker; exit codes and what is left behind are looked at elsewhere."""
    files, params, expected = REFUSED[case]
    folder = make_folder(tmp_path / "m", {**IN_VLLM, **files})
    flags = Flags(str(folder), params=tuple(params))
    with pytest.raises(DropinError) as raised:
        bundle(BundleRequest(bundler.output), flags, bundler.environ, Progress(io.StringIO()))
    assert list(bundler.output.parent.iterdir()) == []
    assert (raised.value.exit_code, raised.value.remedy != "") == (78, True)
    message = str(raised.value)
    assert [word for word in expected if word not in message] == []
    assert "secret@" not in message
    assert CANARY not in message


@pytest.mark.parametrize(
    ("harm", "words"), [(link_outside, "notes.txt is a link that leads out"), (link_folder, "is a link to a folder")]
)
def test_links_that_lead_elsewhere(tmp_path: Path, bundler: Bundler, harm: Callable[[Path], None], words: str) -> None:
    folder = make_folder(tmp_path / "m", IN_VLLM)
    harm(folder)
    assert words in bundler.refusal(folder)


def test_flags_of_vllm_belong_into_the_folder(tmp_path: Path, bundler: Bundler) -> None:
    message = bundler.refusal(make_folder(tmp_path / "m", IN_VLLM), "--", "--seed", "1")
    assert "bundle takes no flags of vLLM" in message


def test_an_upstream_has_no_model(tmp_path: Path, bundler: Bundler) -> None:
    bundler.environ["VLLM_DROPIN_UPSTREAM"] = "http://localhost:1"
    assert "no model to bundle" in bundler.refusal(make_folder(tmp_path / "m", IN_VLLM))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("m/b.tar", "is in the model folder"),
        ("out/b.tar.gz", "no kind of archive"),
        ("none/b.tar", "there is no folder"),
        ("out/other", "is there and is no bundle"),
    ],
)
def test_where_no_bundle_can_be(tmp_path: Path, bundler: Bundler, output: str, words: str) -> None:
    folder = make_folder(tmp_path / "m", IN_VLLM)
    make_folder(tmp_path / "out" / "other", {"precious.txt": "x"})
    assert words in bundler.refusal(folder, output=tmp_path / output)
    assert (tmp_path / "out" / "other" / "precious.txt").exists()


def test_pickles_on_demand(tmp_path: Path, bundler: Bundler) -> None:
    folder = make_folder(tmp_path / "m", {**IN_VLLM, "vllm/more.bin": b"x"})
    bundler.run(folder, "--allow-pickle")
    assert "more.bin" in manifest(bundler.unpacked()).files


def test_a_full_disk_leaves_nothing_new(tmp_path: Path, bundler: Bundler) -> None:
    """A limit on the size of a file is met like a full disk: by an error of write."""
    folder = make_folder(tmp_path / "m", IN_VLLM)
    bundler.run(folder)
    before = bundler.output.read_bytes()
    (folder / "vllm" / "model.safetensors").write_bytes(safetensors(size=3 << 20))
    limit = (1 << 20, 1 << 20)
    message = bundler.refusal(folder, code=74, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert "cannot write" in message
    assert bundler.output.read_bytes() == before


# From the hub


@pytest.fixture
def hub(bundler: Bundler) -> Iterator[FakeHub]:
    files = {
        **MODEL,
        "LICENSE": b"as you like",
        "README.md": b"# card",
        "pytorch_model.bin": b"pickle",
        "onnx/m.onnx": b"o",
    }
    tokenizer = {"tokenizer.json": b'{"other": 1}', "config.json": b"{}", "model.safetensors": safetensors(1)}
    repos = {"org/llama": Repo(files, needs_token=CANARY), "org/tok": Repo(tokenizer, commit="d" * 40)}
    with serve(repos) as running:
        more = {
            "VLLM_DROPIN_ENGINE_PYTHON": str(hub_python()),
            "HF_ENDPOINT": running.url,
            "HF_HOME": str(bundler.scratch / "hf"),
            "MLOPS_RUNTIME_PARAM_HuggingFaceToken": envelope("credential", {"apiToken": CANARY}),
            "PYTHONPATH": "",
        }
        bundler.environ |= more
        yield running


FROM_HUB = {*MODEL, "LICENSE", "README.md"}


def test_a_model_of_the_hub(tmp_path: Path, bundler: Bundler, hub: FakeHub) -> None:
    args = engine_config("--model", "org/llama", "--tokenizer", "org/tok", "--revision", "main")
    folder = make_folder(tmp_path / "m", {"model-metadata.yaml": METADATA, "engine_config.json": args})
    stdout, stderr = bundler.run(folder, "--json")
    summary = json.loads(stdout)
    assert summary["source"] == {"kind": "hub", "name": "org/llama", "revision": COMMIT}
    part = {"kind": "hub", "name": "org/tok", "revision": "d" * 40, "path": "parts/org--tok"}
    assert (summary["parts"], summary["licence"]) == ([part], "LICENSE")
    (warning,) = summary["warnings"]
    assert "no chat template, neither with the tokenizer in vllm/parts/org--tok/ nor" in warning, (
        "the model's is not used"
    )
    unpacked = bundler.unpacked()
    assert set(manifest(unpacked).files) == {*FROM_HUB, "parts/org--tok/tokenizer.json", "parts/org--tok/config.json"}
    assert (unpacked / "vllm" / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert json.loads((unpacked / "engine_config.json").read_text())["args"] == ["--tokenizer", "vllm/parts/org--tok"]
    assert CANARY in {
        request.authorization.removeprefix("Bearer ") for request in hub.requests if request.authorization
    }
    assert CANARY.encode() not in bundler.output.read_bytes()
    assert CANARY not in stdout + stderr
    check = subprocess.run([SCRIPT, "check", unpacked, "--json"], env=bundler.environ, capture_output=True, text=True)
    report = json.loads(check.stdout)
    assert report["command"][4] == str(unpacked / "vllm")
    assert "HF_HUB_OFFLINE" in {variable["name"] for variable in report["environment"]["added"]}


def test_a_download_that_was_cut_off_goes_on(tmp_path: Path, bundler: Bundler, hub: FakeHub) -> None:
    files = hub.repos["org/llama"].files
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    del files["model.safetensors"]
    files["model-00001-of-00002.safetensors"] = safetensors()
    files["model-00002-of-00002.safetensors"] = safetensors(size=4 << 20).replace(b'"w"', b'"v"')
    hub.pause = 0.1
    folder = make_folder(tmp_path / "m", {"model-metadata.yaml": METADATA})
    words = ("--param", "model=org/llama")
    with bundler.start(folder, *words) as process:
        wait_until(lambda: list((tmp_path / "hf").glob("hub/*/snapshots/*/model-00001*")), 30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
        process.communicate()
    assert list(bundler.output.parent.iterdir()) == []
    hub.pause = 0
    hub.requests.clear()
    bundler.run(folder, *words)
    assert hub.fetched() == ["model-00002-of-00002.safetensors"]
    first = bundler.output.read_bytes()
    shutil.rmtree(tmp_path / "hf")
    bundler.run(folder, *words)
    assert bundler.output.read_bytes() == first


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["org/none"], ["the hub has no model org/none"]),
        (["org/pickled"], ["org/pickled has its weights as Python pickles (pytorch_model.bin)", "--allow-pickle"]),
        (["org/code", "--trust-remote-code"], ["code from another repository, org/tok"]),
        (["org/llama", "--tokenizer", "org/a/b.gguf"], ["org/a/b.gguf can't be bundled", "a single file"]),
        (["org/llama", "--tokenizer", "org/llama", "--tokenizer-revision", "v2"], ["at two revisions"]),
    ],
)
def test_what_the_hub_can_not_give(
    tmp_path: Path, bundler: Bundler, hub: FakeHub, args: list[str], words: list[str]
) -> None:
    hub.repos["org/pickled"] = Repo({"config.json": b"{}", "pytorch_model.bin": b"x" * 9})
    code = b'{"auto_map": {"AutoConfig": "org/tok--config.C"}}'
    hub.repos["org/code"] = Repo({**MODEL, "config.json": code})
    message = bundler.refusal(make_folder(tmp_path / "m", {"engine_config.json": engine_config("--model", *args)}))
    assert [word for word in words if word not in message] == []
    assert "pytorch_model.bin" not in hub.fetched()
