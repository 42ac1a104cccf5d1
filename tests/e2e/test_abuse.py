"""Requests that have hurt vLLM elsewhere, sent to the real engine through the gateway: it lives, and says little."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.conftest import UnixConnection
from tests.e2e.test_survival import engine_pids
from tests.gateway.test_doors import DOORS
from tests.gateway.test_engine_routes import ALLOWED, concrete, engine_paths
from vllm_dropin.gateway.errors import ERROR_BYTES

pytestmark = pytest.mark.e2e

CANARY = "s3cr3t-canary"
CHAT = "/v1/chat/completions"


def of_engine(service, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """The engine's own answer, around the gateway."""
    words = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in engine_pids(service)]
    uds = next(line[line.index(b"--uds") + 1].decode() for line in words if b"--uds" in line)
    connection = UnixConnection(uds)
    connection.timeout = 120
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_only_the_allow_list_of_the_running_engine_can_be_reached(real_service):
    status, document = of_engine(real_service, "GET", "/openapi.json")
    paths = set(json.loads(document)["paths"])
    assert status == 200
    assert paths <= engine_paths()  # what tests/gateway/test_engine_routes.py reads of its files leaves nothing out
    others = [concrete(path) for path in sorted(paths - ALLOWED)]
    assert len(others) > 10
    answered = [path for path in others if of_engine(real_service, "GET", path)[0] not in (404, 405)]
    assert answered, "nothing to keep shut: the test would prove nothing"
    with httpx2.Client(base_url=real_service.url, timeout=30) as client:
        for path in others:
            for door in ["/directAccess", "/nim"] if path in DOORS else ["", "/directAccess", "/nim"]:
                for method in ("GET", "POST"):
                    assert client.request(method, door + path).status_code == 404, (method, door + path)


@pytest.mark.parametrize("path", [CHAT, "/chat/completions", f"/directAccess{CHAT}", "/nim/v1/responses"])
def test_twelve_thousand_errors_are_one_short_answer(real_service, path):
    """vLLM finds eight in each message that is none, and 61 in such an input item."""
    many = json.dumps({"messages": [CANARY] * 2000, "input": [CANARY] * 200}).encode()
    inner = path[path.index("/v1") :] if "/v1" in path else CHAT
    found = re.search(rb"(\d+) validation errors", of_engine(real_service, "POST", inner, many)[1])
    assert found is not None
    assert int(found[1]) > 12_000
    started = time.monotonic()
    for body in (many, json.dumps({"messages": [CANARY] * 12_000, "input": [{"type": CANARY}] * 12_000}).encode()):
        answer = httpx2.post(f"{real_service.url}{path}", content=body, timeout=120)
        assert answer.status_code == 400
        assert len(answer.content) <= ERROR_BYTES
        assert CANARY not in answer.text
    assert time.monotonic() - started < 30


# What has ended or blocked engines, or would ask for more than any answer is worth.
POISON: dict[str, dict[str, Any]] = {
    "regex: not closed": {"structured_outputs": {"regex": "["}},
    "regex: nothing to repeat": {"structured_outputs": {"regex": "*"}},
    "regex: look-ahead": {"structured_outputs": {"regex": "(?=a)b"}},
    "regex: back-reference": {"structured_outputs": {"regex": r"(a)\1"}},
    "regex: backtracking": {"structured_outputs": {"regex": "(a+)+$"}},
    "regex: counted": {"structured_outputs": {"regex": "((a{0,99}){0,99}){0,99}"}},
    "regex: long": {"structured_outputs": {"regex": "|".join(f"word{number}" for number in range(20_000))}},
    "regex: deep": {"structured_outputs": {"regex": "(" * 5000 + "a" + ")" * 5000}},
    "grammar: nonsense": {"structured_outputs": {"grammar": "root ::= root root"}},
    "grammar: deep": {"structured_outputs": {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}},
    "schema: of itself": {"structured_outputs": {"json": {"$ref": "#"}}},
    "schema: nowhere": {"structured_outputs": {"json": {"$ref": "#/$defs/none"}}},
    "schema: pattern": {"structured_outputs": {"json": {"type": "string", "pattern": "("}}},
    "n": {"n": 16384},
    "best_of": {"best_of": 16384},
    "prompt_logprobs": {"prompt_logprobs": 10**9},
    "top_logprobs": {"logprobs": True, "top_logprobs": 10**6},
    "min_tokens": {"min_tokens": 10**9},
    "max_tokens": {"max_tokens": -1},
    "seed": {"seed": 2**70},
    "top_k": {"top_k": -7},
    "logit_bias": {"logit_bias": {str(10**12): 100}},
    "stop_token_ids": {"stop_token_ids": [10**12]},
    "bad_words": {"bad_words": ["", "\x00"]},
    "stop": {"stop": ["x"] * 50_000},
    "priority": {"priority": 10**30},
    "deep": {"metadata": json.loads("[" * 900 + "]" * 900)},
}


QUICK = {"regex: not closed", "regex: counted", "regex: deep", "schema: of itself", "n"}  # the others: make test-slow


@pytest.mark.parametrize(
    "poison",
    [pytest.param(poison, id=kind, marks=() if kind in QUICK else pytest.mark.slow) for kind, poison in POISON.items()],
)
def test_poison_leaves_the_engine_alive(real_service, poison):
    """One request of a kind, while a good client asks: that one is answered all the time."""
    before = httpx2.get(f"{real_service.url}/status").json()["engine"]
    stop, statuses, worst = threading.Event(), [], 0.0

    def ask() -> None:
        nonlocal worst
        body = {"messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 2}
        while not statuses or not stop.is_set():
            started = time.monotonic()
            statuses.append(httpx2.post(f"{real_service.url}{CHAT}", json=body, timeout=60).status_code)
            worst = max(worst, time.monotonic() - started)

    good = threading.Thread(target=ask)
    good.start()
    try:
        body = {"messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 4, **poison}
        answer = httpx2.post(f"{real_service.url}{CHAT}", json=body, timeout=60)
    finally:
        stop.set()
        good.join(60)
    # 500 is vLLM's word for what its compilers of grammars raise; 503 would be an engine that is gone.
    assert answer.status_code in (200, 400, 500), answer.text
    assert len(answer.content) <= ERROR_BYTES
    assert set(statuses) == {200}
    assert worst < 20
    assert httpx2.get(f"{real_service.url}/status").json()["engine"] == before
