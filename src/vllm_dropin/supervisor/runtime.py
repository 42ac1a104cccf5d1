"""The runtime folder (private, of one process; those of killed ones are swept) and the public socket."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from vllm_dropin.errors import AddressError, ConfigurationError, InputOutputError
from vllm_dropin.logging import get

log = get("runtime")

PREFIX = "vllm-dropin-"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
SOCKET_PATH_LIMIT = 100
"""Bytes: a unix socket's path has 108 on Linux, and vLLM adds to it for its own sockets."""

ROOM = 1 << 20
"""Bytes that the files of a runtime folder never exceed: counters, the workers' configuration, /status."""

BACKLOG = 2048


@dataclass(frozen=True)
class RuntimeFolder:
    """A 0700 folder that lives as long as the supervisor: engine socket, shared state, worker configuration.

    `lock` is an open descriptor that holds a shared lock on it. It says that we live: `sweep` removes the folders that
    nobody has locked, and systemd-tmpfiles, which empties the temporary folder of what is ten days old, leaves a locked
    one alone.
    """

    path: Path
    lock: int | None = field(default=None, compare=False)

    @classmethod
    def create(cls, wanted: Path | None) -> RuntimeFolder:
        """Make a new private folder below `wanted`, or below the temporary folder when that path is too long.

        What killed processes have left there is removed. Raises InputOutputError when the disk is full,
        ConfigurationError when neither can be written.
        """
        base = wanted or Path(tempfile.gettempdir())
        if len(os.fsencode(base)) + len("/vllm-dropin-xxxxxxxx/engine.sock") > SOCKET_PATH_LIMIT:
            base = Path("/tmp")  # noqa: S108 (mkdtemp makes it private)
        try:
            base.mkdir(parents=True, exist_ok=True)
            sweep(base)
            return cls._make(base)
        except OSError as error:
            if error.errno in _FULL:
                raise InputOutputError(
                    f"there is no room for a runtime folder in {base}: {error.strerror}",
                    "Free some space there, or give another folder with --runtime-dir.",
                ) from error
            raise ConfigurationError(
                f"cannot make a runtime folder in {base}: {error.strerror}",
                "Give a writable folder with --runtime-dir.",
            ) from error

    @classmethod
    def _make(cls, base: Path) -> RuntimeFolder:
        while True:
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
            with contextlib.suppress(FileNotFoundError):  # another's sweep came before our lock
                folder = cls(path, _lock(path))
                break
        try:
            _take_room(path)
        except OSError as error:
            if error.errno in _FULL:  # a file system may refuse for other reasons
                folder.remove()
                raise
        return folder

    @property
    def engine_socket(self) -> Path:
        return self.path / "engine.sock"

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def gateway_config(self) -> Path:
        return self.path / "gateway.json"

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self.lock is not None:
            os.close(self.lock)


def _lock(folder: Path) -> int:
    """Lock a new folder. Raises FileNotFoundError when it has gone meanwhile."""
    descriptor = os.open(folder, _FOLDER)
    with contextlib.suppress(OSError):  # a file system without locks, and most likely without a cleaner
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    if not folder.exists():
        os.close(descriptor)
        raise FileNotFoundError(folder)
    return descriptor


def _take_room(folder: Path) -> None:
    """Take the room that the files will need, and give it back. Raises OSError.

    On a full tmpfs the first touch of the mapped state file would kill us by SIGBUS.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, ROOM)


def sweep(base: Path) -> None:
    """Remove the runtime folders below `base` whose processes are dead: a SIGKILL leaves sockets and a TLS key there.

    Only what is certainly ours and dead goes: a private folder of this user, no link, that nobody holds a lock on.
    """
    for path in base.glob(f"{PREFIX}????????"):
        if path.name.removeprefix(PREFIX).isdigit():
            continue  # a user's number: the state folder of last resort (settings/resolve.py)
        with contextlib.suppress(OSError):  # somebody lives there, it is not ours, or another has just swept it
            descriptor = os.open(path, _FOLDER)
            try:
                found = os.fstat(descriptor)
                if found.st_uid == os.geteuid() and not found.st_mode & 0o077:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
                    log.info("removed %s, which a killed process had left", path)
            finally:
                os.close(descriptor)


def listen(host: str, port: int) -> socket.socket:
    """Bind and listen on the public address, without SO_REUSEPORT: a second instance must not share the traffic.

    Raises AddressError, with what to do, when the address is taken or is not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4]
        public = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise AddressError(f"cannot listen on {host}: {error.strerror}", "Check --address.") from error
    try:
        public.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            public.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
        public.bind(address)
        public.listen(BACKLOG)
    except OSError as error:
        public.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressError(
                f"{host}:{port} is taken by another process",
                "Stop that process or choose another port with --address.",
            ) from error
        if error.errno == errno.EACCES:
            raise AddressError(
                f"not allowed to listen on {host}:{port}", "Choose a port above 1023 with --address."
            ) from error
        raise AddressError(f"cannot listen on {host}:{port}: {error.strerror}", "Check --address.") from error
    return public
