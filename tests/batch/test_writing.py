from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import random
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dropin.batch.inputs import find_inputs
from vllm_dropin.batch.outputs import ADDED, plan_output
from vllm_dropin.batch.records import Record, Source
from vllm_dropin.batch.writing import open_writer
from vllm_dropin.errors import ConfigurationError, InputOutputError
from vllm_dropin.scoring.results import Fault, RowResult

TEXT = st.text(st.characters())  # halves of surrogate pairs too
CLEAN = st.text(st.characters(exclude_categories=["Cs"]))


def answer(record: Record) -> RowResult:
    """A failure for a record with an error; else two completions of its id."""
    if record.error is not None:
        return RowResult(record.row_id, 0, error=record.error, fault=Fault.INPUT)
    texts = (f'said "{record.row_id}"', "\r")
    return RowResult(record.row_id, 0, texts, ("stop", "length"), prompt_tokens=3, completion_tokens=4)


def source(path: Path, data: bytes | str | pa.Table | None = None) -> Source:
    if isinstance(data, pa.Table):
        pq.write_table(data, path)
    elif data is not None:
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return Source(find_inputs([str(path)]))


def write(of: Source, target: Path, pieces: random.Random | None = None, **options: Any) -> bytes:
    """What is at the target after all rows of the source have been written, in pieces of any size."""
    plan = plan_output(str(target), of, **options)
    writer = open_writer(str(target), plan, of)
    pairs = [(record, answer(record)) for batch in of.read() for record in batch]
    while pairs:
        size = pieces.randint(1, 700) if pieces else len(pairs)
        writer.write(pairs[:size])
        pairs = pairs[size:]
    writer.close()
    return target.read_bytes()


def lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.decode().splitlines()]


def cells(data: bytes, delimiter: str = ",") -> list[list[str]]:
    return list(csv.reader(io.StringIO(data.decode(), newline=""), delimiter=delimiter))


# Columns


def test_the_inputs_columns_come_first_then_what_was_added(tmp_path: Path) -> None:
    rows = source(tmp_path / "a.csv", "b,a\n1,2\n3,4,5\n")
    assert cells(write(rows, tmp_path / "o.csv")) == [
        ["b", "a", *ADDED],
        ["1", "2", 'said "0"', "stop", "3", "4", "", "0"],
        ["3", "4", "", "", "", "", "line 3 has 3 cells where the header has 2; quote a cell that holds a comma", "1"],
    ]
    got = lines(write(rows, tmp_path / "o.jsonl"))
    assert list(got[0]) == ["b", "a", *ADDED]
    assert got[0]["prompt_tokens"] == 3
    assert got[1]["completion"] is got[1]["finish_reason"] is got[1]["prompt_tokens"] is None
    table = pq.read_table(io.BytesIO(write(rows, tmp_path / "o.parquet")))
    assert table.schema.names == ["b", "a", *ADDED]
    assert table.to_pylist() == got
    assert [str(field.type) for field in table.schema] == ["string"] * 4 + ["int64"] * 2 + ["string", "int64"]


def test_a_short_row_has_empty_cells(tmp_path: Path) -> None:
    rows = source(tmp_path / "a.csv", "a,b\n1\n")
    assert cells(write(rows, tmp_path / "o.csv"))[1][:2] == ["1", ""]
    assert lines(write(rows, tmp_path / "o.jsonl"))[0]["b"] is None


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    rows = source(tmp_path / "a.csv", "a,b,error\n1,2,3\n")
    assert cells(write(rows, tmp_path / "o.csv", columns=["b"]))[0] == ["b", *ADDED]
    assert cells(write(rows, tmp_path / "o.csv", columns=[]))[0] == list(ADDED)
    table = source(tmp_path / "a.parquet", pa.table({"a": [1], "b": [2], "row_id": [3]}))
    for chosen in (["b", "a"], ["a"], []):
        out = pq.read_table(io.BytesIO(write(table, tmp_path / "o.parquet", columns=chosen)))
        assert out.schema.names == [*chosen, *ADDED]
    free = source(tmp_path / "a.jsonl", '{"a": 1, "b": 2}\n{"a": 3}\n{\n')
    got = lines(write(free, tmp_path / "o.jsonl", columns=["b"]))
    assert [list(line)[:2] for line in got] == [["b", "completion"], ["b", "completion"], ["b", "_raw"]]
    assert [line["b"] for line in got] == [2, None, None]
    assert cells(write(free, tmp_path / "o.csv", columns=["b"]))[1][0] == "2"
    assert pq.read_table(io.BytesIO(write(free, tmp_path / "o.parquet", columns=["b"])))["b"].to_pylist() == [
        2,
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("o.csv", {"columns": ["x"]}, r"--columns: the input has no column 'x'; it has 'a', 'error'"),
        ("o.csv", {}, r"the input has 'error', which is also the name of a column that is added"),
        ("o.txt", {"columns": ["a"]}, r"extension names no format"),
        ("o.jsonl", {"columns": ["a"], "format": "openai-batch"}, "needs OpenAI Batch input"),
        ("o.jsonl", {"columns": ["a"], "format": "xml"}, "'xml' is unknown"),
        ("-", {"columns": ["a"], "format": "parquet"}, "standard output"),
    ],
)
def test_what_can_not_be_written_is_refused(tmp_path: Path, name: str, options: dict[str, Any], words: str) -> None:
    rows = source(tmp_path / "a.csv", "a,error\n1,2\n")
    with pytest.raises(ConfigurationError, match=words) as caught:
        plan_output(name, rows, **options)
    assert caught.value.remedy


