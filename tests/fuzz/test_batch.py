"""Files for `score`, near to what they should be: records, the same from any row on, or an error that says why."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.report import count, tries
from tests.fuzz.tables import TEXT, near_tables
from vllm_dropin.batch.inputs import find_inputs
from vllm_dropin.batch.records import Record, Source
from vllm_dropin.errors import DropinError

CELLS = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | TEXT
LINES = st.one_of(
    st.dictionaries(TEXT | st.just("promptText"), CELLS, max_size=3).map(json.dumps),
    st.builds(
        lambda name, body: json.dumps({"custom_id": name, "url": "/v1/chat/completions", "body": body}), TEXT, CELLS
    ),
    st.sampled_from(
        ["", "{", "[]", "null", '{"a": 1, "a": 2}', '{"a": "\\ud800"}', "9" * 5000, "[" * 3000, "\x00", "NaN"]
    ),
).map(lambda line: line.encode("utf-8", "surrogatepass"))


def parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"promptText": texts}), file)
    return file.getvalue()


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A name and its bytes, perhaps with some of them cut out, put in or changed."""
    kind = draw(st.sampled_from(["csv", "tsv", "jsonl", "parquet"]))
    if kind == "parquet":
        data = parquet(draw(st.lists(TEXT, max_size=4)))
    elif kind == "jsonl":
        data = draw(st.sampled_from([b"\n", b"\r\n"])).join(draw(st.lists(LINES, max_size=5)))
    else:
        data = draw(near_tables())
    packed = draw(st.sampled_from(["", "", ".gz"])) if kind != "parquet" else ""
    data = gzip.compress(data, mtime=0) if packed else data
    if draw(st.booleans()):
        place = draw(st.integers(0, len(data)))
        put = draw(st.sampled_from([b"", b"\x00", b"\xff", b'"', b"\n", b"\x1f\x8b", b"PAR1"]))
        data = data[:place] + put + data[place + draw(st.sampled_from([0, 1, 8])) :]
    return f"rows.{kind}{packed}", data


def read(path: Path, start: int = 0) -> list[Record] | str:
    try:
        return list(itertools.chain.from_iterable(Source(find_inputs([str(path)])).read(start)))
    except DropinError as error:
        assert error.message
        return str(error)


def shown(records: list[Record] | str) -> list[str] | str:
    """As text, because NaN is not itself."""
    if isinstance(records, str):
        return records
    return [f"{record.row_id} {record.place} {dict(record.values)!r} {record.error}" for record in records]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def test_any_file_is_records_or_an_error(folder: Path) -> None:
    @tries(few=60)
    @given(files(), st.integers(0, 4))
    def told(file: tuple[str, bytes], start: int) -> None:
        name, data = file
        path = folder / name
        path.write_bytes(data)
        got: Any = read(path)
        count(f"files of score: {name}", "records" if isinstance(got, list) else "refused")
        if isinstance(got, list):
            assert [record.row_id for record in got] == list(range(len(got)))
            assert shown(read(path, start)) == shown(got[start:])

    told()
