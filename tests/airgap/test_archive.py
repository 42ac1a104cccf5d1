"""Bundles on the disk: whole or not at all, and never other bytes than those that were hashed."""

from __future__ import annotations

import fcntl
import hashlib
import tarfile
from pathlib import Path

import pytest

from vllm_dropin.airgap.archive import Entry, write
from vllm_dropin.errors import ConfigurationError, InputOutputError


def entry(name: str, content: bytes | Path) -> Entry:
    data = content.read_bytes() if isinstance(content, Path) else content
    return Entry(name, content, len(data), hashlib.sha256(data).hexdigest())


def silent(done: int, total: int) -> None:
    """Progress that nobody looks at."""


@pytest.fixture(params=["bundle.tar", "bundle"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / request.param


def test_progress_ends_with_all_bytes(tmp_path: Path, output: Path) -> None:
    seen: list[tuple[int, int]] = []
    write([entry("a", b"x" * 100), entry("b/c", b"y" * 50)], output, lambda *state: seen.append(state))
    assert seen[-1] == (150, 150)


@pytest.mark.parametrize("change", [b"short", b"another one", b"longer than before"])
def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path, output: Path, change: bytes) -> None:
    write([entry("old", b"old")], output, silent)
    path = tmp_path / "weights"
    path.write_bytes(b"as it was..")
    entries = [entry("old", b"new"), entry("weights", path)]
    path.write_bytes(change)
    with pytest.raises(InputOutputError, match="weights changed while it was bundled"):
        write(entries, output, silent)
    assert [path.name for path in output.parent.iterdir()] == [output.name], "nothing half-written"
    old = output / "old"
    if output.suffix == ".tar":
        with tarfile.open(output) as archive:
            archive.extractall(tmp_path / "unpacked", filter="data")
        old = tmp_path / "unpacked" / "old"
    assert old.read_bytes() == b"old", "what was there before is still there"


def test_what_a_killed_run_left_is_used_up(tmp_path: Path, output: Path) -> None:
    if output.suffix == ".tar":
        output.with_name("bundle.tar.partial").write_bytes(b"half of it" * 10_000)
    else:
        (output.parent / ".bundle.partial" / "new").mkdir(parents=True)
        (output.parent / ".bundle.partial" / "new" / "half").touch()
    written = write([entry("a", b"x")], output, silent)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    if output.suffix == ".tar":
        assert written.sha256 == hashlib.sha256(output.read_bytes()).hexdigest()
    else:
        assert [path.name for path in output.iterdir()] == ["a"]


def test_two_runs_do_not_write_the_same_output(tmp_path: Path) -> None:
    output = tmp_path / "bundle.tar"
    with (tmp_path / "bundle.tar.partial").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b"half")
        other.flush()
        with pytest.raises(ConfigurationError, match="another run is writing"):
            write([entry("a", b"x")], output, silent)
    assert (tmp_path / "bundle.tar.partial").read_bytes() == b"half"
    assert not output.exists()


def test_a_disk_that_is_too_small_is_seen_before(tmp_path: Path, output: Path) -> None:
    large = Entry("a", tmp_path / "none", 1 << 60, "")
    with pytest.raises(InputOutputError, match=r"needs .* GB, and its disk has"):
        write([large], output, silent)
    assert list(output.parent.iterdir()) == []
