from __future__ import annotations

import codecs
import csv
import io
import tempfile
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dropin.errors import EncodingError, TableError
from vllm_dropin.scoring.rows import EMPTY, Row, read_rows, survey

COLUMN = "promptText"


def rows(data: bytes, charset: str | None = None, column: str = COLUMN) -> list[Row]:
    return list(read_rows(io.BytesIO(data), column, charset))


def prompts(data: bytes, charset: str | None = None) -> list[str]:
    return [row.prompt for row in rows(data, charset)]


def written(table: Iterable[Iterable[str]], **options: object) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, **options).writerows(table)  # type: ignore[arg-type]
    return text.getvalue().encode()


def test_a_row_knows_its_place_its_line_and_its_prompt() -> None:
    assert rows(b'id,promptText\n1,"two\nlines"\n2,b\n') == [Row(0, 2, "two\nlines"), Row(1, 4, "b")]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_line_end_is_one(end: bytes) -> None:
    assert prompts(end.join([b"promptText", b"a", b"b"])) == ["a", "b"]


def test_line_ends_inside_quotes_are_kept_as_they_are() -> None:
    assert prompts(b'promptText\r\n"a\r\nb\rc\nd"\r\n') == ["a\r\nb\rc\nd"]


@pytest.mark.parametrize(
    ("data", "charset"),
    [
        (codecs.BOM_UTF8 + "promptText\nä\n".encode(), None),
        (codecs.BOM_UTF8 + "promptText\nä\n".encode(), "utf-8"),
        (codecs.BOM_UTF8 + '"promptText"\nä\n'.encode(), "UTF8"),
        (codecs.BOM_UTF8 + "promptText\nä\n".encode(), "latin-1"),
        ("promptText\nä\n".encode("utf-16"), None),
        ("promptText\nä\n".encode("utf-16"), "utf-16"),
        ("promptText\nä\n".encode("utf-16-le"), "utf-16"),
        ("promptText\nä\n".encode("utf-16-le"), "utf-16le"),
        (codecs.BOM_UTF16_BE + "promptText\nä\n".encode("utf-16-be"), "utf-16"),
        (codecs.BOM_UTF16_BE + "promptText\nä\n".encode("utf-16-be"), "utf-16-be"),
        ("promptText\nä\n".encode("utf-32"), None),
        ("promptText\nä\n".encode("latin-1"), "iso-8859-1"),
    ],
)
def test_byte_order_marks_go_and_charsets_are_honoured(data: bytes, charset: str | None) -> None:
    assert prompts(data, charset) == ["ä"]


@pytest.mark.parametrize(
    ("good", "bad", "charset"),
    [
        (b"promptText\n" + b"x" * 200_000, b"\xff", None),
        (codecs.BOM_UTF8 + b"promptText\n", b"\xc3(", "utf-8"),
        (b"promptText\n" + b"x" * 65_530, b"\xc3", None),  # cut at the end of the file
        ("promptText\n".encode("utf-16"), b"\x00\xdc", "utf-16"),
        (b"promptText\n", b"\x80", "ascii"),
        ("promptText\nあ".encode("shift_jis"), b"\x81\x20", "shift_jis"),
    ],
)
def test_bytes_that_are_no_text_are_named_by_their_offset(good: bytes, bad: bytes, charset: str | None) -> None:
    with pytest.raises(EncodingError, match=rf"byte {len(good)} "):
        rows(good + bad, charset)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_file_may_come_in_small_pieces(size: int) -> None:
    """A pipe or a decompressor gives fewer bytes than asked for: a mark is still seen, and bad bytes are refused."""

    class Pieces(io.BytesIO):
        def read(self, asked: int | None = -1, /) -> bytes:
            return super().read(size)

    for charset in ("utf-8-sig", "utf-16", "utf-32"):
        data = "promptText\r\nä\r\n".encode(charset)
        assert [row.prompt for row in read_rows(Pieces(data), COLUMN)] == ["ä"]
    with pytest.raises(EncodingError, match=r"before byte \d+ is not ISO2022_JP text"):
        list(read_rows(Pieces(b"promptText\na\x1b.;;;;;;;;;\n"), COLUMN, "iso2022_jp"))


@pytest.mark.parametrize("charset", ["nonsense", "base64", "rot13", "idna", "punycode", "unicode_escape", "utf-7"])
def test_a_charset_that_no_csv_is_written_in_is_refused(charset: str) -> None:
    with pytest.raises(TableError, match="charset"):
        rows(b"promptText\na\n", charset)


def test_in_one_column_a_blank_line_between_rows_is_an_empty_row() -> None:
    got = rows(b"\n\npromptText\na\n\n\nb\n\n\n")
    assert [(row.line, row.prompt) for row in got] == [(4, "a"), (5, ""), (6, ""), (7, "b")]
    assert [row.fault for row in got] == [None, EMPTY, EMPTY, None]


