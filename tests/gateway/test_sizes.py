"""Headers of hundreds of megabytes, bodies of a gigabyte and lengths that are no lengths, at the default bounds."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import repeat
from pathlib import Path

import pytest

from tests.conftest import GatewayProcess, Stage, wait_until
from tests.faults.figures import record
from vllm_dropin.gateway.config import Limits

MEBI = 1 << 20
PIECE = b"x" * (64 << 10)
GIGABYTE = 1 << 30
JSON, ROWS = "/v1/chat/completions", "/predict/"
CAPS = {JSON: Limits().json_body, ROWS: Limits().row_body}
FORM = b'--b\r\nContent-Disposition: form-data; name="X"; filename="r"\r\n\r\n'


@pytest.fixture(scope="module")
def front() -> Iterator[GatewayProcess]:
    """A gateway with default bounds, none of whose tests may leave anything behind."""
    made = Stage()
    gateway = made.gateway()
    gateway.chat("hi")  # what is imported late is loaded
    yield gateway
    made.close()


class Peak:
    """The most memory that the worker had since, beyond what it had before; in bytes."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self._process = Path(f"/proc/{gateway.workers[0].pid}")
        (self._process / "clear_refs").write_text("5")  # the peak is now what it has
        self._before = self._read()

    def _read(self) -> int:
        lines = (self._process / "status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10

    @property
    def gained(self) -> int:
        return self._read() - self._before


def push(gateway: GatewayProcess, head: bytes, pieces: Iterable[bytes]) -> tuple[int | None, int]:
    """Send all of it, or what the server takes: the status of the answer (None: it only hung up), and the bytes."""
    sent = 0
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection:
        connection.sendall(head)

        def send() -> None:
            nonlocal sent
            with suppress(OSError):  # the server has had enough
                for piece in pieces:
                    connection.sendall(piece)
                    sent += len(piece)

        sender = threading.Thread(target=send)
        sender.start()
        answer = b""
        with suppress(OSError):
            answer = connection.recv(4096)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        sender.join(30)
    return int(answer.split(b" ")[1]) if answer else None, sent


def head(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET /ping HTTP/1.1\r\nHost: x\r\nX-Huge: ", PIECE),
        (b"GET /ping HTTP/1.1\r\nHost: x\r\n", b"X-Many: of them\r\n" * 4096),
        (b"GET /ping HTTP/1.1\r\nHost: x\r\nX-Folded: a\r\n", b" folded\r\n" * 8192),
        (b"GET /", PIECE),
        (b"", PIECE),
        (b"", b"\r\n" * (32 << 10)),
    ],
    ids=["one header", "many headers", "folded lines", "address", "method", "blank lines"],
)
def test_300_mib_of_header_take_no_memory(front: GatewayProcess, start: bytes, piece: bytes) -> None:
    peak = Peak(front)
    status, sent = push(front, start, repeat(piece, 300 * MEBI // len(piece)))
    assert status in (400, 414, 431, None)
    assert sent < 16 * MEBI  # what the sockets between us hold
    record(19, "memory for 300 MiB of header", peak.gained / MEBI, "MiB")
    assert peak.gained < 2 * MEBI
    assert front.get("/ping")[0] == 200


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (JSON, "chunked"), (JSON, "announced"), (ROWS, "chunked"), (ROWS, "announced"), (ROWS, "form"),
        ("/v1/completions", "chunked"), ("/v1/audio/transcriptions", "form"),
    ],
)  # fmt: skip
def test_a_gigabyte_is_413_while_it_comes(front: GatewayProcess, path: str, kind: str) -> None:
    cap = CAPS.get(path, Limits().row_body if "audio" in path else Limits().json_body)
    lines = {
        "chunked": ["Transfer-Encoding: chunked"],
        "announced": [f"Content-Length: {GIGABYTE}"],
        "form": ["Transfer-Encoding: chunked", "Content-Type: multipart/form-data; boundary=b"],
    }[kind]
    pieces = [PIECE] * (GIGABYTE // len(PIECE))
    if kind != "announced":
        framed = f"{len(PIECE):x}\r\n".encode() + PIECE + b"\r\n"
        first = FORM if kind == "form" else b"promptText\n"
        pieces = [f"{len(first):x}\r\n".encode() + first + b"\r\n", *[framed] * len(pieces), b"0\r\n\r\n"]
    peak = Peak(front)
    status, sent = push(front, head(path, *lines), pieces)
    assert status == 413
    assert sent < (0 if kind == "announced" else cap) + 16 * MEBI
    record(20, f"memory for 1 GB, beyond a cap of {cap // MEBI} MiB", max(0, peak.gained - cap) / MEBI, "MiB")
    assert peak.gained < cap + 32 * MEBI
    assert front.state.total("held_bytes") == front.state.total("in_flight") == 0


def test_eight_gigabytes_at_once(front: GatewayProcess) -> None:
    framed = f"{len(PIECE):x}\r\n".encode() + PIECE + b"\r\n"
    peak = Peak(front)
    with ThreadPoolExecutor(8) as pool:
        start = head(JSON, "Transfer-Encoding: chunked")
        sent = pool.map(lambda _: push(front, start, repeat(framed, GIGABYTE // len(PIECE))), range(8))
        assert {status for status, _ in sent} == {413}
    assert peak.gained < 8 * CAPS[JSON] + 32 * MEBI
    assert front.state.total("held_bytes") == 0


def test_more_than_was_announced_is_no_part_of_the_body(front: GatewayProcess) -> None:
    body = b'{"messages": [{"role": "user", "content": "hi"}]}'
    peak, before = Peak(front), front.engine.stats()["started"]
    start = head(JSON, f"Content-Length: {len(body)}") + body
    status, sent = push(front, start, repeat(PIECE, GIGABYTE // len(PIECE)))
    assert status in (200, 400)  # 400: the rest was refused as a request while the answer was still to come
    assert sent < 16 * MEBI
    assert peak.gained < 4 * MEBI
    assert front.engine.stats()["started"] <= before + 1
    assert front.chat("hi")[0] == 200


@pytest.mark.parametrize("path", [JSON, ROWS])
def test_less_than_was_announced_is_no_request(front: GatewayProcess, path: str) -> None:
    before = front.engine.stats()["started"]
    with socket.create_connection(("127.0.0.1", front.port), timeout=10) as connection:
        connection.sendall(head(path, "Content-Length: 900000") + b'{"messages": []}')
        wait_until(lambda: front.state.total("held_bytes") > 0)
    wait_until(lambda: front.state.total("held_bytes") == 0)
    assert front.engine.stats()["started"] == before


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: -1"],
        ["Content-Length: +5"],
        ["Content-Length: 0x10"],
        ["Content-Length: 5, 6"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: 18446744073709551616"],
        ["Content-Length: 1e3"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: gzip"],
    ],
)
def test_lengths_that_are_no_lengths_are_refused(front: GatewayProcess, lines: list[str]) -> None:
    before = front.engine.stats()["started"]
    status, _ = push(front, head(JSON, *lines), [b"5\r\nhello\r\n0\r\n\r\n"])
    assert status == 400
    assert front.engine.stats()["started"] == before


def test_of_two_lengths_the_chunks_count_and_nothing_is_smuggled(front: GatewayProcess) -> None:
    """The engine is sent the body with a length of ours, so the two can't read one request as different ones."""
    body = b'{"messages": [{"role": "user", "content": "hi"}]}'
    chunk = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    before = front.engine.stats()["started"]
    status, _ = push(front, head(JSON, "Content-Length: 4", "Transfer-Encoding: chunked"), [chunk])
    assert status in (200, 400)
    assert front.engine.stats()["started"] - before == (status == 200)
    if status == 200:
        assert "transfer-encoding" not in front.engine.last()["headers"]
