"""Whether all that the image installs is one certain file: pinned, hashed, and in the wheelhouse if there is one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import InvalidRequirement, Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from vllm_dropin.airgap.report import Finding, NotChecked, Problem
from vllm_dropin.environment.locks import Lock, Pin, Target
from vllm_dropin.environment.wheelhouse import GLIBC

if TYPE_CHECKING:
    from vllm_dropin.airgap.image_context import Context

_HASH = re.compile(r"\s--hash=(\S+)")
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)),
    "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64",
)  # fmt: skip
_LOCKS = "Take the lock file from `vllm-dropin build`, which writes it with every hash."
_WHEELS = "Build the context again: vllm-dropin build --wheelhouse."


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: Path, name: str) -> tuple[Lock, tuple[Problem, ...]]:
    """requirements/NAME.lock of a context, and its lines that pin nothing or have no hash."""
    path = f"requirements/{name}.lock"
    text = (folder / path).read_text(encoding="utf-8", errors="replace")
    found: list[Pin] = []
    problems: list[Problem] = []
    for number, line in _logical_lines(text):
        complaint, pin = _read_line(line)
        if pin is not None:
            found.append(pin)
        if complaint:
            problems.append(Problem(f"{path}, line {number}: {complaint}", _LOCKS))
    return Lock(name, text, tuple(found)), tuple(problems)


def check_requirements(found: Context) -> Finding:
    """Every requirement pinned and hashed, our wheel too, and pip told to insist on it."""
    problems = [problem for lock in found.locks for problem in read(found.folder, lock.name)[1]]
    own = (found.folder / "requirements" / "vllm-dropin.lock").read_text(encoding="utf-8", errors="replace")
    expected = f"./{found.wheel.name} --hash=sha256:{digest(found.wheel)}"
    if own.strip() != expected:
        message = f"requirements/vllm-dropin.lock does not name {found.wheel.name} with the SHA-256 that it has"
        problems.append(Problem(message, "The wheel or the lock was changed: build the context again."))
    for number, line in enumerate(found.dockerfile.splitlines(), start=1):
        if "pip install" in line and "--require-hashes" not in line and not line.startswith("#"):
            message = f"Dockerfile, line {number}: pip installs without --require-hashes"
            problems.append(Problem(message, "Take the Dockerfile from `vllm-dropin build`."))
    counts = ", ".join(f"{len(lock.for_target(found.target))} in {lock.name}.lock" for lock in found.locks)
    return Finding("" if problems else f"pinned and hashed: {counts}", tuple(problems))


def check_wheelhouse(found: Context) -> Finding:
    """Every pin has its wheel for the target, and every wheel a pin with its hash."""
    offline = "PIP_NO_INDEX=1" in found.dockerfile
    if found.wheels is None:
        if offline:
            return Finding("", (Problem("wheels/ is missing, and the Dockerfile lets pip ask no index", _WHEELS),))
        raise NotChecked("no wheels/: the image's build asks a package index (build --wheelhouse brings them along)")
    wanted = {_key(pin): (pin, lock) for lock in found.locks for pin in lock.for_target(found.target)}
    problems = [] if offline else [Problem("wheels/ is there, and the Dockerfile lets pip ask an index", _WHEELS)]
    usable = _tags(found.target)
    seen = set()
    for path in found.wheels:
        try:
            name, version, _, tags = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            problems.append(Problem(f"wheels/{path.name} is no wheel", _WHEELS))
            continue
        key = (str(name), str(version))
        if key not in wanted:
            problems.append(Problem(f"wheels/{path.name} is in no lock file", "Take it out, or build again."))
            continue
        pin, lock = wanted[key]
        if digest(path) not in pin.hashes:
            message = f"wheels/{path.name} does not have a hash of {lock.path}: it is damaged or another file"
            problems.append(Problem(message, _WHEELS))
        if usable.isdisjoint(tags):
            message = f"wheels/{path.name} does not fit Python {found.python} on Linux x86-64, glibc 2.{GLIBC}"
            problems.append(Problem(message, _WHEELS))
        else:
            seen.add(key)
    for key in sorted(wanted.keys() - seen):
        message = f"wheels/ has no wheel of {'=='.join(key)} for Python {found.python} ({wanted[key][1].path})"
        problems.append(Problem(message, _WHEELS))
    size = sum(path.stat().st_size for path in found.wheels) / 1e6
    return Finding(
        "" if problems else f"{len(found.wheels)} wheels, {size:,.1f} MB: all that is needed", tuple(problems)
    )


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their continuations, and the number of the first."""
    begun: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        begun.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield number - len(begun) + 1, " ".join(begun)
            begun = []
    if begun:
        yield len(text.splitlines()) - len(begun) + 1, " ".join(begun)


def _read_line(line: str) -> tuple[str, Pin | None]:
    """What is wrong with a line, and its pin. Comments are neither."""
    hashes = _HASH.findall(line)
    text = _HASH.sub("", line).strip()
    shown = text[:80]
    if not text or text.startswith("#"):
        return "", None
    if text.startswith("-"):
        return f"an option has no place here: {shown}", None
    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        return f"no requirement: {shown}", None
    exact = [item for item in requirement.specifier if item.operator == "==" and not item.version.endswith("*")]
    if requirement.url or len(requirement.specifier) != 1 or not exact:
        return f"{shown} is not pinned to one version (==)", None
    marker = str(requirement.marker) if requirement.marker else None
    good = frozenset(text.removeprefix("sha256:") for text in hashes if _SHA256.fullmatch(text))
    pin = Pin(canonicalize_name(requirement.name), exact[0].version, marker, good)
    if not hashes or len(good) != len(set(hashes)):
        return f"{shown} has {'a hash that is no SHA-256' if hashes else 'no hash'}", pin
    return "", pin


def _key(pin: Pin) -> tuple[str, str]:
    try:
        return pin.name, str(Version(pin.version))
    except InvalidVersion:
        return pin.name, pin.version


def _tags(target: Target) -> frozenset[Tag]:
    """What pip would install there."""
    python: Sequence[int] = tuple(int(part) for part in target.python.split("."))
    interpreter = f"cp{target.python.replace('.', '')}"
    fitting = (*cpython_tags(python, platforms=_PLATFORMS), *compatible_tags(python, interpreter, _PLATFORMS))
    return frozenset(fitting)
