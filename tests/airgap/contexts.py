"""Image contexts for the tests of `verify`: what `build` writes, with two small wheels in place of its lock files'."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.environment.builds import build, tiny_wheel

WHEELS = {"product": ("alpha", "1.0", "py3-none-any"), "hooks": ("beta", "2.0", "cp312-cp312-manylinux_2_28_x86_64")}


def make_context(folder: Path) -> Path:
    """A context with a wheelhouse, in which nothing is wrong; it is what the real one is, but for its size."""
    done = build("--base", f"registry.example/vllm@sha256:{'0a' * 32}", "-o", folder.name, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    (folder / "wheels").mkdir()
    purls = []
    for lock, (name, version, tag) in WHEELS.items():
        wheel = tiny_wheel(folder / "wheels", name, version, tag)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        (folder / "requirements" / f"{lock}.lock").write_text(f"{name}=={version} \\\n    --hash=sha256:{digest}\n")
        purls.append(f"pkg:pypi/{name}@{version}")
    change(
        folder, "Dockerfile", "ENV PIP_DISABLE_PIP_VERSION_CHECK=1", "ENV PIP_NO_INDEX=1 PIP_FIND_LINKS=/context/wheels"
    )
    sbom = json.loads((folder / "sbom.cdx.json").read_text())
    kept = ("pkg:docker/", "pkg:pypi/vllm@", "pkg:pypi/vllm-dropin@")
    sbom["components"] = [item for item in sbom["components"] if item["purl"].startswith(kept)]
    sbom["components"] += [{"type": "library", "name": purl, "purl": purl} for purl in purls]
    (folder / "sbom.cdx.json").write_text(json.dumps(sbom))
    return folder


def change(folder: Path, name: str, old: str, new: str) -> None:
    """Replace text in a file of the folder; it has to be there."""
    path = folder / name
    text = path.read_text()
    assert old in text, f"{name} has no {old!r}"
    path.write_text(text.replace(old, new))


def flip(path: Path) -> None:
    """Change one byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def verify(*words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_dropin.cli.main", "verify", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, **more)


def table(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Step to verdict, as the command printed them."""
    verdicts = ("not checked", "failed", "ok")
    rows = (line.split(maxsplit=1) for line in done.stdout.splitlines())
    return {name: next(word for word in verdicts if rest.startswith(word)) for name, rest in rows}
