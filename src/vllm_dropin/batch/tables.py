"""Readers of one file each. They give raw rows, one at a time, and keep no more than a few MiB of the file."""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any, BinaryIO, Final, NoReturn, Self

from vllm_dropin.batch.inputs import InputFile
from vllm_dropin.batch.storage import reading
from vllm_dropin.batch.values import ArrowRow
from vllm_dropin.errors import EncodingError, TableError
from vllm_dropin.scoring.rows import NO_HEADER, Table

RawRow = tuple[int, Mapping[str, object], str | None, int]
"""The line (Parquet: the row) from 1, the values, what is wrong with it, and about how many bytes it takes."""

RAW: Final = "_raw"
"""Where the text of a line that is no JSON object is kept."""
ROWS, BYTES = 1024, 8 << 20
"""The most that a batch holds."""
_DEEPEST = 200
_COLUMN_BUFFERS = 32 << 20
_SMALLEST_BUFFER, _LOCAL_BUFFER, _REMOTE_BUFFER = 64 << 10, 1 << 20, 8 << 20
_PROBED = 64
"""Rows by which the size of a Parquet row is estimated."""


@contextlib.contextmanager
def naming(file: InputFile) -> Iterator[None]:
    """Put the file's name before what is wrong with its table."""
    try:
        yield
    except EncodingError as error:
        remedy = "Save the file as UTF-8, or name its charset with --charset."
        raise EncodingError(f"{file.shown}: {error.message}", remedy) from error
    except TableError as error:
        remedy = (
            "Charsets go by Python's names, such as utf-8 and cp1252." if "charset" in error.message else error.remedy
        )
        raise TableError(f"{file.shown}: {error.message}", remedy) from error


def open_table(file: InputFile, stream: BinaryIO, charset: str | None, delimiter: str) -> Table:
    """A CSV or TSV file whose header has been read."""
    with naming(file):
        table = Table(stream, charset, delimiter)
        if not table.header:
            raise TableError(NO_HEADER, "Its first line must name the columns.")
    return table


def csv_rows(file: InputFile, table: Table) -> Iterator[RawRow]:
    """A row that is too short lacks the values that it lacks: they may not be needed."""
    header = table.header
    width = len(header)
    with naming(file):
        for line, cells in table:
            error = None
            if len(cells) > width:
                error = (
                    f"line {line} has {len(cells)} cells where the header has {width}; quote a cell that holds a comma"
                )
            yield line, dict(zip(header, cells, strict=False)), error, sum(map(len, cells))


def json_rows(stream: BinaryIO) -> Iterator[RawRow]:
    """One object a line; blank lines are no rows. A line that is something else keeps its text as `_raw`."""
    for line, raw in enumerate(stream, 1):
        text = raw.strip(b" \t\r\n\xef\xbb\xbf" if line == 1 else b" \t\r\n")
        if not text:
            continue
        try:
            values = _DECODER.decode(text.decode())
            _refuse_depth(text, values)
        except (ValueError, RecursionError) as error:
            yield line, {RAW: text.decode("utf-8", "backslashreplace")}, _json_fault(line, error), len(raw)
            continue
        if isinstance(values, dict):
            yield line, values, None, len(raw)
        else:
            yield line, {RAW: text.decode()}, f"line {line} is no JSON object", len(raw)


def _refuse_depth(text: bytes, value: object) -> None:
    """What is nested as deeply as Python can read could not be written again, from deeper in the stack."""
    if text.count(b"[") + text.count(b"{") <= _DEEPEST:
        return
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _json_fault(line: int, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"line {line} is not UTF-8 text (byte {error.start} of the line)"
    if isinstance(error, json.JSONDecodeError):
        return f"line {line} is not valid JSON: {error.msg}, column {error.colno}"
    return f"line {line} is not valid JSON: {error}"


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON value")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse)


class ParquetInput:
    """A Parquet file: its schema and number of rows at once, then its rows with their own types."""

    def __init__(self, file: InputFile) -> None:
        import pyarrow.parquet as pq

        assert file.location is not None  # find_inputs refuses Parquet from standard input
        self._name = file.name
        remote = file.location.remote is not None
        with reading(self._name):
            self._stream = file.location.open(block=0) if remote else None
            where = self._stream or file.location.path
            metadata = pq.read_metadata(where)
            # Buffered, else each column of a row group is read as a whole, and a file may be one row group.
            largest = _REMOTE_BUFFER if remote else _LOCAL_BUFFER
            buffer = min(largest, max(_SMALLEST_BUFFER, _COLUMN_BUFFERS // max(1, metadata.num_columns)))
            self._file = pq.ParquetFile(where, metadata=metadata, buffer_size=buffer, pre_buffer=False)
            self.schema: Any = self._file.schema_arrow
            self.rows = int(metadata.num_rows)
            stored = sum(metadata.row_group(at).total_byte_size for at in range(metadata.num_row_groups))
            # What is the same in many rows is stored once: look at some as they will be in memory.
            probe = next(self._file.iter_batches(batch_size=_PROBED), None) if self.rows else None
        self.row_bytes = max(stored / self.rows, _bytes(probe) / probe.num_rows) if probe is not None else 0.0
        """What a row takes in memory, about."""

    def read(self, columns: list[str]) -> Iterator[RawRow]:
        size = max(1, min(ROWS, int(BYTES / (self.row_bytes or 1))))
        batches = self._file.iter_batches(batch_size=size)
        line = 0
        while True:
            with reading(self._name):
                batch = next(batches, None)
            if batch is None:
                return
            if batch.schema.names != columns:
                batch = batch.select(columns)
            share = _bytes(batch) // max(1, batch.num_rows)
            for place in range(batch.num_rows):
                line += 1
                yield line, ArrowRow(batch, place), None, share

    def close(self) -> None:
        self._file.close()
        if self._stream is not None:
            self._stream.close()


def _bytes(batch: Any) -> int:
    """What a batch takes, but for dictionaries: they are shared by all batches."""
    return sum((getattr(column, "indices", column)).nbytes for column in batch.columns)


class RequestIds:
    """The ids of an OpenAI Batch input, each of which may be there once: answers go by it.

    They are kept in a database that spills to disk: ten million of them are a gigabyte of Python objects.
    """

    def __init__(self) -> None:
        # "" is a private file that is gone with the connection. Another thread may read the next batch.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-32768"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("CREATE TABLE ids (id BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def checked(self, row: RawRow) -> RawRow:
        """The row, with an error when its id is missing or has been seen before."""
        line, values, error, size = row
        if error is not None:
            return row
        name = values.get("custom_id")
        if not isinstance(name, str) or not name:
            return line, values, f"line {line} has no custom_id that is a text", size
        key = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if self._database.execute("INSERT OR IGNORE INTO ids VALUES (?)", (key,)).rowcount > 0:
            return row
        return line, values, f"the custom_id {name[:60]!r} has been used by an earlier row", size
