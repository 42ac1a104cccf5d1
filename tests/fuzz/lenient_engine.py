"""The fake engine, with vLLM's way of refusing: a body that makes no sense is a 400, whatever is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests import fake_engine


class LenientEngine(fake_engine.FakeEngine):
    async def infer(self, path: str, body: bytes, scope: Any, send: Any) -> None:
        try:
            await super().infer(path, body, scope, send)
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, OverflowError, RecursionError) as error:
            await self.error(send, 400, f"{type(error).__name__}: {error}"[:500])

    async def refused(self, request: dict[str, Any], prompt: str, send: Any) -> bool:
        # Words of a prompt must not make it fail or wait: what is a 5xx here is the gateway's.
        harmless = "words " * (len(prompt.split()) or bool(prompt))
        for name in ("n", "max_tokens", "max_completion_tokens"):
            if request.get(name) is not None and not 0 < int(request[name]) <= 1000:
                raise ValueError(f"{name} is out of range")
        return await super().refused(request, harmless, send)


if __name__ == "__main__":
    fake_engine.FakeEngine = LenientEngine  # type: ignore[misc]
    fake_engine.main()
