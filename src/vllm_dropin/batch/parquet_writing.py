"""Parquet output: the input's own Arrow types, a row group at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from vllm_dropin.batch.outputs import INDEX, FieldType, OutputPlan
from vllm_dropin.batch.records import Record
from vllm_dropin.batch.sinks import Sink
from vllm_dropin.batch.storage import writing
from vllm_dropin.batch.values import ArrowRow, as_text, mended
from vllm_dropin.batch.writing import Pair, added_values

GROUP_ROWS, GROUP_BYTES = 1 << 15, 16 << 20
"""The most that a row group holds: what is in memory at a time."""
_STEP: Final = 1024
_TYPES: dict[FieldType, Any] = {
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "text": pa.string(),
}


class ParquetOutput:
    """A writer (writing.py). Row groups end at places that only the rows themselves decide."""

    def __init__(self, sink: Sink, plan: OutputPlan) -> None:
        self._sink = sink
        self._plan = plan
        self._columns = plan.columns or ()
        self._kept = _kept_schema(plan)
        self._added = _added_schema(plan)
        self._pairs: list[Pair] = []
        self._batches: list[Any] = []
        self._rows = 0
        self._bytes = 0.0
        with writing(sink.name):
            self._schema = pa.schema([*self._kept, *self._added])
            self._file = pq.ParquetWriter(sink, self._schema, compression="zstd")

    def write(self, pairs: Sequence[Pair]) -> None:
        for pair in pairs:
            self._pairs.append(pair)
            self._rows += 1
            self._bytes += self._size(*pair)
            if self._rows >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
                self._end_group()
            elif len(self._pairs) >= _STEP:
                self._convert()

    def close(self) -> None:
        try:
            self._end_group()
            with writing(self._sink.name):
                self._file.close()
        except BaseException:
            self._sink.abort()
            raise
        self._sink.close()

    def abort(self) -> None:
        self._sink.abort()
        self._file.close()  # writes a footer, which the sink no longer takes in

    def _size(self, record: Record, result: Any) -> float:
        own = self._plan.row_bytes
        if own is None:
            own = sum(len(value) if isinstance(value, str) else 8 for value in record.values.values())
        return own + sum(map(len, result.completions)) + 64

    def _convert(self) -> None:
        """Turn the rows that wait into Arrow arrays, which take a fraction of their memory."""
        if not self._pairs:
            return
        added = [[*added_values(record, result, self._plan)] for record, result in self._pairs]
        repeats = [len(rows) for rows in added]
        columns = list(zip(*(row for rows in added for row in rows), strict=True))
        arrays = [
            pa.array(map(_mended, column), field.type) for column, field in zip(columns, self._added, strict=True)
        ]
        records = [record for record, _ in self._pairs]
        kept = self._arrow_columns(records) if self._plan.schema is not None else self._plain_columns(records)
        if self._plan.explode:
            places = pa.array([place for place, times in enumerate(repeats) for _ in range(times)], pa.int64())
            kept = [column.take(places) for column in kept]
        self._batches.append(pa.table([*kept, *arrays], schema=self._schema))
        self._pairs = []

    def _end_group(self) -> None:
        self._convert()
        if not self._batches:
            return
        with writing(self._sink.name):
            # One chunk: where Arrow ends a page depends on where its chunks end.
            group = pa.concat_tables(self._batches).combine_chunks()
            self._file.write_table(group, row_group_size=max(1, group.num_rows))
        self._batches = []
        self._rows, self._bytes = 0, 0.0

    def _arrow_columns(self, records: Sequence[Record]) -> list[Any]:
        """The rows as they were read, cut out of their batches."""
        pieces: list[Any] = []
        rows = (record.values for record in records)
        for _, run in groupby(rows, key=lambda row: id(_arrow(row).batch)):
            same = [_arrow(row) for row in run]
            places = [row.place for row in same]
            batch = same[0].batch.select(list(self._columns))
            if places == list(range(places[0], places[0] + len(places))):
                pieces.append(batch.slice(places[0], len(places)))
            else:
                pieces.append(batch.take(pa.array(places, pa.int64())))
        table = pa.Table.from_batches(pieces)
        return [table.column(at) for at in range(table.num_columns)]

    def _plain_columns(self, records: Sequence[Record]) -> list[Any]:
        return [
            pa.array((_plain(record.values.get(name), field.type) for record in records), field.type)
            for name, field in zip(self._columns, self._kept, strict=True)
        ]


def _kept_schema(plan: OutputPlan) -> Any:
    columns = plan.columns or ()
    if plan.schema is not None:
        # Without the metadata of the table as a whole, which says things of another table.
        return pa.schema([plan.schema.field(name) for name in columns])
    types = {field.name: _TYPES[field.type] for field in plan.fields or ()}
    named = zip(columns, plan.names, strict=True)
    return pa.schema([pa.field(mended(shown), types.get(name, pa.string())) for name, shown in named])


def _added_schema(plan: OutputPlan) -> Any:
    text = pa.list_(pa.string()) if plan.lists else pa.string()
    fields = [
        ("completion", text),
        ("finish_reason", text),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("error", pa.string()),
        ("row_id", pa.int64()),
    ]
    return pa.schema(fields + [(INDEX, pa.int64())] * plan.explode)


def _arrow(row: Mapping[str, object]) -> ArrowRow:
    assert isinstance(row, ArrowRow)  # all rows of a Parquet source are
    return row


def _plain(value: object, kind: Any) -> object:
    if value is None:
        return None
    if pa.types.is_string(kind):
        return mended(as_text(value))
    return float(value) if pa.types.is_floating(kind) and isinstance(value, int) else value


def _mended(value: object) -> object:
    if isinstance(value, str):
        return mended(value)
    return [mended(item) for item in value] if isinstance(value, list) else value