def test_a_clash_in_json_lines_is_seen_in_the_first_records_or_gives_way_later(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'completion'"):
        plan_output("o.jsonl", source(tmp_path / "a.jsonl", '{"a": 1}\n{"completion": 1}\n'))
    late = '{"a": 1}\n' * 2000 + '{"error": "mine", "input_error": 5}\n'
    rows = source(tmp_path / "b.jsonl", late)
    last = lines(write(rows, tmp_path / "o.jsonl"))[-1]
    assert (last["input_input_error"], last["input_error"], last["error"]) == ("mine", 5, None)
    table = cells(write(rows, tmp_path / "o.csv"))
    assert table[0][:3] == ["a", "input_input_error", "input_error"]
    assert table[-1][:3] == ["", "mine", "5"]


def test_completion_index_is_only_taken_when_completions_have_rows(tmp_path: Path) -> None:
    rows = source(tmp_path / "a.csv", "completion_index\n1\n")
    plan_output("o.csv", rows)
    with pytest.raises(ConfigurationError, match="'completion_index'"):
        plan_output("o.csv", rows, explode=True)


def test_several_completions_are_lists(tmp_path: Path) -> None:
    rows = source(tmp_path / "a.csv", "a,b\n1,2\n3,4,5\n")
    got = lines(write(rows, tmp_path / "o.jsonl", many=True))
    assert got[0]["completion"] == ['said "0"', "\r"]
    assert got[0]["finish_reason"] == ["stop", "length"]
    assert got[1]["completion"] is None
    table = pq.read_table(io.BytesIO(write(rows, tmp_path / "o.parquet", many=True)))
    assert table.schema.field("completion").type == pa.list_(pa.string())
    assert table.to_pylist() == got
    assert json.loads(cells(write(rows, tmp_path / "o.csv", many=True))[1][2]) == ['said "0"', "\r"]


def test_several_completions_can_have_rows_of_their_own(tmp_path: Path) -> None:
    rows = source(tmp_path / "a.csv", "a,b\n1,2\n3,4,5\n")
    got = lines(write(rows, tmp_path / "o.jsonl", many=True, explode=True))
    assert list(got[0]) == ["a", "b", *ADDED, "completion_index"]
    assert [(line["row_id"], line["completion_index"], line["completion"], line["finish_reason"]) for line in got] == [
        (0, 0, 'said "0"', "stop"),
        (0, 1, "\r", "length"),
        (1, None, None, None),
    ]
    assert pq.read_table(io.BytesIO(write(rows, tmp_path / "o.parquet", many=True, explode=True))).to_pylist() == got
    table = source(tmp_path / "a.parquet", pa.table({"x": [[1], [2]]}))
    out = pq.read_table(io.BytesIO(write(table, tmp_path / "o.parquet", many=True, explode=True)))
    assert out["x"].to_pylist() == [[1], [1], [2], [2]]


# Round trips


@given(st.lists(st.tuples(CLEAN, CLEAN), min_size=1), st.sampled_from([("csv", ","), ("tsv", "\t")]))
def test_csv_to_csv_keeps_every_cell(rows: list[tuple[str, str]], kind: tuple[str, str]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=kind[1], quoting=csv.QUOTE_ALL).writerows([("x", "y"), *rows])
    before = source(TEMPORARY / f"in.{kind[0]}", text.getvalue())
    write(before, TEMPORARY / f"out.{kind[0]}")
    after = source(TEMPORARY / f"out.{kind[0]}")
    assert after.columns == ("x", "y", *ADDED)
    got = [record.values for batch in after.read() for record in batch]
    assert [(values["x"], values["y"]) for values in got] == rows
    assert [values["completion"] for values in got] == [f'said "{at}"' for at in range(len(rows))]


@given(st.lists(TEXT, min_size=1))
def test_what_the_model_says_can_be_read_back_from_csv(texts: list[str]) -> None:
    before = source(TEMPORARY / "in.csv", "x\n" + "a\n" * len(texts))
    plan = plan_output("out.csv", before)
    writer = open_writer(str(TEMPORARY / "out.csv"), plan, before)
    records = [record for batch in before.read() for record in batch]
    writer.write([(record, RowResult(0, 0, (text,), ("",))) for record, text in zip(records, texts, strict=True)])
    writer.close()
    got = [record.values["completion"] for batch in source(TEMPORARY / "out.csv").read() for record in batch]
    assert got == [text.encode("utf-8", "backslashreplace").decode() for text in texts]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
NAMES = TEXT.filter(lambda name: name not in ADDED)


@given(st.lists(st.dictionaries(NAMES, JSON, max_size=4), min_size=1))
def test_json_lines_to_json_lines_keep_every_value(records: list[dict[str, Any]]) -> None:
    data = "".join(f"{json.dumps(record)}\n" for record in records)
    (TEMPORARY / "in.jsonl").write_text(data)
    before = Source(find_inputs([str(TEMPORARY / "in.jsonl")], "jsonl"))
    got = [json.loads(line) for line in write(before, TEMPORARY / "out.jsonl").split(b"\n")[:-1]]
    assert [{name: value for name, value in line.items() if name not in ADDED} for line in got] == records


@given(st.lists(st.dictionaries(NAMES, JSON, max_size=4), min_size=1))
def test_any_json_lines_become_csv_and_parquet(records: list[dict[str, Any]]) -> None:
    data = "".join(f"{json.dumps(record)}\n" for record in records)
    (TEMPORARY / "in.jsonl").write_text(data)
    before = Source(find_inputs([str(TEMPORARY / "in.jsonl")], "jsonl"))
    assert len(cells(write(before, TEMPORARY / "out.csv"))) == len(records) + 1
    assert pq.read_metadata(io.BytesIO(write(before, TEMPORARY / "out.parquet"))).num_rows == len(records)


TEMPORARY = Path()


@pytest.fixture(autouse=True, scope="module")
def _temporary(tmp_path_factory: pytest.TempPathFactory) -> None:
    global TEMPORARY
    TEMPORARY = tmp_path_factory.mktemp("round")


def test_a_broken_json_line_comes_out_with_its_text_and_its_error(tmp_path: Path) -> None:
    rows = source(tmp_path / "a.jsonl", '{"a": 1}\n{"a": \n[2]\n')
    got = lines(write(rows, tmp_path / "o.jsonl"))
    assert [line.get("_raw") for line in got] == [None, '{"a":', "[2]"]
    assert [line["error"] is None for line in got] == [True, False, False]
    assert [row[:2] for row in cells(write(rows, tmp_path / "o.csv"))] == [
        ["a", "_raw"],
        ["1", ""],
        ["", '{"a":'],
        ["", "[2]"],
    ]


def test_parquet_keeps_the_inputs_types_exactly(tmp_path: Path) -> None:
    table = pa.table(
        {
            "ns": pa.array([1, None, 3], pa.timestamp("ns", "Europe/Berlin")),
            "ms": pa.array([1, None, 3], pa.timestamp("ms")),
            "price": pa.array([Decimal("1.10"), None, Decimal("3.00")], pa.decimal128(9, 2)),
            "deep": pa.array([{"a": [{"b": 1}]}, None, {"a": None}]),
            "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int8())),
            "kind": pa.array(["x", None, "x"]).dictionary_encode(),
            "large": pa.array(["x", None, ""], pa.large_string()),
            "bytes": pa.array([b"\xff", None, b""], pa.binary()),
            "day": pa.array([1, None, 3], pa.date32()),
            "small": pa.array([1, None, 3], pa.uint8()),
            "half": pa.array([1.5, None, 3], pa.float32()),
            "fixed": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int64(), 2)),
        }
    ).replace_schema_metadata({"pandas": "{}"})
    rows = source(tmp_path / "a.parquet", table)
    out = pq.read_table(io.BytesIO(write(rows, tmp_path / "o.parquet")))
    kept = out.select(table.schema.names)
    expected = pq.read_table(tmp_path / "a.parquet")
    assert kept.schema.equals(expected.schema)
    assert kept.equals(expected)
    assert b"pandas" not in (out.schema.metadata or {})
    first = lines(write(rows, tmp_path / "o.jsonl"))[0]
    assert first["ns"] == "1970-01-01T01:00:00.000000001+01:00"
    assert first["price"] == "1.10"
    assert first["deep"] == {"a": [{"b": 1}]}
    assert first["map"] == [["k", 1]]
    assert first["bytes"] == "/w=="
    assert cells(write(rows, tmp_path / "o.csv"))[1][:4] == [
        "1970-01-01T01:00:00.000000001+01:00", "1970-01-01T00:00:00.001000", "1.10", '{"a": [{"b": 1}]}'
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "kind", "found"),
    [
        ("1 2", "int64", [1, 2]),
        ("1 2.5 null", "double", [1.0, 2.5, None]),
        ("true null", "bool", [True, None]),
        ("true 1", "string", ["true", "1"]),
        ('1 "a"', "string", ["1", "a"]),
        ("[1] null", "string", ["[1]", None]),
        ('{"b":1} "x"', "string", ['{"b": 1}', "x"]),
        ("null null", "string", [None, None]),
        ("9007199254740993 1.5", "string", ["9007199254740993", "1.5"]),
        ("9007199254740993 1", "int64", [9007199254740993, 1]),
        ("9223372036854775808 1", "string", ["9223372036854775808", "1"]),
        ('"\\ud83d" "a"', "string", ["\\ud83d", "a"]),
    ],
)
def test_types_of_json_lines_are_the_narrowest_that_hold_all(
    tmp_path: Path, values: str, kind: str, found: Sequence[object]
) -> None:
    rows = source(tmp_path / "a.jsonl", "".join(f'{{"x": {value}}}\n' for value in values.split(" ")))
    table = pq.read_table(io.BytesIO(write(rows, tmp_path / "o.parquet")))
    assert str(table.schema.field("x").type) == kind
    assert table["x"].to_pylist() == found


