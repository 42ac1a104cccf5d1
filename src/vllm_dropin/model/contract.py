"""The table of runtime parameters that this product understands (contract, section 1, and three of ours)."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_dropin.model.metadata import ParameterType
from vllm_dropin.model.values import Payload


@dataclass(frozen=True)
class Parameter:
    """One parameter that this product understands.

    `minimum` and `maximum` are inclusive. `zero_unset`: 0 means that no value was given (contract, section 1).
    """

    name: str
    type: ParameterType
    meaning: str
    default: Payload = None
    minimum: float | None = None
    maximum: float | None = None
    whole: bool = False
    zero_unset: bool = False
    choices: tuple[str, ...] = ()


CONTRACT: tuple[Parameter, ...] = (
    Parameter("model", "string", "Model to serve: a hub id or a local folder. Not needed when `vllm/` has weights."),
    Parameter("HuggingFaceToken", "credential", "Token for the hub (field `apiToken`)."),
    Parameter(
        "served_model_name", "string", "Name that clients use for the model.", default="datarobot-deployed-llm"
    ),
    Parameter(
        "max_model_len", "string",
        "Context length in tokens, as a number or as vLLM writes it (`16k`, `auto`). Unset: from the model.",
        zero_unset=True,
    ),
    Parameter(
        "gpu_memory_utilization", "numeric", "Share of GPU memory for the engine. Unset: 0.9 on a GPU.",
        minimum=0, maximum=1, zero_unset=True,
    ),
    Parameter("trust_remote_code", "boolean", "Run Python code that comes with the model.", default=False),
    Parameter(
        "default_parallelism", "string", "How several GPUs are used: `tp` (tensor) or `pp` (pipeline).",
        default="tp", choices=("tp", "pp"),
    ),
    Parameter("system_prompt", "string", "System message for rows and for chats that have none."),
    Parameter("prompt_column_name", "string", "Column of a CSV that holds the prompt.", default="promptText"),
    Parameter(
        "max_tokens", "numeric", "Most tokens of one completion.", minimum=1, whole=True, zero_unset=True
    ),
    Parameter("n", "numeric", "Completions for each prompt.", minimum=1, whole=True, zero_unset=True),
    Parameter("temperature", "numeric", "Sampling temperature; 0 is greedy.", minimum=0, maximum=2),
    Parameter(
        "chat_defaults", "boolean",
        "Whether system_prompt, max_tokens, temperature and n are also applied to chat requests that leave them unset.",
        default=True,
    ),
    Parameter(
        "error_status", "string",
        "Errors of the engine: `openai` passes them as they are, `drum` gives a 500 with the incumbent's message.",
        default="openai", choices=("openai", "drum"),
    ),
    Parameter(
        "row_errors", "string",
        "A row that fails: `report` answers the others and says why, `fail` refuses the whole request.",
        default="report", choices=("report", "fail"),
    ),
    Parameter("verifySSL", "boolean", "Verify TLS when status is reported to the platform.", default=True),
    Parameter(
        "max_watchdog_restarts", "numeric", "Engine restarts before the service gives up.",
        default=10, minimum=0, whole=True,
    ),
    Parameter(
        "max_watchdog_backoff_sec", "numeric", "Longest pause before an engine restart, in seconds.",
        default=300, minimum=0,
    ),
    Parameter(
        "DRUM_OPENAI_CLIENT_TIMEOUT", "numeric", "Deadline of one request to the engine, in seconds.",
        default=3600, minimum=0, zero_unset=True,
    ),
    Parameter(
        "NIM_DIRECT_ACCESS_REQUEST_TIMEOUT", "numeric", "Deadline of one direct-access request, in seconds.",
        default=3600, minimum=0, zero_unset=True,
    ),
    Parameter(
        "CUSTOM_MODEL_WORKERS", "numeric", "Accepted and ignored: one gateway worker serves many requests at once.",
        minimum=0, whole=True, zero_unset=True,
    ),
)  # fmt: skip
