from __future__ import annotations

import datetime
import gzip
import io
import itertools
import json
import sys
import threading
import tracemalloc
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dropin.batch.inputs import find_inputs
from vllm_dropin.batch.records import CsvOptions, Record, Source
from vllm_dropin.errors import ConfigurationError, EncodingError, InputOutputError, TableError
from vllm_dropin.scoring.rows import read_rows


def source(tmp_path: Path, files: Mapping[str, bytes | str], charset: str | None = None) -> Source:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return Source(find_inputs([str(tmp_path / name) for name in files]), CsvOptions(charset))


def read(of: Source, start: int = 0) -> list[Record]:
    return list(itertools.chain.from_iterable(of.read(start)))


def values(of: Source) -> list[dict[str, Any]]:
    return [dict(record.values) for record in read(of)]


def test_a_record_has_a_place_a_name_and_texts(tmp_path: Path) -> None:
    got = source(tmp_path, {"rows.csv": 'id,promptText\n1,"two\nlines"\n2,b\n'})
    assert got.columns == ("id", "promptText")
    first, second = read(got)
    assert (first.row_id, second.row_id) == (0, 1)
    assert first.place == f"{tmp_path}/rows.csv, line 2"
    assert second.place == f"{tmp_path}/rows.csv, line 4"
    assert first.values == {"id": "1", "promptText": "two\nlines"}
    assert first.error is None


def test_rows_are_counted_over_all_files(tmp_path: Path) -> None:
    got = source(tmp_path, {"a.csv": "x,y\n1,2\n3,4\n", "b.csv": "y,x\n6,5\n"})
    assert [record.row_id for record in read(got)] == [0, 1, 2]
    assert values(got) == [{"x": "1", "y": "2"}, {"x": "3", "y": "4"}, {"x": "5", "y": "6"}]


def test_tabs_tell_cells_apart_in_a_tsv(tmp_path: Path) -> None:
    assert values(source(tmp_path, {"a.tsv": 'x\ty\n1,5\t"a\tb"\n'})) == [{"x": "1,5", "y": "a\tb"}]


