"""No secret leaves: canaries come in by every door, a careless hook and engine print them, and then all is searched."""

from __future__ import annotations

import base64
import gzip
import http.client
import http.server
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest

pytest.importorskip("httpx2", reason="the drivers of the contract suite need it: make test")

from tests.conftest import Stage
from tests.contract.drivers import Engine, Ours, Service, envelopes, free_port, start
from tests.contract.folders import make_folder
from tests.fuzz import leaky
from tests.serving import serving

BESIDE = str(Path(leaky.__file__).parent)

# By door: each with characters that URLs, base64 and JSON spell differently.
HUB, BUCKET, EXTRA, FILE_VALUE, KEY_FILE, KEY_VARIABLE, PLATFORM, MADE, UPSTREAM = (
    f"cnry{name}/+{name * 3}7=q%" for name in ("hub", "bkt", "ext", "fil", "kef", "kva", "plt", "mad", "ups")
)
PRIVATE = "-----BEGIN PRIVATE KEY-----\ncnryprivateMIIEvQIBADANBgkqhkiG9w0BAQEF\n-----END PRIVATE KEY-----\n"
PRIVATE_LINE = PRIVATE.splitlines()[1]
GIVEN = (HUB, BUCKET, EXTRA, FILE_VALUE, KEY_FILE, KEY_VARIABLE, PLATFORM, PRIVATE_LINE)

HOOK = f"""
import os, sys
sys.path.append({BESIDE!r})
import leaky

def load_model(code_dir):
    with open(os.environ["SEEN"], "w") as file:
        file.write("\\0".join(f"{{name}}={{value}}" for name, value in os.environ.items()))
    leaky.leak()
    if "HOOK_FAILS" in os.environ:
        raise leaky.Trouble
    os.environ["AWS_SESSION_TOKEN"] = {MADE!r}
"""
ENGINE = f"""
import os, pathlib, runpy, sys
sys.path.append({BESIDE!r})
import leaky
leaky.leak()
if {{dies}}:
    raise leaky.Trouble
runpy.run_path(str(pathlib.Path(__file__).with_name("stub.py")), run_name="__main__")
"""


