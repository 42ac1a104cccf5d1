"""scripts/audit.py: what it reads of the lock files, and its exit codes in front of a database of our own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from scripts import audit

from tests.contract.drivers import free_port
from tests.serving import serving

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
AUDITOR = ROOT / ".venv-audit" / "bin" / "python"
HASH = " \\\n    --hash=sha256:" + "0" * 64 + "\n"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_package_of_a_lock_is_asked_about(lock: Path) -> None:
    lines = lock.read_text().replace("\\\n", " ").splitlines()
    required = [Requirement(line.partition(" --hash")[0]) for line in lines if line and not line.startswith("#")]
    expected = {(canonicalize_name(one.name), str(one.specifier)[2:].partition("+")[0]) for one in required}
    found = audit.pins([lock])
    assert set(found) == expected
    assert set(map(tuple, found.values())) == {(lock.name,)}


def test_a_package_at_two_versions_is_asked_about_in_two_rounds(tmp_path: Path) -> None:
    locks = written(tmp_path, one=["Two_Words==1.0", "b==2"], other=["two-words==1.1+cpu", "b==2"])
    assert audit.pins(locks) == {("two-words", "1.0"): ["one.lock"], ("b", "2"): ["one.lock", "other.lock"],
                                 ("two-words", "1.1"): ["other.lock"]}  # fmt: skip
    assert audit.rounds(list(audit.pins(locks))) == [{"two-words": "1.0", "b": "2"}, {"two-words": "1.1"}]


class Database(ThreadingHTTPServer):
    """OSV's query interface, with one flaw on record; 500 for the versions in `broken`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Query)
        self.asked: list[tuple[str, str]] = []
        self.flawed = ("bad-one", "1.0")
        self.broken: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/query"


class _Query(BaseHTTPRequestHandler):
    server: Database

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        package, version = query["package"]["name"], query["version"]
        self.server.asked.append((package, version))
        affected = {
            "package": {"name": package, "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.1"}]}],
        }
        flaw = {"id": "PYSEC-2026-1", "summary": "It is bad.", "affected": [affected]}
        body = json.dumps({"vulns": [flaw]} if (package, version) == self.server.flawed else {}).encode()
        self.send_response(500 if version in self.server.broken else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def database() -> Iterator[Database]:
    with serving(Database()) as server:
        yield server


def written(folder: Path, **locks: list[str]) -> list[Path]:
    for name, lines in locks.items():
        (folder / f"{name}.lock").write_text("".join(line + HASH for line in lines))
    return [folder / f"{name}.lock" for name in locks]


def run(python: str | Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [str(python), str(ROOT / "scripts" / "audit.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


needs_auditor = pytest.mark.skipif(not AUDITOR.exists(), reason="pip-audit is in .venv-audit: make audit")


@needs_auditor
def test_nothing_known_about_any_of_them_is_0(database: Database, tmp_path: Path) -> None:
    locks = written(tmp_path, one=["good==1.0", "bad-one==1.1"], other=["good==1.0+cpu"])
    done = run(AUDITOR, "--osv-url", database.url, *locks)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "audit: 2 of 2 packages of 2 lock files asked about, 0 vulnerable\n"
    assert sorted(database.asked) == [("bad-one", "1.1"), ("good", "1.0")]


@needs_auditor
def test_a_known_vulnerability_is_1_though_others_could_not_be_asked_about(database: Database, tmp_path: Path) -> None:
    """The second round, with the other version of a package, gets no answer."""
    database.broken = {"9.9"}
    locks = written(tmp_path, one=["Bad.One==1.0", "good==1.0"], other=["good==9.9"])
    done = run(AUDITOR, "--osv-url", database.url, *locks)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "bad-one 1.0: PYSEC-2026-1 (fixed in 1.1); in one.lock",
        "audit: 2 of 3 packages of 2 lock files asked about, 1 vulnerable",
    ]
    assert "nobody could be asked about good 9.9" in done.stderr
    assert "NOT AUDITED" not in done.stderr
    database.flawed = ("nothing", "")
    assert run(AUDITOR, "--osv-url", database.url, *locks).returncode == 3


@pytest.mark.parametrize(
    "python", [sys.executable, pytest.param(AUDITOR, marks=needs_auditor)], ids=["no pip-audit", "no database"]
)
def test_nobody_to_ask_is_3_and_said_aloud(tmp_path: Path, python: str | Path) -> None:
    done = run(python, "--osv-url", f"http://127.0.0.1:{free_port()}/", *written(tmp_path, one=["good==1.0"]))
    assert done.returncode == 3
    assert done.stdout == "audit: 0 of 1 packages of 1 lock files asked about, 0 vulnerable\n"
    assert "audit: osv does not answer" in done.stderr or "does not answer: " in done.stderr
    assert "NOT AUDITED" in done.stderr
