"""The engine's own name for its model, which the contract's clients don't know."""

from __future__ import annotations

import json

from vllm_dropin.gateway.config import CONTRACT_MODEL, GatewayConfig
from vllm_dropin.gateway.engine_client import EngineClient
from vllm_dropin.gateway.errors import EngineUnavailable

LIST_TIMEOUT = 5.0
LIST_BYTES = 1 << 20


class ServedModel:
    """Configured for an engine of ours; learned from an upstream, whose model nobody named to us.

    vLLM takes a request without a name. Other servers refuse one, so aliases and rows need the upstream's.
    """

    def __init__(self, config: GatewayConfig, engine: EngineClient) -> None:
        self._configured = config.served_model
        self._engine = engine
        self._learned: str | None = None
        self._generation = -1

    async def name(self) -> str | None:
        """None: an upstream that has not said. It is asked again after it has been away."""
        if self._configured is not None:
            return self._configured
        generation = self._engine.generation
        if self._generation != generation and (name := await self._ask()) is not None:
            self._learned, self._generation = name, generation
        return self._learned

    async def _ask(self) -> str | None:
        """The contract's name where the upstream has it, else the first that it lists."""
        try:
            async with self._engine.request("GET", "/v1/models", timeout=LIST_TIMEOUT) as response:
                if response.status != 200:
                    return None
                listed = json.loads(await response.read(LIST_BYTES))
            names = [str(card["id"]) for card in listed["data"]]
        except (EngineUnavailable, TimeoutError, ValueError, KeyError, TypeError):
            return None
        return CONTRACT_MODEL if CONTRACT_MODEL in names else next(iter(names), None)
