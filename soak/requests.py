"""What the clients ask. Each prompt holds a number of its own, which the model says again: so an answer names its row.

The numbers are drawn at random, so that a wrong digit in an answer does not make it another row's.
"""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import dataclass

MODEL = "datarobot-deployed-llm"
CHAT, ROWS = "/v1/chat/completions", "/predict/"
_NUMBERS = range(100_000, 1_000_000)
_WORDS = ("river", "stone", "window", "garden", "letter", "silver", "engine", "morning", "forest", "paper", "winter")
_CONTEXT_WORDS = 2_100
"""More words than the example's context has tokens (2,048): the engine refuses such a row."""


@dataclass(frozen=True)
class Chat:
    """One chat request whose answer has exactly `tokens` tokens. `filler`: words in front of the question."""

    number: int
    tokens: int
    stream: bool = False
    filler: str = ""

    path = CHAT
    content_type = "application/json"
    weight = 1

    @property
    def association_id(self) -> str:
        return f"soak-{self.number}"

    def body(self) -> bytes:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"{self.filler}{question(self.number)}"}],
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "temperature": 0,
            "datarobot_association_id": self.association_id,
        }
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(body).encode()


@dataclass(frozen=True)
class Row:
    """One line of a table. A broken one has no number that counts: it must come back as an error, in its place."""

    number: int
    cells: tuple[str, ...]
    broken: bool = False


@dataclass(frozen=True)
class Table:
    """One CSV."""

    number: int
    rows: tuple[Row, ...]

    path = ROWS
    content_type = "text/csv"

    @property
    def weight(self) -> int:
        return len(self.rows)

    def body(self) -> bytes:
        text = io.StringIO()
        csv.writer(text).writerows([("id", "promptText"), *(row.cells for row in self.rows)])
        return text.getvalue().encode()


Request = Chat | Table


def question(number: int) -> str:
    return f"Say the number {number}."


class Author:
    """Writes requests, the same ones for the same seed."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def number(self) -> int:
        return self._random.choice(_NUMBERS)

    def chat(self, tokens: tuple[int, int], *, stream: bool = False, long_share: float = 0.0) -> Chat:
        """Between `tokens` tokens long; `long_share` of them with a prompt of up to 1,500 words."""
        words = self._random.randint(300, 1_500) if self._random.random() < long_share else 0
        filler = "".join(f"{self._random.choice(_WORDS)} " for _ in range(words))
        return Chat(self.number(), self._random.randint(*tokens), stream, filler)

    def table(self, rows: int, broken_share: float = 0.1) -> Table:
        """At most `rows` rows, one of them sound at least; the broken ones lie anywhere."""
        count = self._random.randint(max(1, rows // 2), rows)
        sound = self._random.randrange(count)
        numbers = self._random.sample(_NUMBERS, count)
        made = [
            self._row(number, broken=index != sound and self._random.random() < broken_share)
            for index, number in enumerate(numbers)
        ]
        return Table(self.number(), tuple(made))

    def _row(self, number: int, *, broken: bool) -> Row:
        name = str(number)
        if not broken:
            return Row(number, (name, question(number)))
        cells = self._random.choice(
            [(name, ""), (name,), (name, question(number), "one too many"), (name, "word " * _CONTEXT_WORDS)]
        )
        return Row(number, cells, broken=True)
