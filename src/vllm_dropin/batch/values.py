"""Values of any format as text and as JSON.

Text stays as it is and nothing becomes an empty cell. Times are ISO 8601, decimals their exact digits in quotes, bytes
base64; what JSON has no number for (NaN, infinities) is null there. Nested values are JSON text in a cell.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any


def as_json(value: object) -> object:
    """The same value from what JSON has: None, bool, int, float, str, list, dict."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {as_text(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return as_text(value)


def as_text(value: object) -> str:
    """The value as the text of a cell."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, bool | list | tuple | Mapping):
        return dump(as_json(value))
    return str(value)


def dump(value: object) -> str:
    """JSON text on one line, readable where that is possible: half of a surrogate pair has to be escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if text.isascii() or _encodes(text) else json.dumps(value, allow_nan=False)


def encoded(text: str) -> bytes:
    """UTF-8, in which half of a surrogate pair is written as its escape: `\\\\ud83d`."""
    return text.encode("utf-8", "backslashreplace")


def mended(text: str) -> str:
    """The text without halves of surrogate pairs, which no file of UTF-8 can hold: see `encoded`."""
    return text if text.isascii() or _encodes(text) else encoded(text).decode("utf-8")


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class ArrowRow(Mapping[str, object]):
    """One row of an Arrow record batch, converted value by value when it is asked for."""

    __slots__ = ("batch", "place")

    def __init__(self, batch: Any, place: int) -> None:
        self.batch = batch
        self.place = place

    def __getitem__(self, name: str) -> object:
        at = self.batch.schema.get_field_index(name)
        if at < 0:
            raise KeyError(name)
        return _python(self.batch.column(at)[self.place])

    def __contains__(self, name: object) -> bool:
        return name in self.batch.schema.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.batch.schema.names)

    def __len__(self) -> int:
        return int(self.batch.num_columns)


def _python(scalar: Any) -> object:
    """An Arrow value as Python's. Arrow's own conversion of nanoseconds depends on whether pandas is installed."""
    import pyarrow as pa

    kind = scalar.type
    if not scalar.is_valid:
        return None
    if pa.types.is_struct(kind):
        return {name: _python(item) for name, item in scalar.items()}
    if pa.types.is_map(kind):
        return [[_python(part) for part in entry.values()] for entry in scalar.values]
    if pa.types.is_nested(kind) and hasattr(scalar, "values"):
        return [_python(item) for item in scalar.values]
    if pa.types.is_temporal(kind):
        return _time(scalar)
    value: object = scalar.as_py()
    return value


def _time(scalar: Any) -> object:
    """A time as Python has it; ISO 8601 text for nanoseconds, and what Arrow says for years that Python has not."""
    import pyarrow as pa

    kind = scalar.type
    unit = getattr(kind, "unit", None)
    try:
        if unit != "ns":
            value: object = scalar.as_py()
            return value
        if pa.types.is_timestamp(kind):
            coarse = pa.timestamp("us", kind.tz)
        else:
            coarse = pa.duration("us") if pa.types.is_duration(kind) else pa.time64("us")
        moment = pa.scalar(scalar.value // 1000, coarse).as_py()
    except (ValueError, OverflowError):
        return f"{scalar.value} {unit} since 1970" if unit else str(scalar.value)
    if scalar.value % 1000 == 0:
        return moment
    if isinstance(moment, datetime.timedelta):
        return f"{scalar.value} ns"
    digits = f"{scalar.value % 1_000_000_000:09}"
    whole = moment.replace(microsecond=0).isoformat()
    at = len("00:00:00") + (len("1970-01-01T") if isinstance(moment, datetime.datetime) else 0)
    return f"{whole[:at]}.{digits}{whole[at:]}"
