"""SIGHUP to the service: keys and certificate are read again. Real processes; an upstream that is not there will do."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.certificates import Certificate, make_certificate, served_name
from tests.conftest import wait_until
from tests.contract.drivers import free_port


class Serving:
    """`vllm-dropin serve` in front of nothing, with the certificate and the keys of a test."""

    def __init__(
        self,
        folder: Path,
        *flags: str,
        environ: dict[str, str] | None = None,
        before: Iterable[str] = (),
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        self.port = free_port()
        self.trust: ssl.SSLContext | None = None
        self._log = folder / "log"
        (folder / "model").mkdir()
        script = Path(sys.executable).with_name("vllm-dropin")
        argv = [str(script), "serve", str(folder / "model"), "--address", f"127.0.0.1:{self.port}"]
        argv += ["--upstream", "http://127.0.0.1:9", "--runtime-dir", str(folder / "run"), *flags]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*before, *argv], env={**os.environ, **(environ or {})}, stdin=stdin, stdout=log, stderr=log
            )

    def status(self, path: str = "/status", key: str | None = None) -> int | None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        if self.trust is not None:
            connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=5, context=self.trust)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
            return connection.getresponse().status
        except OSError:
            return None
        finally:
            connection.close()

    def hang_up(self, words: str) -> None:
        """SIGHUP, until the log has these words once more."""
        before = self.output().count(words)
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.output().count(words) > before, 10)

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(15)


@pytest.fixture
def pair(tmp_path: Path) -> Certificate:
    """The files that the service is given."""
    return make_certificate(tmp_path / "tls", "first")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("key-one\n")
    file.chmod(0o600)
    return file


@pytest.fixture
def serving(tmp_path: Path, pair: Certificate, keys: Path) -> Iterator[Serving]:
    flags = ("--tls-cert", str(pair.cert), "--tls-key", str(pair.key), "--api-key-file", str(keys))
    service = Serving(tmp_path, *flags, environ={"VLLM_DROPIN_API_KEYS": "key-env"})
    service.trust = pair.trust
    yield service
    service.stop()


def test_keys_and_certificate_are_rotated(serving: Serving, tmp_path: Path, pair: Certificate, keys: Path) -> None:
    wait_until(lambda: serving.status("/livez") == 200, 10)
    assert f"listening on https://127.0.0.1:{serving.port}" in serving.output()
    assert [serving.status(key=key) for key in ("key-one", "key-env", "key-two")] == [200, 200, 401]
    second = make_certificate(tmp_path / "tls", "second")

    keys.write_text("bad key\n")
    pair.cert.write_text(second.cert.read_text())
    serving.hang_up("keys and certificate stay as they were")
    assert "line 1: a key with spaces" in serving.output()
    keys.write_text("key-two\n")
    serving.hang_up("keys and certificate stay as they were")
    assert "is not the private key of" in serving.output()
    assert (serving.status(key="key-one"), served_name(serving.port)) == (200, "first")

    pair.key.write_text(second.key.read_text())
    serving.hang_up("2 key(s) and the certificate read again")
    serving.trust = second.trust
    time.sleep(1.2)  # for a second the listener with the old certificate still takes connections
    assert serving.status(key="key-two") == 200
    assert [serving.status(key=key) for key in ("key-one", "key-env")] == [401, 200]
    assert served_name(serving.port) == "second"

    large = make_certificate(tmp_path / "tls", "large", "secp521r1")
    pair.key.write_text(large.key.read_text())
    pair.cert.write_text(large.cert.read_text())
    serving.hang_up("is of a kind that can't be served")
    assert (serving.status(key="key-two"), served_name(serving.port)) == (200, "second")

    private = list((tmp_path / "run").rglob("*.pem"))
    assert [path.stat().st_mode & 0o777 for path in private] == [0o600]
    assert private[0].read_text().startswith(second.key.read_text())
    serving.stop()
    assert serving.process.returncode == 0
    assert not list((tmp_path / "run").rglob("*"))
    for secret in ("key-one", "key-two", "key-env", "PRIVATE"):
        assert secret not in serving.output()


def test_a_worker_that_starts_later_has_what_was_renewed(serving: Serving, keys: Path) -> None:
    wait_until(lambda: serving.status("/livez") == 200, 10)
    keys.write_text("key-two\n")
    serving.hang_up("read again")
    children = Path(f"/proc/{serving.process.pid}/task/{serving.process.pid}/children")
    worker = int(children.read_text().split()[0])
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: str(worker) not in children.read_text().split() and serving.status("/livez") == 200, 10)
    assert (serving.status(key="key-one"), serving.status(key="key-two")) == (401, 200)


def test_signals_while_the_workers_start_do_no_harm(tmp_path: Path, keys: Path) -> None:
    """They have no handler yet, and five ends in a row would end the service."""
    service = Serving(tmp_path, "--api-key-file", str(keys), "--workers", "2")
    try:
        wait_until(lambda: "listening on" in service.output(), 10)
        keys.write_text("key-two\n")
        for _ in range(30):
            service.process.send_signal(signal.SIGHUP)
            time.sleep(0.02)
        wait_until(lambda: {service.status(key="key-two") for _ in range(6)} == {200}, 10)
        assert {service.status(key="key-one") for _ in range(6)} == {401}
        assert "starting it again" not in service.output()
    finally:
        service.stop()
    assert service.process.returncode == 0


def test_a_key_that_cannot_be_served_ends_the_start(tmp_path: Path) -> None:
    large = make_certificate(tmp_path / "tls", "large", "secp521r1")
    service = Serving(tmp_path, "--tls-cert", str(large.cert), "--tls-key", str(large.key))
    try:
        assert service.process.wait(20) == 78
    finally:
        service.stop()
    assert f"{large.key} is of a kind that can't be served" in service.output()
    assert "P-256" in service.output()


@pytest.mark.skipif(shutil.which("setsid") is None, reason="needs setsid")
@pytest.mark.parametrize("how", [[], ["nohup"]])
def test_a_terminal_that_is_gone_takes_the_service_along(tmp_path: Path, how: list[str]) -> None:
    """Unless nohup had it stay. While the terminal is there SIGHUP means what it always means."""
    (tmp_path / "keys").write_text("key-one\n")
    master, terminal = os.openpty()
    service = Serving(
        tmp_path, "--api-key-file", str(tmp_path / "keys"), before=["setsid", "--ctty", *how], stdin=terminal
    )
    os.close(terminal)
    again = "1 key(s) read again"
    try:
        wait_until(lambda: service.status("/livez") == 200, 10)
        service.hang_up(again)
        os.close(master)  # the kernel sends SIGHUP to the session's leader
        if how:
            wait_until(lambda: service.output().count(again) == 2, 5)
            service.process.terminate()
        assert service.process.wait(10) == 0
    finally:
        service.stop()
