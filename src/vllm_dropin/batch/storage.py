"""Local and remote files through one door: found, opened, described, and their errors told in our words.

Remote means fsspec: `s3://`, `gs://`, `az://` and what belongs to them, by back ends that the extra `cloud` installs.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from vllm_dropin.errors import ConfigurationError, DropinError, InputOutputError

STDIO = "-"
SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "abfss", "memory", "file")
BLOCK = 8 << 20
"""Bytes that are fetched from a remote at a time: few enough requests, little memory."""
_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "RefreshError",
    "ClientAuthenticationError",
    "CredentialUnavailableError",
}
"""By name, because the back ends that raise them need not be installed."""
_REMEDIES = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (AWS_ENDPOINT_URL for another S3 server).",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS to a key file, or run `gcloud auth application-default login`.",
    "az": "Set AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING.",
}
_CHECKSUMS = ("ETag", "etag", "md5Hash", "crc32c", "content_md5", "generation")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")


@dataclass(frozen=True)
class Location:
    """One file or folder: a local path, or a URL with its file system. `name` is what messages call it."""

    name: str
    path: str
    remote: Any = None

    def size(self) -> int | None:
        """In bytes, where it is known."""
        with reading(self.name):
            if self.remote is None:
                return Path(self.path).stat().st_size
            size = self.remote.info(self.path).get("size")
        return None if size is None else int(size)

    def is_file(self) -> bool:
        with finding(self.name):
            return bool(Path(self.path).is_file() if self.remote is None else self.remote.isfile(self.path))

    def is_folder(self) -> bool:
        with finding(self.name):
            return bool(Path(self.path).is_dir() if self.remote is None else self.remote.isdir(self.path))

    def exists(self) -> bool:
        """Also true for pipes and devices, such as those that a shell makes for `<(command)`."""
        with finding(self.name):
            return bool(Path(self.path).exists() if self.remote is None else self.remote.exists(self.path))

    def same(self, other: Location) -> bool:
        """Whether it is one file with the other, by another name perhaps."""
        if self.remote is not None or other.remote is not None:
            return self.name == other.name
        with finding(self.name):
            return Path(self.path).resolve() == Path(other.path).resolve()

    def below(self, folder: str) -> bool:
        """Whether it is a local file in this folder or deeper."""
        return self.remote is None and Path(self.path).resolve().is_relative_to(Path(folder).resolve())

    def children(self) -> list[Location]:
        """The files of a folder by name; those whose name begins with `.` or `_` are left out."""
        with finding(self.name):
            if self.remote is None:
                paths = [str(child) for child in Path(self.path).iterdir() if child.is_file()]
            else:
                entries = self.remote.ls(self.path, detail=True)
                paths = [entry["name"] for entry in entries if entry["type"] == "file"]
        visible = (path for path in sorted(paths) if not path.rpartition("/")[2].startswith((".", "_")))
        return [self._beside(path) for path in visible]

    def matches(self) -> list[Location]:
        """The files that the path means as a glob, by name."""
        with finding(self.name):
            if self.remote is None:
                found = glob.glob(self.path, recursive=True)  # noqa: PTH207 (the pattern may be absolute)
                paths = [path for path in found if Path(path).is_file()]
            else:
                entries = self.remote.glob(self.path, detail=True)
                paths = [path for path, entry in entries.items() if entry["type"] == "file"]
        return [self._beside(path) for path in sorted(paths)]

    def _beside(self, path: str) -> Location:
        return Location(path if self.remote is None else self.remote.unstrip_protocol(path), path, self.remote)

    def open(self, block: int = BLOCK) -> BinaryIO:
        """Its bytes. Of a remote file `block` bytes more than were asked for are fetched at a time; 0: no more."""
        with reading(self.name):
            if self.remote is None:
                return Path(self.path).open("rb")
            how = {"block_size": block, "cache_type": "readahead"} if block else {"cache_type": "none"}
            return cast(BinaryIO, self.remote.open(self.path, "rb", **how))

    def create(self) -> IO[bytes]:
        """For writing, from nothing. A remote file appears as a whole when it is closed."""
        with writing(self.name):
            if self.remote is None:
                return Path(self.path).open("wb")
            return cast(IO[bytes], self.remote.open(self.path, "wb", block_size=BLOCK))

    def marks(self) -> dict[str, str]:
        """What tells a remote file from another one without reading it: size and checksum, else size and times."""
        with reading(self.name):
            self.remote.invalidate_cache()
            info = self.remote.info(self.path)
        found = {key: str(info[key]) for key in _CHECKSUMS if info.get(key)}
        if not found:
            found = {key: str(info[key]) for key in _TIMES if info.get(key)}
        return {"size": str(info.get("size")), **found}


def locate(name: str) -> Location:
    """Where `name` points. Raises ConfigurationError when it is a URL that nothing here can read."""
    scheme = _scheme(name)
    if scheme is None:
        return Location(name, name)
    if scheme == "file":
        return Location(name, re.sub(r"^file://(localhost(?=/))?", "", name))
    if scheme not in SCHEMES:
        known = ", ".join(f"{known}://" for known in SCHEMES)
        raise ConfigurationError(f"{name}: {scheme}:// is not supported", f"Use a local path, or one of {known}.")
    with finding(name):
        remote = _file_system(scheme, name)
        return Location(name, remote._strip_protocol(name), remote)


def standard_input() -> BinaryIO:
    return sys.stdin.buffer


def _file_system(scheme: str, name: str) -> Any:
    import fsspec  # here: a run on local files needs none of it, and it costs 60 ms

    try:
        return fsspec.core.url_to_fs(name)[0]
    except ImportError as error:
        raise ConfigurationError(
            f"{name}: the package that reads {scheme}:// is missing ({error.name or error})",
            "pip install 'vllm-dropin[cloud]'",
        ) from error


def _scheme(name: str) -> str | None:
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", name)
    return found[1].lower() if found else None


@contextlib.contextmanager
def finding(name: str) -> Iterator[None]:
    """While looking for what the user named: refused access is the configuration's fault."""
    with _translated(name, "read"):
        yield


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """While reading it: whatever the disk, the remote or a codec raises becomes an InputOutputError with its name."""
    with _translated(name, "read"):
        yield


