"""One log format for the whole tree of processes, on stderr, with secrets taken out."""

from __future__ import annotations

import base64
import logging
import sys
from collections.abc import Iterable
from urllib.parse import quote

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s  %(message)s"


class Redactor(logging.Filter):
    """Replaces every known secret, in its raw, base64 and URL-encoded forms, by `***`."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._forms: tuple[str, ...] = ()
        self.learn(secrets)

    def learn(self, secrets: Iterable[str]) -> None:
        """Hide these from now on. Values under four characters are too common to hide."""
        forms = set(self._forms)
        for secret in secrets:
            if len(secret) >= 4:
                forms |= {
                    secret,
                    quote(secret, safe=""),
                    base64.b64encode(secret.encode()).decode().rstrip("="),
                }
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


REDACTOR = Redactor()


def setup(level: str = "INFO") -> None:
    """Send our log to stderr. Called once, at the start of each process of ours."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(REDACTOR)
    root = logging.getLogger("vllm_dropin")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


def get(name: str) -> logging.Logger:
    """The logger of one part, `vllm_dropin.<part>`."""
    return logging.getLogger(f"vllm_dropin.{name}")
