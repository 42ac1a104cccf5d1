"""`vllm-dropin push` over real HTTP against tests/platforms/standin.py, which is strict about all that it is sent."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tests.folders import MINIMAL_METADATA, definitions, make_folder
from tests.platforms.standin import PREFIX, TOKEN, Refuse, StandIn
from vllm_dropin.cli.main import main
from vllm_dropin.logging import REDACTOR

SCRIPT = Path(sys.executable).with_name("vllm-dropin")
QUICK = ("--poll", "0.01")
CREDENTIAL = "5f0000000000000000000abc"
SECRET = "hf_secret-canary-0815"
INFO = {"name": "vLLM test", "description": "for tests", "label": "test 1", "environmentVersionDescription": "base: x"}
METADATA = definitions(
    "fieldName: max_tokens, type: numeric", "fieldName: system_prompt, type: string",
    "fieldName: HuggingFaceToken, type: credential", "fieldName: trust_remote_code, type: boolean",
)  # fmt: skip

# The SDK's own, at its import and for a platform that speaks of deprecation.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:datarobot.*")


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with StandIn().serving() as standin:
        monkeypatch.setenv("DATAROBOT_ENDPOINT", standin.endpoint)
        monkeypatch.setenv("DATAROBOT_API_TOKEN", TOKEN)
        yield standin
        assert standin.complaints == []


class Run:
    """Runs `push` in this process: the exit code, what it said, and never the token."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *words: str, code: int = 0) -> Run:
        found = main(["push", words[0], *words[1:], *QUICK])
        self.out, self.err = self._capsys.readouterr()
        assert found == code, self.err
        assert TOKEN not in self.out + self.err
        assert "Traceback" not in self.err
        return self

    def ids(self) -> dict[str, str]:
        return dict(re.findall(r"^(.+) ([0-9a-f]{24})", self.out, re.MULTILINE))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    kept = REDACTOR._forms
    yield Run(capsys)
    REDACTOR._forms = kept


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    return path


@pytest.fixture
def context(tmp_path: Path) -> str:
    files = {"Dockerfile": b"FROM x", "env_info.json": json.dumps(INFO).encode()}
    return str(archive(tmp_path / "vllm_dropin.tar.gz", files))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    files = {
        "model-metadata.yaml": METADATA, "custom.py": "def load_model(code_dir): pass\n", "sub/more.txt": "x",
        ".vllm-dropin/schemas/x.json": "{}", "__pycache__/a.pyc": "", "vllm/model.safetensors": "w",
    }  # fmt: skip
    return str(make_folder(tmp_path / "folder", files))


def with_environment(platform: StandIn) -> str:
    environment = platform.add_environment("vLLM test")
    platform.add_environment_version(environment["id"], ["success"])
    return str(environment["id"])


MODEL = ("--environment", "vLLM test")


# Environment


def test_an_environment_is_created_and_built(platform: StandIn, run: Run, context: str) -> None:
    platform.build_states = ["submitted", "submitted", "processing", "processing", "success"]
    run("environment", context)
    (environment,) = platform.environments
    (version,) = platform.environment_versions[environment["id"]]
    assert run.ids() == {"environment": environment["id"], "version": version["id"]}
    assert (environment["name"], environment["description"]) == ("vLLM test", "for tests")
    assert (version["label"], version["dockerContextSize"]) == ("test 1", Path(context).stat().st_size)
    assert version["description"].startswith("base: x\n\nvllm-dropin sha256:")
    states = [line for line in run.err.splitlines() if line.startswith("build: ")]
    assert states == ["build: submitted", "build: processing", "build: success"]
    assert re.findall(r"\| (.*)", run.err) == platform.build_log


def test_the_same_context_is_not_sent_twice(platform: StandIn, run: Run, context: str) -> None:
    first = run("environment", context).ids()
    assert run("environment", context).ids() == first
    assert "this context is built already" in run.err
    assert len(platform.sent("POST", ".*")) == 2


def test_another_context_is_another_version(platform: StandIn, run: Run, context: str, tmp_path: Path) -> None:
    first = run("environment", context).ids()
    other = archive(tmp_path / "other.tar.gz", {"Dockerfile": b"FROM y"})
    second = run("environment", str(other), "--name", "vLLM test", "--label", "second").ids()
    assert first["environment"] == second["environment"]
    assert first["version"] != second["version"]