def spelled(secret: str) -> set[str]:
    """The spellings in which a secret must not be found; of base64 what it is wherever the secret stands in a text."""
    data = secret.encode()
    found = {secret, quote(secret), quote(secret, safe=""), quote_plus(secret), json.dumps(secret)[1:-1]}
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + data).decode()
        whole = encoded[-(-shift * 4 // 3) : len(data) * 4 // 3 - 3]
        found |= {whole, whole.replace("+", "-").replace("/", "_")}
    return found


def leaked(text: str | bytes, *allowed: str) -> list[str]:
    """The canaries in a text, in any spelling, and halves of them."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    secrets = [secret for secret in (*GIVEN, MADE, UPSTREAM) if secret not in allowed]
    return [form for secret in secrets for form in (*spelled(secret), secret[:9], secret[-9:]) if form in text]


def test_the_search_finds_what_a_careless_program_prints() -> None:
    """Else nothing that follows would say anything."""
    for secret in GIVEN:
        for form in leaky.forms(secret):
            assert leaked(f"before{form}behind"), form
    assert leaked("nothing here, cnr y") == []


class Events(http.server.ThreadingHTTPServer):
    """The platform's side of the status events."""

    def __init__(self) -> None:
        self.bodies: list[str] = []
        self.tokens: set[str | None] = set()
        kept = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                kept.tokens.add(self.headers["Authorization"])
                kept.bodies.append(self.path + self.rfile.read(int(self.headers["Content-Length"])).decode())
                self.send_response(202)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Silence."""

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def titles(self) -> list[str]:
        return [json.loads(body[body.index("{") :])["title"] for body in self.bodies]


@pytest.fixture
def events() -> Iterator[Events]:
    with serving(Events()) as server:
        yield server


class OursWithSecrets(Ours):
    """`vllm-dropin serve` with keys and values from files."""

    def command(self, folder: Path, engine: Engine, port: int, scratch: Path) -> list[str]:
        files = ["--api-key-file", str(scratch / "keys"), "--runtime-params-file", str(scratch / "values.yaml")]
        more = ["--logging-level", "debug", "--param", "max_watchdog_restarts=1"]
        return [*super().command(folder, engine, port, scratch), *files, *more]


class Scene:
    """A service that got every canary, with a hook and an engine that tell everybody."""

    def __init__(self, scratch: Path, events: Events, dies: bool = False, **environ: str) -> None:
        self.scratch, self.events = scratch, events
        self.runtime: list[Path] = []
        """The folder of this run, once it is known: its path is short, so it is not below ours."""
        scratch.mkdir()
        leaks, self.seen = scratch / "leaks.json", scratch / "seen"
        leaks.write_text(json.dumps([*GIVEN, PRIVATE]))
        (scratch / "keys").write_text(KEY_FILE + "\n")
        (scratch / "values.yaml").write_text(f"mine: {{password: {json.dumps(FILE_VALUE)}}}\n")
        for name in ("keys", "values.yaml"):
            (scratch / name).chmod(0o600)
        metadata = "runtimeParameterDefinitions:\n" + "".join(
            f"  - {{fieldName: {name}, type: credential}}\n" for name in ("HuggingFaceToken", "bucket", "mine")
        )
        engine = Engine.stub(scratch / "engine")
        server = next((scratch / "engine").rglob("api_server.py"))
        server.rename(server.with_name("stub.py"))
        server.write_text(ENGINE.format(dies=dies))
        bucket = {"awsAccessKeyId": "me", "awsSecretAccessKey": BUCKET, "gcpKey": {"private_key": PRIVATE}}
        given = envelopes(
            {
                "HuggingFaceToken": ("credential", {"credentialType": "api_token", "apiToken": HUB}),
                "bucket": ("credential", bucket),
                "undefined": ("credential", {"user": "u", "password": EXTRA}),
            }
        )
        more = {
            "DATAROBOT_ENDPOINT": f"http://127.0.0.1:{events.server_port}/api/v2",
            "DATAROBOT_API_TOKEN": PLATFORM,
            "MLOPS_DEPLOYMENT_ID": "d",
            "VLLM_DROPIN_API_KEYS": KEY_VARIABLE,
            "bucket_AWS_SECRET_ACCESS_KEY": BUCKET,
            "LEAKS": str(leaks),
            "SEEN": str(self.seen),
        }
        folder = make_folder(scratch / "model", custom=HOOK, metadata=metadata)
        self.service = start(OursWithSecrets(), folder, engine, scratch, {**given, **more, **environ})

    def get(self, path: str, key: str | None) -> bytes:
        connection = http.client.HTTPConnection(self.service.url.removeprefix("http://"), timeout=10)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
            return connection.getresponse().read()
        finally:
            connection.close()

    def wait_ready(self, restarts: int) -> None:
        def ready() -> bool:
            try:
                told = json.loads(self.get("/status", KEY_FILE))
            except (OSError, ValueError):
                return False
            return bool(told["phase"] == "ready" and told["engine"]["restarts"] == restarts)

        self.service.wait_for(ready, 30, "not ready")

    def search(self) -> None:
        """Look at the log, the events and the files."""
        assert "***" in self.service.output()
        assert leaked(self.service.output()) == []
        assert self.events.bodies
        assert leaked(json.dumps(self.events.bodies)) == []
        assert self.events.tokens == {f"Bearer {PLATFORM}"}
        assert self.written() == set()

    def written(self) -> set[str]:
        """The files in the folders of state and of this run that have a secret in them. Each is for its owner only."""
        found = [path for folder in (self.scratch / "state", *self.runtime) for path in files_below(folder)]
        with_secrets = [path for path in found if leaked(path.read_bytes())]
        assert [path for path in with_secrets if path.stat().st_mode & 0o077] == []
        return {path.name for path in with_secrets}


def files_below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def of_process(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_bytes().decode("utf-8", "replace")


@pytest.fixture
def scene(tmp_path: Path, events: Events) -> Iterator[Any]:
    started: list[Scene] = []

    def begin(dies: bool = False, **environ: str) -> Scene:
        started.append(Scene(tmp_path / "scene", events, dies, **environ))
        return started[-1]

    yield begin
    for one in started:
        one.service.stop()


def test_a_service_keeps_its_secrets_whatever_its_hook_and_engine_say(scene: Any, events: Events) -> None:
    shown: Scene = scene()
    service: Service = shown.service
    shown.wait_ready(restarts=0)
    launch = service.launch()
    shown.runtime = [Path(launch.values("--uds")[0]).parent]
    assert launch.environ["HF_TOKEN"] == HUB
    assert launch.environ["AWS_SESSION_TOKEN"] == MADE
    assert leaked(shown.seen.read_text(), HUB, BUCKET, EXTRA, FILE_VALUE, PRIVATE_LINE) == []  # the hook's environment

    assert service.process is not None
    children = set(service.processes()) - {service.process.pid}
    assert len(children) >= 3  # gateway, guardian, engine
    for pid in (*children, service.process.pid):
        assert leaked(of_process(pid, "cmdline")) == []
    for pid in children:
        # The engine, and its guardian, have the hub's token and what the hook set; the gateway has none.
        command = of_process(pid, "cmdline")
        allowed = () if "gateway.worker" in command else (HUB, MADE)
        assert leaked(of_process(pid, "environ"), *allowed) == [], command
    assert shown.written() == {"gateway.json"}  # the keys that the workers check

    os.kill(launch.pid, signal.SIGKILL)
    shown.wait_ready(restarts=1)
    for path in ("/status", "/info", "/metrics", "/stats", "/version", "/capabilities", "/openapi.json", "/v1/models"):
        for key in (KEY_FILE, KEY_VARIABLE, "wrong", None):
            assert leaked(shown.get(path, key)) == [], (path, key)
    service.process.send_signal(signal.SIGTERM)
    assert service.exit_code(15) == 0
    assert "Engine restarted" in events.titles
    shown.search()


def test_a_crash_leaves_no_memory_in_a_file(scene: Any) -> None:
    """Keys are in the memory of every process of ours, and core files are on by default on many machines."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard == 0:
        pytest.skip("this machine allows no core files")
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        shown: Scene = scene()
        shown.wait_ready(restarts=0)
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    service = shown.service
    for pid in service.processes():
        limit = next(line for line in of_process(pid, "limits").splitlines() if line.startswith("Max core file size"))
        assert limit.split()[4] == "0", of_process(pid, "cmdline")
    worker = next(pid for pid in service.processes() if "gateway.worker" in of_process(pid, "cmdline"))
    for pid in (worker, service.launch().pid):
        assert Path(f"/proc/{pid}/cwd").resolve().is_relative_to(shown.scratch)  # a core file goes there by default
        os.kill(pid, signal.SIGSEGV)
    shown.wait_ready(restarts=1)
    assert [path for path in files_below(shown.scratch) if path.name.startswith("core")] == []


@pytest.mark.parametrize(("how", "code"), [("hook", 78), ("engine", 70)])
def test_a_service_that_dies_keeps_its_secrets(scene: Any, events: Events, how: str, code: int) -> None:
    shown: Scene = scene(dies=how == "engine", **({"HOOK_FAILS": "1"} if how == "hook" else {}))
    assert shown.service.exit_code(40) == code, shown.service.output()[-2000:]
    assert "Deployment failed" in events.titles
    assert "can't go on: ***" in shown.service.output()
    shown.search()


def test_the_key_of_an_upstream_stays_here(tmp_path: Path, stage: Stage) -> None:
    (tmp_path / "key").write_text(UPSTREAM)
    (tmp_path / "key").chmod(0o600)
    upstream = stage.engine(port=free_port())

    class BeforeUpstream(Ours):
        def command(self, folder: Path, engine: Engine, port: int, scratch: Path) -> list[str]:
            address = ["--address", f"127.0.0.1:{port}", "--state-dir", str(scratch / "state")]
            flags = ["--upstream", f"http://127.0.0.1:{upstream.port}", "--upstream-key-file", str(scratch / "key")]
            return [str(Path(sys.executable).with_name("vllm-dropin")), "serve", str(folder), *address, *flags]

    service = start(BeforeUpstream(), make_folder(tmp_path / "model"), Engine(Path(sys.executable)), tmp_path)
    try:
        service.wait_ready(20)
        with service.client() as client:
            client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "status=500 x"}]})
            for path in ("/status", "/info", "/metrics"):
                assert leaked(client.get(path).content) == [], path
        assert upstream.last()["headers"]["authorization"] == f"Bearer {UPSTREAM}"
        for pid in service.processes():
            assert leaked(of_process(pid, "cmdline") + of_process(pid, "environ")) == []
    finally:
        service.stop()
    assert leaked(service.output()) == []