def test_csv_is_what_it_is_over_http(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbfid,promptText\n1,a\n\n,\n2\n3,hello, world\n"4","d\r\ne"\n'
    for record, row in zip(
        read(source(tmp_path, {"a.csv": data})), read_rows(io.BytesIO(data), "promptText"), strict=True
    ):
        assert record.row_id == row.index
        assert record.place.endswith(f"line {row.line}")
        if row.error is None:
            assert record.values["promptText"] == row.prompt
        else:
            assert record.error == row.error or "promptText" not in record.values


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_what_they_are_over_http(data: bytes, single: bool) -> None:
    whole = (b"promptText\n" if single else b"a,promptText\n") + data
    path = Path(TEMPORARY / "any.csv")
    path.write_bytes(whole)
    expected: Sequence[str | None] | type[TableError]
    try:
        expected = [row.prompt if row.error is None else None for row in read_rows(io.BytesIO(whole), "promptText")]
    except TableError as error:
        expected = type(error)
    try:
        found = read(Source(find_inputs([str(path)])))
    except TableError as error:
        assert type(error) is expected
        return
    assert [None if record.error else record.values.get("promptText") for record in found] == expected


TEMPORARY = Path()


@pytest.fixture(autouse=True, scope="module")
def _temporary(tmp_path_factory: pytest.TempPathFactory) -> None:
    global TEMPORARY
    TEMPORARY = tmp_path_factory.mktemp("any")


def test_a_charset_can_be_named(tmp_path: Path) -> None:
    assert values(source(tmp_path, {"a.csv": "x\nä\n".encode("latin-1")}, "latin-1")) == [{"x": "ä"}]


@pytest.mark.parametrize(
    ("data", "charset", "words"),
    [
        ("", None, "no header line"),
        ("\n\n", None, "no header line"),
        ('x\na\n"b', None, "never closed"),
        (b"x\nab\xff", None, "byte 4 is not UTF-8.*\n.*--charset"),
        (b"x\n", "nonsense", "charset 'nonsense' is unknown.*\n.*cp1252"),
    ],
)
def test_a_broken_table_is_named(tmp_path: Path, data: bytes | str, charset: str | None, words: str) -> None:
    with pytest.raises(TableError, match=rf"(?s)a\.csv: .*{words}"):
        read(source(tmp_path, {"a.csv": data}, charset))
    if b"\xff" in (data if isinstance(data, bytes) else b""):
        with pytest.raises(EncodingError):
            read(source(tmp_path, {"a.csv": data}))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.csv": "x,y\n", "b.csv": "x\n"}, r"b\.csv lacks 'y', compared with .*a\.csv"),
        ({"a.csv": "x\n", "b.csv": "x,z\n"}, r"b\.csv also has 'z'"),
        ({"a.csv": "x,y,x\n"}, r"a\.csv has the column 'x' twice"),
    ],
)
def test_columns_must_agree(tmp_path: Path, files: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        source(tmp_path, files)


def test_json_lines_are_free_in_their_fields(tmp_path: Path) -> None:
    data = '\ufeff{"a": 1, "b": [1, {"c": null}]}\n\n  \n{"d": 1.5, "e": "\\ud83d"}\r\n{"f": true}'
    got = source(tmp_path, {"a.jsonl": data})
    assert got.columns is None
    assert values(got) == [{"a": 1, "b": [1, {"c": None}]}, {"d": 1.5, "e": "\ud83d"}, {"f": True}]
    assert [record.place.rpartition(", ")[2] for record in read(got)] == ["line 1", "line 4", "line 5"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not valid JSON"),
        ('{"a": 1} {', "not valid JSON: Extra data, column 10"),
        ("[1]", "no JSON object"),
        ("null", "no JSON object"),
        ('{"a": NaN}', "NaN is no JSON value"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a": ' + "[" * 100_000 + "}", "not valid JSON"),
        ('{"a": ' + "[" * 300 + "]" * 300 + "}", "nested too deeply"),
    ],
)
def test_a_line_that_is_no_object_is_a_row_with_an_error(tmp_path: Path, line: str, words: str) -> None:
    first, second, third = read(source(tmp_path, {"a.jsonl": f'{{"x": 1}}\n{line}\n{{"x": 2}}\n'}))
    assert (first.error, third.error) == (None, None)
    assert second.error is not None
    assert words in second.error
    assert "line 2 " in second.error
    assert second.values == {"_raw": line}


def test_bytes_that_are_no_text_are_kept_as_escapes(tmp_path: Path) -> None:
    (record,) = read(source(tmp_path, {"a.jsonl": b'{"a": "\xff"}\n'}))
    assert "not UTF-8" in (record.error or "")
    assert record.values == {"_raw": '{"a": "\\xff"}'}


def test_many_brackets_in_a_text_are_not_deep(tmp_path: Path) -> None:
    assert values(source(tmp_path, {"a.jsonl": json.dumps({"a": "[" * 1000, "b": [[]] * 300})})) != []
    assert read(source(tmp_path, {"a.jsonl": json.dumps({"a": "[" * 1000})}))[0].error is None


def test_requests_need_an_id_of_their_own(tmp_path: Path) -> None:
    lines = [{"custom_id": name, "body": {}} for name in ("a", "b", "a", "", 1)] + [{"body": {}}]
    data = "".join(f"{json.dumps(line)}\n" for line in lines)
    again = '{"custom_id": "b", "body": {}}\n'
    got = source(tmp_path, {"a.jsonl": data, "b.jsonl": again})
    errors = [record.error or "" for record in read(got)]
    assert errors[:2] == ["", ""]
    assert "'a' has been used" in errors[2]
    assert all("no custom_id" in error for error in errors[3:6])
    assert "'b' has been used" in errors[6]
    assert [record.error or "" for record in read(got)] == errors
    assert [record.error or "" for record in read(got, start=2)] == errors[2:]


TABLE = pa.table(
    {
        "text": ["a", None, "c"],
        "when": pa.array([1000, None, 1_700_000_000_000_000_001], pa.timestamp("ns", "UTC")),
        "price": pa.array([Decimal("1.10"), None, Decimal("3.00")], pa.decimal128(9, 2)),
        "nested": [{"a": [1, 2]}, {"a": []}, None],
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
    }
)


def test_parquet_rows_are_converted_when_they_are_looked_at(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet", row_group_size=2)
    got = Source(find_inputs([str(tmp_path / "a.parquet")]))
    assert got.columns == ("text", "when", "price", "nested", "kind")
    assert got.rows == 3
    assert got.schema.equals(TABLE.schema)
    first, _, third = read(got)
    assert third.place == f"{tmp_path}/a.parquet, row 3"
    assert first.values["text"] == "a"
    assert first.values["when"] == datetime.datetime(1970, 1, 1, 0, 0, 0, 1, datetime.UTC)
    assert third.values["when"] == "2023-11-14T22:13:20.000000001+00:00"
    assert dict(third.values) | {"when": 0} == {
        "text": "c", "when": 0, "price": Decimal("3.00"), "nested": None, "kind": "x"
    }  # fmt: skip
    assert "none" not in first.values


def test_parquet_files_must_agree_in_types(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1], "y": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"y": ["b"], "x": [2]}), tmp_path / "b.parquet")
    assert values(Source(find_inputs([str(tmp_path)]))) == [{"x": 1, "y": "a"}, {"x": 2, "y": "b"}]
    pq.write_table(pa.table({"x": [1.5], "y": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(ConfigurationError, match=r"'x' is int64 in .*a\.parquet and double in .*c\.parquet"):
        Source(find_inputs([str(tmp_path)]))


def test_a_parquet_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [str(at) for at in range(100_000)]}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputOutputError, match=r"a\.parquet can't be read"):
        Source(find_inputs([str(path)]))
    path.write_bytes(whole[:1000] + bytes(len(whole) - 2000) + whole[-1000:])
    with pytest.raises(InputOutputError, match=r"a\.parquet can't be read"):
        read(Source(find_inputs([str(path)])))


def test_a_gzip_that_is_cut_short_gives_its_rows_then_fails(tmp_path: Path) -> None:
    data = "x\n" + "".join(f"{at}\n" for at in range(200_000))
    batches = source(tmp_path, {"a.csv.gz": gzip.compress(data.encode())[:-20]}).read()
    assert len(next(batches)) == 1024
    with pytest.raises(InputOutputError, match=r"a\.csv\.gz can't be read"):
        list(batches)


def test_batches_are_bounded_in_rows_and_bytes(tmp_path: Path) -> None:
    short = source(tmp_path, {"a.csv": "x\n" + "a\n" * 3000})
    assert [len(batch) for batch in short.read()] == [1024, 1024, 952]
    long = source(tmp_path, {"b.csv": "x\n" + ("a" * (3 << 20) + "\n") * 7})
    assert [len(batch) for batch in long.read()] == [3, 3, 1]
    pq.write_table(pa.table({"x": [f"{at}" * 100_000 for at in range(100, 200)]}), tmp_path / "c.parquet")
    assert max(len(batch) for batch in Source(find_inputs([str(tmp_path / "c.parquet")])).read()) < 60
    # Stored once, and as large in memory.
    pq.write_table(pa.table({"x": ["same" * 100_000] * 100}), tmp_path / "d.parquet")
    assert max(len(batch) for batch in Source(find_inputs([str(tmp_path / "d.parquet")])).read()) < 60


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "a.csv.gz"])
def test_reading_can_begin_anywhere(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"x": [str(at) for at in range(3000)]}), path)
    elif name == "a.jsonl":
        path.write_text("".join(f'{{"x": "{at}"}}\n' for at in range(3000)))
    else:
        text = ("x\n" + "".join(f"{at}\n" for at in range(3000))).encode()
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    got = Source(find_inputs([str(path)]))
    tail = read(got, start=2000)
    assert [(record.row_id, record.values["x"]) for record in tail] == [(at, str(at)) for at in range(2000, 3000)]
    assert read(got, start=5000) == []
    assert len(read(got)) == 3000


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl", "a.parquet"])
def test_how_far_it_is_can_be_seen_from_another_thread(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = [f"{at * 7919}" * 20 for at in range(20_000)]
    if name == "a.parquet":
        pq.write_table(pa.table({"x": rows}), path)
    elif name == "a.jsonl":
        path.write_text("".join(f'{{"x": "{row}"}}\n' for row in rows))
    else:
        text = "\n".join(["x", *rows]).encode()
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    got = Source(find_inputs([str(path), str(path)]))
    seen: list[tuple[int, int]] = []
    for _ in got.read():
        looker = threading.Thread(target=lambda: seen.append(got.position))
        looker.start()
        looker.join()
    size = path.stat().st_size
    assert [total for _, total in seen] == [2 * size] * len(seen)
    done = [at for at, _ in seen]
    assert done == sorted(done)
    assert 0 < done[0] < size < done[-1] <= 2 * size
    assert got.position == (2 * size, 2 * size)


def test_standard_input_is_read_once_with_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x,y\n1,2\n")))
    got = Source(find_inputs(["-"], "csv"))
    assert (got.columns, got.rereadable) == (("x", "y"), False)
    (record,) = read(got)
    assert (record.values, record.place) == ({"x": "1", "y": "2"}, "standard input, line 2")
    assert got.position == (8, 0)
    with pytest.raises(ConfigurationError, match="standard input can be read only once"):
        got.read()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    rows, text = 40_000, "x" * 500
    if kind == "parquet":  # one row group: the case that costs memory where it is read as a whole
        pq.write_table(pa.table({"x": [f"{at}{text}" for at in range(rows)]}), path, compression="none")
    else:
        line = f'{{"x": "{text}"}}\n' if kind == "jsonl" else f"{text}\n"
        path.write_text(("x\n" if kind == "csv" else "") + line * rows)
    got = Source(find_inputs([str(path)]))
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    tracemalloc.start()
    try:
        count = most = 0
        for batch in got.read():
            count += len(batch)
            most = max(most, pool.bytes_allocated() - before)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == rows
    assert peak < 6 << 20
    assert most < 8 << 20
