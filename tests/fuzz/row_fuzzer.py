"""The row reader under atheris, which changes its inputs by the lines of ours that they reach. libFuzzer's options.

The first byte chooses the charset, the second where the bytes are cut; a crash is an input, written to a file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))
with atheris.instrument_imports(include=["vllm_dropin.scoring.rows"]):
    from tests.fuzz.trickle import COLUMN, alike, outcome

CHARSETS = [None, "utf-8", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift_jis", "gb18030", "iso2022_jp"]
HEADERS = [b"", COLUMN.encode() + b"\n", b"a," + COLUMN.encode() + b"\n"]


def try_one(data: bytes) -> None:
    if len(data) < 2:
        return
    charset, size = CHARSETS[data[0] % len(CHARSETS)], 1 + data[1] % 8
    table = HEADERS[data[1] % len(HEADERS)] + data[2:]
    if not alike(outcome(table, charset, size), outcome(table, charset)):
        raise AssertionError(f"what {table!r} means in {charset} depends on where it is cut")


if __name__ == "__main__":
    atheris.Setup(sys.argv, try_one)
    atheris.Fuzz()
