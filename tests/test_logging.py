"""No known secret in a log, whatever form it has taken on the way there."""

import base64
import io
import json
import logging
import urllib.parse

import pytest

from vllm_dropin import logging as ours
from vllm_dropin.logging import Redactor

TOKEN = "hf_canary/T+oken=="
KEY = (
    "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASC\nabcdefghijklmnopqrstuvwxyz012345\n"
    "-----END PRIVATE KEY-----\n"
)


@pytest.mark.parametrize(
    "text",
    [
        TOKEN,
        f"Bearer {TOKEN}, and more",
        base64.b64encode(TOKEN.encode()).decode(),
        base64.urlsafe_b64encode(TOKEN.encode()).decode(),
        *(base64.b64encode(f"{user}:{TOKEN}@host".encode()).decode() for user in ("u", "us", "use")),
        base64.urlsafe_b64encode(f"u?:{TOKEN}".encode()).decode(),
        urllib.parse.quote(TOKEN),
        urllib.parse.quote(TOKEN, safe=""),
        urllib.parse.quote_plus(TOKEN),
        json.dumps({"token": TOKEN}),
        repr({"token": TOKEN}),
    ],
)
def test_a_token_is_hidden_in_every_form(text):
    hidden = Redactor([TOKEN]).hide(text)
    assert "***" in hidden
    assert "canary" not in hidden
    assert len(hidden) < len(text)


@pytest.mark.parametrize("text", [KEY, json.dumps(KEY), repr(KEY), *KEY.splitlines()[1:3]])
def test_a_key_of_several_lines_is_hidden_whole_and_line_by_line(text):
    hidden = "\n".join(Redactor([KEY]).hide(text).splitlines())
    assert "MIIEv" not in hidden
    assert "abcdef" not in hidden


def test_what_is_no_secret_by_itself_stays():
    redactor = Redactor(["abc", " \n ", KEY])
    assert redactor.hide("abc -----END PRIVATE KEY----- def") == "abc -----END PRIVATE KEY----- def"


def test_a_traceback_in_the_log_is_hidden_too(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    ours.setup()
    ours.REDACTOR.learn(["canary-in-a-traceback"])
    try:
        try:
            raise ValueError("canary-in-a-traceback")
        except ValueError:
            ours.get("test").exception("it failed")
    finally:
        logger = logging.getLogger("vllm_dropin")
        logger.handlers.clear()
        logger.propagate = True
    assert "ValueError: ***" in stream.getvalue()
