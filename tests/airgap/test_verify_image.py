"""An image's root: this machine's own file system with what an image has laid over it, entered by chroot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tests.airgap.test_verify import add_hook, weights
from tests.contract.drivers import Engine
from tests.folders import MINIMAL_METADATA, make_folder

# Mounts in a namespace of their own: they go with the process. The layers are on a tmpfs, because an overlay can't
# have its own layers below it.
MOUNTS = """
set -e
place=$1; shift
mount -t tmpfs tmpfs "$place/layers"
mkdir "$place/layers/work"
cp -a "$place/image" "$place/layers/upper"
mount -t overlay overlay -o "lowerdir=/,upperdir=$place/layers/upper,workdir=$place/layers/work" "$place/root"
exec "$@"
"""


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    """A place with `image`, the files that a Dockerfile's steps leave; `root` is where they are mounted."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for folder in ("layers", "root"):
            (place / folder).mkdir()
        product = place / "image" / "opt" / "vllm-dropin"
        sbom = {"components": [{"purl": f"pkg:pypi/pydantic@{metadata.version('pydantic')}"}]}
        make_folder(
            place / "image",
            {
                "opt/vllm-dropin/bin/vllm-dropin": f'#!/bin/sh\nexec {sys.executable} -m vllm_dropin.cli.main "$@"\n',
                "opt/vllm-dropin/start_server.sh": "",
                "opt/vllm-dropin/env_info.json": json.dumps({"label": "a label"}),
                "opt/vllm-dropin/sbom.cdx.json": json.dumps(sbom),
                "opt/hooks/site-packages/clients.py": "",
            },
        )
        (product / "bin" / "vllm-dropin").chmod(0o755)
        (product / "lib" / "python3.11").mkdir(parents=True)
        ours = next(path for path in sys.path if path.endswith("site-packages"))
        (product / "lib" / "python3.11" / "site-packages").symlink_to(ours)
        shutil.copytree(Engine.stub(tmp_path / "engine").python.parents[1], place / "image/opt/engine", symlinks=True)
        for parent in Path(sys.base_prefix).parents:  # user 1000 has to reach this Python
            (place / "image" / parent.relative_to("/")).mkdir(parents=True, exist_ok=True)
        for folder in (place / "image").rglob("*"):
            if folder.is_dir() and not folder.is_symlink():
                folder.chmod(0o777 if folder.name in ("record", "tmp") else 0o755)
        for folder in ("opt/code", "data"):
            (place / "image" / folder).mkdir()
            os.chown(place / "image" / folder, 1000, 0)
        yield place


def verify_root(place: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("an image's root is entered by chroot, as root")
    mounts = ["unshare", "-m", "--propagation", "private", "sh", "-c", MOUNTS, "sh", str(place)]
    command = [sys.executable, "-m", "vllm_dropin.cli.main", "verify", str(place / "root"), str(folder), "--json"]
    done = subprocess.run([*mounts, *command], capture_output=True, text=True, timeout=90)
    if "mount: " in done.stderr:
        pytest.skip(f"no overlay here: {done.stderr.splitlines()[0]}")
    return done


HOOK = """\
    import os, urllib.request
    assert os.getuid() == 1000 and code_dir == '/opt/code', (os.getuid(), code_dir)
    with open(f'{code_dir}/made', 'w') as file:
        file.write(os.environ['VLLM_DROPIN_HOOK_PATH'])
    try:
        urllib.request.urlopen('http://telemetry.example.com/')
    except OSError:
        pass
"""


def test_the_product_inside_the_image_serves_the_folder_as_its_user(image, tmp_path):
    folder = make_folder(tmp_path / "model", {"model-metadata.yaml": MINIMAL_METADATA, **weights()})
    add_hook(folder, HOOK)
    before = sorted(folder.rglob("*"))
    done = verify_root(image, folder)
    assert done.returncode == 0, done.stderr
    steps = {step["name"]: step for step in json.loads(done.stdout)["steps"]}
    assert steps["contents"]["detail"] == "a label; all 1 listed packages are installed"
    assert {name for name, step in steps.items() if step["verdict"] == "not checked"} == {
        "dockerfile", "base", "requirements", "wheelhouse",
    }  # fmt: skip
    assert steps["run"]["facts"]["prediction"] == "echo: What is the capital of France?"
    assert steps["run"]["facts"]["wanted"] == [{"host": "telemetry.example.com", "phase": "hook"}]
    assert sorted(folder.rglob("*")) == before  # neither the folder nor the image is changed
    assert folder.stat().st_uid == 0
    assert not any((image / "image" / "data").iterdir())


def test_an_image_that_lacks_what_it_lists(image, tmp_path):
    papers = image / "image" / "opt" / "vllm-dropin" / "sbom.cdx.json"
    papers.write_text(json.dumps({"components": [{"purl": "pkg:pypi/pydantic@0.1"}, {"purl": "pkg:docker/x@1"}]}))
    folder = make_folder(tmp_path / "model", {"model-metadata.yaml": MINIMAL_METADATA})
    done = verify_root(image, folder)
    assert done.returncode == 78
    assert "error: contents: sbom.cdx.json lists pkg:pypi/pydantic@0.1, which the image does not have" in done.stderr
    assert "error: run: " in done.stderr  # no model at all: the image's own words
