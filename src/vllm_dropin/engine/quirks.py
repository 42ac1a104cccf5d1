"""What we tell an engine that nobody asked for, each with its reason. All of it gives way to what a user says."""

from __future__ import annotations

from dataclasses import dataclass

MAX_N_VARIABLE = "VLLM_MAX_N_SEQUENCES"
"""vLLM's own bound on `n` and on the width of a beam search, 16,384 by default."""


@dataclass(frozen=True)
class FlagQuirk:
    """A flag that is added unless one of `unless` (dests of vLLM's parser) is used."""

    tokens: tuple[str, ...]
    dest: str
    reason: str
    unless: tuple[str, ...] = ()
    cpu: bool | None = None  # None: on any build

    @property
    def source(self) -> str:
        return _source(self.cpu)


@dataclass(frozen=True)
class VariableQuirk:
    """A variable that is set unless the environment has it."""

    name: str
    value: str
    reason: str
    cpu: bool | None = None

    @property
    def source(self) -> str:
        return _source(self.cpu)


def _source(cpu: bool | None) -> str:
    return "default" if cpu is None else "default (CPU)" if cpu else "default (GPU)"


FLAGS: tuple[FlagQuirk, ...] = (
    FlagQuirk(
        ("--enforce-eager",), "enforce_eager",
        "compiling takes about a minute on a few CPU cores and gains little there",
        unless=("enforce_eager", "compilation_config", "optimization_level"), cpu=True,
    ),
    FlagQuirk(
        ("--gpu-memory-utilization", "0.9"), "gpu_memory_utilization",
        "the published default of this environment; vLLM's own is 0.92",
        unless=("gpu_memory_utilization",), cpu=False,
    ),
    FlagQuirk(
        ("--disable-uvicorn-access-log",), "disable_uvicorn_access_log",
        "the gateway is the engine's only client",
        unless=("disable_uvicorn_access_log",),
    ),
    FlagQuirk(
        ("--allowed-media-domains", "none.invalid"), "allowed_media_domains",
        "vLLM fetches image URLs from anywhere unless hosts are listed; data: URLs still work",
        unless=("allowed_media_domains",),
    ),
)  # fmt: skip


def for_files(cores: int) -> tuple[FlagQuirk, ...]:
    """The flags of an engine that answers the rows of files: all of them, where there are so many cores.

    One of vLLM's Python API servers takes in about 350 requests a second, on a core of its own; a small model on a
    large GPU answers more (docs/benchmarks.md).
    """
    servers = min(4, cores // 4)
    if servers < 2:
        return FLAGS
    several = FlagQuirk(
        ("--api-server-count", str(servers)), "api_server_count",
        "one API server is slower than a small model on a large GPU",
        unless=("api_server_count", "data_parallel_size", "grpc"), cpu=False,
    )  # fmt: skip
    return (*FLAGS, several)


VARIABLES: tuple[VariableQuirk, ...] = (
    VariableQuirk("DO_NOT_TRACK", "1", "no usage statistics leave the machine"),
    VariableQuirk("VLLM_NO_USAGE_STATS", "1", "no usage statistics leave the machine"),
    VariableQuirk(
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "900", "the gateway keeps connections; vLLM's 5 s would reset them"
    ),
    VariableQuirk("PYTHONFAULTHANDLER", "1", "a hanging or crashing engine writes the stacks of its threads"),
    VariableQuirk("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0", "an allowed media host must not lead elsewhere"),
    VariableQuirk(
        "VLLM_CPU_KVCACHE_SPACE", "2", "GiB for the KV cache; unset, it takes most of the memory", cpu=True
    ),
    VariableQuirk(
        "VLLM_USE_AOT_COMPILE", "0", "with compilation, warm starts take half as long without it", cpu=True
    ),
)  # fmt: skip
