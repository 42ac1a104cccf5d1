#!/usr/bin/env python3
"""Builds the image's CPU variant and boots it, with buildah and without a container daemon or an image registry.

    make image-test          needs root, 40 GB of disk, `apt-get install buildah debootstrap`, and a package index

1. A base image: Debian's minbase with Python and libnuma, by debootstrap.
2. The context, by `vllm-dropin build --cpu --wheelhouse`.
3. The image, by buildah in a network namespace without any network: it needs no index.
4. Two starts, as the image's own configuration says: user 1000:0; and a random user of group 0 with a read-only root
   and one volume at /data, the model folder on it. Each serves examples/smollm2, answers its CSV, and exits 0 on
   SIGTERM.

buildah's chroot isolation can't make a root read-only. So the starts use the container's mounted root directly: own
mount, PID and network namespaces (no network but loopback), the root bound to itself, for the second start read-only,
then chroot, the user, no new privileges, and the entry point as PID 1. What a container runtime adds and this does not:
seccomp and AppArmor profiles, cgroup limits, and a /dev of its own (this one is the host's).

Everything that was made is removed at the end, also after a failure.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "smollm2"
SUITE = "bookworm"  # its Python is 3.11, for which torch's CPU build is locked
PACKAGES = "python3,python3-venv,libnuma1"
BASE = "localhost/image-test-base:1"
IMAGE = "localhost/image-test:1"
NEEDED_GB = 40
READY_SECONDS = 420
KEPT_TOOLS = ("sh", "chown", "chgrp", "chmod", "mkdir", "pip")


class Failed(Exception):
    """A step went wrong; its message says how."""


@dataclass(frozen=True)
class Start:
    """How the image is started."""

    title: str
    uid: int
    volume: Path | None = None  # at /data; then the root is read-only
    code_dir: str = "/opt/code"


class Test:
    def __init__(self, work: Path) -> None:
        self.work = work
        self.lines: list[str] = []

    def run(self) -> None:
        with self.step("base image (debootstrap, minbase)"):
            self.make_base()
        with self.step("context (vllm-dropin build --cpu --wheelhouse)"):
            self.make_context()
        with self.step("image (buildah, no network)"):
            self.make_image()
        container = self.buildah("from", "--pull-never", IMAGE)
        root = Path(self.buildah("mount", container))
        config = json.loads(self.buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
        copy_example(root / "opt" / "code", 1000)
        first = Start("user 1000:0", 1000)
        with self.step(first.title):
            self.serve(root, config, first)
        uid = random.randrange(10_000, 60_000)
        volume = self.work / "volume"
        volume.mkdir(mode=0o770)
        os.chown(volume, uid, 0)
        copy_example(volume / "code", uid)
        second = Start(f"user {uid}:0, read-only root, one volume", uid, volume, "/data/code")
        with self.step(second.title):
            self.serve(root, config, second)

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        print(f"... {title}", flush=True)
        began, at = time.monotonic(), len(self.lines)
        yield
        self.lines.insert(at, f"ok  {time.monotonic() - began:4.0f} s  {title}")

    def note(self, text: str) -> None:
        print(f"    {text}", flush=True)
        self.lines.append(f"             {text}")

    def make_base(self) -> None:
        container = self.buildah("from", "scratch")
        root = self.buildah("mount", container)
        self.command(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, root], 900)
        shutil.rmtree(Path(root, "var/cache/apt"), ignore_errors=True)
        self.buildah("commit", "--rm", "--format", "docker", container, BASE)

    def make_context(self) -> None:
        product = Path(sys.executable).parent / "vllm-dropin"
        output = self.work / "context"
        self.command([str(product), "build", "--cpu", "--base", BASE, "--wheelhouse", "--output", str(output)], 1200)
        wheels = [path.stat().st_size for path in (output / "wheels").iterdir()]
        self.note(f"{len(wheels)} wheels, {sum(wheels) / 1e9:.1f} GB")

    def make_image(self) -> None:
        context = self.work / "context"
        build = ("bud", "--format", "docker", "--layers=false", "--pull-never", "--tag", IMAGE, str(context))
        self.command(["unshare", "--net", *self.buildah_words(*build)], 1800)
        shutil.rmtree(context)
        sizes = json.loads(self.buildah("images", "--json", IMAGE))
        self.note(f"image: {sizes[0]['size']}")

    def serve(self, root: Path, config: dict[str, Any], start: Start) -> None:
        variables = dict(item.split("=", 1) for item in config["Env"])
        inside = {
            "root": str(root),
            "volume": str(start.volume) if start.volume else None,
            "uid": start.uid,
            "cwd": config["WorkingDir"],
            "argv": [*config["Entrypoint"], *(config.get("Cmd") or [])],
            "environ": {**variables, "CODE_DIR": start.code_dir},
        }
        expect(config["User"] == "1000:0", f"the image's user is {config['User']}")
        log = self.work / "log"
        namespaces = ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "--propagation", "private"]
        with log.open("wb") as output:
            parent = subprocess.Popen(
                [*namespaces, sys.executable, __file__, "inside", json.dumps(inside)],
                stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        try:
            self.ask_everything(parent, config, start)
        except BaseException:
            print(*log.read_text(errors="replace").splitlines()[-40:], sep="\n")
            raise
        finally:
            if parent.poll() is None:
                parent.kill()
                parent.wait()

    def ask_everything(self, parent: subprocess.Popen[bytes], config: dict[str, Any], start: Start) -> None:
        began = time.monotonic()
        pid = wait_for(lambda: first_child(parent.pid), 10, parent)
        wait_for(lambda: request(pid, "GET", "/livez")[0] == 200, 60, parent)
        live = time.monotonic() - began
        wait_for(lambda: request(pid, "GET", "/readyz")[0] == 200, READY_SECONDS, parent)
        self.note(f"answers after {live:.1f} s, ready after {time.monotonic() - began:.0f} s")
        health = config["Healthcheck"]["Test"]
        expect(health[0] == "CMD" and enter(pid, health[1:]).returncode == 0, "the image's HEALTHCHECK fails")
        if start.volume is not None:
            touched = enter(pid, ["touch", "/opt/probe"])
            expect("Read-only file system" in touched.stderr, f"the root is not read-only: {touched.stderr}")
        for tool in KEPT_TOOLS:
            expect(enter(pid, ["sh", "-c", f"command -v {tool}"]).returncode == 0, f"the image has no {tool}")
        owner = Path(f"/proc/{pid}").stat().st_uid
        expect(owner == start.uid, f"it runs as {owner}")
        status, body = request(pid, "POST", "/predict/", EXAMPLE / "sample.csv")
        expect(status == 200, f"/predict/ answered {status}: {body[:300]}")
        answers = json.loads(body)["predictions"]
        expect(len(answers) == 6 and all(answers), f"the predictions are {answers}")
        self.note(f"POST /predict/: 200, {len(answers)} predictions; the first: {answers[0]!r}")
        began = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        code = parent.wait(60)
        expect(code == 0, f"the exit code after SIGTERM is {code}")
        self.note(f"SIGTERM: exit code 0 after {time.monotonic() - began:.1f} s")

    def buildah_words(self, *arguments: str) -> list[str]:
        storage = ("--root", f"{self.work}/storage", "--runroot", f"{self.work}/run", "--storage-driver", "vfs")
        policy = ("--signature-policy", f"{self.work}/policy.json") if arguments[0] in ("bud", "from", "commit") else ()
        return ["buildah", *storage, arguments[0], *policy, *arguments[1:]]

    def buildah(self, *arguments: str) -> str:
        return self.command(self.buildah_words(*arguments), 600).strip()

    def command(self, words: Sequence[str], seconds: float) -> str:
        """Its standard output. Raises Failed with the end of what it said."""
        environ = {**os.environ, "BUILDAH_ISOLATION": "chroot", "TMPDIR": f"{self.work}/tmp"}
        done = subprocess.run(
            words, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
        if done.returncode != 0:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
            raise Failed(f"{words[0]} {' '.join(words[-6:])}: exit code {done.returncode}\n{said}")
        return done.stdout


def copy_example(target: Path, uid: int) -> None:
    """The example's files without its unpacked weights, for this user."""
    shutil.copytree(EXAMPLE, target, ignore=shutil.ignore_patterns("vllm", "__pycache__", ".*"), dirs_exist_ok=True)
    for path in (target, *target.rglob("*")):
        os.chown(path, uid, 0)
        path.chmod(0o775 if path.is_dir() else 0o664)


