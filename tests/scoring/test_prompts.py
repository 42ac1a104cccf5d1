from __future__ import annotations

import json

import pytest

from vllm_dropin.scoring.prompts import GenerationDefaults, chat_body


def test_a_bare_request_holds_only_the_prompt() -> None:
    assert json.loads(chat_body("hi\ud800", GenerationDefaults(), None)) == {
        "messages": [{"role": "user", "content": "hi\ud800"}]
    }


def test_defaults_travel_with_every_row() -> None:
    defaults = GenerationDefaults(system_prompt="Be kind.", max_tokens=7, n=2, temperature=0)
    assert json.loads(chat_body("hi", defaults, "m")) == {
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}],
        "model": "m",
        "max_tokens": 7,
        "n": 2,
        "temperature": 0.0,
    }


@pytest.mark.parametrize(
    ("asked", "length", "given"), [(None, 10, None), (5, None, 5), (9, 10, 9), (10, 10, 9), (99, 10, 9), (5, 1, 1)]
)
def test_a_default_leaves_room_for_a_prompt(asked: int | None, length: int | None, given: int | None) -> None:
    assert GenerationDefaults(max_tokens=asked).capped(length).max_tokens == given
