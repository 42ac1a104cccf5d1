"""Packages for hooks, behind the engine's own: from the variable that the image sets to the hook's sys.path."""

import asyncio
import sys
from pathlib import Path

import pytest

from vllm_dropin.errors import ConfigurationError
from vllm_dropin.settings.choices import Choices
from vllm_dropin.settings.options import Flags
from vllm_dropin.supervisor.hook import HookRequest, run_hook

HOOK = """
import os, sys

def load_model(code_dir):
    import client, packaging
    os.environ["CLIENT"] = client.__file__
    os.environ["PACKAGING"] = packaging.__file__
"""


def folders(value: str) -> tuple[Path, ...]:
    return Choices(Flags(), {"VLLM_DROPIN_HOOK_PATH": value}).folders("hook_path")


def test_folders_are_joined_as_in_path(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert folders(f"{tmp_path}/a:{tmp_path}/b:") == (tmp_path / "a", tmp_path / "b")
    assert folders("") == ()


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigurationError, match=r"hook_path \(VLLM_DROPIN_HOOK_PATH\): there is no folder"):
        folders(str(tmp_path / "nowhere"))


def test_a_hook_finds_them_behind_the_engines_packages(tmp_path):
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("client", "packaging"):
        (packages / f"{name}.py").touch()
    (tmp_path / "custom.py").write_text(HOOK)
    request = HookRequest(
        python=Path(sys.executable), hook_file=tmp_path / "custom.py", code_dir=tmp_path, environ={}, timeout=20,
        runtime_dir=tmp_path, extra_paths=(packages,),
    )  # fmt: skip
    changes = asyncio.run(run_hook(request, print)).environ_changes
    assert changes["CLIENT"] == str(packages / "client.py")
    assert not str(changes["PACKAGING"]).startswith(str(tmp_path))  # the engine's Python has its own
