"""The Dockerfile: linted, and what a platform relies on."""

import json
import re
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.certificates import make_certificate
from tests.environment.builds import ROOT
from vllm_dropin.environment import dockerfile
from vllm_dropin.environment.image import choose

HADOLINT = Path(sys.executable).parent / "hadolint"
CHECK = ROOT / "src/vllm_dropin/environment/files/image_check.py"


@pytest.mark.parametrize("variant", ["gpu", "cpu"])
@pytest.mark.parametrize("wheelhouse", [False, True])
def test_hadolint_finds_nothing(variant, wheelhouse, tmp_path):
    file = tmp_path / "Dockerfile"
    file.write_text(dockerfile.render(choose(variant), wheelhouse))
    done = subprocess.run([HADOLINT, file], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("variant", ["gpu", "cpu"])
def test_user_port_paths_and_probe(variant):
    final = dockerfile.render(choose(variant), wheelhouse=False).rpartition("FROM base\n")[2]
    assert "\nUSER 1000:0\n" in final
    assert "\nEXPOSE 8080\n" in final
    for line in ('CODE_DIR="/opt/code"', 'DO_NOT_TRACK="1"', 'VLLM_DROPIN_HOOK_PATH="/opt/hooks/site-packages"'):
        assert line in final
    assert "curl" not in final
    assert 'ENTRYPOINT ["/opt/vllm-dropin/start_server.sh"]' in final
    assert "chmod -R g=u /opt/code /data" in final


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("status", [200, 500])
def test_the_probe_asks_as_the_service_listens(tls, status, tmp_path):
    asked = []

    class Livez(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *words):
            pass

    server = HTTPServer(("127.0.0.1", 0), Livez)
    environ = {}
    if tls:
        made = make_certificate(tmp_path, "outside")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(made.cert, made.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        environ["VLLM_DROPIN_TLS_CERT"] = str(made.cert)
    threading.Thread(target=server.handle_request).start()
    text = dockerfile.render(choose("gpu"), wheelhouse=False)
    _, option, code = json.loads(re.search(r"HEALTHCHECK .*\\\n +CMD (.*)", text)[1])
    code = code.replace("8080", str(server.server_port))
    done = subprocess.run([sys.executable, option, code], env=environ, timeout=20)
    server.server_close()
    assert (done.returncode, asked) == (int(status != 200), ["/livez"])


@pytest.mark.parametrize("variant", ["gpu", "cpu"])
def test_every_install_checks_hashes(variant):
    for wheelhouse in (False, True):
        text = dockerfile.render(choose(variant), wheelhouse)
        installs = re.findall(r"pip install (.*)", text)
        assert len(installs) == (3 if variant == "cpu" else 2)
        assert all("--require-hashes" in line and "--only-binary=:all:" in line for line in installs)
        assert ("PIP_NO_INDEX=1" in text) == wheelhouse
        assert ("://" in text) == (variant == "cpu" and not wheelhouse)  # torch's index, asked when there is no wheel


def check(*arguments, code=None):
    done = subprocess.run([sys.executable, CHECK, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if code is None else code), done.stderr
    return done.stdout + done.stderr


def test_the_base_is_checked_while_the_image_is_built():
    python = "{}.{}".format(*sys.version_info)
    assert check("base", python)
    assert check("base", python, "packaging", "26.3")
    assert "build it with --python" in check("base", "3.9", code=1)
    assert "has no vllm-of-nobody" in check("base", python, "vllm-of-nobody", "1", code=1)
    assert "made for 0.33.0: use --vllm" in check("base", python, "packaging", "0.33.0", code=1)


def test_what_a_hook_can_not_import_is_named(tmp_path):
    (tmp_path / "azure").mkdir()
    (tmp_path / "azure" / "storage.py").touch()
    assert "a hook can't import" in check("hooks", str(tmp_path), code=1)