@contextlib.contextmanager
def writing(name: str) -> Iterator[None]:
    """While writing it."""
    with _translated(name, "written"):
        yield


@contextlib.contextmanager
def _translated(name: str, done: str) -> Iterator[None]:
    try:
        yield
    except DropinError:
        raise
    except Exception as error:
        # Each remote has a hierarchy of its own, which need not be installed: there is nothing narrower to catch.
        local = isinstance(error, OSError | EOFError | zlib.error) or type(error).__module__.startswith("pyarrow")
        if not local and _scheme(name) is None:
            raise
        raise _told(name, done, error) from error


def _told(name: str, done: str, error: Exception) -> DropinError:
    scheme = {"gcs": "gs", "abfs": "az", "abfss": "az"}.get(_scheme(name) or "", _scheme(name))
    if _no_credentials(error):
        return ConfigurationError(
            f"{name} can't be {done}: no credentials for {scheme}://", _REMEDIES.get(scheme or "", "")
        )
    if isinstance(error, PermissionError):
        where = (
            "The credentials lack the right to do that." if scheme else "Check the rights of the file and its folders."
        )
        return ConfigurationError(f"{name} can't be {done}: {_reason(error)}", where)
    if isinstance(error, FileNotFoundError) and done == "written":
        return ConfigurationError(f"{name} can't be written: its folder or bucket does not exist", "Create it first.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputOutputError(
            f"{name} can't be written: the disk is full", "Free some space and give the same command again."
        )
    remedy = (
        "Try the same command again when it is reachable."
        if scheme
        else "Check the file; it may be cut short or damaged."
    )
    if done == "written":
        remedy = "Give the same command again when that is put right."
    return InputOutputError(f"{name} can't be {done}: {_reason(error)}", remedy)


def _no_credentials(error: BaseException | None) -> bool:
    if error is None:
        return False
    named = type(error).__name__ in _CREDENTIALS or "Must provide either a connection_string" in str(error)
    return named or "Anonymous caller" in str(error) or _no_credentials(error.__cause__)


def _reason(error: Exception) -> str:
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    first = (words or type(error).__name__).strip().splitlines()[0]
    return first[:300]
