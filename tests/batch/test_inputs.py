from __future__ import annotations

import gzip
import io
import os
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vllm_dropin.batch.inputs import InputFile, find_inputs
from vllm_dropin.errors import ConfigurationError, InputOutputError

ROWS = b"promptText\na\nb\n"
BATCH = b'{"custom_id": "r", "body": {"messages": []}}\n'


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return bytes(sink.getvalue().to_pybytes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.csv", "a.csv", ".hidden.csv", "_also.csv", "notes.txt", "sub/c.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(ROWS)
    return tmp_path


def names(files: tuple[InputFile, ...]) -> list[str]:
    return [os.path.basename(file.name) for file in files]


def one(path: Path, data: bytes) -> InputFile:
    path.write_bytes(data)
    (file,) = find_inputs([str(path)])
    return file


def test_a_file_keeps_its_name_and_has_a_size(folder: Path) -> None:
    (file,) = find_inputs([str(folder / "a.csv")])
    assert (file.name, file.size, file.format, file.compression) == (str(folder / "a.csv"), 15, "csv", None)
    assert file.rereadable
    with file.open() as stream:
        assert stream.read() == ROWS


def test_a_folder_is_its_files_of_known_extensions(folder: Path) -> None:
    assert names(find_inputs([str(folder)])) == ["a.csv", "b.csv"]


def test_a_glob_is_what_it_matches(folder: Path) -> None:
    assert names(find_inputs([str(folder / "*.csv")])) == ["_also.csv", "a.csv", "b.csv"]
    assert names(find_inputs([str(folder / "**/[bc].csv")])) == ["b.csv", "c.csv"]


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    assert names((one(tmp_path / "a[1].csv", ROWS),)) == ["a[1].csv"]


def test_several_names_keep_their_order(folder: Path) -> None:
    assert names(find_inputs([str(folder / "b.csv"), str(folder / "a.csv")])) == ["b.csv", "a.csv"]


def test_a_url_of_a_local_file(folder: Path) -> None:
    (file,) = find_inputs([f"file://{folder}/a.csv"])
    with file.open() as stream:
        assert stream.read() == ROWS


@pytest.mark.parametrize(
    ("name", "format", "compression"),
    [
        ("x.csv", "csv", None),
        ("x.CSV", "csv", None),
        ("x.tsv.gz", "tsv", "gzip"),
        ("x.jsonl.zst", "jsonl", "zstd"),
        ("x.ndjson", "jsonl", None),
        ("x.a.b.csv.gz", "csv", "gzip"),
    ],
)
def test_the_extension_tells_the_format(tmp_path: Path, name: str, format: str, compression: str | None) -> None:
    data = b'{"promptText": "a"}\n' if format == "jsonl" else ROWS
    packed = {"gzip": gzip.compress, "zstd": zstd, None: bytes}[compression](data)
    file = one(tmp_path / name, packed)
    assert (file.format, file.compression) == (format, compression)
    with file.open() as stream:
        assert stream.read() == data


def test_a_format_that_is_given_wins_and_compression_stays(tmp_path: Path) -> None:
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(ROWS))
    (file,) = find_inputs([str(tmp_path / "x.txt.gz")], "csv")
    assert (file.format, file.compression) == ("csv", "gzip")
    assert find_inputs([str(tmp_path / "x.txt.gz")], "NDJSON")[0].format == "jsonl"


@pytest.mark.parametrize("data", [BATCH, b"\n\n" + BATCH, b"\xef\xbb\xbf" + BATCH])
def test_requests_are_recognised_by_their_first_line(tmp_path: Path, data: bytes) -> None:
    assert one(tmp_path / "x.jsonl", data).format == "openai-batch"
    assert one(tmp_path / "x.jsonl.gz", gzip.compress(data)).format == "openai-batch"
    assert find_inputs([str(tmp_path / "x.jsonl")], "jsonl")[0].format == "jsonl"


@pytest.mark.parametrize("data", [b"", b'{"custom_id": "r"}\n', b"nonsense\n", b"[1]\n", b"\xff\n"])
def test_other_lines_are_no_requests(tmp_path: Path, data: bytes) -> None:
    assert one(tmp_path / "x.jsonl", data).format == "jsonl"


def test_an_empty_file_is_what_the_others_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").write_bytes(BATCH)
    assert {file.format for file in find_inputs([str(tmp_path)])} == {"openai-batch"}


