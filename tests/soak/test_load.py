"""The clients, against servers that are silent, cut the connection, or take their time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

from soak.ledger import Entry, Events, Ledger
from soak.load import Clients, Mix
from soak.requests import Chat
from soak.verdicts import Outcome

CHAT = Chat(123456, tokens=2)
CUT = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"
REFUSAL = json.dumps({"error": {"message": "too many requests"}}).encode()
REFUSED = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: %d\r\n\r\n%b" % (len(REFUSAL), REFUSAL)


def ask(folder: Path, answer: bytes | None, act: Callable[[Clients], Awaitable[object]]) -> tuple[Ledger, list[str]]:
    """Let clients ask a server with one answer (None: silence); what they entered, and the keys that they showed."""
    keys: list[str] = []
    served: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        served.add(task)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        keys.extend(line.split()[-1] for line in head.splitlines() if line.startswith("Authorization"))
        if answer is None:
            await reader.read()
        else:
            writer.write(answer)
        writer.close()
        await writer.wait_closed()

    async def run() -> Ledger:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with Events(folder / "events.jsonl") as events:
            ledger = Ledger(events)
            async with server, Clients(f"http://127.0.0.1:{port}", lambda: "key", ledger, events, 7) as clients:
                await act(clients)
            await asyncio.gather(*served, return_exceptions=True)
        return ledger

    return asyncio.run(run()), keys


def entered(ledger: Ledger) -> Entry:
    (entry,) = ledger.entries
    return entry


def test_a_cut_answer_is_entered_as_cut(tmp_path: Path) -> None:
    ledger, keys = ask(tmp_path, CUT, lambda clients: clients.ask("chat", CHAT))
    assert entered(ledger).verdict.outcome is Outcome.CUT
    assert keys == ["key"]


def test_a_client_leaves_when_its_patience_ends(tmp_path: Path) -> None:
    ledger, _ = ask(tmp_path, None, lambda clients: clients.ask("leaving", CHAT, patience=0.1))
    assert entered(ledger).verdict.outcome is Outcome.LEFT
    assert 0.1 <= entered(ledger).seconds < 1.0
    assert ledger.open == 0


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    async def run() -> Entry:
        with Events(tmp_path / "events.jsonl") as events:
            async with Clients("http://127.0.0.1:1", lambda: "key", Ledger(events), events, 7) as clients:
                return await clients.ask("chat", CHAT)

    assert asyncio.run(run()).verdict.outcome is Outcome.CUT


def test_all_clients_of_a_mix_ask_and_stop(tmp_path: Path) -> None:
    async def act(clients: Clients) -> None:
        clients.start(Mix(1, 1, 1, 1, 0, 0, rows=4, tokens=(8, 8), long_share=0.0, pause=0.0))
        await asyncio.sleep(0.2)
        assert await clients.stop(5.0) == 0
        assert clients.failure() is None

    ledger, _ = ask(tmp_path, REFUSED, act)
    assert {entry.client for entry in ledger.entries} == {
        "chat", "stream", "table", "leaving stream", "leaving table",
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert len(lines) == len(ledger.entries) == sum(ledger.asked.values())
    assert {line["verdict"]["outcome"] for line in lines if line["client"] == "chat"} == {"refused"}
