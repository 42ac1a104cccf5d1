"""Our wheel is the same wherever it is made, and says what a released one says."""

import email
import subprocess
import sys
import zipfile
from io import BytesIO

import pytest
from packaging.requirements import Requirement

from tests.environment.builds import ROOT
from vllm_dropin import __version__
from vllm_dropin.environment import wheel

MAKE = "import sys; from vllm_dropin.environment import wheel; sys.stdout.buffer.write(wheel.build().data)"


@pytest.fixture(scope="module")
def ours():
    return wheel.build()


def contents(data):
    with zipfile.ZipFile(BytesIO(data)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def test_two_builds_are_the_same(ours):
    assert wheel.build() == ours
    assert ours.name == f"vllm_dropin-{__version__}-py3-none-any.whl"


def test_an_installed_package_makes_the_same_wheel(ours, tmp_path):
    file = tmp_path / ours.name
    file.write_bytes(ours.data)
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-index", "--no-deps", "--target", str(site), str(file)]
    subprocess.run(pip, check=True, timeout=60)
    again = subprocess.run(
        [sys.executable, "-P", "-c", MAKE], env={"PYTHONPATH": str(site)}, cwd=tmp_path, capture_output=True, timeout=60
    )
    assert again.stderr == b""
    assert again.stdout == ours.data


def test_it_has_what_hatchling_would_pack(ours, tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    theirs = contents(next(tmp_path.glob("*.whl")).read_bytes())
    mine = contents(ours.data)
    about = f"vllm_dropin-{__version__}.dist-info/"
    assert mine.keys() == theirs.keys()
    for name in mine.keys() - {f"{about}METADATA", f"{about}WHEEL", f"{about}entry_points.txt"}:
        assert mine[name] == theirs[name], name
    assert mine[f"{about}entry_points.txt"].split() == theirs[f"{about}entry_points.txt"].split()
    said, wanted = (email.message_from_bytes(files[f"{about}METADATA"]) for files in (mine, theirs))
    for field in ("Name", "Version", "Requires-Python", "License-Expression", "License-File", "Summary"):
        assert said[field] == wanted[field]
    for field in ("Classifier", "Provides-Extra"):
        assert sorted(said.get_all(field)) == sorted(wanted.get_all(field))
    requirements = [{Requirement(line) for line in message.get_all("Requires-Dist")} for message in (said, wanted)]
    assert requirements[0] == requirements[1]
