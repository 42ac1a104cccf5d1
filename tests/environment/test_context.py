"""The context: the same bytes each time, whole or not at all."""

import json
import os
import resource
import subprocess
import sys
import tarfile

import pytest

from tests.environment.builds import ROOT, build, tree

MEMBERS = {
    "Dockerfile", "README.md", "env_info.json", "image_check.py", "requirements", "requirements/hooks.lock",
    "requirements/product.lock", "requirements/vllm-dropin.lock", "sbom.cdx.json", "start_server.sh",
    "vllm_dropin-0.1.0-py3-none-any.whl",
}  # fmt: skip


def test_two_builds_have_the_same_sha256(tmp_path):
    first = build("--json", cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = {**os.environ, "TZ": "Asia/Tokyo", "LC_ALL": "C", "SOURCE_DATE_EPOCH": "1", "PYTHONHASHSEED": "7"}
    second = build("--json", "-o", "x.tgz", cwd=elsewhere, env=other, umask=0o077)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert json.loads(first.stdout)["sha256"] == json.loads(second.stdout)["sha256"]
    assert (tmp_path / "vllm_dropin.tar.gz").read_bytes() == (elsewhere / "x.tgz").read_bytes()
    assert sorted(os.listdir(elsewhere)) == ["x.tgz"]


def test_the_archive_is_a_context(tmp_path):
    assert build(cwd=tmp_path).returncode == 0
    with tarfile.open(tmp_path / "vllm_dropin.tar.gz") as archive:
        members = archive.getmembers()
        archive.extractall(tmp_path / "context", filter="data")
    assert {member.name for member in members} == MEMBERS
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert {(member.uid, member.gid, member.uname, member.mtime) for member in members} == {(0, 0, "", 315532800)}
    assert build("-o", "folder", cwd=tmp_path).returncode == 0
    assert tree(tmp_path / "context") == tree(tmp_path / "folder")


def test_the_environment_in_the_repository_is_current(tmp_path):
    """And so `tar -czvf vllm_dropin.tar.gz -C environment .` makes the archive that a platform takes."""
    assert build("-o", "fresh", cwd=tmp_path).returncode == 0
    fresh, kept = tree(tmp_path / "fresh"), tree(ROOT / "environment")
    differ = sorted(name for name in fresh.keys() | kept.keys() if fresh.get(name) != kept.get(name))
    assert differ == [], "environment/ is not what `build` writes: run `make environment`"
    command = ["tar", "-czf", str(tmp_path / "seed.tar.gz"), "-C", str(ROOT / "environment"), "."]
    subprocess.run(command, check=True, timeout=60)
    with tarfile.open(tmp_path / "seed.tar.gz") as archive:
        archive.extractall(tmp_path / "seed", filter="data")
    assert tree(tmp_path / "seed") == fresh


def test_a_folder_that_was_built_is_replaced_and_no_other(tmp_path):
    assert build("-o", "image", cwd=tmp_path).returncode == 0
    (tmp_path / "image" / "stale").touch()
    assert build("--cpu", "-o", "image", cwd=tmp_path).returncode == 0
    assert not (tmp_path / "image" / "stale").exists()
    assert (tmp_path / "image" / "requirements" / "cpu.lock").exists()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    refused = build("-o", "precious", cwd=tmp_path)
    assert refused.returncode == 78
    assert "has something else in it" in refused.stderr
    assert sorted(os.listdir(tmp_path)) == ["image", "precious"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-o", "nowhere/x.tar.gz"], "there is no folder"),
        (["-o", "x.zip"], "no kind of archive"),
        (["--base", "Not An Image"], "is not the name of an image"),
        (["--vllm", "0.1.0"], "Supported: 0.32.0"),
        (["--", "--max-model-len", "5"], "takes no flags of vLLM"),
    ],
)
def test_what_can_not_be_built_is_said_with_its_remedy(tmp_path, options, words):
    done = build(*options, cwd=tmp_path)
    assert done.returncode == 78
    assert words in done.stderr
    assert len(done.stderr.splitlines()) >= 2
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    (tmp_path / "vllm_dropin.tar.gz").write_text("the last one")
    limit = 100_000  # bytes that a file may have: the kernel refuses the rest, as a full disk would
    done = build(cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 74
    assert "cannot write" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["vllm_dropin.tar.gz"]
    assert (tmp_path / "vllm_dropin.tar.gz").read_text() == "the last one"


def test_the_readme_has_the_command_that_makes_the_same_files(tmp_path):
    digest = "sha256:" + "a" * 64
    options = ("--cpu", "--base", f"registry.example/python@{digest}")
    assert build(*options, "-o", "a", cwd=tmp_path).returncode == 0
    text = (tmp_path / "a" / "README.md").read_text()
    command = next(line for line in text.splitlines() if "vllm-dropin build" in line).split("`")[1]
    assert command == f"vllm-dropin build {' '.join(options)}"
    assert build(*command.split()[2:], "-o", "b", cwd=tmp_path).returncode == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def start(tmp_path, *arguments, **environ):
    """Run start_server.sh with a program in place of ours that says what it is called with."""
    stub = tmp_path / "stub"
    stub.write_text('#!/bin/sh\necho "$@"\n')
    stub.chmod(0o755)
    script = (ROOT / "src/vllm_dropin/environment/files/start_server.sh").read_text()
    (tmp_path / "start.sh").write_text(script.replace("/opt/vllm-dropin/bin/vllm-dropin", str(stub)))
    variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), **environ}
    command = ["sh", str(tmp_path / "start.sh"), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=20)


def test_the_start_script_asks_for_keys_when_there_are_some(tmp_path):
    assert start(tmp_path).stdout == "serve /opt/code --address 0.0.0.0:8080 --auth none\n"
    assert "--auth" not in start(tmp_path, VLLM_DROPIN_API_KEY_FILE="/keys").stdout
    assert "--auth" not in start(tmp_path, VLLM_DROPIN_API_KEYS="one two").stdout
    assert "--auth" not in start(tmp_path, VLLM_DROPIN_AUTH="key").stdout
    assert start(tmp_path, "--workers", "2", CODE_DIR="/data/code").stdout == (
        "serve /data/code --address 0.0.0.0:8080 --auth none --workers 2\n"
    )


def test_the_start_script_says_what_is_not_writable(tmp_path):
    done = start(tmp_path, HOME="/proc/nowhere")
    assert done.returncode == 74
    assert "can't write /proc/nowhere" in done.stderr
    assert "Mount a volume at /data" in done.stderr


def test_build_is_quick_to_explain_itself():
    done = subprocess.run(
        [sys.executable, "-m", "vllm_dropin.cli.main", "build", "--help"], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0
    assert all(option in done.stdout for option in ("--gpu", "--cpu", "--base", "--vllm", "--wheelhouse", "--output"))
