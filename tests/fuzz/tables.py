"""Tables that nobody would write by hand: bytes near to a CSV, and texts that a CSV has to carry."""

from __future__ import annotations

import codecs
import csv
import io

from hypothesis import strategies as st

from tests.fuzz.trickle import COLUMN

CHARSETS = [
    "utf-8",
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32",
    "latin-1",
    "cp1252",
    "shift_jis",
    "gb18030",
]

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PIECES = st.sampled_from(
    [b'"', b'""', b",", b"\n", b"\r", b"\r\n", b"\x00", b"\xff", b"\xc3", b"\xe2\x82", b" ", b"\t", b"\x85", b"\x1c",
     codecs.BOM_UTF8, codecs.BOM_UTF16_LE, b"a", b"\xc3\xa4", b"promptText", b"promptText\n", b"\x0b\x0c", b"\x1b.",
     b"\xe2\x80\xa8", b"\x1b$B", b"~{"]
)  # fmt: skip


def written(rows: list[list[str]], charset: str = "utf-8") -> bytes:
    """A table with the prompt's column, as Python's csv writes it; what a charset lacks is replaced."""
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    return file.getvalue().encode(charset, "replace")


def near_tables() -> st.SearchStrategy[bytes]:
    """Bytes that are often a table, and else nearly one."""
    pieces = st.lists(PIECES, max_size=30).map(b"".join)
    tables = st.tuples(st.lists(TEXT, max_size=6), st.sampled_from(CHARSETS)).map(
        lambda drawn: written([[COLUMN], *([text] for text in drawn[0])], drawn[1])
    )
    return st.one_of(tables, st.builds(bytes.__add__, tables, pieces), pieces.map(b"promptText\n".__add__), st.binary())
