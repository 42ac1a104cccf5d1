"""The row reader: what was written comes back, and any bytes are rows or an error that says why, however they come."""

from __future__ import annotations

import codecs
import io
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.report import EXAMPLES, SECONDS, count, tries
from tests.fuzz.tables import CHARSETS, TEXT, near_tables, written
from tests.fuzz.trickle import COLUMN, alike, outcome
from vllm_dropin.errors import TableError
from vllm_dropin.scoring.rows import Table, survey


@tries(few=50)
@given(st.lists(st.lists(TEXT, min_size=2, max_size=2)), st.sampled_from([name for name in CHARSETS if name[0] == "u"]))
def test_what_is_written_comes_back(table: list[list[str]], charset: str) -> None:
    data = written([["id", COLUMN], *table], charset)
    marked = charset.endswith(("-sig", "-16", "-32"))
    got = outcome(data, None if marked else charset)
    assert isinstance(got, list), got
    assert [row.prompt for row in got] == [cells[1] for cells in table]
    count("rows written and read", charset)


@tries(few=100)
@given(near_tables(), st.none() | st.sampled_from(CHARSETS) | st.text(max_size=8))
@example(codecs.BOM_UTF16_BE + b"\x00", "utf-32")
@example(b"promptText\n\x80", "hz")
def test_any_bytes_are_rows_or_a_table_error(data: bytes, charset: str | None) -> None:
    got = outcome(data, charset)
    if isinstance(got, list):
        assert [row.index for row in got] == list(range(len(got)))
        assert [row.line for row in got] == sorted(row.line for row in got)
        counted = survey(io.BytesIO(data), COLUMN, charset)
        assert (counted.rows, counted.faulty) == (len(got), sum(row.fault is not None for row in got))
    count("any bytes as rows", "rows" if isinstance(got, list) else "refused")


@tries(few=100)
@given(near_tables(), st.none() | st.sampled_from(CHARSETS), st.sampled_from([1, 2, 3, 7]))
def test_where_the_bytes_are_cut_does_not_matter(data: bytes, charset: str | None, size: int) -> None:
    assert alike(outcome(data, charset, size), outcome(data, charset))
    count("rows in pieces", f"{size} bytes")


@tries(few=50)
@given(near_tables(), st.sampled_from([",", "\t", ";", "|"]))
def test_records_have_the_cells_that_were_written(data: bytes, delimiter: str) -> None:
    try:
        table = Table(io.BytesIO(data), delimiter=delimiter)
        records = list(table)
    except TableError:
        count("any bytes as a table", "refused")
        return
    assert all(cells for _, cells in records)
    assert all(line >= 1 for line, _ in records)
    count("any bytes as a table", "read")


def test_codecs_of_python_end_in_rows_or_a_table_error() -> None:
    """Every name of a codec that Python knows may come as a charset."""
    from encodings.aliases import aliases

    for name in sorted({*aliases, *aliases.values()}):
        for data in (b"promptText\nhello\n\xff\x00", "promptText\nä\n".encode("utf-16")):
            outcome(data, name)
            count("charsets of Python", "read or refused")


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is in .venv-fuzz: make fuzz")
@pytest.mark.timeout(SECONDS + 60)
def test_the_reader_under_a_fuzzer_that_follows_coverage() -> None:
    with tempfile.TemporaryDirectory(prefix="vd-") as folder:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("row_fuzzer.py")), f"-max_total_time={SECONDS}",
             "-seed=1" if not EXAMPLES else "-seed=0", "-max_len=512", f"-artifact_prefix={folder}/", folder],
            capture_output=True, text=True, errors="replace",
        )  # fmt: skip
        found = {path.name: path.read_bytes() for path in Path(folder).glob("crash-*")}
    assert done.returncode == 0, f"{found}\n{done.stderr[-3000:]}"
    runs = next(line.split()[1] for line in done.stderr.splitlines() if line.startswith("Done "))
    covered = next(line for line in reversed(done.stderr.splitlines()) if " cov: " in line)
    count("row reader under atheris", f"no crash in {runs} runs, {covered.split(' cov: ')[1].split()[0]} edges")
