"""From the bytes of a CSV file to rows.

The rules, chosen so that N rows in are N answers out, in order:

- A byte order mark is dropped. The charset is the one that the mark tells, else the caller's, else UTF-8.
- The first line that is not blank is the header. Columns are told apart by commas, cells quoted as in RFC 4180.
- In a table of one column a blank line between rows is a row with an empty cell: that is how most programs write one.
  In a table of several columns a blank line is no row: an empty record there still has its commas.
- Blank lines at the end of the file are no rows; `""` is.
- A row with more cells than the header, or without the prompt's cell, is broken by itself; the others are read on.
- A quoted cell that is never closed breaks the whole table: nobody knows how many rows it swallowed.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import IO, cast

from vllm_dropin.errors import EncodingError, TableError

EMPTY = "the prompt is empty"
NO_HEADER = "the CSV has no header line"
LONGEST_CELL = 1 << 30  # characters; the body's limit is what bounds a cell, csv's 128 Ki would not do

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Python knows these as text encodings. No CSV is written in them; some decode in quadratic time.
_REFUSED = {"idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape", "utf-7"}


@dataclass(frozen=True, slots=True)
class Row:
    """One input record: its place (from 0), the line of the file on which it starts (from 1), and its prompt.

    `error` is why the reader could not find a prompt.
    """

    index: int
    line: int
    prompt: str = ""
    error: str | None = None

    @property
    def fault(self) -> str | None:
        """Why the engine need not be asked about this row; None when it must."""
        if self.error is None and (not self.prompt or self.prompt.isspace()):
            return EMPTY
        return self.error


@dataclass(frozen=True, slots=True)
class Survey:
    """What a first pass over a table found: how many rows, how many of them have a fault, and the first of those."""

    rows: int
    faulty: int
    first: tuple[Row, ...]


def read_rows(file: IO[bytes], column: str, charset: str | None = None) -> Iterator[Row]:
    """The rows of a seekable CSV file, read from its start, one at a time.

    Raises EncodingError when the bytes are not text in `charset`; TableError when the charset is unknown, there is no
    header, `column` is not in it, or a quoted cell never ends.
    """
    file.seek(0)
    table = Table(file, charset)
    if not table.header:
        raise TableError(NO_HEADER, f"its first line must name the column {column!r}")
    position, width = _position(table.header, column), len(table.header)
    for index, (line, cells) in enumerate(table):
        yield _row(index, line, cells, position, width)


def survey(file: IO[bytes], column: str, charset: str | None = None, keep: int = 20) -> Survey:
    """Read the whole table once, to know before the first row is asked that it can be read. Raises as `read_rows`."""
    rows = faulty = 0
    first: list[Row] = []
    for row in read_rows(file, column, charset):
        rows += 1
        if row.fault is not None:
            faulty += 1
            if len(first) < keep:
                first.append(row)
    return Survey(rows, faulty, tuple(first))


class Table:
    """A CSV file from where it stands to its end: `header` at once ([] when there is none), then its records, once.

    A record is the line on which it starts and its cells, as many as were written. The file stays the caller's and need
    not be seekable. Raises EncodingError and TableError, at once and while iterating.
    """

    def __init__(self, file: IO[bytes], charset: str | None = None, delimiter: str = ",") -> None:
        csv.field_size_limit(LONGEST_CELL)  # for the whole process; csv has no other way
        start = _start(file)
        self._encoding = _encoding(start, charset)
        self._bytes = _Counted(file, start)
        # A cast: typeshed wants a name of it, which the wrapper can do without.
        text = io.TextIOWrapper(cast(IO[bytes], self._bytes), encoding=self._encoding, newline="")
        self._lines = _Lines(text)
        with self._named_errors():
            self._reader = csv.reader(self._lines, delimiter=delimiter)
            self.header = next(filter(None, self._reader), [])
            self._refuse_open_quote(1)

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        reader, lines, single = self._reader, self._lines, len(self.header) == 1
        blank = 0
        line = reader.line_num + 1
        with self._named_errors():
            for cells in reader:
                if lines.ended:
                    self._refuse_open_quote(line)
                if not cells:
                    blank += 1
                else:
                    if single:
                        for back in range(blank, 0, -1):
                            yield line - back, [""]
                    blank = 0
                    yield line, cells
                line = reader.line_num + 1

    def _refuse_open_quote(self, line: int) -> None:
        # csv asks for a line after the last one only inside quotes.
        if self._lines.ended and self.header:
            raise TableError(f"a quoted cell that starts on line {line} or after it is never closed")

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except UnicodeError as error:
            if isinstance(error, UnicodeDecodeError):
                # The decoder was given all that was read so far; the error's bytes are the last of it.
                where = f"byte {self._bytes.given - len(error.object) + error.start}"
            else:  # decoders with escape sequences (ISO 2022) keep what may be half of one, and do not say where it is
                where = f"a byte before byte {self._bytes.given}"
            raise EncodingError(
                f"{where} is not {self._encoding.upper()} text",
                "save the file as UTF-8, or name its charset in the content type",
            ) from error


class _Counted(io.BufferedIOBase):
    """Hands out `start`, then the file; counts what it gave. Closing it leaves the file open."""

    def __init__(self, file: IO[bytes], start: bytes) -> None:
        self._file = file
        self._start = start
        self.given = 0

    def readable(self) -> bool:
        return True

    def read1(self, size: int = -1, /) -> bytes:
        chunk, self._start = self._start or self._file.read(size), b""
        self.given += len(chunk)
        return chunk


class _Lines:
    """The physical lines of a text, ends kept; `ended` once a reader has asked for one more than there are."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.ended = False

    def __iter__(self) -> Iterator[str]:
        # A chain, because no code of ours then runs for each line: a cell may have millions.
        first = self._text.readline().removeprefix("\ufeff")
        return chain((first,) if first else (), self._text, self._end())

    def _end(self) -> Iterator[str]:
        self.ended = True
        yield from ()


