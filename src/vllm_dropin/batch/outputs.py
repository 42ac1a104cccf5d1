"""What an output will look like, decided and checked before anything is started.

The input's columns come first, all of them or those chosen, then what was added: `completion`, `finish_reason`,
`prompt_tokens`, `completion_tokens`, `error`, `row_id`. Where a row may have several completions, `completion` and
`finish_reason` are lists (JSON text in a CSV), or with `explode` each completion has a row of its own, with
`completion_index` from 0. A row that failed has an error, and nothing (null, an empty cell) for what it lacks.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from vllm_dropin.batch.kinds import KNOWN, Compression, Format, by_extension, listed, named_format
from vllm_dropin.batch.records import Source
from vllm_dropin.batch.storage import STDIO
from vllm_dropin.errors import ConfigurationError

ADDED = ("completion", "finish_reason", "prompt_tokens", "completion_tokens", "error", "row_id")
INDEX = "completion_index"
FieldType = Literal["bool", "int", "float", "text"]
_EXACT = 1 << 53
_INT64 = 1 << 63


@dataclass(frozen=True)
class Field:
    """One column that JSON Lines records have, and the narrowest type that holds all of its values."""

    name: str
    type: FieldType


@dataclass(frozen=True)
class OutputPlan:
    """The shape of an output. `columns` are those of the input that are kept; None: each record's own.

    For Parquet `schema` is the Arrow schema of the kept columns when the input has one, else `fields` their types,
    where they are not all text. `row_bytes` is what an input row takes, where that is known.
    """

    format: Format
    compression: Compression | None
    columns: tuple[str, ...] | None
    many: bool = False
    explode: bool = False
    schema: Any = None
    fields: tuple[Field, ...] | None = None
    row_bytes: float | None = None
    free_records: bool = False

    @property
    def lists(self) -> bool:
        """Whether `completion` and `finish_reason` are lists."""
        return self.many and not self.explode

    @property
    def added(self) -> tuple[str, ...]:
        return (*ADDED, INDEX) if self.explode else ADDED

    @property
    def names(self) -> tuple[str, ...]:
        """What the kept columns are called in the output."""
        taken = {*self.added, *(self.columns or ())}
        return tuple(free_name(name, taken) if name in self.added else name for name in self.columns or ())

    @property
    def needs_survey(self) -> bool:
        """Whether the columns or their types are only known when all records have been read once."""
        if not self.free_records or self.fields is not None or self.format in ("jsonl", "openai-batch"):
            return False
        return self.columns is None or self.format == "parquet"

    def surveyed(self, source: Source) -> OutputPlan:
        """The same plan with what a pass over the whole input tells, where it needs one; blocking."""
        if not self.needs_survey:
            return self
        fields = survey(source)
        if self.columns is not None:
            types = {field.name: field.type for field in fields}
            fields = tuple(Field(name, types.get(name, "text")) for name in self.columns)
        return replace(self, columns=tuple(field.name for field in fields), fields=fields)


def plan_output(
    name: str,
    source: Source,
    *,
    format: str | None = None,
    columns: Sequence[str] | None = None,
    many: bool = False,
    explode: bool = False,
) -> OutputPlan:
    """The plan for the output `name` (a path, a URL or `-`) of `source`.

    `columns` are the input's to keep. Raises ConfigurationError when the name tells no format, a column is not there,
    or an input column has the name of one that is added. Of JSON Lines only the first records are looked at: a later
    field of such a name is kept as `input_<name>`.
    """
    written, compression = _format(name, source, format)
    if written == "openai-batch":
        if columns is not None or explode:
            option = "--explode" if explode else "--columns"
            raise ConfigurationError(
                f"{option} has no effect on OpenAI Batch output", "Leave it out, or write csv or parquet."
            )
        return OutputPlan(written, compression, None, free_records=True)
    free = source.columns is None
    kept = _kept(source.columns, columns)
    plan = OutputPlan(
        written,
        compression,
        kept,
        many=many,
        explode=explode,
        schema=source.schema,
        row_bytes=source.row_bytes,
        free_records=free,
    )
    if plan.needs_survey and not source.rereadable:
        raise ConfigurationError(
            f"the input can be read only once, and {written} output of JSON Lines takes a first pass over it",
            "Write jsonl, or save the input to a file.",
        )
    if kept is not None:
        _refuse_clash(kept, plan)
    elif source.rereadable:
        _refuse_clash(_first_fields(source), plan)
    return plan


def free_name(name: str, taken: Container[str]) -> str:
    """A name for an input field whose own name is that of an added one."""
    while name in taken:
        name = f"input_{name}"
    return name


def survey(source: Source) -> tuple[Field, ...]:
    """The fields of JSON Lines records, in the order in which they first appear, with types that hold all their values.

    true and false alone are bool; whole numbers int; numbers float, if none loses a digit; all else is text, in which
    what is no text is written as JSON. null says nothing about a type. Reads all of the input.
    """
    types: dict[str, FieldType | None] = {}
    large: set[str] = set()
    for batch in source.read():
        for record in batch:
            for name, value in record.values.items():
                if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT:
                    large.add(name)
                types[name] = _wider(types.get(name), value)
    return tuple(
        Field(name, "text" if type is None or (type == "float" and name in large) else type)
        for name, type in types.items()
    )


def _wider(known: FieldType | None, value: object) -> FieldType | None:
    found: FieldType
    if value is None or known == "text":
        return known
    if isinstance(value, bool):
        found = "bool"
    elif isinstance(value, int):
        found = "int" if -_INT64 <= value < _INT64 else "text"
    elif isinstance(value, float):
        found = "float"
    else:
        return "text"
    if known is None or known == found:
        return found
    return "float" if {known, found} == {"int", "float"} else "text"


def _format(name: str, source: Source, format: str | None) -> tuple[Format, Compression | None]:
    written: Format | None
    if name == STDIO:
        written = named_format(format) if format else source.format
        compression = None
        if written == "parquet":
            raise ConfigurationError(
                "Parquet can't be written to standard output", "Name a file, or add a text format."
            )
    else:
        told, compression = by_extension(name)
        written = named_format(format) if format else told
        if written is None:
            raise ConfigurationError(f"the output {name}: its extension names no format", f"Known are {KNOWN}.")
        if written == "parquet":
            compression = None
    if written == "jsonl" and format is None and source.format == "openai-batch":
        written = "openai-batch"
    if written == "openai-batch" and source.format != "openai-batch":
        raise ConfigurationError("OpenAI Batch output needs OpenAI Batch input", "Write jsonl, csv or parquet.")
    return written, compression


def _kept(there: tuple[str, ...] | None, chosen: Sequence[str] | None) -> tuple[str, ...] | None:
    if chosen is None:
        return there
    chosen = tuple(dict.fromkeys(chosen))
    missing = [name for name in chosen if there is not None and name not in there]
    if missing:
        raise ConfigurationError(
            f"--columns: the input has no column {listed(missing)}; it has {listed(there or ())}", "Correct the names."
        )
    return chosen


def _first_fields(source: Source) -> list[str]:
    batch = next(source.read(), [])
    return list(dict.fromkeys(name for record in batch for name in record.values))


def _refuse_clash(columns: Iterable[str], plan: OutputPlan) -> None:
    clash = [name for name in columns if name in plan.added]
    if clash:
        raise ConfigurationError(
            f"the input has {listed(clash)}, which is also the name of a column that is added",
            "Rename it in the input, or say with --columns which of the others to keep.",
        )
