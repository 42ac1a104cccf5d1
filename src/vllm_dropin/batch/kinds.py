"""File formats and compressions, as names of files tell them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.nearest import did_you_mean

Format = Literal["csv", "tsv", "jsonl", "parquet", "openai-batch"]
"""`openai-batch` is JSON Lines whose records are requests: `custom_id`, `method`, `url`, `body`."""
Compression = Literal["gzip", "zstd"]

FORMATS: tuple[Format, ...] = get_args(Format)
_EXTENSIONS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
KNOWN = "csv, tsv, jsonl, ndjson and parquet, each but parquet also with .gz or .zst"
DELIMITERS: dict[Format, str] = {"csv": ",", "tsv": "\t"}


def by_extension(name: str) -> tuple[Format | None, Compression | None]:
    """What the end of a file's name says; (None, …) when it names no format that we know."""
    stem, _, ending = name.lower().rpartition(".")
    compression = _COMPRESSIONS.get(f".{ending}")
    if compression:
        ending = stem.rpartition(".")[2]
    found = _EXTENSIONS.get(f".{ending}")
    return (None, compression) if found == "parquet" and compression else (found, compression)


def named_format(name: str) -> Format:
    """The format that a user typed. Raises ConfigurationError."""
    plain = name.strip().lower()
    plain = "jsonl" if plain == "ndjson" else plain
    for format in FORMATS:
        if format == plain:
            return format
    raise ConfigurationError(
        f"the format {name!r} is unknown{did_you_mean(name, FORMATS)}", f"Known are {', '.join(FORMATS)}."
    )


def listed(names: Iterable[str], most: int = 20) -> str:
    """Column names for a message: quoted, long ones and long lists cut."""
    every = list(names)
    return ", ".join(repr(name[:60]) for name in every[:most]) + (", …" if len(every) > most else "")