def test_a_folder_is_a_context_too(platform: StandIn, run: Run, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "context", {"Dockerfile": "FROM x", "env_info.json": json.dumps(INFO), ".hid": "1"})
    first = run("environment", str(folder)).ids()
    assert run("environment", str(folder)).ids() == first
    (call,) = platform.sent("POST", "executionEnvironments/.*/versions/")
    assert dict(call.form)["docker_context"][0].endswith(".zip")
    (folder / ".hid").write_text("2")
    assert run("environment", str(folder)).ids()["version"] != first["version"]


def test_a_failed_build_shows_its_log_and_is_built_anew(platform: StandIn, run: Run, context: str) -> None:
    platform.build_states = ["submitted", "processing", "failed"]
    platform.build_error = "no space\x1b[31m left"
    run("environment", context, code=78)
    assert "Step 3/3 : done\n  no space[31m left" in run.err
    assert run.out == ""
    platform.build_states = ["success"]
    run("environment", context)
    assert len(platform.environment_versions[platform.environments[0]["id"]]) == 2


def test_a_push_that_was_cut_off_waits_for_the_same_version(platform: StandIn, run: Run, context: str) -> None:
    platform.build_states = ["submitted", "processing"]
    run("environment", context, "--wait", "0.1", code=74)
    assert "still processing after" in run.err
    assert "Run the same command again" in run.err
    (version,) = platform.environment_versions[platform.environments[0]["id"]]
    version["_states"] = ["processing", "success"]
    assert run("environment", context).ids()["version"] == version["id"]
    assert "this context was sent before" in run.err
    assert len(platform.sent("POST", ".*/versions/")) == 1


def test_an_answer_that_is_lost_does_not_send_twice(platform: StandIn, run: Run, context: str) -> None:
    platform.cut_after = lambda call: call.method == "POST" and call.path.endswith("versions/")
    run("environment", context, code=74)
    assert "creating a version of the environment: the platform can't be reached" in run.err
    platform.cut_after = None
    run("environment", context)
    assert len(platform.sent("POST", ".*/versions/")) == 1


def test_a_name_that_is_there_twice(platform: StandIn, run: Run, context: str) -> None:
    made = [platform.add_environment(name)["id"] for name in ("vLLM test", "x", "vLLM test 2", "vLLM test")]
    run("environment", context, code=78)
    assert f"2 environments are called 'vLLM test': {made[0]}, {made[3]}" in run.err
    assert "--id ID" in run.err
    assert run("environment", context, "--id", made[3]).ids()["environment"] == made[3]


def test_an_id_that_is_not_there(platform: StandIn, run: Run, context: str) -> None:
    run("environment", context, "--id", CREDENTIAL, code=78)
    assert f"looking for the environment {CREDENTIAL}: the platform answers 404: {CREDENTIAL} was not found" in run.err


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"env_info.json": b"{}"}, "has no Dockerfile at its top"),
        ({"context/Dockerfile": b"x"}, "has no Dockerfile at its top"),
        ({"Dockerfile": b"x", "env_info.json": b"["}, "is not a JSON object"),
        ({"Dockerfile": b"x"}, "Give the environment a --name"),
    ],
)
def test_a_context_that_could_not_be_built(
    platform: StandIn, run: Run, tmp_path: Path, files: dict[str, bytes], words: str
) -> None:
    run("environment", str(archive(tmp_path / "c.tar.gz", files)), code=78)
    assert words in run.err
    assert platform.calls == []


