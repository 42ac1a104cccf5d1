"""The shapes of a whole answer (contract, section 3), written piece by piece.

Results go to a spool, one line each, and the document is composed from it at the end: whether it needs extra columns is
only known with the last row, and a long answer in one of many rows must cost its own length only.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from typing import IO

from vllm_dropin.scoring.results import RowResult

_PIECE = 1 << 16  # bytes; what a composed document is handed out in
_NULL = b"null"


class Spool:
    """Results in the order in which they were added; in memory up to `memory` bytes, then in a temporary file.

    A line holds the error and the `n` completions as JSON, between tabs: JSON text has no raw tab or line end.
    """

    def __init__(self, n: int = 1, memory: int = 8 << 20) -> None:
        # Not closed here: it lives as long as the spool.
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=memory)  # noqa: SIM115
        self.n = n
        self.rows = 0
        self.failed = 0
        self.size = 0

    def add(self, result: RowResult) -> int:
        """Append one result and return how many bytes it took."""
        texts: list[str | None] = [result.prediction, *result.completions[1 : self.n]]
        texts += [None] * (self.n - len(texts))
        line = b"\t".join([_json(result.error), *map(_json, texts)]) + b"\n"
        self._file.write(line)
        self.rows += 1
        self.failed += result.error is not None
        self.size += len(line)
        return len(line)

    def __iter__(self) -> Iterator[list[bytes]]:
        """The JSON fragments of each row: error, then completions."""
        self._file.seek(0)
        for line in self._file:
            yield line[:-1].split(b"\t")

    @property
    def columns(self) -> list[str]:
        """The extra columns that this answer needs: `error` when a row failed, `completion_2` … when n > 1."""
        return ["error"] * (self.failed > 0) + [f"completion_{place}" for place in range(2, self.n + 1)]

    def extras(self, fragments: list[bytes]) -> list[bytes]:
        """One row's values for `columns`."""
        return [*fragments[:1], *fragments[2:]] if self.failed else fragments[2:]

    def close(self) -> None:
        self._file.close()


def predictions(spool: Spool) -> Iterator[bytes]:
    """`{"predictions": […]}`, with `extraModelOutput` as columns, index and data when there are extra columns."""
    return _pieces(_predictions(spool))


def deployment(spool: Spool, target: str) -> Iterator[bytes]:
    """`{"data": […]}`, the form under DEPLOYMENT_CONFIG; extra columns are in each record (decision 17)."""
    return _pieces(_deployment(spool, _json(target)))


def _predictions(spool: Spool) -> Iterator[bytes]:
    yield b'{"predictions":['
    for place, fragments in enumerate(spool):
        yield b"," * (place > 0) + fragments[1]
    yield b"]"
    if spool.columns:
        yield b',"extraModelOutput":{"columns":%b,"index":[' % json.dumps(spool.columns).encode()
        for place in range(spool.rows):
            yield b",%d" % place if place else b"0"
        yield b'],"data":['
        for place, fragments in enumerate(spool):
            yield b"," * (place > 0) + b"[" + b",".join(spool.extras(fragments)) + b"]"
        yield b"]}"
    yield b"}"


def _deployment(spool: Spool, target: bytes) -> Iterator[bytes]:
    names = [_json(name) for name in spool.columns]
    yield b'{"data":['
    for place, fragments in enumerate(spool):
        text = fragments[1]
        yield b"," * (place > 0) + b'{"prediction":' + text
        yield b',"predictionValues":[{"label":' + target + b',"value":' + text + b'}],"rowId":%d' % place
        if names:
            pairs = zip(names, spool.extras(fragments), strict=True)
            yield b',"extraModelOutput":{' + b",".join(name + b":" + value for name, value in pairs) + b"}"
        yield b"}"
    yield b"]}"


def _pieces(parts: Iterator[bytes]) -> Iterator[bytes]:
    piece = bytearray()
    for part in parts:
        piece += part
        if len(piece) >= _PIECE:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece)


def _json(text: str | None) -> bytes:
    if text is None:
        return _NULL
    try:
        return json.dumps(text, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair: only an escape can say that
        return json.dumps(text).encode()
