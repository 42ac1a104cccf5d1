"""What the tests of this folder share: `vllm-dropin build` as a process, and small wheels to be found by pip."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from vllm_dropin.environment.locks import Lock, Pin

ROOT = Path(__file__).parents[2]


def build(*options: str, cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_dropin.cli.main", "build", *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, **more)


def tree(folder: Path) -> dict[str, tuple[bytes, bool]]:
    """Path to bytes and whether it can be run."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), bool(path.stat().st_mode & 0o100)) for path in files}


def tiny_wheel(folder: Path, name: str, version: str, tag: str = "py3-none-any") -> Path:
    path = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = ""
    with zipfile.ZipFile(path, "w") as archive:
        for place, text in files.items():
            archive.writestr(place, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
            record += f"{place},sha256={digest},{len(text)}\n"
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return path


def lock_of(*wheels: Path, name: str = "product") -> Lock:
    pins = []
    for wheel in wheels:
        package, version, *_ = wheel.name.split("-")
        pins.append(Pin(package, version, None, frozenset({hashlib.sha256(wheel.read_bytes()).hexdigest()})))
    return Lock(name, "", tuple(pins))
