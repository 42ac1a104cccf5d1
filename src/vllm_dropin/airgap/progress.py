"""How far a bundle is: one line that is kept up to date in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TextIO

_TERMINAL_EVERY, _PLAIN_EVERY = 0.2, 10.0
"""Seconds between two lines."""


class Progress:
    """Tells stages and bytes on `stream`. Threads may share it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._lock = threading.Lock()
        self._shown = time.monotonic()
        self._width = 0

    def say(self, text: str) -> None:
        """A sentence on a line of its own."""
        with self._lock:
            self._clear()
            print(text, file=self._stream, flush=True)

    def show(self, text: str) -> None:
        """The present state, if it is time to."""
        with self._lock:
            now = time.monotonic()
            if now - self._shown < (_TERMINAL_EVERY if self._terminal else _PLAIN_EVERY):
                return
            self._shown = now
            if not self._terminal:
                print(text, file=self._stream, flush=True)
                return
            self._stream.write(f"\r{text}{' ' * max(0, self._width - len(text))}")
            self._stream.flush()
            self._width = len(text)

    def counting(self, what: str) -> Callable[[int, int], None]:
        """A listener for bytes done and all bytes of one stage."""
        return lambda done, total: self.show(f"{what}: {done / 1e9:.2f} of {total / 1e9:.2f} GB")

    def clear(self) -> None:
        """Take the line back, where it is one that is kept up to date."""
        with self._lock:
            self._clear()
            self._stream.flush()

    def _clear(self) -> None:
        if self._terminal and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
        self._width = 0
