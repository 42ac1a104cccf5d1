"""The CSV in a request: a raw body, or the file part `X` of a multipart form (contract, section 3)."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from vllm_dropin.gateway.errors import HttpError
from vllm_dropin.gateway.limits import SPOOL_BUFFER

# Its complaints go to the client, as a 422; in the log they would be lines of nobody.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

PART = b"X"
_RAW_TYPES = {b"", b"text/csv", b"text/plain"}
_PIECE = 1 << 16
_HOW = "send the CSV as the file part X of a form (curl -F X=@rows.csv) or as a text/csv body"


@dataclass(frozen=True)
class Upload:
    """The bytes of one CSV, at `file`, and the charset that its sender named. Close it."""

    file: IO[bytes]
    charset: str | None

    def close(self) -> None:
        self.file.close()


def open_upload(body: IO[bytes], headers: Mapping[bytes, bytes], spool_above: int) -> Upload:
    """Find the CSV in a whole body. Raises HttpError 422 when there is none or its type is another.

    A part is copied out of the form, to disk when it is larger than `spool_above` bytes.
    """
    if headers.get(b"content-encoding", b"identity").lower() not in (b"identity", b""):
        raise unusable("compressed bodies are not taken")
    kind, options = parse_options_header(headers.get(b"content-type"))
    kind = kind.lower()
    if kind == b"multipart/form-data":
        return _from_form(body, options.get(b"boundary", b""), spool_above)
    if kind not in _RAW_TYPES:
        raise unusable(f"the content type {kind.decode('latin-1')[:80]!r} is not taken; {_HOW}")
    if not body.read(1):
        raise unusable(f"the body is empty; {_HOW}")
    return Upload(body, _charset(options))


def unusable(message: str) -> HttpError:
    """The contract's refusal of what can't be scored."""
    return HttpError(422, f"ERROR: {message}")


def _charset(options: Mapping[bytes, bytes]) -> str | None:
    return options.get(b"charset", b"").decode("latin-1") or None


def _from_form(body: IO[bytes], boundary: bytes, spool_above: int) -> Upload:
    # Handed on, or closed below.
    form = _Form(tempfile.SpooledTemporaryFile(max_size=spool_above, buffering=SPOOL_BUFFER))  # noqa: SIM115
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": form.begin_part,
                "on_header_begin": form.begin_header,
                "on_header_field": form.header_name,
                "on_header_value": form.header_value,
                "on_header_end": form.end_header,
                "on_headers_finished": form.end_headers,
                "on_part_data": form.data,
                "on_part_end": form.end_part,
                "on_end": form.end,
            },
        )
        while piece := body.read(_PIECE):
            parser.write(piece)
        parser.finalize()
        if not form.complete:
            raise unusable("the multipart body is cut short")
        if form.charset_of_part is None:
            raise unusable(f"the form has no file part X; {_HOW}")
        if form.file.tell() == 0:
            raise unusable("the file part X is empty")
    except FormParserError as error:
        form.file.close()
        raise unusable(f"the multipart body is malformed: {error}") from error
    except BaseException:
        # Nobody else knows the temporary file.
        form.file.close()
        raise
    return Upload(form.file, form.charset_of_part or None)


@dataclass
class _Form:
    """What the parser tells, kept until the end: the first file part named X goes to `file`."""

    file: IO[bytes]
    charset_of_part: str | None = None  # None: no such part yet; "": it named no charset
    complete: bool = False
    _headers: dict[bytes, bytes] = field(default_factory=dict)
    _name: bytes = b""
    _value: bytes = b""
    _wanted: bool = False

    def begin_part(self) -> None:
        self._headers.clear()
        self._wanted = False

    def begin_header(self) -> None:
        self._name = self._value = b""

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def end_header(self) -> None:
        self._headers[self._name.lower()] = self._value

    def end_headers(self) -> None:
        header = self._headers.get(b"content-disposition", b"")
        _, disposition = parse_options_header(header)
        # The parser drops `filename*`, by which some clients send a name that is not ASCII.
        is_file = b"filename" in disposition or b"filename*=" in header.lower()
        self._wanted = is_file and disposition.get(b"name") == PART and self.charset_of_part is None
        if self._wanted:
            self.charset_of_part = _charset(parse_options_header(self._headers.get(b"content-type"))[1]) or ""

    def data(self, data: bytes, start: int, end: int) -> None:
        if self._wanted:
            self.file.write(data[start:end])

    def end_part(self) -> None:
        self._wanted = False

    def end(self) -> None:
        self.complete = True
