"""Whether vLLM would take a flag's value. Doubtful values pass: vLLM is the one to refuse them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

_SUFFIXED = re.compile(r"\d+(?:\.\d+)?[kmgtKMGT]")
_SUFFIXED_IN_JSON = re.compile(r"\b(\d+(?:\.\d+)?)[kmgtKMGT]\b")


class BadValue(ValueError):
    """What is wrong with a value. Scalars are quoted in it; JSON is not, for it may hold secrets."""


def _int(text: str) -> object:
    try:
        return int(text)
    except ValueError:
        raise BadValue(f"{text[:80]!r} is not a whole number") from None


def _float(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        raise BadValue(f"{text[:80]!r} is not a number") from None


def _human_int(text: str) -> object:
    """`4096`, or with a suffix: `4k` is 4,000, `4K` is 4,096 and takes no decimals."""
    word = text.strip()
    if not _SUFFIXED.fullmatch(word):
        return _int(word)
    if word[-1].isupper() and "." in word:
        raise BadValue(f"{word!r}: {word[-1]} counts in powers of 1024 and takes no decimals; write {word.lower()!r}")
    return word


def _human_int_or_auto(text: str) -> object:
    return text if text.strip().lower() in {"auto", "-1"} else _human_int(text)


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadValue(f"its value is not JSON ({error})") from None


def _config_json(text: str) -> object:
    """vLLM expands `80g` in the JSON of its config classes, though not inside strings: either reading may do."""
    try:
        return _json(text)
    except BadValue:
        return _json(_SUFFIXED_IN_JSON.sub(r"\1", text))


_READERS: dict[str, Callable[[str], object]] = {
    "int": _int,
    "float": _float,
    "human_readable_int": _human_int,
    "human_readable_int_or_auto": _human_int_or_auto,
    "json": _json,
    "parse_dataclass": _config_json,
    "str": str,
}
_JSON_KINDS = frozenset({"json", "parse_dataclass"})
_SCALAR_KINDS = frozenset({"int", "float", "human_readable_int", "human_readable_int_or_auto"})


def _inner(kind: str | None) -> tuple[str, bool]:
    """The kind within `optional(…)`, and whether it was within one. Argparse's default is text."""
    if kind is not None and kind.startswith("optional("):
        return kind[len("optional(") : -1], True
    return kind or "str", False


def takes_keys(kind: str | None, choices: Sequence[object]) -> bool:
    """Whether `--flag.key value` can be meant: vLLM makes one JSON text of such keys."""
    return not choices and _inner(kind)[0] not in _SCALAR_KINDS


def check(kind: str | None, choices: Sequence[object], text: str) -> None:
    """Raise BadValue where vLLM is sure to refuse `text` for a flag of this type with these choices."""
    inner, optional = _inner(kind)
    reader = _READERS.get(inner)
    if reader is None or (optional and text in {"", "None"}):
        return
    value = reader(text)
    if choices and inner not in _JSON_KINDS and value not in choices:
        allowed = ", ".join(str(choice) for choice in choices if choice is not None)
        raise BadValue(f"{text[:80]!r} is not one of {allowed}")
