"""A file that is read in pieces, and what the row reader makes of it."""

from __future__ import annotations

import io

from vllm_dropin.errors import TableError
from vllm_dropin.scoring import rows

COLUMN = "promptText"
WHOLE = 1 << 30


class Trickle(io.BytesIO):
    """Gives at most `size` bytes at a time, as sockets and decompressors do."""

    def __init__(self, data: bytes, size: int) -> None:
        super().__init__(data)
        self.size = size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(self.size if size is None or size < 0 else min(size, self.size))


def outcome(data: bytes, charset: str | None = None, size: int = WHOLE) -> list[rows.Row] | TableError:
    """The rows of a table that comes in pieces of `size` bytes, or why it is refused."""
    try:
        return list(rows.read_rows(Trickle(data, size), COLUMN, charset))
    except TableError as error:
        return error


def alike(one: list[rows.Row] | TableError, other: list[rows.Row] | TableError) -> bool:
    """Whether two readings of the same bytes agree.

    Of two faults the reader tells the one that it meets first: a bad byte far behind a bad header only if it has been
    read already. Bad bytes are named by the same offset, where the decoder tells it.
    """
    if isinstance(one, list) or isinstance(other, list):
        return one == other
    known = one.message.startswith("byte ") and other.message.startswith("byte ")
    return not known or one.message == other.message
