"""What the workers are told comes from the settings, all of it."""

from __future__ import annotations

from pathlib import Path

from vllm_dropin.gateway.config import GatewayConfig
from vllm_dropin.settings.options import Flags
from vllm_dropin.settings.resolve import load
from vllm_dropin.supervisor.briefing import gateway_config
from vllm_dropin.supervisor.runtime import RuntimeFolder


def briefed(folder: Path, *params: str, **options: str) -> GatewayConfig:
    settings = load(Flags(str(folder), {"upstream": "http://127.0.0.1:9", **options}, params), {})
    return gateway_config(settings, RuntimeFolder(folder))


def test_deadlines(tmp_path: Path) -> None:
    config = briefed(tmp_path, "DRUM_OPENAI_CLIENT_TIMEOUT=7", "NIM_DIRECT_ACCESS_REQUEST_TIMEOUT=9")
    assert (config.limits.request_timeout, config.limits.direct_timeout) == (7, 9)


def test_limits(tmp_path: Path) -> None:
    options = {"max_in_flight": "3", "max_queue": "4", "row_concurrency": "5", "max_n": "6", "idle_timeout": "7"}
    limits = briefed(tmp_path, json_body_limit="6KiB", row_body_limit="7KiB", **options).limits
    assert (limits.max_in_flight, limits.max_queue, limits.row_concurrency) == (3, 4, 5)
    assert (limits.max_n, limits.idle_timeout) == (6, 7)
    assert (limits.json_body, limits.row_body) == (6 << 10, 7 << 10)


def test_an_upstreams_model_is_its_own_unless_it_is_named(tmp_path: Path) -> None:
    assert briefed(tmp_path).served_model is None
    named = briefed(tmp_path, "served_model_name=mine")
    assert named.served_model == "mine"
    assert "mine" in named.model_aliases


def test_generation(tmp_path: Path) -> None:
    params = ("system_prompt=Be kind.", "temperature=0", "max_tokens=5", "n=1", "chat_defaults=false")
    config = briefed(tmp_path, *params, "prompt_column_name=ask", "row_errors=fail", "error_status=drum")
    assert config.generation.model_dump() == {
        "system_prompt": "Be kind.",
        "prompt_column_name": "ask",
        "max_tokens": 5,
        "n": 1,
        "temperature": 0,
    }
    assert (config.chat_defaults, config.row_errors, config.error_status) == (False, "fail", "drum")
