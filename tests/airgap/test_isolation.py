"""The network without a way out, as root and as a user, in processes of their own."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_dropin.airgap.isolation import Contact, destination

PROGRAM = """
import encodings.idna, json, os, socket, sys, time
from pathlib import Path
from vllm_dropin.airgap import isolation

scratch, folder, user = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
if user:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    isolation._LIBC.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as after the exec of a user's own process
try:
    isolation.enter()
except OSError as error:
    print(json.dumps({"refused": str(error)}))
    sys.exit()
isolation.forget_names(scratch)
shielded = isolation.shield(folder, scratch / "layers")
(folder / "old").write_text("new")
(folder / "made").mkdir()
began, failures = time.monotonic(), []
with isolation.Watch() as watch:
    for host, port in (
        ("example.com", 80), ("example.com", 443), ("93.184.216.34", 8000), ("93.184.216.34", 8000),
        ("2606:2800:220:1::1", 443), ("169.254.169.254", 80), ("localhost", 1), ("127.0.0.1", 2),
        (socket.gethostname(), 3),
    ):
        try:
            socket.create_connection((host, port), timeout=5)
        except OSError as error:
            failures.append(type(error).__name__)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.connect(("8.8.8.8", 80))  # how programs ask for their own address: nothing is sent
        own = datagrams.getsockname()[0]
        datagrams.sendto(b"time?", ("192.0.2.7", 123))
        datagrams.sendto(b"anybody?", ("239.0.0.1", 9999))
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
print(json.dumps({
    "contacts": [str(contact) for contact in watch.contacts], "failures": failures, "own": own,
    "seconds": time.monotonic() - began, "shielded": shielded, "uid": os.getuid(),
    "resolver": Path("/etc/resolv.conf").read_text() if Path("/etc/resolv.conf").exists() else "",
}))
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """Where another user can reach it, which is not so with tmp_path."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def isolated(place: Path, user: int) -> dict[str, Any]:
    if user and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    scratch, folder = place / "scratch", place / "folder, with: odd name"
    for path in (scratch, folder):
        path.mkdir(exist_ok=True)
        (path / "old").write_text("old")
        for part in (path, path / "old"):
            os.chown(part, user or -1, user or -1)
    command = [sys.executable, "-c", PROGRAM, str(scratch), str(folder), str(user)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    if "refused" in found:
        pytest.skip(f"no namespaces here: {found['refused']}")
    return {**found, "folder": folder, "scratch": scratch}


@pytest.mark.parametrize("user", [0, 12345])
def test_who_wants_out_is_heard_and_gets_nowhere(place, user):
    resolver = Path("/etc/resolv.conf").read_bytes() if Path("/etc/resolv.conf").exists() else b""
    found = isolated(place, user)
    assert found["contacts"] == [
        "example.com", "93.184.216.34:8000", "[2606:2800:220:1::1]:443", "169.254.169.254:80", "192.0.2.7:123",
    ]  # fmt: skip
    assert len(found["failures"]) == 9
    assert found["seconds"] < 5  # refused at once, not after a timeout
    assert found["own"] == "127.0.0.1"
    assert found["uid"] == (user or os.getuid())
    assert not found["resolver"] or found["resolver"].startswith("nameserver 127.0.0.1\n")
    assert not resolver or Path("/etc/resolv.conf").read_bytes() == resolver


@pytest.mark.parametrize("user", [0, 12345])
def test_what_is_written_into_a_shielded_folder_stays_out_of_it(place, user):
    found = isolated(place, user)
    if not found["shielded"]:
        pytest.skip("the kernel or the file system has no overlay for us")
    assert (found["folder"] / "old").read_text() == "old"
    assert not (found["folder"] / "made").exists()
    assert (found["scratch"] / "layers" / "upper" / "old").read_text() == "new"


def test_a_folder_with_files_of_others_is_not_shielded_from_a_user(place):
    """The kernel would not let them be changed, which without the shield may be allowed."""
    (place / "folder, with: odd name").mkdir()
    (place / "folder, with: odd name" / "of root").touch()
    found = isolated(place, 12345)
    assert not found["shielded"]
    assert (found["folder"] / "old").read_text() == "new"


def test_a_folder_with_a_volume_in_it_is_not_shielded(place):
    """An overlay would show the folder below the volume."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    folder, scratch = place / "a folder", place / "scratch"
    (folder / "vllm").mkdir(parents=True)
    scratch.mkdir()
    program = (
        "import sys; from pathlib import Path; from vllm_dropin.airgap import isolation; isolation.enter(); "
        "print(isolation.shield(Path(sys.argv[1]), Path(sys.argv[2])), *Path(sys.argv[1], 'vllm').iterdir())"
    )
    mounts = 'mount -t tmpfs tmpfs "$1/vllm" && touch "$1/vllm/weights" && exec "$0" -c "$3" "$1" "$2"'
    command = ["unshare", "-m", "sh", "-c", mounts, sys.executable, str(folder), str(scratch), program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == (f"False {folder}/vllm/weights\n", "")


def ipv4(target: str, protocol: int, payload: bytes, options: bytes = b"") -> bytes:
    words = 5 + len(options) // 4
    head = struct.pack("!BBHHHBBH4s4s", 64 + words, 0, 0, 0, 0, 64, protocol, 0, bytes(4), socket.inet_aton(target))
    return head + options + payload


def ipv6(target: str, protocol: int, payload: bytes) -> bytes:
    head = struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64)
    return head + bytes(16) + socket.inet_pton(socket.AF_INET6, target) + payload


