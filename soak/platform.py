"""A stand-in for the platform's status endpoint, which can be away in three ways."""

from __future__ import annotations

import enum
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

SILENCE = 15.0
"""Seconds without an answer: more than the service waits for one."""


class Mood(enum.StrEnum):
    """How it answers."""

    WELL = "well"
    ERROR = "with status 500"
    SILENT = "not"
    RUDE = "by closing the connection"


AWAY = (Mood.ERROR, Mood.SILENT, Mood.RUDE)


class Platform:
    """Takes status events on a port of its own. A context manager."""

    def __init__(self) -> None:
        self.mood = Mood.WELL
        self.taken: Counter[str] = Counter()
        """Titles of the events that it has answered with 200."""
        platform = self

        class Handler(_Handler):
            def do_POST(self) -> None:
                self.take(platform)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="platform", daemon=True)

    @property
    def environ(self) -> dict[str, str]:
        """What makes a service report here."""
        port = self._server.server_address[1]
        return {
            "DATAROBOT_ENDPOINT": f"http://127.0.0.1:{port}/api/v2",
            "DATAROBOT_API_TOKEN": "soak-token",
            "MLOPS_DEPLOYMENT_ID": "soak",
        }

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def take(self, platform: Platform) -> None:
        event = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mood = platform.mood
        if mood is Mood.SILENT:
            time.sleep(SILENCE)
        if mood in (Mood.SILENT, Mood.RUDE):
            self.close_connection = True
            return
        if mood is Mood.WELL:
            platform.taken[event["title"]] += 1
        self.send_response(200 if mood is Mood.WELL else 500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the events are counted."""