# OpenAI Batch


def test_openai_batch_gives_each_request_its_reply(tmp_path: Path) -> None:
    data = "".join(f'{{"custom_id": "{name}", "body": {{"messages": []}}}}\n' for name in ("a", "b", "c", "a"))
    rows = source(tmp_path / "a.jsonl", data)
    plan = plan_output("o.jsonl", rows)
    assert plan.format == "openai-batch"
    writer = open_writer(str(tmp_path / "o.jsonl"), plan, rows)
    results = [
        RowResult(0, 0, ("x",), ("stop",), reply=b'{"id":"chatcmpl-1","choices":[]}'),
        RowResult(1, 0, ("x",), ("stop",), reply=b'{\n "id": "chatcmpl-2"\n}'),
        RowResult(2, 0, ("x", "y"), ("stop", "length"), prompt_tokens=1, completion_tokens=2),
        RowResult(3, 0, error="used twice", fault=Fault.INPUT),
    ]
    records = [record for batch in rows.read() for record in batch]
    writer.write(list(zip(records, results, strict=True)))
    writer.close()
    first, second, third, fourth = lines((tmp_path / "o.jsonl").read_bytes())
    assert first == {
        "id": "batch_req_0",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "row-0", "body": {"id": "chatcmpl-1", "choices": []}},
        "error": None,
    }
    assert second["response"]["body"] == {"id": "chatcmpl-2"}
    assert [choice["message"]["content"] for choice in third["response"]["body"]["choices"]] == ["x", "y"]
    assert third["response"]["body"]["usage"]["total_tokens"] == 3
    assert (fourth["response"], fourth["error"]) == (None, {"code": "input", "message": "used twice"})
    with pytest.raises(ConfigurationError, match="--explode has no effect"):
        plan_output("o.jsonl", rows, explode=True)
    assert cells(write(rows, tmp_path / "o.csv"))[0][:2] == ["custom_id", "body"]
    assert "custom_id" in lines(write(rows, tmp_path / "p.jsonl", format="jsonl"))[0]


