"""Edits on the engine's bytes: the association id (decision 5), and an honest end for a stream that broke off.

Nothing is parsed: a splice costs 0.14 µs, parsing a chunk 5.4 µs.
"""

from __future__ import annotations

import json
import re
from typing import Any

# Quotes inside a JSON string are escaped, so this can't be a model's own words.
_ABORTED = b'"finish_reason":"abort"'
_DONE = b"data: [DONE]"
_DATA_OBJECT = re.compile(rb"data:[ \t]*\{")
_EMPTY_REST = re.compile(rb"[ \t\r\n]*\}")
_ERROR_REST = re.compile(rb'[ \t]*"error"[ \t]*:[ \t]*\{')
_JSON_START = re.compile(rb"[ \t\r\n]*\{")


def association_member(value: object) -> bytes:
    """The id as a member of a JSON object, with the comma after it."""
    return b'"datarobot_association_id":' + json.dumps(value).encode() + b","


def splice_object(body: bytes, member: bytes) -> bytes:
    """The member inside the JSON object that the body is; anything else stays as it is."""
    start = _JSON_START.match(body)
    if start is None:
        return body
    at = start.end()
    if _EMPTY_REST.match(body, at):
        member = member[:-1]
    return body[:at] + member + body[at:]


class EventStream:
    """Passes server-sent events on, line by whole line, whatever the chunks are.

    `member` is spliced after the first `{` of each event's data, but not into an error. A `[DONE]` that follows an
    error or an aborted completion is dropped, because a client would read it as success; `finish` tells.
    With nothing to edit the bytes that come out are the bytes that went in.
    """

    def __init__(self, member: bytes = b"") -> None:
        self._member = member
        self._held: list[bytes] = []
        self._event_open = False
        self._data_seen = False
        self._failed = False
        self._aborted = False

    def feed(self, chunk: bytes) -> bytes:
        """What can be passed on now: all lines that are complete."""
        end = chunk.rfind(b"\n") + 1
        if not end:
            self._held.append(chunk)
            return b""
        lines = chunk[:end]
        if self._held:
            lines = b"".join(self._held) + lines
            self._held.clear()
        if end < len(chunk):
            self._held.append(chunk[end:])
        return b"".join([self._line(line) for line in lines.split(b"\n")[:-1]])

    def finish(self) -> bytes:
        """What is left at a regular end."""
        rest = b"".join(self._held)
        self._held.clear()
        if self._aborted and not self._failed:
            rest += self.break_off(error_frame("the engine aborted this request"))
        return rest

    def break_off(self, frame: bytes) -> bytes:
        """The error frame, after closing the event that is open; half a line is dropped."""
        self._held.clear()
        return (b"\n" if self._event_open else b"") + frame

    def _line(self, line: bytes) -> bytes:
        """One line, which comes without its newline and leaves with it."""
        if line in (b"", b"\r"):
            opened, self._event_open, self._data_seen = self._event_open, False, False
            # The blank line after a dropped [DONE] goes too.
            return line + b"\n" if opened or not (self._failed or self._aborted) else b""
        if line.startswith(b"data:") and not self._data_seen:
            if line.startswith(_DONE) and (self._failed or self._aborted):
                return b""
            self._data_seen = True
            start = _DATA_OBJECT.match(line)
            if start is not None:
                line = self._object(line, start.end())
        self._event_open = True
        return line + b"\n"

    def _object(self, line: bytes, at: int) -> bytes:
        if _ERROR_REST.match(line, at):
            self._failed = True
            return line
        if _ABORTED in line:
            self._aborted = True
        if not self._member:
            return line
        member = self._member[:-1] if _EMPTY_REST.match(line, at) else self._member
        return line[:at] + member + line[at:]


def error_frame(message: str, path: str = "") -> bytes:
    """The last event of a stream that broke off, in the words of the route's protocol."""
    body: dict[str, Any]
    if path == "/v1/messages":
        body = {"type": "error", "error": {"type": "api_error", "message": message}}
        return b"event: error\ndata: " + json.dumps(body).encode() + b"\n\n"
    if path == "/v1/responses":
        body = {"type": "error", "code": "server_error", "message": message, "param": None}
        return b"event: error\ndata: " + json.dumps(body).encode() + b"\n\n"
    body = {"error": {"message": message, "type": "server_error", "param": None, "code": 503}}
    return b"data: " + json.dumps(body).encode() + b"\n\n"
