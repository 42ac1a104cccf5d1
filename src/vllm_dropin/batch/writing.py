"""Writers: records with their results in, a file of any format out. The same rows always give the same bytes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Protocol

from vllm_dropin.batch.kinds import DELIMITERS
from vllm_dropin.batch.outputs import OutputPlan, free_name
from vllm_dropin.batch.records import Record, Source
from vllm_dropin.batch.sinks import Sink
from vllm_dropin.batch.tables import RAW
from vllm_dropin.batch.values import as_json, as_text, dump, encoded
from vllm_dropin.scoring.results import RowResult

Pair = tuple[Record, RowResult]


class Writer(Protocol):
    """One output that is being written. All methods block; they raise InputOutputError."""

    def write(self, pairs: Sequence[Pair]) -> None:
        """Append rows, in this order."""

    def close(self) -> None:
        """Complete the output: a local file has been synced then, a remote one appears."""

    def abort(self) -> None:
        """Give it up: a remote file does not appear; a local one is left unfinished."""


def open_writer(target: str | BinaryIO, plan: OutputPlan, source: Source) -> Writer:
    """Begin the output at a path, a URL or a stream, which stays open. Blocking: it may first read the whole input.

    What is at a path is overwritten. Raises ConfigurationError when there can't be a file, and InputOutputError.
    """
    plan = plan.surveyed(source)
    sink = Sink(target, plan.compression)
    try:
        if plan.format == "parquet":
            from vllm_dropin.batch.parquet_writing import ParquetOutput

            return ParquetOutput(sink, plan)
        if plan.format in DELIMITERS:
            return _CsvWriter(sink, plan)
        return _BatchWriter(sink) if plan.format == "openai-batch" else _JsonWriter(sink, plan)
    except BaseException:
        sink.abort()
        raise


def added_values(record: Record, result: RowResult, plan: OutputPlan) -> Iterator[tuple[Any, ...]]:
    """The values of `plan.added`: once, or with `explode` once for each completion."""
    failed = result.error is not None
    tokens = (None, None) if failed else (result.prompt_tokens, result.completion_tokens)
    tail = (*tokens, result.error, record.row_id)
    if not plan.explode:
        if failed:
            yield (None, None, *tail)
        elif plan.lists:
            yield (list(result.completions), list(result.finish_reasons), *tail)
        else:
            yield (result.prediction, result.finish_reasons[0] if result.finish_reasons else "", *tail)
    elif failed or not result.completions:
        yield (None, None, *tail, None)
    else:
        for index, text in enumerate(result.completions):
            yield (text, result.finish_reasons[index], *tail, index)


class _TextWriter:
    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def close(self) -> None:
        self._sink.close()

    def abort(self) -> None:
        self._sink.abort()


class _CsvWriter(_TextWriter):
    """CSV as RFC 4180 quotes it, with \\n at the end of a line: UTF-8 that read_rows reads back to the same cells."""

    def __init__(self, sink: Sink, plan: OutputPlan) -> None:
        super().__init__(sink)
        self._plan = plan
        self._columns = plan.columns or ()
        self._buffer = io.StringIO(newline="")
        delimiter = DELIMITERS[plan.format]
        self._writer = csv.writer(self._buffer, delimiter=delimiter, lineterminator="\n")
        # Python's writer leaves a lone carriage return unquoted, which no reader can tell from a line end.
        self._quoting = csv.writer(self._buffer, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        self._put([*plan.names, *plan.added])
        self._flush()

    def write(self, pairs: Sequence[Pair]) -> None:
        for record, result in pairs:
            values = record.values
            cells = [as_text(values.get(name)) for name in self._columns]
            for added in added_values(record, result, self._plan):
                self._put([*cells, *map(as_text, added)])
        self._flush()

    def _put(self, cells: list[str]) -> None:
        writer = self._quoting if any("\r" in cell for cell in cells) else self._writer
        writer.writerow(cells)

    def _flush(self) -> None:
        self._sink.write(encoded(self._buffer.getvalue()))
        self._buffer.seek(0)
        self._buffer.truncate()


class _JsonWriter(_TextWriter):
    """One object a line: the record's own fields, then what was added."""

    def __init__(self, sink: Sink, plan: OutputPlan) -> None:
        super().__init__(sink)
        self._plan = plan
        self._taken = frozenset(plan.added)

    def write(self, pairs: Sequence[Pair]) -> None:
        lines: list[str] = []
        for record, result in pairs:
            fields = self._fields(record)
            for added in added_values(record, result, self._plan):
                lines.append(dump({**fields, **dict(zip(self._plan.added, added, strict=True))}))
        self._sink.write("".join(f"{line}\n" for line in lines).encode())

    def _fields(self, record: Record) -> dict[str, object]:
        values = record.values
        if self._plan.columns is not None:
            fields = {name: as_json(values.get(name)) for name in self._plan.columns}
            return {**fields, RAW: values[RAW]} if self._plan.free_records and RAW in values else fields
        return {
            free_name(name, {*self._taken, *values}) if name in self._taken else name: as_json(value)
            for name, value in values.items()
        }


class _BatchWriter(_TextWriter):
    """What OpenAI's Batch API gives back: one line for each request, by its custom_id, with the whole reply."""

    def write(self, pairs: Sequence[Pair]) -> None:
        self._sink.write(b"".join(_batch_line(record, result) for record, result in pairs))


def _batch_line(record: Record, result: RowResult) -> bytes:
    custom_id = record.values.get("custom_id")
    start = b'{"id": "batch_req_%d", "custom_id": %b, ' % (record.row_id, dump(as_json(custom_id)).encode())
    if result.error is not None:
        code = result.fault.value if result.fault else "internal"
        error = dump({"code": code, "message": result.error}).encode()
        return start + b'"response": null, "error": %b}\n' % error
    response = b'{"status_code": 200, "request_id": "row-%d", "body": %b}' % (record.row_id, _reply(result))
    return start + b'"response": %b, "error": null}\n' % response


def _reply(result: RowResult) -> bytes:
    """The engine's own reply on one line; one like it where that was not kept."""
    if result.reply is not None:
        reply = result.reply.strip()
        return dump(json.loads(reply)).encode() if b"\n" in reply or b"\r" in reply else reply
    choices = [
        {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        for index, (text, reason) in enumerate(zip(result.completions, result.finish_reasons, strict=True))
    ]
    usage = {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "total_tokens": result.prompt_tokens + result.completion_tokens,
    }
    return dump({"object": "chat.completion", "choices": choices, "usage": usage}).encode()
