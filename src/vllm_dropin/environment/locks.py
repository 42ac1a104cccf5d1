"""The lock files that the product ships: every package at one version, with the hashes of its files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from packaging.markers import Marker

import vllm_dropin
from vllm_dropin.errors import ConfigurationError

SHIPPED = ("cpu", "hooks", "product")
"""The locks in our wheel, in the package's folder environment/requirements."""

_PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;]+)(?:\s*;\s*(?P<marker>.*?))?\s+--hash=")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


@dataclass(frozen=True)
class Target:
    """A Python on Linux x86-64, the only platform that the locks are made for."""

    python: str

    def wants(self, marker: str | None) -> bool:
        """Whether a requirement with this environment marker is installed there."""
        return marker is None or Marker(marker).evaluate(
            {
                "implementation_name": "cpython",
                "os_name": "posix",
                "platform_machine": "x86_64",
                "platform_python_implementation": "CPython",
                "platform_system": "Linux",
                "python_full_version": f"{self.python}.0",
                "python_version": self.python,
                "sys_platform": "linux",
            }
        )


@dataclass(frozen=True)
class Pin:
    """One package of a lock."""

    name: str
    version: str
    marker: str | None
    hashes: frozenset[str]

    @property
    def purl(self) -> str:
        return f"pkg:pypi/{self.name}@{self.version.replace('+', '%2B')}"


@dataclass(frozen=True)
class Lock:
    """A lock file: `name` is `product` for requirements/product.lock."""

    name: str
    text: str
    pins: tuple[Pin, ...]

    @property
    def path(self) -> str:
        """Where it is in the image context."""
        return f"requirements/{self.name}.lock"

    def for_target(self, target: Target) -> tuple[Pin, ...]:
        return tuple(pin for pin in self.pins if target.wants(pin.marker))


def source_tree() -> Path | None:
    """The checkout that this package is run from, or None when it was installed from a wheel."""
    package = Path(vllm_dropin.__file__).parent
    root = package.parents[1]
    return root if package.parent.name == "src" and (root / "pyproject.toml").is_file() else None


@cache
def read(name: str) -> Lock:
    """A shipped lock: the checkout's own, else the one in the installed package."""
    root = source_tree()
    if root is not None:
        text = (root / "requirements" / f"{name}.lock").read_text(encoding="utf-8")
    else:
        place = resources.files("vllm_dropin.environment").joinpath("requirements", f"{name}.lock")
        if not place.is_file():
            raise ConfigurationError(
                f"this installation of vllm-dropin has no {name}.lock", "Install it from its wheel, or use a checkout."
            )
        text = place.read_text(encoding="utf-8")
    return Lock(name, text, tuple(_pins(text)))


def _pins(text: str) -> list[Pin]:
    pins = []
    for line in text.replace("\\\n", " ").splitlines():
        found = _PIN.match(line)
        if found is None:
            raise ConfigurationError(f"a lock file has a line without a pin or a hash: {line[:80]}", "Run `make lock`.")
        name = re.sub(r"[-_.]+", "-", found["name"]).lower()
        pins.append(Pin(name, found["version"], found["marker"], frozenset(_HASH.findall(line))))
    return pins