def test_a_quoted_empty_cell_is_a_row_even_at_the_end() -> None:
    assert prompts(b'promptText\na\n""\n') == ["a", ""]


def test_in_several_columns_a_blank_line_is_no_row() -> None:
    assert prompts(b"id,promptText\n1,a\n\n,\n3,c\n") == ["a", "", "c"]


def test_ragged_rows_are_broken_by_themselves() -> None:
    got = rows(b'id,promptText,note\n1,a,x\n2\n3,hello, world,x\n4,"d"\n')
    assert [row.prompt for row in got] == ["a", "", "", "d"]
    assert "line 3 has 1 cells" in (got[1].fault or "")
    assert "line 4 has 4 cells" in (got[2].fault or "")
    assert got[3].fault is None  # the prompt is there; what is missing is not needed


@pytest.mark.parametrize("length", [1 << 20, 10_000_000])
def test_large_cells(length: int) -> None:
    got = prompts(b'promptText\n"' + b"x" * length + b'"\nb\n')
    assert [len(prompt) for prompt in got] == [length, 1]


def test_nul_bytes_are_characters() -> None:
    assert prompts(b"promptText\na\x00b\n") == ["a\x00b"]


def test_a_header_alone_has_no_rows() -> None:
    assert rows(b"promptText\n") == rows(b"id,promptText") == []


@pytest.mark.parametrize("data", [b"", b"\n\n", codecs.BOM_UTF8])
def test_no_header(data: bytes) -> None:
    with pytest.raises(TableError, match="no header"):
        rows(data)


def test_a_missing_column_names_what_is_there_and_what_is_not() -> None:
    with pytest.raises(TableError, match=r"'promptText' is missing; the CSV has 'id', 'prompt text '"):
        rows(b"id,prompt text \n1,a\n")
    with pytest.raises(TableError, match="…") as many:
        rows(",".join("c" * 500 + str(at) for at in range(1000)).encode())
    assert len(str(many.value)) < 2000


def test_a_quote_that_never_ends_breaks_the_table() -> None:
    for data in (b'promptText\na\n"b\nc\n', b'promptText\na\n"b\nc', b'promptText\n"'):
        with pytest.raises(TableError, match="never closed"):
            rows(data)


@pytest.mark.parametrize("data", [b'promptText\n"b"', b'promptText\n"b""c"', b'promptText\n"b\n"', b"promptText\nb"])
def test_a_last_line_without_an_end_is_whole(data: bytes) -> None:
    assert len(rows(data)) == 1


def test_reading_twice_and_leaving_early_keep_the_file_open() -> None:
    with tempfile.SpooledTemporaryFile(max_size=8) as file:
        file.write(b"promptText\n" + b"a\n" * 1000)
        first = read_rows(file, COLUMN)
        assert next(first).prompt == "a"
        first.close()
        assert len(list(read_rows(file, COLUMN))) == 1000
        assert not file.closed


def test_a_survey_counts_rows_and_faults() -> None:
    found = survey(io.BytesIO(b'promptText\na\n""\n"  "\n"x",y\nb\n'), COLUMN, keep=2)
    assert (found.rows, found.faulty) == (5, 3)
    assert [row.index for row in found.first] == [1, 2]


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(TEXT), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_what_csv_writes_in_one_column_comes_back(texts: list[str], charset: str) -> None:
    data = written([[COLUMN], *([text] for text in texts)]).decode().encode(charset)
    assert prompts(data) == texts


@given(st.lists(st.tuples(TEXT, TEXT, TEXT)), st.sampled_from(["\r\n", "\n"]))
def test_what_csv_writes_in_several_columns_comes_back(table: list[tuple[str, str, str]], end: str) -> None:
    # With "\n" as the line end Python's writer leaves a lone "\r" unquoted, which no reader can tell from a line end.
    data = written([["a", COLUMN, "b"], *table], lineterminator=end, quoting=csv.QUOTE_ALL)
    assert prompts(data) == [cells[1] for cells in table]


@given(st.lists(st.from_regex(r"[a-z ]{0,6}", fullmatch=True)))
def test_lines_written_without_quotes_keep_their_places(texts: list[str]) -> None:
    data = "\n".join([COLUMN, *texts]).encode()
    while texts and not texts[-1]:
        texts = texts[:-1]  # blank lines at the end of a file are no rows
    assert prompts(data) == texts


@given(st.binary(max_size=300))
def test_any_bytes_give_rows_or_a_table_error(data: bytes) -> None:
    try:
        got = rows(b"promptText\n" + data)
    except TableError:
        return
    assert [row.index for row in got] == list(range(len(got)))
