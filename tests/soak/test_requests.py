from __future__ import annotations

import csv
import io
import json

from soak.requests import Author


def test_the_same_seed_writes_the_same() -> None:
    def written(seed: str) -> list[bytes]:
        author = Author(seed)
        return [author.chat((8, 96), long_share=0.5).body(), author.table(24).body()]

    assert written("7 chat 0") == written("7 chat 0")
    assert written("7 chat 0") != written("7 chat 1")


def test_a_table_has_each_number_once_and_a_sound_row() -> None:
    author = Author("7")
    tables = [author.table(24, broken_share=0.5) for _ in range(50)]
    for table in tables:
        lines = list(csv.reader(io.StringIO(table.body().decode())))
        assert lines[0] == ["id", "promptText"]
        assert [line[0] for line in lines[1:]] == [str(row.number) for row in table.rows]
        assert len({row.number for row in table.rows}) == len(table.rows) == table.weight
        for line, row in zip(lines[1:], table.rows, strict=True):
            sound = len(line) == 2 and line[1] == f"Say the number {row.number}."
            assert sound is not row.broken
        assert not all(row.broken for row in table.rows)
    assert any(row.broken for table in tables for row in table.rows)


def test_a_chat_asks_for_exactly_its_tokens() -> None:
    chat = Author("7").chat((8, 96), stream=True, long_share=1.0)
    body = json.loads(chat.body())
    assert body["max_tokens"] == chat.tokens
    assert body["ignore_eos"] is body["stream"] is body["stream_options"]["include_usage"] is True
    assert body["messages"][0]["content"].endswith(f" Say the number {chat.number}.")
    assert 300 < len(body["messages"][0]["content"].split()) <= 1_504
