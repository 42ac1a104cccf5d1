"""From a row to the request that asks the engine about it."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class GenerationDefaults(BaseModel):
    """The runtime parameters that shape a generation (contract, section 1). None means: leave it to the engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    system_prompt: str | None = None
    prompt_column_name: str = "promptText"
    max_tokens: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)

    def capped(self, max_model_len: int | None) -> GenerationDefaults:
        """With max_tokens at most `max_model_len` - 1: a default must not make every request fail (decision 12)."""
        if self.max_tokens is None or max_model_len is None or self.max_tokens < max_model_len:
            return self
        return self.model_copy(update={"max_tokens": max(1, max_model_len - 1)})


def messages(prompt: str, defaults: GenerationDefaults) -> list[dict[str, Any]]:
    """The chat for one prompt: the system prompt, where there is one, then the user's words."""
    chat = [{"role": "user", "content": prompt}]
    if defaults.system_prompt:
        chat.insert(0, {"role": "system", "content": defaults.system_prompt})
    return chat


def chat_body(prompt: str, defaults: GenerationDefaults, model: str | None) -> bytes:
    """The chat completion request for one row, as JSON. Never a stream; `model` None leaves the name out."""
    request: dict[str, Any] = {"messages": messages(prompt, defaults)}
    if model is not None:
        request["model"] = model
    for name in ("max_tokens", "n", "temperature"):
        value = getattr(defaults, name)
        if value is not None:
            request[name] = value
    return json.dumps(request).encode("ascii")
