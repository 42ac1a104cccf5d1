"""Makes the shipped flag tables, `src/vllm_dropin/engine/flags/<version>.json`, from vLLM's wheels.

    python scripts/dump_flags.py --python ENGINE_PYTHON [--work FOLDER] VERSION...

ENGINE_PYTHON is a Python in which some version of vLLM runs on a CPU: its dependencies serve all the others. Each
wheel (about 350 MB) is downloaded by pip, its .py files are unpacked and put before everything else on PYTHONPATH, and
the wheel is deleted. Run it for the latest patch of each minor release of vLLM, then look at `git diff`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "vllm_dropin"
# vLLM's wheels are built for one ABI and named after the oldest glibc that they run on.
PLATFORMS = ("manylinux_2_35_x86_64", "manylinux_2_31_x86_64", "manylinux_2_28_x86_64", "manylinux1_x86_64")

sys.path.insert(0, str(ROOT / "src"))
from vllm_dropin.engine import flags  # noqa: E402 (the checkout beside this script, installed or not)


def download(version: str, folder: Path) -> Path:
    """The wheel of a version, by pip, without its dependencies."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = ["download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary", ":all:", *platforms]
    command += ["--python-version", "3.12", "--dest", str(folder), f"vllm=={version}"]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> None:
    """Only what the parser needs: the Python files, and the metadata that tells the version."""
    with zipfile.ZipFile(wheel) as archive:
        wanted = [name for name in archive.namelist() if re.search(r"\.py$|\.dist-info/METADATA$", name)]
        archive.extractall(folder, wanted)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dump_actions(python: Path, unpacked: Path) -> list[str]:
    """The parser's actions under `python` with the unpacked version first on its path."""
    environ = {**os.environ, "PYTHONPATH": str(unpacked), "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    program = PACKAGE / "children" / "dump_flags.py"
    done = subprocess.run([python, program, "--as-cpu"], env=environ, cwd="/", stdout=subprocess.PIPE, check=True)
    return done.stdout.decode().splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument("--python", type=Path, required=True, help="a Python in which vLLM runs on a CPU")
    parser.add_argument("--work", type=Path, help="where to download to (default: a temporary folder)")
    options = parser.parse_args()
    for version in options.versions:
        with tempfile.TemporaryDirectory(dir=options.work) as temporary:
            folder = Path(temporary)
            wheel = download(version, folder)
            digest = sha256(wheel)
            unpack(wheel, folder / "unpacked")
            wheel.unlink()
            actions = dump_actions(options.python, folder / "unpacked")
        target = PACKAGE / "engine" / "flags" / f"{version}.json"
        target.write_text(flags.render_dump(version, actions, wheel.name, digest), encoding="utf-8")
        print(f"{target.relative_to(ROOT)}: {len(json.loads(target.read_text())['actions'])} actions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
