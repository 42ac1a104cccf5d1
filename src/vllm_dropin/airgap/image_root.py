"""The root file system of an image that was built from a context: known, compared with its papers, and entered."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name

from vllm_dropin.airgap import isolation
from vllm_dropin.airgap.report import Finding, Problem
from vllm_dropin.environment import dockerfile
from vllm_dropin.environment.image import choose
from vllm_dropin.errors import ConfigurationError

CODE_DIR = "/opt/code"
PROGRAM = f"{dockerfile.PRODUCT}/bin/vllm-dropin"
_START = f"{dockerfile.PRODUCT}/start_server.sh"
_ENV = re.compile(r'^(?:ENV|   ) (\w+)="([^"]*)"', re.MULTILINE)
_USER, _GROUP = 1000, 0
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_AGAIN = "Build the image again from its context."


def is_one(folder: Path) -> bool:
    """Whether this is the root of such an image."""
    return _below(folder, _START).is_file()


def compare(root: Path) -> Finding:
    """Whether what is installed in the root is what its bill of materials lists."""
    try:
        label = json.loads(_below(root, f"{dockerfile.PRODUCT}/env_info.json").read_bytes())["label"]
        components = json.loads(_below(root, f"{dockerfile.PRODUCT}/sbom.cdx.json").read_bytes())["components"]
        listed = {str(item["purl"]) for item in components if str(item["purl"]).startswith("pkg:pypi/")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{dockerfile.PRODUCT} has no env_info.json and sbom.cdx.json: {error}", _AGAIN
        ) from None
    installed = {
        f"pkg:pypi/{canonicalize_name(found.name)}@{found.version.replace('+', '%2B')}"
        for folder in (dockerfile.PRODUCT, dockerfile.HOOKS, dockerfile.ENGINE)
        for place in sorted(_below(root, folder).glob("lib/python3.*/site-packages"))
        for found in metadata.distributions(path=[str(place)])
    }
    base = {purl for purl in listed if purl.startswith("pkg:pypi/vllm@")}  # in the base image, wherever its Python is
    missing = sorted(listed - base - installed)
    if missing:
        shown = ", ".join(missing[:3])
        return Finding("", (Problem(f"sbom.cdx.json lists {shown}, which the image does not have", _AGAIN),))
    return Finding(f"{label}; all {len(listed) - len(base)} listed packages are installed", facts={"label": label})


def environ(root: Path, ours: Mapping[str, str]) -> dict[str, str]:
    """The image's variables, which a root file system alone does not tell, and the runtime parameters of ours."""
    cpu = _below(root, dockerfile.ENGINE).is_dir()
    text = dockerfile.render(choose("cpu" if cpu else "gpu"), wheelhouse=False)
    variables = {name: value.replace("$PATH", _PATH) for name, value in _ENV.findall(text)}
    parameters = {name: value for name, value in ours.items() if name.startswith("MLOPS_RUNTIME_PARAM_")}
    return {"PATH": _PATH, **variables, **parameters}


def prepare(root: Path, folder: Path, scratch: Path) -> None:
    """In the namespaces: the root as a container runtime would show it, with the model folder. Raises OSError.

    What is written into the root from now on lands in `scratch`.
    """
    if not isolation.shield(root, scratch / "root"):
        raise OSError(errno.EROFS, "no overlay can be had over it, and it must not be changed")
    isolation.mount("proc", _below(root, "/proc"), "proc")
    isolation.mount("sysfs", _below(root, "/sys"), "sysfs", isolation.READ_ONLY)  # vLLM counts a CPU's cores there
    isolation.bind("/dev", _below(root, "/dev"), recursive=True)
    for name, text in isolation.name_files().items():
        place = _below(root, f"/etc/{name}")
        place.unlink(missing_ok=True)  # it may be a link, to a place that is not the image's
        place.write_text(text)
    code = _below(root, CODE_DIR)
    code.mkdir(parents=True, exist_ok=True)
    isolation.bind(folder, code)
    for path in (code, *(path for path in code.rglob("*") if path.is_dir() and not path.is_symlink())):
        os.chown(path, _USER, _GROUP)  # as the platform's copy would be: the hook may write there
        path.chmod(0o775)


def enter(root: Path) -> None:
    """Between fork and exec: the image's root, its user and working folder."""
    os.chroot(root)
    os.chdir(CODE_DIR)
    os.setgroups([])
    os.setgid(_GROUP)
    os.setuid(_USER)


def _below(root: Path, place: str) -> Path:
    return root / place.lstrip("/")
