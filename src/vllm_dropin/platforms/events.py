"""Status events to the platform: what happened to this deployment, told without ever delaying it.

POST `{endpoint}/remoteEvents/`, as contract section 4 has it. A thread of its own sends them, in order, with retries;
the callers only put them into a bounded queue. A dead, hanging or lying endpoint costs a warning in the log.
"""

from __future__ import annotations

import collections
import http.client
import json
import logging
import ssl
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, Literal
from urllib.parse import SplitResult, urlsplit

from vllm_dropin.logging import REDACTOR, get
from vllm_dropin.settings.settings import Platform

log = get("events")

QUEUE_LIMIT = 64
MESSAGE_LIMIT = 8 << 10
"""Characters of a message; the rest is cut off."""
REQUEST_TIMEOUT = 10.0
BACKOFF = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try of one event; after the last it is given up."""

Outcome = Literal["sent", "refused", "later"]


@dataclass(frozen=True)
class Event:
    """One thing to tell."""

    title: str
    message: str
    timestamp: str

    def body(self, deployment_id: str) -> bytes:
        return json.dumps(
            {
                "eventType": "deploymentInfo",
                "title": self.title,
                "message": self.message,
                "timestamp": self.timestamp,
                "deploymentId": deployment_id,
            }
        ).encode()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could carry the token to another host: answer it like an error."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> None:
        return None


@dataclass(frozen=True)
class Target:
    """Where events go, and how. `of` refuses what would show the token to others."""

    url: str
    token: str
    deployment_id: str
    opener: urllib.request.OpenerDirector

    @classmethod
    def of(cls, endpoint: str, token: str, deployment_id: str, verify: bool) -> Target | None:
        """The target, or None with a warning when the endpoint or the token can't be used."""
        token = token.strip()
        try:
            parts = urlsplit(endpoint.strip())
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            usable = False
        if not usable:
            log.warning("DATAROBOT_ENDPOINT is no http or https address; no status events are sent")
            return None
        if not token.isprintable() or not token.isascii():
            log.warning("DATAROBOT_API_TOKEN has characters that no header can hold; no status events are sent")
            return None
        if parts.scheme == "http" and not _loopback(parts):
            log.warning(
                "DATAROBOT_ENDPOINT is http: the token would travel in the clear; no status events are sent "
                "until it is https"
            )
            return None
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if parts.scheme == "https":
            handlers.append(urllib.request.HTTPSHandler(context=_tls(verify)))
        else:
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy would take the token off this machine
        url = f"{endpoint.strip().rstrip('/')}/remoteEvents/"
        return cls(url, token, deployment_id, urllib.request.build_opener(*handlers))

    def post(self, event: Event, timeout: float) -> tuple[Outcome, str]:
        """Send once. The second value says what happened, without the token and without the endpoint's own words."""
        request = urllib.request.Request(  # noqa: S310 (`of` has checked the scheme)
            self.url,
            data=event.body(self.deployment_id),
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"},
            method="POST",
        )
        try:
            with self.opener.open(request, timeout=timeout) as answer:
                return "sent", f"status {answer.status}"
        except urllib.error.HTTPError as error:
            error.close()
            later = error.code >= 500 or error.code in (408, 429)
            return "later" if later else "refused", f"status {error.code}"
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                return "refused", f"its certificate is not trusted ({error.reason.verify_message}; see verifySSL)"
            return "later", str(error.reason) or type(error.reason).__name__
        except TimeoutError:
            return "later", "no answer in time"
        except (OSError, http.client.HTTPException) as error:
            return "later", type(error).__name__


def _loopback(parts: SplitResult) -> bool:
    host = parts.hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _tls(verify: bool) -> ssl.SSLContext:
    if verify:
        return ssl.create_default_context()
    log.warning("verifySSL is false: the platform's certificate is not checked when status events are sent")
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class StatusReporter:
    """Sends events to one deployment; does nothing unless endpoint, token and deployment id are all set.

    `send` never waits and never raises. `close` gives what is queued a last chance, `timeout` seconds long.
    """

    def __init__(self, endpoint: str | None, token: str | None, deployment_id: str | None, verify: bool = True) -> None:
        self._target: Target | None = None
        self._queue: collections.deque[Event] = collections.deque()
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._thread: threading.Thread | None = None
        if endpoint and token and deployment_id:
            REDACTOR.learn([token])
            self._target = Target.of(endpoint, token, deployment_id, verify)

    @classmethod
    def of(cls, platform: Platform) -> StatusReporter:
        """The reporter that the settings ask for."""
        token = platform.token.reveal() if platform.token else None
        return cls(platform.endpoint, token, platform.deployment_id, platform.verify_ssl)

    def stage(self, index: int, total: int, message: str) -> None:
        """`Deployment stage i out of N`: N is 3 with a load_model (start, done, launching), else 1."""
        self.send(f"Deployment stage {index} out of {total}", message)

    def send(self, title: str, message: str) -> None:
        """Queue an event. When the queue is full, the oldest is dropped with a warning."""
        if self._target is None:
            return
        text = REDACTOR.hide(message)[:MESSAGE_LIMIT]
        event = Event(title, text, datetime.now(UTC).isoformat())
        with self._changed:
            if self._deadline is not None:
                return
            dropped = self._queue.popleft() if len(self._queue) >= QUEUE_LIMIT else None
            self._queue.append(event)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, args=(self._target,), name="events", daemon=True)
                self._thread.start()
            self._changed.notify()
        if dropped is not None:
            log.warning("too many status events are waiting; %r is dropped", dropped.title)

    def close(self, timeout: float = 2.0) -> None:
        """Send what is queued, once, and stop. Returns within `timeout` seconds, whatever the endpoint does."""
        with self._changed:
            if self._deadline is None:
                self._deadline = time.monotonic() + timeout
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout)
            if left := len(self._queue):
                log.warning("%d status event(s) could not be sent before the end", left)

    def _run(self, target: Target) -> None:
        while (event := self._next()) is not None:
            self._deliver(target, event)
            with self._changed:
                if self._queue and self._queue[0] is event:
                    self._queue.popleft()

    def _next(self) -> Event | None:
        """The oldest event, which stays queued while it is being sent; None when closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._deadline is not None)
            return self._queue[0] if self._queue else None

    def _deliver(self, target: Target, event: Event) -> None:
        """Try until it is sent, refused for good, or out of tries. Once closing has begun, one more try."""
        for pause in (*BACKOFF, 0.0):
            closing, timeout = self._time_for_a_try()
            outcome, reason = target.post(event, timeout)
            if outcome == "sent":
                return
            if outcome == "refused" or closing or not pause:
                log.warning("status event %r was not taken by the platform: %s", event.title, reason)
                return
            log.log(
                logging.WARNING if pause == BACKOFF[0] else logging.DEBUG,
                "status event %r is not taken yet, trying again: %s",
                event.title,
                reason,
            )
            self._sleep(pause)

    def _time_for_a_try(self) -> tuple[bool, float]:
        """Whether closing has begun, and how many seconds a try may take."""
        with self._changed:
            if self._deadline is None:
                return False, REQUEST_TIMEOUT
            return True, max(0.1, min(REQUEST_TIMEOUT, self._deadline - time.monotonic()))

    def _sleep(self, seconds: float) -> None:
        """Wait before the next try, or until closing begins."""
        with self._changed:
            self._changed.wait_for(lambda: self._deadline is not None, seconds)
