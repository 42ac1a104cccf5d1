"""Being a good parent of last resort: adopt orphaned descendants, and collect them when they have ended."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

from vllm_dropin.children.guardian import become_subreaper, stat_fields


class Orphans:
    """Collects ended processes that nobody waits for: our work as PID 1, and when a guardian dies before its engine."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):  # an old kernel: then PID 1 of the container does this work
            become_subreaper()
        self._seen: set[int] = set()

    def reap(self, known: Collection[int]) -> int:
        """Collect what was already dead at the call before and is not in `known`. Returns how many.

        Two calls, because a child that asyncio has just forked and not yet registered must be left to it.
        """
        dead = {pid for pid in _dead_children() if pid not in known}
        collected = 0
        for pid in dead & self._seen:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
                collected += 1
        self._seen = dead
        return collected


def _dead_children() -> list[int]:
    own = str(os.getpid())
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = stat_fields(entry.name)[:2]
                if state == "Z" and parent == own:
                    found.append(int(entry.name))
    return found