def first_child(pid: int) -> int | None:
    """The process under `unshare`: PID 1 of the new namespace, by its number out here."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


def wait_for(happens: Callable[[], Any], seconds: float, parent: subprocess.Popen[bytes]) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := happens()):
        expect(parent.poll() is None, f"it ended with exit code {parent.poll()}")
        expect(time.monotonic() < deadline, f"nothing after {seconds} s")
        time.sleep(0.5)
    return value


_ASK = """
import sys, urllib.error, urllib.request
method, path, file = sys.argv[1:]
body = open(file, "rb").read() if file else None
question = urllib.request.Request("http://127.0.0.1:8080" + path, body, {"Content-Type": "text/csv"}, method=method)
try:
    answer = urllib.request.urlopen(question, timeout=300)
except urllib.error.HTTPError as error:
    answer = error
except OSError:
    print("0"); raise SystemExit
print(answer.status); print(answer.read().decode())
"""


def request(pid: int, method: str, path: str, file: Path | None = None) -> tuple[int, str]:
    """Status and body, asked from inside the network namespace of `pid`. Status 0: nobody listens."""
    words = ["nsenter", f"--net=/proc/{pid}/ns/net", sys.executable, "-c", _ASK, method, path, str(file or "")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=330)
    status, _, body = done.stdout.partition("\n")
    return int(status or 0), body


def enter(pid: int, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command as root inside the container of `pid`, as `docker exec` would."""
    inside = ["nsenter", "--target", str(pid), "--mount", "--pid", "--net", "--root", "--wd"]
    path = f"/opt/engine/bin:{os.defpath}:/usr/sbin:/sbin"
    return subprocess.run(
        [*inside, *words], capture_output=True, text=True, timeout=60, env={"PATH": path, "LC_ALL": "C"}
    )