# Bytes


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "csv.zst", "tsv", "jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_the_same_rows_give_the_same_bytes(tmp_path: Path, kind: str, ending: str) -> None:
    rows = [f"{at} " * (at % 50) for at in range(3000)]
    if kind == "parquet":
        of = source(tmp_path / "a.parquet", pa.table({"x": pa.array(rows).dictionary_encode()}))
    elif kind == "jsonl":
        of = source(tmp_path / "a.jsonl", "".join(f'{{"x": "{row}"}}\n' for row in rows))
    else:
        of = source(tmp_path / "a.csv", "".join(f"{row}\n" for row in ["x", *(row or "-" for row in rows)]))
    whole = write(of, tmp_path / f"o.{ending}")
    for seed in range(2):
        assert write(of, tmp_path / f"p.{ending}", random.Random(seed)) == whole


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_output_can_be_read_back(tmp_path: Path, ending: str) -> None:
    rows = source(tmp_path / "a.csv", "x\n" + "abc\n" * 50_000)
    write(rows, tmp_path / f"o.csv.{ending}")
    assert sum(len(batch) for batch in source(tmp_path / f"o.csv.{ending}").read()) == 50_000
    if ending == "gz":
        assert gzip.decompress((tmp_path / "o.csv.gz").read_bytes()) == write(rows, tmp_path / "o.csv")