def _row(index: int, line: int, cells: list[str], position: int, width: int) -> Row:
    if len(cells) > width:
        why = f"line {line} has {len(cells)} cells where the header has {width}; quote a cell that holds a comma"
        return Row(index, line, error=why)
    if len(cells) <= position:
        return Row(index, line, error=f"line {line} has {len(cells)} cells; the prompt is cell {position + 1}")
    return Row(index, line, cells[position])


def _position(header: list[str], column: str) -> int:
    if column in header:
        return header.index(column)
    seen = ", ".join(repr(name[:60]) for name in header[:20]) + (", …" if len(header) > 20 else "")
    raise TableError(
        f"the column {column!r} is missing; the CSV has {seen}",
        "rename the column, or set the runtime parameter prompt_column_name",
    )


def _start(file: IO[bytes]) -> bytes:
    """Enough bytes to see a byte order mark. A pipe or a decompressor may give fewer than it is asked for."""
    start = b""
    while len(start) < 4 and (more := file.read(4 - len(start))):
        start += more
    return start


def _encoding(start: bytes, charset: str | None) -> str:
    """The name of Python's codec for a file that begins so."""
    told = next((name for bom, name in _BOMS if start.startswith(bom)), None)
    if charset is None:
        return told or "utf-8"
    try:
        name = codecs.lookup(charset).name
        b" ".decode(name, "replace")  # refuses codecs that are not of text, such as base64
    except (LookupError, ValueError):
        name = "undefined"
    if name.replace("_", "-") in _REFUSED:
        raise TableError(f"the charset {charset[:40]!r} is unknown", "send UTF-8")
    if told is not None:
        # As browsers have it: the mark is in the file, while the name is often what a client says of every file.
        return told
    # Without a mark Python's decoder refuses; what is written today is little-endian.
    return f"{name}-le" if name in ("utf-16", "utf-32") else name