def expect(truth: bool, otherwise: str) -> None:
    if not truth:
        raise Failed(otherwise)


def inside(wanted: dict[str, Any]) -> None:
    """In the new namespaces: mounts, loopback, root, user, then the image's entry point."""
    root = wanted["root"]
    mount("--bind", root, root)
    mount("-t", "proc", "proc", f"{root}/proc")
    mount("-t", "sysfs", "-o", "ro", "sysfs", f"{root}/sys")  # vLLM counts the cores of a CPU there, by lscpu
    mount("--rbind", "/dev", f"{root}/dev")
    if wanted["volume"]:
        mount("--bind", wanted["volume"], f"{root}/data")
        mount("-o", "remount,bind,ro", root)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:  # `ip link set lo up`
        fcntl.ioctl(control, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS: IFF_UP, IFF_RUNNING
    os.chroot(root)
    os.chdir(wanted["cwd"])
    os.setgroups([])
    os.setgid(0)
    os.setuid(wanted["uid"])
    ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    os.execve(wanted["argv"][0], wanted["argv"], wanted["environ"])


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def remove(work: Path) -> None:
    """Nothing is mounted there any more (all mounts were in namespaces that have ended): make sure before removing."""
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    left = [place for place in mounted if place.startswith(f"{work}/")]
    for place in sorted(left, reverse=True):
        subprocess.run(["umount", place], check=False)
    if any(line.split()[4].startswith(f"{work}/") for line in Path("/proc/self/mountinfo").read_text().splitlines()):
        print(f"image-test: something is still mounted below {work}: it is left there", file=sys.stderr)
        return
    shutil.rmtree(work, ignore_errors=True)


def main() -> int:
    missing = [tool for tool in ("buildah", "debootstrap", "unshare", "nsenter") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        print(
            f"image-test: needs root and buildah, debootstrap, util-linux (missing: {', '.join(missing) or 'root'});\n"
            "  Debian and Ubuntu: apt-get install buildah debootstrap",
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work = Path(tempfile.mkdtemp(prefix="image-test-", dir=os.environ.get("TMPDIR", "/var/tmp")))
    free = shutil.disk_usage(work).free / 1e9
    test = Test(work)
    try:
        expect(free > NEEDED_GB, f"{NEEDED_GB} GB of disk are needed, and {free:.0f} GB are free; set TMPDIR")
        (work / "tmp").mkdir()
        (work / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        test.run()
        return 0
    except (Failed, subprocess.TimeoutExpired) as error:
        test.lines.append(f"FAILED: {error}")
        return 1
    finally:
        remove(work)
        print("\nimage-test:", *test.lines, sep="\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["inside"]:
        inside(json.loads(sys.argv[2]))
    sys.exit(main())