def run(*words: str | Path, environ: Mapping[str, str]) -> subprocess.CompletedProcess[bytes]:
    command = [str(Path(sys.executable).with_name("vllm-dropin")), *map(str, words)]
    return subprocess.run(command, env={**os.environ, **environ}, capture_output=True, timeout=60)


def unpacked(archive: Path) -> Iterable[tuple[str, bytes]]:
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            data = file.read() if file else b""
            yield member.name, gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def test_no_archive_and_no_report_has_a_secret(tmp_path: Path) -> None:
    metadata = "runtimeParameterDefinitions:\n  - {fieldName: HuggingFaceToken, type: credential}\n"
    folder = make_folder(tmp_path / "model", metadata=metadata)
    environ = {
        **envelopes({"HuggingFaceToken": ("credential", {"apiToken": HUB})}),
        "HF_TOKEN": HUB,
        "DATAROBOT_ENDPOINT": "http://127.0.0.1:9/api/v2",  # nobody listens there
        "DATAROBOT_API_TOKEN": PLATFORM,
        "VLLM_DROPIN_API_KEYS": KEY_VARIABLE,
        "VLLM_DROPIN_STATE_DIR": str(tmp_path / "state"),
    }
    engine = Engine.stub(tmp_path / "engine")
    build = run("build", "-o", tmp_path / "context.tar.gz", environ=environ)
    bundle = run("bundle", folder, "-o", tmp_path / "model.tar", "--engine-python", engine.python, environ=environ)
    check = run("check", folder, "--json", "--engine-python", engine.python, environ=environ)
    push = run("push", "model", folder, "--dry-run", "--environment", "e", environ=environ)
    assert [done.returncode for done in (build, bundle, check)] == [0, 0, 0], (build, bundle, check)
    for done in (build, bundle, check, push):
        assert leaked(done.stdout + done.stderr) == [], done.args
    for archive in (tmp_path / "context.tar.gz", tmp_path / "model.tar"):
        members = list(unpacked(archive))
        assert len(members) > 2
        assert [name for name, data in members if leaked(data) or leaked(name)] == []
    assert [path for path in files_below(tmp_path / "state") if leaked(path.read_bytes())] == []