def test_row_groups_end_where_the_rows_say(tmp_path: Path) -> None:
    rows = source(tmp_path / "a.csv", "x\n" + ("a" * (1 << 20) + "\n") * 40)
    groups = pq.ParquetFile(io.BytesIO(write(rows, tmp_path / "o.parquet"))).metadata.num_row_groups
    assert groups == 3


def test_an_output_without_rows_has_its_columns(tmp_path: Path) -> None:
    rows = source(tmp_path / "a.csv", "x\n")
    assert cells(write(rows, tmp_path / "o.csv")) == [["x", *ADDED]]
    assert pq.read_table(io.BytesIO(write(rows, tmp_path / "o.parquet"))).schema.names == ["x", *ADDED]
    assert write(rows, tmp_path / "o.jsonl") == b""
    free = source(tmp_path / "a.jsonl", "")
    assert cells(write(free, tmp_path / "o.csv")) == [list(ADDED)]


# Streams and failures


class Full(io.RawIOBase):
    """A stream that takes `room` bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.taken = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        if len(self.taken) + len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.taken += bytes(data)
        return len(data)


def test_what_is_written_to_a_stream_is_there_at_once_and_the_stream_stays_open(tmp_path: Path) -> None:
    rows = source(tmp_path / "a.csv", "x\na\n")
    stream = Full(1 << 20)
    writer = open_writer(cast(BinaryIO, stream), plan_output("-", rows), rows)
    (batch,) = rows.read()
    writer.write([(record, answer(record)) for record in batch])
    assert len(cells(stream.taken)) == 2
    writer.close()
    assert not stream.closed


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_full_disk_is_an_error_of_ours(tmp_path: Path, format: str, room: int) -> None:
    rows = source(tmp_path / "a.csv", "x\n" + "".join(f"{at * 7919}\n" for at in range(2000)))
    plan = plan_output(f"o.{format}", rows)
    with pytest.raises(InputOutputError, match="the disk is full") as caught:
        writer = open_writer(cast(BinaryIO, Full(room)), plan, rows)
        try:
            for batch in rows.read():
                writer.write([(record, answer(record)) for record in batch])
            writer.close()
        except BaseException:
            writer.abort()
            raise
    assert caught.value.exit_code == 74


def test_a_full_disk_device(tmp_path: Path) -> None:
    rows = source(tmp_path / "a.csv", "x\na\n")
    for name in ("o.csv", "o.csv.gz", "o.csv.zst", "o.jsonl", "o.parquet"):
        (tmp_path / name).symlink_to("/dev/full")
        with pytest.raises(InputOutputError, match=rf"{name} can't be written: the disk is full"):
            write(rows, tmp_path / name)


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "csv.zst", "jsonl", "parquet"])
def test_an_output_that_is_given_up_is_closed(tmp_path: Path, ending: str) -> None:
    rows = source(tmp_path / "a.csv", "x\na\n")
    writer = open_writer(str(tmp_path / f"o.{ending}"), plan_output(f"o.{ending}", rows), rows)
    (batch,) = rows.read()
    writer.write([(record, answer(record)) for record in batch])
    writer.abort()
    writer.abort()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    rows = source(tmp_path / "a.csv", "x\na\n")
    with pytest.raises(ConfigurationError, match=r"none/o\.csv can't be written: its folder or bucket does not exist"):
        write(rows, tmp_path / "none/o.csv")


def test_standard_input_of_json_lines_can_not_become_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"a": 1}\n')))
    rows = Source(find_inputs(["-"], "jsonl"))
    with pytest.raises(ConfigurationError, match="takes a first pass"):
        plan_output("o.csv", rows)
    assert plan_output("-", rows).format == "jsonl"
    assert plan_output("o.csv", rows, columns=["a"]).columns == ("a",)