@pytest.mark.parametrize("content", [b"no archive", b"\x1f\x8b\x08\x00broken"])
def test_a_file_that_is_no_archive(platform: StandIn, run: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.tar.gz").write_bytes(content)
    run("environment", str(tmp_path / "c.tar.gz"), code=78)
    assert "can't be read as an image context" in run.err
    run("environment", str(tmp_path / "absent"), code=78)
    assert "No such file" in run.err


# Model


def test_a_model_with_everything(platform: StandIn, run: Run, folder: str) -> None:
    environment = with_environment(platform)
    run(
        "model", folder, *MODEL, "--bundle", "gpu.large", "--memory", "32GiB", "--replicas", "2", "--egress", "none",
        "--param", "max_tokens=512", "--param", "trust_remote_code=true", "--param", "system_prompt=Be brief.",
        "--credential", f"HuggingFaceToken={CREDENTIAL}", "--exclude", "vllm/*",
    )  # fmt: skip
    (model,) = platform.models
    assert (model["name"], model["targetType"], model["targetName"]) == ("m", "TextGeneration", "resultText")
    (call,) = platform.sent("POST", "customModels/.*/versions/")
    fields = dict(call.form)
    assert fields["baseEnvironmentId"] == environment
    assert (fields["networkEgressPolicy"], fields["maximumMemory"], fields["replicas"]) == ("NONE", str(32 << 30), "2")
    assert [path for name, path in call.form if name == "filePath"] == [
        "custom.py",
        "model-metadata.yaml",
        "sub/more.txt",
    ]
    assert json.loads(fields["runtimeParameterValues"]) == [
        {"fieldName": "max_tokens", "type": "numeric", "value": 512},
        {"fieldName": "trust_remote_code", "type": "boolean", "value": True},
        {"fieldName": "system_prompt", "type": "string", "value": "Be brief."},
        {"fieldName": "HuggingFaceToken", "type": "credential", "value": CREDENTIAL},
    ]
    second, first = platform.versions[model["id"]]
    assert second["resourceBundleId"] == "gpu-large"
    assert run.ids() == {"model": model["id"], "version": second["id"]}
    assert first["description"] != second["description"]
    (test,) = platform.tests
    assert (test["customModelImageId"], test["overallStatus"]) == (second["id"], "succeeded")
    assert "version 1.1 on the bundle gpu-large" in run.err
    assert "test: in_progress\ntest: succeeded" in run.err


def test_nothing_is_done_twice(platform: StandIn, run: Run, folder: str) -> None:
    with_environment(platform)
    words = ("model", folder, *MODEL, "--bundle", "gpu.large")
    first = run(*words).ids()
    writing = len([call for call in platform.calls if call.method != "GET"])
    assert run(*words).ids() == first
    assert "this content is there already: version 1.1" in run.err
    assert "the test of this version succeeded before" in run.err
    assert len([call for call in platform.calls if call.method != "GET"]) == writing


@pytest.mark.parametrize("change", ["file", "parameter", "environment", "bundle"])
def test_what_changed_is_a_new_version(platform: StandIn, run: Run, folder: str, change: str) -> None:
    environment = with_environment(platform)
    first = run("model", folder, *MODEL, "--no-test").ids()
    more: tuple[str, ...] = ()
    if change == "file":
        (Path(folder) / "custom.py").write_text("# other\n")
    if change == "parameter":
        more = ("--param", "max_tokens=5")
    if change == "environment":
        platform.add_environment_version(environment, ["success"])
    if change == "bundle":
        more = ("--bundle", "cpu-small")
    second = run("model", folder, *MODEL, "--no-test", *more).ids()
    assert first["model"] == second["model"]
    assert first["version"] != second["version"]
    uploads = len(platform.sent("POST", "customModels/.*/versions/"))
    assert uploads == (1 if change == "bundle" else 2)  # the files need not be sent again for another bundle


@pytest.mark.parametrize("cut", ["PATCH customModels/[0-9a-f]*/versions/", "POST customModelTests/"])
def test_a_model_goes_on_where_it_was_cut_off(platform: StandIn, run: Run, folder: str, cut: str) -> None:
    with_environment(platform)
    platform.cut_after = lambda call: re.fullmatch(cut, f"{call.method} {call.path}") is not None
    run("model", folder, *MODEL, "--bundle", "gpu.large", code=74)
    platform.cut_after = None
    run("model", folder, *MODEL, "--bundle", "gpu.large")
    assert len(platform.sent("POST", "customModels/.*/versions/")) == 1
    assert len(platform.tests) == 1


def test_a_failed_test_says_why_and_is_tried_again(platform: StandIn, run: Run, folder: str) -> None:
    with_environment(platform)
    platform.test_states = ["in_progress", "failed"]
    run("model", folder, *MODEL, "--test-dataset", CREDENTIAL, code=78)
    assert "ended as failed" in run.err
    assert "error_check: failed the server did not start" in run.err
    assert "CUDA out of memory[31m" in run.err
    assert platform.tests[0]["datasetId"] == CREDENTIAL
    platform.test_states = ["succeeded"]
    run("model", folder, *MODEL, "--test-dataset", CREDENTIAL)
    assert len(platform.versions[platform.models[0]["id"]]) == 1


@pytest.mark.parametrize("end", ["success", "failed"])
def test_requirements_are_built_first(platform: StandIn, run: Run, folder: str, end: str) -> None:
    with_environment(platform)
    (Path(folder) / "requirements.txt").write_text("nonsense\n")
    platform.dependency_states = ["submitted", "processing", end]
    run("model", folder, *MODEL, code=0 if end == "success" else 78)
    assert f"build of requirements.txt: {end}" in run.err
    assert ("no matching distribution" in run.err) == (end == "failed")
    assert len(platform.tests) == (end == "success")


@pytest.mark.parametrize(
    ("prepare", "words", "expected"),
    [
        (lambda p: None, (), "there is no environment called 'vLLM test'"),
        (lambda p: p.add_environment("vLLM test"), (), "has no version that is built"),
        (lambda p: [with_environment(p), with_environment(p)], (), "2 environments are called"),
        (with_environment, ("--bundle", "tpu"), "The platform has: cpu-small (cpu.small), gpu-large (gpu.large, GPU)."),
        (lambda p: [with_environment(p), p.add_model("m"), p.add_model("m")], (), "2 models are called 'm'"),
        (lambda p: [with_environment(p), p.add_model("m", "Regression")], (), "has the target type Regression"),
        (with_environment, ("--id", CREDENTIAL), "the platform answers 404"),
        (
            with_environment,
            ("--environment-version", CREDENTIAL),
            "the environment's version: the platform answers 404",
        ),
    ],
)
def test_what_is_not_there_is_said(
    platform: StandIn, run: Run, folder: str, prepare: Any, words: tuple[str, ...], expected: str
) -> None:
    prepare(platform)
    run("model", folder, *MODEL, *words, code=78)
    assert expected in run.err
    assert platform.sent("POST", ".*") == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--param", f"HuggingFaceToken={SECRET}"), "Write --credential NAME=ID. Only the id leaves this machine."),
        (("--credential", f"HuggingFaceToken={SECRET}"), "is no id of a stored credential"),
        (("--credential", f"max_tokens={CREDENTIAL}"), "it is defined as numeric"),
        (("--param", "max_token=5"), "did you mean 'max_tokens'?"),
        (("--param", "max_tokens=many"), "is not a number"),
        (("--param", "max_tokens"), "a value is missing"),
        (("--memory", "much"), "this is no size"),
        (("--replicas", "0"), "at least one has to run"),
        (("--exclude", "*"), "has no files to push"),
    ],
)
def test_wrong_words_send_nothing(
    platform: StandIn, run: Run, folder: str, words: tuple[str, ...], expected: str
) -> None:
    run("model", folder, *MODEL, *words, code=78)
    assert expected in run.err
    assert SECRET not in run.err
    assert platform.calls == []


