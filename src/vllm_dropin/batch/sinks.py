"""Where the bytes of an output go: a local file, a remote one or a stream, compressed on the way."""

from __future__ import annotations

import contextlib
import gzip
import os
from typing import IO, Any, BinaryIO, cast

from vllm_dropin.batch.kinds import Compression
from vllm_dropin.batch.storage import locate, writing

_CHUNK = 1 << 20
_GZIP_LEVEL = 6


class Sink:
    """One output. Raises InputOutputError with its name when it can't be written; ConfigurationError at the start.

    The bytes that arrive depend on the bytes that were written and on nothing else: not on the pieces in which they
    were written, nor on the time.
    """

    def __init__(self, target: str | BinaryIO, compression: Compression | None) -> None:
        self.name = target if isinstance(target, str) else "standard output"
        location = locate(target) if isinstance(target, str) else None
        self._owned = location is not None
        self._local = location is not None and location.remote is None
        self._file: Any = location.create() if location else cast(BinaryIO, target)
        self._end = _End(self._file)
        self._packed = _compressor(self._end, compression)
        self._waiting = bytearray()
        self._size = 0
        self.closed = False

    def write(self, data: bytes | memoryview) -> int:
        """Takes all of it. What is not compressed and goes to a stream is there at once."""
        size = len(data)
        self._size += size
        with writing(self.name):
            if self._packed is not None:
                self._pack(data)
            else:
                self._end.write(data)
                if not self._owned:
                    self._end.flush()
        return size

    def _pack(self, data: bytes | memoryview) -> None:
        # In pieces of one size: a compressor's output may depend on where its input is cut.
        self._waiting += data
        while len(self._waiting) >= _CHUNK:
            self._packed.write(bytes(self._waiting[:_CHUNK]))
            del self._waiting[:_CHUNK]

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Nothing: `close` does what has to be done."""

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """Complete it: a local file is on the disk then, a remote one has appeared."""
        if self.closed:
            return
        self.closed = True
        try:
            with writing(self.name):
                if self._packed is not None:
                    self._packed.write(bytes(self._waiting))
                    self._packed.close()
                self._file.flush()
                if self._local:
                    os.fsync(self._file.fileno())
                if self._owned:
                    self._file.close()
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Leave it as it is. A remote file does not appear; what a local one holds is of no use."""
        if self._end.dead:
            return
        self.closed = self._end.dead = True
        if self._packed is not None:
            self._packed.close()
        # What fails here is of no use to anyone: the first error is the one to show.
        with contextlib.suppress(Exception):
            if hasattr(self._file, "discard"):
                self._file.discard()
        with contextlib.suppress(Exception):
            if self._local:
                self._file.close()
            elif self._owned:
                self._file.closed = True  # else it would be completed when it is collected


class _End:
    """The file as compressors see it: it outlives them, and takes nothing in when it is `dead`."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.dead = False

    def write(self, data: bytes | memoryview) -> int:
        if not self.dead:
            self._file.write(data)
        return len(data)

    def flush(self) -> None:
        if not self.dead:
            self._file.flush()

    def close(self) -> None:
        self.closed = True


def _compressor(end: _End, compression: Compression | None) -> Any:
    if compression == "gzip":
        # Neither a time nor a name in its header.
        return gzip.GzipFile(filename="", fileobj=cast(BinaryIO, end), mode="wb", compresslevel=_GZIP_LEVEL, mtime=0)
    if compression == "zstd":
        import pyarrow as pa

        return pa.CompressedOutputStream(pa.PythonFile(end, "w"), "zstd")
    return None
