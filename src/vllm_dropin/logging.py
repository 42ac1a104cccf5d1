"""One log format for the whole tree of processes, on stderr, with secrets taken out."""

from __future__ import annotations

import base64
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s  %(message)s"
_SHORTEST_INSIDE = 8  # characters of base64; fewer are found in ordinary words


class Redactor(logging.Filter):
    """Replaces every known secret, in its raw, base64, URL-encoded and JSON forms, by `***`.

    Of a secret of several lines (a private key) each line is hidden: a log is read and written line by line.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._forms: tuple[str, ...] = ()
        self.learn(secrets)

    def learn(self, secrets: Iterable[str]) -> None:
        """Hide these from now on. Values under four characters are too common to hide."""
        forms = set(self._forms)
        for secret in secrets:
            if len(secret.strip()) < 4:
                continue
            forms |= _forms(secret)
            if len(lines := secret.splitlines()) > 1:
                # Short lines, and the frame of a key, are no secret by themselves and would hide too much.
                forms |= {line.strip() for line in lines if len(line.strip()) >= 16 and not line.startswith("-----")}
        self._forms = tuple(sorted(forms, key=len, reverse=True))

    def hide(self, text: str) -> str:
        for form in self._forms:
            if form in text:
                text = text.replace(form, "***")
        return text

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        hidden = self.hide(message)
        if hidden is not message:
            record.msg, record.args = hidden, ()
        return True


def _forms(secret: str) -> set[str]:
    data = secret.encode("utf-8", "surrogateescape")
    return {
        secret,
        secret.strip(),
        quote(data, safe=""),
        quote(data),
        quote_plus(data),
        base64.b64encode(data).decode().rstrip("="),
        base64.urlsafe_b64encode(data).decode().rstrip("="),
        json.dumps(secret)[1:-1],
        repr(secret)[1:-1],
        *_inside_base64(data),
    }


def _inside_base64(data: bytes) -> Iterator[str]:
    """What becomes of a secret behind something else in base64, as in `Basic` with a user name: by place, of three.

    The first and the last character are left where they depend on the neighbours; short ones would hide too much.
    """
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + data)
        inner = encoded[-(-before * 8 // 6) : (before + len(data)) * 8 // 6].decode()
        if len(inner) >= _SHORTEST_INSIDE:
            yield inner
            yield inner.replace("+", "-").replace("/", "_")


class _Formatter(logging.Formatter):
    """Hides secrets in what is added after the filters have run: tracebacks."""

    def formatException(self, ei: Any) -> str:
        return REDACTOR.hide(super().formatException(ei))


REDACTOR = Redactor()


def setup(level: str = "INFO") -> None:
    """Send our log to stderr. Called once, at the start of each process of ours."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(_FORMAT))
    handler.addFilter(REDACTOR)
    root = logging.getLogger("vllm_dropin")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


def get(name: str) -> logging.Logger:
    """The logger of one part, `vllm_dropin.<part>`."""
    return logging.getLogger(f"vllm_dropin.{name}")
