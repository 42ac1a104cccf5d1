"""A platform that we work on: its client, how progress is told, and how long its builds are waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from datarobot.client import set_client

from vllm_dropin.errors import InputOutputError, PlatformError
from vllm_dropin.platforms.datarobot.account import Account
from vllm_dropin.platforms.datarobot.client import Client
from vllm_dropin.platforms.datarobot.rehearsal import Rehearsal

_SIGN_OF_LIFE = 60.0
MARK = "vllm-dropin sha256:"
"""Before the digest by which a version is found again, in its description."""


class _Named(Protocol):
    @property
    def id(self) -> str: ...


Found = TypeVar("Found", bound=_Named)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Platform:
    """`say` takes lines for people; `interval` and `limit` are seconds."""

    client: Client
    say: Callable[[str], None]
    interval: float = 5.0
    limit: float = 3600.0
    rehearsing: bool = False

    def wait(self, what: str, look: Callable[[], tuple[str, Result | None]]) -> Result:
        """Look until there is a result, telling each change of state.

        Raises InputOutputError when there is none in time; the platform goes on meanwhile.
        """
        start = told = time.monotonic()
        last = ""
        while True:
            state, result = look()
            now = time.monotonic()
            if state != last or now - told >= _SIGN_OF_LIFE:
                after = f" ({now - start:.0f} s)" if state == last else ""
                self.say(f"{what}: {state}{after}")
                last, told = state, now
            if result is not None:
                return result
            if now - start >= self.limit:
                raise InputOutputError(
                    f"{what}: still {state} after {self.limit:.0f} s",
                    "The platform goes on. Run the same command again to go on waiting, with a longer --wait.",
                )
            time.sleep(self.interval)


def connect(
    account: Account, say: Callable[[str], None], interval: float, limit: float, rehearsal: Rehearsal | None
) -> Platform:
    """Make this the platform of the SDK's classes. Nothing is sent yet."""
    client = Client(account, min(interval, 5.0) / 10, rehearsal)
    set_client(client)
    return Platform(client, say, interval, limit, rehearsal is not None)


def only(kind: str, name: str, found: Sequence[Found], option: str) -> Found | None:
    """The one of that name, or None. Raises PlatformError for several: a name alone says nothing then."""
    if len(found) > 1:
        ids = ", ".join(item.id for item in found)
        raise PlatformError(
            f"{len(found)} {kind}s are called {name!r}: {ids}",
            f"Say which one with {option} ID, or rename one of them.",
        )
    return found[0] if found else None


def marked(digest: str, description: str) -> str:
    """A description that holds the digest."""
    return f"{description.strip()}\n\n{MARK}{digest}".strip()


def has_mark(digest: str, description: str | None) -> bool:
    return f"{MARK}{digest}" in (description or "")