def tcp(port: int, flags: int) -> bytes:
    return struct.pack("!HHIIBBHHH", 40000, port, 1, 0, 5 << 4, flags, 1024, 0, 0)


def question(*labels: bytes, port: int = 53) -> bytes:
    name = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    return struct.pack("!HHHH", 40000, port, 0, 0) + struct.pack("!HHHHHH", 7, 256, 1, 0, 0, 0) + name + b"\0\1\0\1"


SYN, ACK = 2, 16


@pytest.mark.parametrize(
    ("packet", "host"),
    [
        (ipv4("192.0.2.1", 6, tcp(443, SYN)), ("192.0.2.1", 443)),
        (ipv4("192.0.2.1", 6, tcp(443, SYN), options=bytes(8)), ("192.0.2.1", 443)),
        (ipv4("192.0.2.1", 6, tcp(443, SYN | ACK)), None),
        (ipv4("192.0.2.1", 6, tcp(443, ACK)), None),
        (ipv4("127.0.0.5", 6, tcp(443, SYN)), None),
        (ipv4("224.0.0.251", 17, question(b"x", port=5353)), None),
        (ipv4("192.0.2.1", 1, bytes(16)), None),
        (ipv4("127.0.0.53", 17, question(b"huggingface", b"co")), ("huggingface.co", None)),
        (ipv4("192.0.2.53", 17, question(b"a", b"example")), ("a.example", None)),
        (ipv4("127.0.0.1", 17, question(b"localhost")), None),
        (ipv4("127.0.0.1", 17, question(b"1", b"0", b"0", b"127", b"in-addr", b"arpa")), None),
        (ipv4("127.0.0.1", 17, question(b"\xff\x1b")), ("\\xff\\x1b", None)),
        (ipv6("2001:db8::1", 6, tcp(80, SYN)), ("2001:db8::1", 80)),
        (ipv6("::1", 6, tcp(80, SYN)), None),
        (ipv6("fe80::1", 17, question(b"x", port=80)), None),
        (b"", None),
    ],
)
def test_what_a_packet_asks_for(packet, host):
    assert destination(packet) == host


@pytest.mark.parametrize(
    "packet", [ipv4("127.0.0.1", 17, question(b"a" * 40, b"example")), ipv6("2001:db8::1", 6, tcp(80, SYN))]
)
def test_a_packet_that_is_cut_off_is_no_accident(packet):
    for length in range(len(packet) - 5):
        destination(packet[:length])
    loop = bytearray(packet)
    loop[-20:] = b"\xc0" * 20
    destination(bytes(loop))


def test_a_contact_reads_like_an_address():
    assert str(Contact("example.com", None, 0)) == "example.com"
    assert str(Contact("192.0.2.1", 80, 0)) == "192.0.2.1:80"
    assert str(Contact("2001:db8::1", 80, 0)) == "[2001:db8::1]:80"
