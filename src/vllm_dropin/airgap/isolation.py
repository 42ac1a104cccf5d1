"""A network without a way out, and ears in it: namespaces of one process, entered without any program's help.

All addresses are made addresses of this machine (one route), so that a connection to any of them is refused at once,
and the packet that asked for it passes the loopback device, where it is seen. The same goes for questions to a name
server: nobody answers, and the name is known.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import ipaddress
import os
import re
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_NEW_MOUNTS, _NEW_USER, _NEW_NETWORK = 0x00020000, 0x10000000, 0x40000000
READ_ONLY = 1
_BIND, _REC, _PRIVATE = 0x1000, 0x4000, 0x40000
_LIBC = ctypes.CDLL(None, use_errno=True)
_OCTAL = re.compile(r"\\([0-7]{3})")
"""How mountinfo writes a blank in a name."""
_NAMES = 53
"""The port of name servers."""


@dataclass(frozen=True)
class Contact:
    """Somebody wanted out: to a host by its name (then `port` is not known) or to a port of an address."""

    host: str
    port: int | None
    at: float
    """Seconds since 1970."""

    def __str__(self) -> str:
        if self.port is None:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def enter() -> None:
    """Move this process, which may have one thread only, into new namespaces: mounts and a network of loopback.

    Needs root, or a kernel where users may have namespaces of their own. Raises OSError where neither is so.
    """
    user, group = os.geteuid(), os.getegid()
    try:
        _unshare(_NEW_NETWORK | _NEW_MOUNTS)
    except PermissionError:
        _unshare(_NEW_USER | _NEW_NETWORK | _NEW_MOUNTS)
        with contextlib.suppress(FileNotFoundError):
            Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    mount("none", "/", flags=_REC | _PRIVATE)
    _raise_loopback()
    _keep_here(socket.AF_INET, "127.0.0.1")
    with contextlib.suppress(OSError):  # a kernel without IPv6
        _keep_here(socket.AF_INET6, "::1")


def mount(source: Path | str, target: Path | str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2). Raises OSError."""
    words = [os.fsencode(word) or None for word in (source, target, kind)]
    if _LIBC.mount(*words, ctypes.c_ulong(flags), options.encode() or None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def bind(source: Path | str, target: Path | str, recursive: bool = False) -> None:
    """Show `source` at `target` too. Raises OSError."""
    mount(source, target, flags=_BIND | (_REC if recursive else 0))


def shield(folder: Path, scratch: Path) -> bool:
    """Let everything that is written into `folder` from now on land in `scratch`. False where that can't be had."""
    if not _all_known(folder) or _mounted_below(folder):
        return False
    for name in ("upper", "work"):
        (scratch / name).mkdir(parents=True)
    (scratch / "upper").chmod(folder.stat().st_mode & 0o7777)
    (scratch / "lower").symlink_to(folder)  # the folder's own name may have a comma or a colon
    options = ",".join(f"{name}dir={scratch}/{name}" for name in ("lower", "upper", "work"))
    try:
        mount("overlay", folder, "overlay", options=options)
    except OSError:
        return False
    return True


def forget_names(scratch: Path) -> None:
    """Hide what this machine knows of names: its hosts, its name servers and services that answer for them.

    Where the kernel refuses, names are heard of all the same, but a name in the machine's own hosts file is not.
    """
    for file, text in name_files().items():
        ours, theirs = scratch / file, Path("/etc") / file
        ours.write_text(text)
        if theirs.is_file():  # without one, the C library asks the name server of this machine anyway
            with contextlib.suppress(OSError):
                bind(ours, theirs.resolve())


def name_files() -> dict[str, str]:
    """What /etc is to have in this network."""
    return {
        "hosts": f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {socket.gethostname()}\n",
        "resolv.conf": "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n",
    }


class Watch:
    """Hears everything that passes the loopback device and wants to another host. To be made before anybody speaks."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))  # ETH_P_ALL
        self._socket.bind(("lo", 0x0003))
        self._socket.settimeout(0.2)
        self._found: dict[tuple[str, int | None], Contact] = {}
        self._ended = False
        self._pool = ThreadPoolExecutor(1, "watch")

    def __enter__(self) -> Watch:
        self._listening = self._pool.submit(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        self._pool.shutdown()
        self._socket.close()
        self._listening.result()  # raises what went wrong: a deaf watch must not pass for silence

    @property
    def contacts(self) -> tuple[Contact, ...]:
        """Each host once, in the order of their first time."""
        return tuple(self._found.values())

    def _listen(self) -> None:
        quiet = False
        while not (self._ended and quiet):  # what has been sent by the end is still heard
            try:
                packet, address = self._socket.recvfrom(2048)
            except TimeoutError:
                quiet = True
                continue
            quiet = False
            if address[2] == socket.PACKET_OUTGOING and (wanted := destination(packet)) is not None:
                self._found.setdefault(wanted, Contact(*wanted, time.time()))


def destination(packet: bytes) -> tuple[str, int | None] | None:
    """The host that an IP packet asks for: the name in a question, or the address of a TCP start or of UDP.

    None for what stays here, for answers, and for what is cut off.
    """
    try:
        return _destination(packet)
    except (IndexError, struct.error, ValueError):
        return None


def _destination(packet: bytes) -> tuple[str, int | None] | None:
    version = packet[0] >> 4
    if version == 4:
        protocol, address, payload = packet[9], ipaddress.ip_address(packet[16:20]), packet[(packet[0] & 15) * 4 :]
    else:
        protocol, address, payload = packet[6], ipaddress.ip_address(packet[24:40]), packet[40:]
    if protocol not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        return None
    (port,) = struct.unpack_from("!H", payload, 2)
    if protocol == socket.IPPROTO_UDP and port == _NAMES:
        name = _question(payload[8:])
        return None if _local(name) else (name, None)
    if protocol == socket.IPPROTO_TCP and payload[13] & 0x12 != 0x02:  # SYN without ACK: a connection begins
        return None
    if (
        address.is_loopback
        or address.is_multicast
        or address.is_unspecified
        or (address.version == 6 and address.is_link_local)
    ):
        return None
    return str(address), port


def _question(message: bytes) -> str:
    """The name in a DNS question (RFC 1035, section 4)."""
    labels, at = [], 12
    while (length := message[at]) != 0:
        if length > 63 or at + length >= len(message):
            raise ValueError("no plain name")
        # Escaped: what is asked for may be anything, and is shown in a terminal.
        labels.append(ascii(message[at + 1 : at + 1 + length].decode("latin-1"))[1:-1])
        at += length + 1
    return ".".join(labels)


def _local(name: str) -> bool:
    return name in ("", "localhost", socket.gethostname()) or name.endswith(
        (".localhost", ".in-addr.arpa", ".ip6.arpa")
    )


def _all_known(folder: Path) -> bool:
    """Whether this namespace knows the owner of every file: the kernel copies no other, so it could not be changed."""
    known = [Path(f"/proc/self/{kind}_map").read_text().split() for kind in ("uid", "gid")]
    if any(len(ids) != 3 or ids[2] != "1" for ids in known):
        return True  # root, or a container's root
    owner = tuple(int(ids[0]) for ids in known)
    found = (path.lstat() for path in (folder, *folder.rglob("*")))
    return all((state.st_uid, state.st_gid) == owner for state in found)


def _mounted_below(folder: Path) -> bool:
    """Whether something is mounted in the folder, such as a volume with the weights: an overlay would hide it."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    places = (Path(_OCTAL.sub(lambda found: chr(int(found[1], 8)), line.split()[4])) for line in lines)
    return any(place != folder and place.is_relative_to(folder) for place in places)


def _unshare(flags: int) -> None:
    if _LIBC.unshare(flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _raise_loopback() -> None:
    """`ip link set lo up`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS: IFF_UP, IFF_RUNNING


def _keep_here(family: socket.AddressFamily, source: str) -> None:
    """`ip route add local default dev lo src SOURCE`, by rtnetlink(7). Raises OSError.

    Without the source, a connection would seem to come from the address that it goes to.
    """
    attributes = b"".join(
        _attribute(kind, data)
        for kind, data in (
            (4, struct.pack("=I", socket.if_nametoindex("lo"))),  # RTA_OIF
            (7, socket.inet_pton(family, source)),  # RTA_PREFSRC
        )
    )
    # rtmsg: table local (255), protocol boot (3), scope host (254), type local (2)
    body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, 255, 3, 254, 2, 0) + attributes
    # nlmsghdr: RTM_NEWROUTE (24), request, with an answer, create (0x405)
    head = struct.pack("=IHHII", 16 + len(body), 24, 0x405, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(5)
        netlink.sendto(head + body, (0, 0))
        (error,) = struct.unpack_from("=i", netlink.recv(4096), 16)
    if error:
        raise OSError(-error, os.strerror(-error), f"route {source}")


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)
