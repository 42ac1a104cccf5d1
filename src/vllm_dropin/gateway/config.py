"""What a gateway worker is told at its start: one JSON file, mode 0600, in the runtime folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_dropin.scoring.prompts import GenerationDefaults

# The name by which the contract's clients mean the served model, whatever that is called.
CONTRACT_MODEL = "datarobot-deployed-llm"


class Limits(BaseModel):
    """Bounds on what a client may ask of us. Sizes in bytes, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_in_flight: int = Field(default=256, ge=1)
    max_queue: int = Field(default=128, ge=0)
    row_concurrency: int = Field(default=64, ge=1)
    json_body: int = Field(default=8 << 20, ge=1024)
    row_body: int = Field(default=64 << 20, ge=1024)
    spool_above: int = Field(default=8 << 20, ge=0)
    held_bytes: int = Field(default=256 << 20, ge=1 << 20)
    max_n: int = Field(default=8, ge=1)
    request_timeout: float = Field(default=3600, gt=0)
    direct_timeout: float = Field(default=3600, gt=0)
    idle_timeout: float = Field(default=75, gt=0)
    body_grace: float = Field(default=30, gt=0)


class Deployment(BaseModel):
    """The part of DEPLOYMENT_CONFIG that changes the shape of a row answer (contract, section 3)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    target_name: str
    class_mapping: tuple[str, ...] = ()


class SettingReport(BaseModel):
    """One line of /status `settings`; the value is already hidden when it is a secret."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    value: Any
    source: str
    overrode: tuple[str, ...] = ()


class GatewayConfig(BaseModel):
    """Everything a worker needs beside the shared state.

    `engine_uds` or `engine_url` (scheme, host, port; a path prefix without `/v1` is allowed) says where the engine is.
    `tls` is the PEM file of certificate and key, None for plain HTTP; another content has another name.
    `served_model` is the name that the engine answers to; a request that names none of `model_aliases` and not
    `served_model` passes its own name through. None means an upstream, which is asked for its name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    code_dir: str
    url_prefix: str = ""
    target_type: str = "textgeneration"
    model_metadata: dict[str, Any] | None = None
    engine_uds: str | None = None
    engine_url: str | None = None
    engine_key: str | None = None
    served_model: str | None = None
    model_aliases: tuple[str, ...] = (CONTRACT_MODEL,)
    max_model_len: int | None = None
    generation: GenerationDefaults = GenerationDefaults()
    chat_defaults: bool = True
    row_errors: Literal["report", "fail"] = "report"
    error_status: Literal["openai", "drum"] = "openai"
    deployment: Deployment | None = None
    error_server: bool = False
    api_keys: tuple[str, ...] = ()
    tls: str | None = None
    limits: Limits = Limits()
    settings: tuple[SettingReport, ...] = ()
    log_level: str = "INFO"

    def save(self, path: Path) -> None:
        """Replace it atomically, so that only this user can read it: it holds the keys."""
        write_private(path, self.model_dump_json())

    @classmethod
    def load(cls, path: Path) -> GatewayConfig:
        return cls.model_validate_json(path.read_bytes())


def write_private(path: Path, text: str) -> None:
    """Put a file with secrets in its place, whole and mode 0600."""
    temporary = path.with_suffix(".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)
