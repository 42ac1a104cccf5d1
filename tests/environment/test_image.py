"""Which image is asked for, and that everything made from it says the same."""

import json
import re

import pytest

from vllm_dropin.environment import dockerfile
from vllm_dropin.environment.image import LABEL_LIMIT, Base, choose, supported
from vllm_dropin.errors import ConfigurationError

DIGEST = "sha256:" + "0123456789abcdef" * 4
# The contract, section 5.
KEYS = {
    "id", "name", "description", "programmingLanguage", "label", "environmentVersionId",
    "environmentVersionDescription", "isPublic", "isDownloadable", "useCases", "contextUrl", "imageRepository", "tags",
}  # fmt: skip


def test_the_default_is_vllms_image_at_the_newest_supported_version():
    image = choose("gpu")
    assert str(image.base) == f"vllm/vllm-openai:v{supported()[-1]}"
    assert image.vllm == supported()[-1]
    assert min(supported()) >= "0.32"


def test_the_cpu_variant_has_the_version_that_is_locked():
    image = choose("cpu")
    assert image.vllm == "0.32.0"
    assert [lock.name for lock in image.locks] == ["cpu", "product", "hooks"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("vllm/vllm-openai:v0.33.0", ("vllm/vllm-openai", "v0.33.0", None)),
        (f"vllm/vllm-openai@{DIGEST}", ("vllm/vllm-openai", None, DIGEST)),
        (f"mirror.example:5000/a/b_c:1@{DIGEST}", ("mirror.example:5000/a/b_c", "1", DIGEST)),
        ("localhost/base:1", ("localhost/base", "1", None)),
    ],
)
def test_base_names_of_every_form(name, parts):
    base = Base.parse(name)
    assert (base.name, base.tag, base.digest) == parts
    assert str(base) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "case/UPPER:1",
        "a b:1",
        "name:",
        "name:1@sha256:abc",
        f"name@{DIGEST}0",
        "name:1\nRUN evil",
        "-x:1",
        "a//b:1",
    ],
)
def test_a_broken_base_name_is_refused(name):
    with pytest.raises(ConfigurationError, match="is not the name of an image") as error:
        Base.parse(name)
    assert "NAME@sha256" in error.value.remedy


@pytest.mark.parametrize("name", ["vllm/vllm-openai", "vllm/vllm-openai:latest"])
def test_a_base_that_moves_is_refused(name):
    with pytest.raises(ConfigurationError, match="a different image after each release"):
        Base.parse(name)


@pytest.mark.parametrize(("variant", "version"), [("gpu", "0.31.0"), ("gpu", "0.99.0"), ("cpu", "0.33.0")])
def test_an_unsupported_version_names_the_supported_ones(variant, version):
    with pytest.raises(ConfigurationError, match=f"{version} is not supported") as error:
        choose(variant, vllm=version)
    assert "0.32.0" in error.value.remedy
    assert error.value.exit_code == 78


def test_the_cpu_build_is_for_one_python():
    with pytest.raises(ConfigurationError, match=r"locked for Python 3\.11 only"):
        choose("cpu", python="3.12")


@pytest.mark.parametrize("variant", ["gpu", "cpu"])
@pytest.mark.parametrize("base", [None, f"registry.example/vllm@{DIGEST}"])
def test_env_info_and_dockerfile_agree(variant, base):
    image = choose(variant, base)
    information = json.loads(image.env_info())
    assert information.keys() == KEYS
    text = dockerfile.render(image, wheelhouse=False)
    start = re.search(r"^FROM (\S+) AS base$", text, re.MULTILINE)[1]
    labels = dict(re.findall(r'^(?:LABEL|   ) ([\w.-]+)="([^"]*)"', text, re.MULTILINE))
    assert start == str(image.base)
    assert start == labels["org.opencontainers.image.base.name"]
    assert start in information["environmentVersionDescription"]
    assert start in information["description"]
    assert information["label"] == labels["org.opencontainers.image.version"]
    assert f"vLLM {labels['vllm-dropin.vllm']}" in information["label"]
    assert len(information["label"]) <= LABEL_LIMIT
    assert ("is not known to vllm-dropin" in text) == (base is None)
    assert re.fullmatch("[0-9a-f]{24}", information["environmentVersionId"])
    assert information["useCases"] == ["customModel"]
