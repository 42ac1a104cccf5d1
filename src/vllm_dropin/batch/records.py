"""All rows of all inputs as one sequence of records, a batch at a time: memory does not grow with the input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_dropin.batch.inputs import InputFile
from vllm_dropin.batch.kinds import DELIMITERS, Format, listed
from vllm_dropin.batch.tables import BYTES, ROWS, ParquetInput, RawRow, RequestIds, csv_rows, json_rows, open_table
from vllm_dropin.errors import ConfigurationError
from vllm_dropin.scoring.rows import Table


@dataclass(frozen=True, slots=True)
class Record:
    """One row: its place among all rows of all inputs (from 0), where it stands ("rows.csv, line 12"), its values.

    `error` is what the reader found wrong with it; its values are then what could be read.
    """

    row_id: int
    place: str
    values: Mapping[str, object]
    error: str | None = None


@dataclass(frozen=True)
class CsvOptions:
    """How text tables are read. `charset` None: by the byte order mark, else UTF-8."""

    charset: str | None = None


class Source:
    """The rows of `files`, which agree in format and columns.

    Raises ConfigurationError, TableError or InputOutputError when a header can't be read or the files do not agree.
    `columns` are in the order of the first file; None for JSON Lines, each of whose records has its own. `schema` is
    the Arrow schema of Parquet files, and `rows` how many rows they have.
    """

    def __init__(self, files: Sequence[InputFile], csv: CsvOptions = CsvOptions()) -> None:
        self.files = tuple(files)
        self.format: Format = self.files[0].format
        self.columns: tuple[str, ...] | None = None
        self.schema: Any = None
        self.rows: int | None = None
        self.row_bytes: float | None = None
        """What a row takes on average, where that is known beforehand (Parquet)."""
        self._csv = csv
        self._total = sum(file.size or 0 for file in files)
        self._done = 0
        self._kept: dict[InputFile, Table] = {}
        """What can be opened only once, with its header read."""
        self._spent = False
        if self.format == "parquet":
            self._look_at_schemas()
        elif self.format in DELIMITERS:
            self._look_at_headers()

    @property
    def rereadable(self) -> bool:
        """Whether `read` can be called more than once."""
        return all(file.rereadable for file in self.files)

    @property
    def position(self) -> tuple[int, int]:
        """How many bytes the latest `read` has gone through, of how many (0 where nobody knows); from any thread."""
        return self._done, self._total

    def read(self, start: int = 0) -> Iterator[list[Record]]:
        """The records from row `start` on, in batches of at most 1,024 rows and about 8 MiB.

        Raises InputOutputError when a file can't be read to its end; TableError or EncodingError when a text table is
        broken from some place on.
        """
        if not self.rereadable:
            if self._spent:
                raise ConfigurationError(f"{self._once()} can be read only once", "Save it to a file and score that.")
            self._spent = True
        return self._batches(start)

    def _batches(self, start: int) -> Iterator[list[Record]]:
        batch: list[Record] = []
        size = 0
        with contextlib.closing(self._rows()) as rows:
            for row_id, (place, (line, values, error, taken)) in enumerate(rows):
                if row_id < start:
                    continue
                batch.append(Record(row_id, f"{place} {line}", values, error))
                size += taken
                if len(batch) >= ROWS or size >= BYTES:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def _rows(self) -> Generator[tuple[str, RawRow], None, None]:
        """Every row with the words before its number."""
        before = 0
        with RequestIds() as ids:
            check = ids.checked if self.format == "openai-batch" else None
            for file in self.files:
                if file.rereadable:
                    self._done = before
                place = f"{file.shown}, {'row' if self.format == 'parquet' else 'line'}"
                with contextlib.closing(self._file_rows(file)) as rows:
                    for row in rows:
                        yield place, check(row) if check else row
                before += file.size or 0
        self._done = max(self._done, before)

    def _file_rows(self, file: InputFile) -> Generator[RawRow, None, None]:
        if self.format == "parquet":
            yield from self._parquet_rows(file)
        elif not file.rereadable and (table := self._kept.pop(file, None)) is not None:
            yield from csv_rows(file, table)
        else:
            with file.open(self._mover()) as stream:
                if self.format in DELIMITERS:
                    table = open_table(file, stream, self._csv.charset, DELIMITERS[self.format])
                    yield from csv_rows(file, table)
                else:
                    yield from json_rows(stream)

    def _parquet_rows(self, file: InputFile) -> Iterator[RawRow]:
        before = self._done
        with contextlib.closing(ParquetInput(file)) as table:
            # By rows: the bytes of a Parquet file are read in no order.
            share = (file.size or 0) / max(1, table.rows)
            for row in table.read(list(self.columns or ())):
                yield row
                self._done = before + int(row[0] * share)

    def _mover(self) -> Callable[[int], None]:
        def moved(count: int) -> None:
            self._done += count

        return moved

    def _once(self) -> str:
        return next(file.shown for file in self.files if not file.rereadable)

    def _look_at_headers(self) -> None:
        for file in self.files:
            stream = file.open(peek=True) if file.rereadable else file.open(self._mover())
            try:
                table = open_table(file, stream, self._csv.charset, DELIMITERS[self.format])
            finally:
                if file.rereadable:
                    stream.close()
            if not file.rereadable:
                self._kept[file] = table
            self._agree(file, table.header)

    def _look_at_schemas(self) -> None:
        rows = 0
        size = 0.0
        for file in self.files:
            with contextlib.closing(ParquetInput(file)) as table:
                self._agree(file, table.schema.names)
                self._agree_in_types(file, table.schema)
                rows += table.rows
                size += table.rows * table.row_bytes
        self.rows = rows
        self.row_bytes = size / rows if rows else 0.0

    def _agree(self, file: InputFile, columns: list[str]) -> None:
        twice = next((name for at, name in enumerate(columns) if name in columns[:at]), None)
        if twice is not None:
            raise ConfigurationError(f"{file.shown} has the column {twice!r} twice", "Rename one of them.")
        if self.columns is None:
            self.columns = tuple(columns)
        missing = [name for name in self.columns if name not in columns]
        added = [name for name in columns if name not in self.columns]
        if missing or added:
            lacks = f"{file.shown} lacks {listed(missing)}" if missing else f"{file.shown} also has {listed(added)}"
            raise ConfigurationError(
                f"the inputs have different columns: {lacks}, compared with {self.files[0].shown}",
                "Score them one after the other, or give them the same columns.",
            )

    def _agree_in_types(self, file: InputFile, schema: Any) -> None:
        if self.schema is None:
            self.schema = schema
        for field in self.schema:
            other = schema.field(field.name).type
            if other != field.type:
                raise ConfigurationError(
                    f"the inputs have different types: {field.name!r} is {field.type} in {self.files[0].shown} and "
                    f"{other} in {file.shown}",
                    "Score them one after the other, or write them with one schema.",
                )
