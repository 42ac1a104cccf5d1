"""The locks that are shipped."""

import pytest

from vllm_dropin.environment.locks import SHIPPED, Target, read


@pytest.mark.parametrize("name", SHIPPED)
def test_each_package_has_hashes(name):
    pins = read(name).pins
    assert len(pins) == read(name).text.count("==") - sum((pin.marker or "").count("==") for pin in pins)
    assert all(pin.hashes for pin in pins)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_one_version_of_each_package_for_a_python(name, python):
    names = [pin.name for pin in read(name).for_target(Target(python))]
    assert len(names) == len(set(names))
    assert not {"colorama", "pywin32"} & set(names)


def test_markers_are_those_of_the_target():
    of_cpu = {python: {pin.name for pin in read("cpu").for_target(Target(python))} for python in ("3.11", "3.12")}
    assert "torch" in of_cpu["3.11"]
    assert "torch" not in of_cpu["3.12"]  # no hash is known: docs/dependencies.md


def test_the_clients_of_hooks_are_locked():
    clients = {"azure-storage-blob", "boto3", "google-cloud-storage", "huggingface-hub", "pandas", "requests"}
    assert clients <= {pin.name for pin in read("hooks").pins}