def test_a_link_out_of_the_folder_is_not_followed(platform: StandIn, run: Run, folder: str, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("key")
    (Path(folder) / "link").symlink_to(tmp_path / "private")
    run("model", folder, *MODEL, code=78)
    assert "is a link that leads out of" in run.err
    assert platform.calls == []


# Deployment


def with_model(platform: StandIn) -> str:
    model = platform.add_model("m")
    return str(platform.add_version(model["id"])["id"])


def test_a_version_is_registered_and_deployed(platform: StandIn, run: Run, folder: str) -> None:
    version = with_model(platform)
    run("deploy", folder, "--prediction-environment", CREDENTIAL, "--importance", "LOW", "--label", "prod")
    (package,), (deployment,) = platform.packages, platform.deployments
    assert (package["modelId"], package["name"]) == (version, "m")
    assert (deployment["label"], deployment["status"]) == ("prod", "active")
    (call,) = platform.sent("POST", "deployments/fromModelPackage/")
    assert call.body == {
        "modelPackageId": package["id"], "label": "prod", "predictionEnvironmentId": CREDENTIAL, "importance": "LOW",
    }  # fmt: skip
    assert f"OpenAI base URL {platform.endpoint}/deployments/{deployment['id']}" in run.out
    assert "registration: inProgress\nregistration: complete" in run.err
    assert "deployment: RUNNING" in run.err


def test_deploying_again_changes_nothing(platform: StandIn, run: Run, folder: str) -> None:
    with_model(platform)
    first = run("deploy", folder).out
    assert run("deploy", folder).out == first
    assert "registered already" in run.err
    assert len(platform.sent("POST", ".*")) == 2


def test_another_version_replaces_only_when_told(platform: StandIn, run: Run, folder: str) -> None:
    with_model(platform)
    run("deploy", folder)
    newer = platform.add_version(platform.models[0]["id"])
    run("deploy", folder, code=78)
    assert "serves another version" in run.err
    assert "--replace" in run.err
    run("deploy", folder, "--replace")
    assert [package["modelId"] for package in platform.packages][-1] == newer["id"]
    assert platform.packages[-1]["registeredModelVersion"] == 2
    assert platform.deployments[0]["modelPackage"] == {"id": platform.packages[-1]["id"]}
    assert "replacement: RUNNING" in run.err


def test_an_older_version_by_its_id_and_without_a_folder(platform: StandIn, run: Run) -> None:
    older = with_model(platform)
    platform.add_version(platform.models[0]["id"])
    run("deploy", "--model", "m", "--version", older, "--registered-name", "r", "--label", "d")
    assert platform.packages[0]["modelId"] == older
    assert platform.registered[0]["name"] == "r"


def test_a_deployment_that_was_cut_off_is_waited_for(platform: StandIn, run: Run, folder: str) -> None:
    with_model(platform)
    platform.package_states, platform.job_states = ["complete"], ["RUNNING"]
    run("deploy", folder, "--wait", "0.1", code=74)
    assert "deployment: still RUNNING" in run.err
    platform.deployments[0]["status"] = "active"
    run("deploy", folder)
    assert len(platform.deployments) == 1


def test_a_deployment_that_fails(platform: StandIn, run: Run, folder: str) -> None:
    with_model(platform)
    platform.job_states = ["RUNNING", "ERROR"]
    run("deploy", folder, code=78)
    assert "the deployment failed: no GPU is free" in run.err


def test_a_registration_that_fails(platform: StandIn, run: Run, folder: str) -> None:
    with_model(platform)
    platform.package_states = ["inProgress", "failed"]
    run("deploy", folder, code=78)
    assert "the build of the registered version" in run.err
    assert platform.deployments == []


@pytest.mark.parametrize(
    ("prepare", "words", "expected"),
    [
        (lambda p: None, (), "there is no model called 'm'"),
        (lambda p: p.add_model("m"), (), "has no version"),
        (lambda p: [with_model(p), p.add_registered("m"), p.add_registered("m")], (), "--registered-id ID"),
        (
            lambda p: [with_model(p), *(p.add_deployment(name, "x") for name in ("m", "m", "m2"))],
            (), "2 deployments are called 'm'",
        ),
        (with_model, ("--id", CREDENTIAL), "looking for the deployment"),
        (with_model, ("--version", CREDENTIAL), "looking for the model's version"),
    ],
)  # fmt: skip
def test_what_can_not_be_deployed(
    platform: StandIn, run: Run, folder: str, prepare: Any, words: tuple[str, ...], expected: str
) -> None:
    prepare(platform)
    run("deploy", folder, *words, code=78)
    assert expected in run.err
    assert platform.sent("POST", "deployments/.*") == []


# The way there


def test_from_nothing_to_a_deployment(platform: StandIn, run: Run, context: str, folder: str) -> None:
    run("environment", context)
    run("model", folder, *MODEL)
    run("deploy", folder)
    assert platform.deployments[0]["status"] == "active"


@pytest.mark.parametrize("what", ["environment", "model", "deploy"])
def test_a_dry_run_shows_the_very_calls(platform: StandIn, run: Run, context: str, folder: str, what: str) -> None:
    words = {
        "environment": ("environment", context),
        "model": (
            "model", folder, *MODEL, "--bundle", "gpu.large", "--param", "max_tokens=5", "--replicas", "2",
            "--credential", f"HuggingFaceToken={CREDENTIAL}",
        ),
        "deploy": ("deploy", folder),
    }[what]  # fmt: skip
    shown = run(*words, "--dry-run").out
    assert platform.calls == []
    assert TOKEN not in shown
    with_environment(platform) if what == "model" else None
    with_model(platform) if what == "deploy" else None
    platform.package_states = ["complete"]
    run(*words)
    rehearsed = [line for line in shown.splitlines() if re.match(r"(GET|POST|PATCH) ", line)]
    # Waiting repeats calls, and lists have pages: both as often as it takes.
    real = [f"{call.method} {call.path}" for call in platform.calls if "offset" not in call.query]
    assert _steps(real) == _steps([line.partition("?")[0] for line in rehearsed])
    writing = [line for line in rehearsed if not line.startswith("GET")]
    assert len(writing) == len([call for call in platform.calls if call.method != "GET"])
    if what == "model":
        assert '"fieldName": "HuggingFaceToken", "type": "credential", "value": "5f0000' in shown
        assert '"resourceBundleId": "<bundle>"' in shown


def _steps(calls: list[str]) -> list[str]:
    """Without ids, and each call once where it is repeated."""
    plain = [re.sub(r"[0-9a-f]{24}|<[a-z ]+>", "ID", call) for call in calls]
    return [call for number, call in enumerate(plain) if call not in plain[:number]]


def test_a_dry_run_hides_what_looks_like_a_secret(platform: StandIn, run: Run, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", {"model-metadata.yaml": definitions("fieldName: api_key, type: string")})
    run("model", str(folder), *MODEL, "--param", f"api_key={SECRET}", "--dry-run")
    assert SECRET not in run.out
    assert '"value": "***"' in run.out


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, 78, "Check DATAROBOT_API_TOKEN"),
        (403, 78, "has no right to do this"),
        (404, 78, "Check the id"),
        (409, 78, "no, says the platform"),
        (413, 78, "takes no upload of that size"),
        (422, 78, '{"name": "too long"}'),
        (500, 74, "Run the same command again"),
        (503, 74, "Run the same command again"),
    ],
)
def test_refusals_have_the_platforms_own_words(
    platform: StandIn, run: Run, context: str, status: int, code: int, words: str
) -> None:
    more = {"errors": {"name": "too long"}} if status == 422 else {}
    platform.refusals[("POST", "executionEnvironments/")] = Refuse(status, "no, says the platform", **more)
    run("environment", context, code=code)
    assert f"creating the environment 'vLLM test': the platform answers {status}: no, says the platform" in run.err
    assert words in run.err
    assert len(platform.sent("POST", ".*")) == 1  # not repeated: it may have been done


