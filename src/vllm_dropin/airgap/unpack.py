"""Unpacks an archive that may be hostile: an allow-list of what an entry may be, and nothing outside the folder.

tarfile reads the headers; what is written, and where, is decided here. Its own `data` filter would not do: it has no
caps, takes a name twice, and ends without a word at a header that is broken. Nothing is ever written through a link:
no entry may be below one, and when all are there, each must lead to something inside.
"""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

from vllm_dropin.errors import ConfigurationError, InputOutputError

_CHUNK = 1 << 20
"""Bytes: the longest single read. tarfile holds a long name or a pax header in memory, so theirs are no longer."""
_GZIP = b"\x1f\x8b"
_BLOCK = 512
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REPACK = "Pack the folder again, by `tar -czf FILE -C FOLDER .`."
_KINDS = {
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


@dataclass(frozen=True)
class Caps:
    """The most that an archive may hold: bytes, entries, and bytes for each packed byte once `ratio_from` are out.

    Weights and wheels hardly shrink. A bomb of gzip reaches 1,032 to 1.
    """

    size: int = 4 << 40
    entries: int = 100_000
    ratio: int = 100
    ratio_from: int = 64 << 20


CAPS = Caps()


@dataclass(frozen=True)
class Unpacked:
    """A folder, its number of files and their bytes."""

    folder: Path
    files: int
    size: int


def unpack(archive: Path, folder: Path, caps: Caps = CAPS) -> Unpacked:
    """Unpack a .tar or .tar.gz into a new `folder`, which is there whole or not at all.

    Permissions are 0644 and 0755, for folders and what its owner could run; owners and times are dropped. Raises
    ConfigurationError, which names the entry, for what is not allowed and for a broken archive; InputOutputError when
    it can't be read or the disk is full.
    """
    try:
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    except OSError as error:
        raise InputOutputError(
            f"cannot unpack into {folder}: {error.strerror}", "Set TMPDIR to another disk."
        ) from None
    try:
        with archive.open("rb") as raw:
            unpacked = _Unpacking(archive.name, _Stream(raw, caps), draft, caps).run()
        draft.chmod(0o755)
        draft.rename(folder)
    except _Refused as refusal:
        raise ConfigurationError(f"{archive.name}: {refusal.message}", refusal.remedy) from None
    except (
        tarfile.TarError,
        gzip.BadGzipFile,
        zlib.error,
        EOFError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ConfigurationError(
            f"{archive.name} is cut off or is no tar archive: {error}", "Copy it again and compare its SHA-256."
        ) from None
    except OSError as error:
        full = error.errno in _NO_ROOM
        raise InputOutputError(
            f"cannot unpack {archive}: {error.strerror}",
            "Free some space, or set TMPDIR to a larger disk." if full else "Check the file and its permissions.",
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Unpacked(folder, unpacked.files, unpacked.size)


def survey(folder: Path) -> Unpacked:
    """The same view of a folder that is used as it is. Raises ConfigurationError for links out and special files."""
    files = size = 0
    root = folder.resolve()
    for path in walk(folder):
        mode = path.lstat().st_mode
        name = path.relative_to(folder)
        if stat.S_ISLNK(mode):
            if not path.exists() or not path.resolve().is_relative_to(root):
                raise ConfigurationError(
                    f"{name} in {folder} is a link to {path.readlink()}, which is not in the folder",
                    "Put the file itself there.",
                )
        elif stat.S_ISREG(mode):
            files, size = files + 1, size + path.lstat().st_size
        else:
            raise ConfigurationError(f"{name} in {folder} is no file, folder or link", "Take it out of the folder.")
    return Unpacked(folder, files, size)


def walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder but the folders themselves, sorted, links not followed."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        folders[:] = sorted(set(folders).difference(links))
        yield from (Path(place) / name for name in sorted([*names, *links]))


class _Refused(Exception):
    """What is wrong with the archive, without its name."""

    def __init__(self, message: str, remedy: str = _REPACK) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class _Stream:
    """The bytes of the tar, forward only and capped: a file as far as tarfile needs one."""

    def __init__(self, raw: BinaryIO, caps: Caps) -> None:
        packed = raw.read(len(_GZIP)) == _GZIP
        raw.seek(0)
        self._raw = raw
        self._source: IO[bytes] = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if packed else raw
        self._caps = caps
        self._at = 0
        self.last = b""

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= _CHUNK:
            raise _Refused(f"a header at byte {self._at:,} claims to be {count:,} bytes long")
        self.last = self._source.read(count)
        self._at += len(self.last)
        caps, packed = self._caps, self._raw.tell()
        if self._at > caps.size + _CHUNK:
            raise _Refused(f"it unpacks to more than {caps.size:,} bytes")
        if self._at > caps.ratio_from and self._at > caps.ratio * packed:
            raise _Refused(f"{packed:,} bytes unpack to more than {self._at:,}: a decompression bomb", "Do not use it.")
        return self.last

    def seek(self, position: int) -> int:
        if position < self._at:  # a negative size: tarfile would read in circles
            raise _Refused(f"a header before byte {self._at:,} leads backward")
        while self._at < position and self.read(min(_CHUNK, position - self._at)):
            pass
        return self._at


class _Unpacking:
    """One archive on its way into `root`."""

    def __init__(self, title: str, stream: _Stream, root: Path, caps: Caps) -> None:
        self._title = title
        self._stream = stream
        self._root = root
        self._caps = caps
        self._kinds: dict[tuple[str, ...], bytes] = {(): tarfile.DIRTYPE}
        self._links: list[Path] = []
        self._files = 0
        self._size = 0

    def run(self) -> Unpacked:
        with tarfile.open(fileobj=cast(IO[bytes], self._stream), mode="r:") as tar:
            for number, entry in enumerate(tar, start=1):
                if number > self._caps.entries:
                    raise _Refused(f"it has more than {self._caps.entries:,} entries")
                self._take(entry)
        self._expect_the_end()
        for path in self._links:
            self._check_link(path)
        return Unpacked(self._root, self._files, self._size)

    def _take(self, entry: tarfile.TarInfo) -> None:
        parts = _parts(entry.name)
        kind = tarfile.REGTYPE if entry.type == tarfile.AREGTYPE else entry.type
        known = self._kinds.get(parts)
        if known is not None and not (known == kind == tarfile.DIRTYPE):
            raise _Refused(f"{_shown(entry.name)} is there twice")
        for depth in range(len(parts)):
            if self._kinds.setdefault(parts[:depth], tarfile.DIRTYPE) != tarfile.DIRTYPE:
                raise _Refused(f"{_shown(entry.name)} is below {'/'.join(parts[:depth])}, which is no folder")
        self._kinds[parts] = kind
        path = self._root.joinpath(*parts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == tarfile.DIRTYPE:
                path.mkdir(exist_ok=True)
            elif kind == tarfile.REGTYPE and not entry.issparse():
                self._write(entry, path)
            elif kind == tarfile.LNKTYPE:
                self._link_hard(entry, path)
            elif kind == tarfile.SYMTYPE:
                self._link(entry, path)
            else:
                what = "a sparse file" if entry.issparse() else _KINDS.get(kind, f"an entry of type {kind!r}")
                raise _Refused(f"{_shown(entry.name)} is {what}; only files, folders and links inside are unpacked")
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ):
                raise _Refused(f"{_shown(entry.name)} can't be a name of a file: {error.strerror}") from None
            raise

    def _write(self, entry: tarfile.TarInfo, path: Path) -> None:
        if not 0 <= entry.size <= self._caps.size - self._size:
            what = "more than is allowed" if entry.size > 0 else "no size"
            raise _Refused(f"{_shown(entry.name)} would be {entry.size:,} bytes: {what}")
        if entry.size > shutil.disk_usage(self._root).free:
            raise OSError(errno.ENOSPC, f"{_shown(entry.name)} of {entry.size:,} bytes does not fit on the disk")
        left = entry.size
        mode = 0o755 if entry.mode & 0o100 else 0o644
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            while left and (data := self._stream.read(min(_CHUNK, left))):
                file.write(data)
                left -= len(data)
            os.fchmod(file.fileno(), mode)
        if left:
            raise _Refused(f"it is cut off in {_shown(entry.name)}: {left:,} bytes are missing", "Copy it again.")
        self._files += 1
        self._size += entry.size

    def _link_hard(self, entry: tarfile.TarInfo, path: Path) -> None:
        target = _parts(entry.linkname)
        if self._kinds.get(target) != tarfile.REGTYPE:
            raise _Refused(
                f"{_shown(entry.name)} is a hard link to {_shown(entry.linkname)}, which is no file before it"
            )
        path.hardlink_to(self._root.joinpath(*target))
        self._files += 1

    def _link(self, entry: tarfile.TarInfo, path: Path) -> None:
        _check_text(entry.linkname)
        if entry.linkname.startswith("/"):
            raise _Refused(
                f"{_shown(entry.name)} is a link to {_shown(entry.linkname)}, out of the folder", _DEREFERENCE
            )
        self._links.append(path)
        path.symlink_to(entry.linkname)

    def _check_link(self, path: Path) -> None:
        """Where it really leads, over other links too: by the kernel's rules, not by the look of the names."""
        name, target = path.relative_to(self._root), str(path.readlink())
        try:
            place = Path(os.path.realpath(path, strict=True))
        except OSError as error:
            raise _Refused(f"{name} is a link to {_shown(target)}: {error.strerror}", _DEREFERENCE) from None
        if not place.is_relative_to(os.path.realpath(self._root)):
            raise _Refused(f"{name} is a link to {_shown(target)}, out of the folder", _DEREFERENCE)

    def _expect_the_end(self) -> None:
        """tarfile takes a broken header for the end; the real one is a block of zeros, with zeros behind it."""
        if self._stream.last != bytes(_BLOCK):
            raise _Refused(f"it is cut off or broken at byte {self._stream.tell():,}", "Copy it again.")
        while data := self._stream.read(_CHUNK):
            if data.strip(b"\0"):
                raise _Refused("more data follows the end of the archive, which other programs may unpack")


_DEREFERENCE = "Put the files themselves in place of links: tar --dereference."


def _parts(name: str) -> tuple[str, ...]:
    """The name's parts below the folder. Raises _Refused for one that leads anywhere else."""
    _check_text(name)
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if name.startswith("/"):
        raise _Refused(f"{_shown(name)} is an absolute name")
    if ".." in parts:
        raise _Refused(f"{_shown(name)} leads out of the folder")
    return parts


def _check_text(name: str) -> None:
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise _Refused(f"{_shown(name)} has a control character in its name")
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise _Refused(f"{_shown(name)} is no UTF-8")


def _shown(name: str) -> str:
    """A name as a message can have it: quoted, so that no control character reaches a terminal."""
    return ascii(name if len(name) <= 200 else f"{name[:197]}...")
