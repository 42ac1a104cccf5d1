"""Fetching wheels: real pip, a folder or a dead port in place of the index."""

import hashlib
import subprocess
import sys
import tarfile
import venv
from dataclasses import replace

import pytest

from tests.environment.builds import build, lock_of, tiny_wheel
from vllm_dropin.environment.image import choose
from vllm_dropin.environment.locks import Target, read
from vllm_dropin.environment.wheelhouse import fetch
from vllm_dropin.errors import ConfigurationError, InputOutputError

PYTHON = Target("3.12")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The folder that pip takes wheels from, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "wheels"
    folder.mkdir()
    return folder


def test_wheels_of_the_target_are_taken_not_of_this_python(index, target):
    pure = tiny_wheel(index, "pure", "1.0")
    native = tiny_wheel(index, "native", "2.0", "cp312-cp312-manylinux_2_28_x86_64")
    tiny_wheel(index, "native", "2.0", "cp311-cp311-manylinux_2_28_x86_64")
    fetch(lock_of(pure, native), PYTHON, target)
    assert {path.name for path in target.iterdir()} == {pure.name, native.name}


def test_a_missing_wheel_names_package_and_python(index, target):
    wheel = tiny_wheel(index, "native", "2.0", "cp311-cp311-manylinux_2_28_x86_64")
    with pytest.raises(
        ConfigurationError, match=r"no wheel of native==2\.0 \(requirements/product\.lock\) for Python 3\.12"
    ):
        fetch(lock_of(wheel), PYTHON, target)


def test_a_missing_torch_tells_where_it_is(index, target):
    wheel = tiny_wheel(index, "torch", "2.0")
    lock = lock_of(wheel)
    wheel.unlink()
    with pytest.raises(ConfigurationError) as error:
        fetch(lock, PYTHON, target)
    assert "PIP_EXTRA_INDEX_URL" in error.value.remedy


def test_another_file_under_the_same_version_is_refused(index, target):
    wheel = tiny_wheel(index, "pure", "1.0")
    lock = lock_of(wheel)
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(ConfigurationError, match="does not have a hash of"):
        fetch(lock, PYTHON, target)
    assert list(target.iterdir()) == []


def test_an_index_that_does_not_answer_is_no_missing_wheel(index, target, monkeypatch):
    wheel = tiny_wheel(index, "pure", "1.0")
    lock = lock_of(wheel)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    for name, value in {
        "INDEX_URL": "http://someone:secret@127.0.0.1:9/simple",
        "RETRIES": "1",
        "TIMEOUT": "1",
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(InputOutputError, match="index does not answer") as error:
        fetch(lock, PYTHON, target)
    assert "secret" not in str(error.value)


def test_a_failed_build_leaves_nothing(index, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    done = build("--wheelhouse", cwd=folder)
    assert done.returncode == 78
    assert "pip finds no wheel of" in done.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_an_image_needs_no_index(tmp_path):
    """What the Dockerfile does with a wheelhouse, done with this Python: two environments, and the same wheel again."""
    python = "{}.{}".format(*sys.version_info)
    done = build("--wheelhouse", "--python", python, "-o", "context.tar", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "context.tar") as archive:
        archive.extractall(tmp_path / "context", filter="data")
    context = tmp_path / "context"
    image = replace(choose("gpu"), python=python)
    allowed = {digest for lock in image.locks for pin in lock.pins for digest in pin.hashes}
    wheels = list((context / "wheels").iterdir())
    assert {hashlib.sha256(path.read_bytes()).hexdigest() for path in wheels} <= allowed
    for place, locks in {"product": ("product", "vllm-dropin"), "hooks": ("hooks",)}.items():
        home = tmp_path / place
        venv.create(home, with_pip=True)
        names = [word for lock in locks for word in ("-r", f"requirements/{lock}.lock")]
        install = [home / "bin/pip", "install", "-qq", "--no-index", "--find-links", "wheels", "--no-deps", *names]
        subprocess.run([*install, "--require-hashes"], cwd=context, check=True, timeout=300)
        subprocess.run([home / "bin/pip", "check"], check=True, timeout=60)
    subprocess.run([tmp_path / "hooks/bin/python", context / "image_check.py", "hooks", "/nowhere"], check=True)
    again = [tmp_path / "product/bin/vllm-dropin", "build", "--python", python, "-o", "again"]
    subprocess.run(again, cwd=tmp_path, check=True, timeout=60, capture_output=True)
    wheel = next(context.glob("*.whl")).name
    assert (tmp_path / "again" / wheel).read_bytes() == (context / wheel).read_bytes()
    assert (tmp_path / "again/requirements/product.lock").read_text() == read("product").text
