"""Our own wheel, made from the files of this very installation, the same bytes on every machine.

hatchling makes the wheels that are released; here it would be one more thing to install beside the product, and its
metadata differs from release to release. So this wheel has the same files and says the same in one fixed form, made
from pyproject.toml in a checkout and from the installed metadata elsewhere. Nothing is compressed: zlib's output
differs between its builds, and git and gzip compress better what is not compressed twice.
"""

from __future__ import annotations

import base64
import hashlib
import io
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

import vllm_dropin
from vllm_dropin import __version__
from vllm_dropin.environment import locks
from vllm_dropin.errors import ConfigurationError

_DISTRIBUTION = "vllm-dropin"
_STEM = f"vllm_dropin-{__version__}"
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a zip file can hold."""
_RUBBISH = ("~", ".orig", ".pyc", ".rej", ".swp", ".tmp")


@dataclass(frozen=True)
class Wheel:
    """A wheel in memory."""

    name: str
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def build() -> Wheel:
    """The wheel of this installation. Raises ConfigurationError when its metadata can't be found."""
    root = locks.source_tree()
    files = _package_files()
    for name in locks.SHIPPED:
        files[f"vllm_dropin/environment/requirements/{name}.lock"] = locks.read(name).text.encode()
    about = _from_project(root) if root is not None else _from_installation()
    info = f"{_STEM}.dist-info"
    files[f"{info}/METADATA"] = about.metadata.encode()
    files[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: vllm-dropin {__version__}\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    ).encode()
    files[f"{info}/entry_points.txt"] = about.entry_points.encode()
    files[f"{info}/licenses/LICENSE"] = about.licence.encode()
    record = "".join(f"{path},{_digest(data)},{len(data)}\n" for path, data in sorted(files.items()))
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    return Wheel(f"{_STEM}-py3-none-any.whl", _zip(files))


@dataclass(frozen=True)
class _About:
    metadata: str
    entry_points: str
    licence: str


def _package_files() -> dict[str, bytes]:
    package = Path(vllm_dropin.__file__).parent
    files = {}
    for path in package.rglob("*"):
        parts = path.relative_to(package.parent).parts
        if "__pycache__" in parts or any(part.startswith(".") for part in parts) or path.name.endswith(_RUBBISH):
            continue
        if path.is_file():
            files["/".join(parts)] = path.read_bytes()
    return files


def _from_project(root: Path) -> _About:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras: dict[str, list[str]] = project.get("optional-dependencies", {})
    optional = [_with_extra(line, extra) for extra, lines in extras.items() for line in lines]
    return _About(
        _metadata(
            {
                "Summary": [project["description"]],
                "License-Expression": [project["license"]],
                "Classifier": project["classifiers"],
                "Requires-Python": [project["requires-python"]],
                "Requires-Dist": [*project["dependencies"], *optional],
                "Provides-Extra": list(extras),
            }
        ),
        _entry_points(project["scripts"]),
        (root / "LICENSE").read_text(encoding="utf-8"),
    )


def _from_installation() -> _About:
    try:
        distribution = metadata.distribution(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise ConfigurationError(
            "vllm-dropin is neither installed nor run from a checkout, so its wheel can't be made",
            "Install it: pip install vllm-dropin.",
        ) from None
    said = distribution.metadata
    names = ("Summary", "License-Expression", "Classifier", "Requires-Python", "Requires-Dist", "Provides-Extra")
    scripts = {point.name: point.value for point in distribution.entry_points if point.group == "console_scripts"}
    return _About(
        _metadata({name: said.get_all(name) or [] for name in names}),
        _entry_points(scripts),
        distribution.read_text("licenses/LICENSE") or "",
    )


def _with_extra(line: str, extra: str) -> str:
    """As metadata has it: a requirement of an extra is one with a marker."""
    requirement = Requirement(line)
    marker = f"({requirement.marker}) and " if requirement.marker else ""
    requirement.marker = None
    return f"{requirement}; {marker}extra == '{extra}'"


def _metadata(fields: Mapping[str, list[str]]) -> str:
    fields = {**fields, "Requires-Dist": [str(Requirement(line)) for line in fields["Requires-Dist"]]}
    lines = ["Metadata-Version: 2.4", f"Name: {_DISTRIBUTION}", f"Version: {__version__}", "License-File: LICENSE"]
    lines += [f"{name}: {value}" for name, values in fields.items() for value in sorted(values)]
    return "\n".join(lines) + "\n"


def _entry_points(scripts: Mapping[str, str]) -> str:
    return "[console_scripts]\n" + "".join(f"{name} = {value}\n" for name, value in sorted(scripts.items()))


def _digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def _zip(files: Mapping[str, bytes]) -> bytes:
    """Sorted, with the metadata last, as the format advises."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(files, key=lambda path: (".dist-info/" in path, path)):
            entry = zipfile.ZipInfo(path, _EPOCH)
            entry.create_system = 3  # Unix, wherever it is made
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, files[path])
    return buffer.getvalue()
