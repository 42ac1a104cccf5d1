"""Every wheel that an image installs, fetched beforehand, so that the image is built without an index."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from vllm_dropin.environment.dockerfile import TORCH_INDEX
from vllm_dropin.environment.image import Image
from vllm_dropin.environment.locks import Lock, Pin, Target
from vllm_dropin.errors import ConfigurationError, DropinError, InputOutputError

GLIBC = 35
"""2.35 is Ubuntu 22.04's, the older one of the bases' C libraries."""

_PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)),
    "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64",
)  # fmt: skip
_NO_NETWORK = re.compile(
    r"Retrying \(|NewConnectionError|ConnectTimeout|ReadTimeout|SSLError|ProxyError|connection broken|unreachable"
)
_NO_SPACE = re.compile(r"No space left|Disk quota")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")


@dataclass(frozen=True)
class WheelFile:
    """A fetched wheel."""

    path: Path
    pin: Pin
    sha256: str


def download(image: Image, folder: Path) -> tuple[WheelFile, ...]:
    """Fetch the wheels of all the image's locks into `folder` by pip, as pip is set up on this machine.

    Raises ConfigurationError for what is not to be had for the image's Python, InputOutputError when no index answers.
    """
    for lock in image.locks:
        fetch(lock, image.target, folder)
    return tuple(_match(image, folder))


def fetch(lock: Lock, target: Target, folder: Path) -> None:
    """The wheels of one lock for this Python. Raises ConfigurationError or InputOutputError."""
    # pip would judge the markers by the Python that runs it, so the file that it gets has none.
    lines = [
        f"{pin.name}=={pin.version} " + " ".join(f"--hash=sha256:{digest}" for digest in sorted(pin.hashes))
        for pin in lock.for_target(target)
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write("\n".join(lines) + "\n")
        requirements.flush()
        command = [
            sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-input",
            "--no-deps", "--only-binary=:all:", "--require-hashes", "--implementation", "cp",
            "--python-version", target.python, *(f"--platform={platform}" for platform in _PLATFORMS),
            "--dest", str(folder), "--requirement", requirements.name,
        ]  # fmt: skip
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise _failure(done.stderr, lock, target)


def _failure(stderr: str, lock: Lock, target: Target) -> DropinError:
    """What pip's complaint means."""
    stderr = _CREDENTIALS.sub("***@", stderr)
    if "No module named pip" in stderr:
        return ConfigurationError(
            f"--wheelhouse: {sys.executable} has no pip", f"Run `{sys.executable} -m ensurepip` once."
        )
    if _NO_SPACE.search(stderr):
        return InputOutputError("--wheelhouse: the disk is full", "Free some space, or set TMPDIR to a larger disk.")
    if _NO_NETWORK.search(stderr):
        return InputOutputError(
            "--wheelhouse: the package index does not answer", "Check the network, and pip's index and proxy settings."
        )
    missing = re.search(r"No matching distribution found for (\S+)", stderr)
    if missing:
        torch = f" torch for CPUs is at {TORCH_INDEX}: PIP_EXTRA_INDEX_URL." if missing[1].startswith("torch==") else ""
        return ConfigurationError(
            f"--wheelhouse: pip finds no wheel of {missing[1]} ({lock.path}) for Python {target.python}, Linux x86-64, "
            f"glibc 2.{GLIBC}",
            f"Give pip an index that has it.{torch}",
        )
    if "DO NOT MATCH THE HASHES" in stderr:
        wrong = re.search(r"^\s+(\S+==\S+) from", stderr, re.MULTILINE)
        return ConfigurationError(
            f"--wheelhouse: {wrong[1] if wrong else 'a file'} does not have a hash of {lock.path}",
            "The index has another file under this version: do not use it, and find out why.",
        )
    last = [line for line in stderr.splitlines() if line.startswith("ERROR")] or stderr.splitlines()[-1:] or ["?"]
    return InputOutputError(f"--wheelhouse: pip failed: {last[0][:300]}", "Try it by hand: pip download --help.")


def _match(image: Image, folder: Path) -> list[WheelFile]:
    """Each wheel with its pin. Raises ConfigurationError when a pin has no wheel, or a wheel no pin."""
    pins = {(pin.name, str(Version(pin.version))): pin for lock in image.locks for pin in lock.for_target(image.target)}
    found: Mapping[tuple[str, str], Path] = {_identity(path): path for path in sorted(folder.iterdir())}
    odd = pins.keys() ^ found.keys()
    if odd:
        names = ", ".join("==".join(identity) for identity in sorted(odd))
        raise ConfigurationError(f"--wheelhouse: wheels and lock files differ: {names}", "Run it again.")
    wheels = []
    for identity, path in found.items():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        wheels.append(WheelFile(path, pins[identity], digest))
    return wheels


def _identity(path: Path) -> tuple[str, str]:
    try:
        name, version, _, _ = parse_wheel_filename(path.name)
    except InvalidWheelFilename:
        return path.name, ""
    return canonicalize_name(name), str(version)