@pytest.mark.parametrize(
    ("argument", "format", "words"),
    [
        ("none.csv", None, "does not exist"),
        ("none*.csv", None, "no file matches"),
        ("sub", None, "no file of a known format"),
        ("notes.txt", None, "names no format.*\n.*csv, tsv, jsonl, ndjson and parquet"),
        ("x.parquet.gz", None, "names no format"),
        ("a.csv", "jsno", "'jsno' is unknown; did you mean 'jsonl'"),
        ("mixed", None, "different formats: .*a.csv is csv, .*b.jsonl is jsonl.*\n.*--format"),
    ],
)
def test_what_can_not_be_scored_is_refused(tmp_path: Path, argument: str, format: str | None, words: str) -> None:
    for name in ("a.csv", "notes.txt", "x.parquet.gz", "sub/notes.txt", "mixed/a.csv", "mixed/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(ROWS)
    with pytest.raises(ConfigurationError, match=f"(?s){words}") as caught:
        find_inputs([str(tmp_path / argument)], format)
    assert caught.value.exit_code == 78
    assert caught.value.remedy


def test_nothing_at_all_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="nothing to score"):
        find_inputs([])


@pytest.mark.parametrize(
    ("given", "format", "words"),
    [
        (["-"], None, "not known"),
        (["-"], "parquet", "Parquet can't"),
        (["-", "a.csv"], "csv", "together with files"),
    ],
)
def test_standard_input_alone_and_of_a_known_format(given: list[str], format: str | None, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        find_inputs(given, format)


def test_standard_input_can_be_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(ROWS)))
    (file,) = find_inputs(["-"], "csv")
    assert (file.size, file.rereadable) == (None, False)
    with file.open() as stream:
        assert stream.read() == ROWS
    assert not sys.stdin.buffer.closed
    assert file.fingerprint() != file.fingerprint()


def test_a_pipe_has_no_size_and_is_opened_once(tmp_path: Path) -> None:
    pipe = tmp_path / "rows"
    os.mkfifo(pipe)
    (file,) = find_inputs([str(pipe)], "jsonl")
    assert (file.size, file.rereadable) == (None, False)
    writer = threading.Thread(target=pipe.write_bytes, args=[BATCH])
    writer.start()
    with file.open() as stream:
        assert stream.read() == BATCH
    writer.join()
    with pytest.raises(ConfigurationError, match="pipe"):
        find_inputs([str(pipe)], "parquet")


def test_a_fingerprint_tells_contents_apart(tmp_path: Path) -> None:
    first = one(tmp_path / "a.csv", ROWS).fingerprint()
    assert first.startswith("blake2b:")
    assert one(tmp_path / "b.csv", ROWS).fingerprint() == first
    assert one(tmp_path / "a.csv", ROWS + b"c\n").fingerprint() != first


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_bytes_that_move_are_those_of_the_file(tmp_path: Path, pack: object) -> None:
    ending = "gz" if pack is gzip.compress else "zst"
    file = one(tmp_path / f"x.csv.{ending}", pack(b"promptText\n" + os.urandom(1 << 20).hex().encode()))  # type: ignore[operator]
    moved: list[int] = []
    with file.open(moved.append) as stream:
        stream.read(1000)
        assert 0 < sum(moved) < (file.size or 0)
        stream.read()
    assert sum(moved) == file.size


@pytest.mark.parametrize("cut", [-1, -9, 20])
@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_compressed_file_that_is_cut_short_is_named(tmp_path: Path, pack: object, cut: int) -> None:
    ending = "gz" if pack is gzip.compress else "zst"
    packed: bytes = pack(os.urandom(100_000))  # type: ignore[operator]
    file = one(tmp_path / f"x.csv.{ending}", packed[:cut])
    with file.open() as stream, pytest.raises(InputOutputError, match=rf"x\.csv\.{ending} can't be read"):
        stream.read()


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_what_is_not_compressed_is_named(tmp_path: Path, ending: str) -> None:
    file = one(tmp_path / f"x.csv.{ending}", ROWS * 100)
    with file.open() as stream, pytest.raises(InputOutputError, match=rf"x\.csv\.{ending} can't be read"):
        stream.read()


def test_several_compressed_members_are_one_file(tmp_path: Path) -> None:
    for ending, pack in (("gz", gzip.compress), ("zst", zstd)):
        with one(tmp_path / f"x.csv.{ending}", pack(ROWS) + pack(ROWS)).open() as stream:
            assert stream.read() == ROWS + ROWS


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    file = one(tmp_path / "x.csv", ROWS)
    (tmp_path / "x.csv").unlink()
    with pytest.raises(InputOutputError, match=r"x\.csv can't be read: No such file"):
        file.open()
    with pytest.raises(InputOutputError, match=r"x\.csv can't be read"):
        file.fingerprint()


@pytest.mark.parametrize(("url", "module"), [("gs://b/x.csv", "gcsfs"), ("abfs://b/x.csv", "adlfs")])
def test_a_missing_back_end_names_the_extra(url: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=r"package that reads \w+:// is missing") as caught:
        find_inputs([url])
    assert caught.value.remedy == "pip install 'vllm-dropin[cloud]'"


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)ftp:// is not supported.*s3://"):
        find_inputs(["ftp://x/y.csv"])


def test_a_parquet_file_has_its_own_compression(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": ["x"]}), tmp_path / "x.parquet")
    (file,) = find_inputs([str(tmp_path)])
    assert (file.format, file.compression) == ("parquet", None)