def test_a_wrong_token_is_not_repeated_anywhere(
    platform: StandIn, run: Run, context: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATAROBOT_API_TOKEN", "wrong-token-canary")
    run("environment", context, code=78)
    assert "listing environments: the platform answers 401: Invalid Authorization header" in run.err
    assert "wrong-token" not in run.out + run.err


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_reading_is_repeated(platform: StandIn, run: Run, context: str, status: int) -> None:
    platform.fail_once = [("GET", "executionEnvironments/", status), ("GET", ".*/buildLog/", status)]
    run("environment", context)
    assert len(platform.environments) == 1


def test_a_write_is_repeated_only_when_it_was_not_taken_up(platform: StandIn, run: Run, context: str) -> None:
    platform.fail_once = [("POST", "executionEnvironments/", 429)]
    run("environment", context)
    assert len(platform.environments) == 1


def test_answers_that_are_no_json(platform: StandIn, run: Run, context: str) -> None:
    platform.fail_once = [("GET", "executionEnvironments/", 200)]
    run("environment", context, code=74)
    assert "the platform's answer is not understood" in run.err
    platform.fail_once = [("POST", "executionEnvironments/", 502)]
    run("environment", context, code=74)
    assert "the platform answers 502: <h1>über capacity</h1>" in run.err


@pytest.mark.parametrize("named", ["http://internal.invalid", "https://internal.invalid:8443"])
def test_links_are_followed_at_the_endpoint_only(platform: StandIn, run: Run, folder: str, named: str) -> None:
    platform.named = named
    for number in range(3):
        platform.add_model(f"m{number}")
    with_model(platform)
    run("deploy", folder)
    assert platform.deployments[0]["status"] == "active"


def test_a_platform_that_is_not_there(run: Run, context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATAROBOT_ENDPOINT", "http://127.0.0.1:9/api/v2")
    monkeypatch.setenv("DATAROBOT_API_TOKEN", TOKEN)
    run("environment", context, code=74)
    assert "listing environments: the platform can't be reached: " in run.err
    assert "Connection refused" in run.err


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("", "DATAROBOT_ENDPOINT is not set"),
        ("http://app.example.com/api/v2", "over http everybody on the way could read the token"),
        ("http://127.0.0.1.example.com/api/v2", "over http"),
        ("ftp://127.0.0.1/", "no address of an API"),
        ("https://me:pass-canary@app.example.com/", "holds a user name or password"),
        ("https://[bad/", "is no URL"),
        ("app.example.com", "no address of an API"),
    ],
)
def test_endpoints_that_are_refused(
    run: Run, context: str, monkeypatch: pytest.MonkeyPatch, endpoint: str, words: str
) -> None:
    monkeypatch.setenv("DATAROBOT_ENDPOINT", endpoint)
    monkeypatch.setenv("DATAROBOT_API_TOKEN", TOKEN)
    run("environment", context, code=78)
    assert words in run.err
    assert "canary" not in run.err


