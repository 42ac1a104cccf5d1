"""A full disk, wherever serve writes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Serve


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A small tmpfs without a free byte."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no mounting here")
    with pytest.raises(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("option", ["--runtime-dir", "--state-dir"])
def test_a_full_disk_is_told_at_the_start(full_disk: Path, serve: Serve, option: str) -> None:
    service = serve(option, str(full_disk), custom="def load_model(code_dir):\n    return None\n")
    assert service.exit_code(10) == 74, service.output()
    log = service.output()
    assert str(full_disk) in log
    assert option in log
    assert "Traceback" not in log
    assert not list(full_disk.glob("vllm-dropin-*"))
    assert service.engine and service.engine.record
    assert not (service.engine.record / "launch.json").exists()