@pytest.mark.parametrize("token", ["", "  ", "two words", "line\nbreak-canary"])
def test_tokens_that_are_refused(run: Run, context: str, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("DATAROBOT_ENDPOINT", "https://app.example.com/api/v2")
    monkeypatch.setenv("DATAROBOT_API_TOKEN", token)
    run("environment", context, code=78)
    assert "DATAROBOT_API_TOKEN" in run.err
    assert "canary" not in run.err


def test_a_netrc_file_does_not_replace_the_token(
    platform: StandIn, run: Run, context: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    run("environment", context)


def test_the_api_is_found_without_its_path(
    platform: StandIn, run: Run, context: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATAROBOT_ENDPOINT", platform.endpoint.removesuffix(PREFIX.rstrip("/")) + "/")
    run("environment", context)


def test_flags_of_vllm_and_folders_without_a_name(platform: StandIn, run: Run, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", {"custom.py": ""})
    run("model", str(folder), *MODEL, code=78)
    assert "the model has no name" in run.err
    run("model", str(make_folder(tmp_path / "g", {"model-metadata.yaml": MINIMAL_METADATA})), code=78)
    assert "Give --environment NAME" in run.err
    run("deploy", "--model-id", CREDENTIAL, code=78)
    assert "the deployment needs a name" in run.err


def test_ctrl_c_says_that_nothing_is_lost(platform: StandIn, context: str) -> None:
    """The command itself, killed while the platform builds and started again."""
    platform.build_states = ["processing"]
    env = {**os.environ, "PATH": "/usr/bin:/bin"}
    argv = [SCRIPT, "push", "environment", context, *QUICK]
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not platform.sent("GET", ".*/buildLog/"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "interrupted; the platform goes on" in err
    assert "Traceback" not in err
    platform.environment_versions[platform.environments[0]["id"]][0]["_states"] = ["success"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert len(platform.sent("POST", ".*/versions/")) == 1
    assert TOKEN not in err + done.stdout + done.stderr


def test_without_the_sdk_it_says_how_to_get_it(platform: StandIn, context: str, tmp_path: Path) -> None:
    (tmp_path / "trap" / "datarobot").mkdir(parents=True)
    (tmp_path / "trap" / "datarobot" / "__init__.py").write_text("raise ModuleNotFoundError(name='datarobot')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "trap")}
    done = subprocess.run([SCRIPT, "push", "environment", context], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 78
    assert "pip install 'vllm-dropin[datarobot]'" in done.stderr
