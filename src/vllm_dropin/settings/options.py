"""What the command line takes: every option is also `VLLM_DROPIN_<NAME>`, and some have a name of the contract's.

A flag wins over its variable; an empty variable counts as unset (contract, section 1; decision 14). This module imports
nothing heavy: `--help` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Option:
    """One option. `metavar` None makes it a switch. `contract` is the variable that existing set-ups use."""

    name: str
    meaning: str
    metavar: str | None = None
    default: str = ""
    contract: str | None = None

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    @property
    def key(self) -> str:
        """The name of the setting."""
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return f"VLLM_DROPIN_{self.key.upper()}"

    @property
    def variables(self) -> tuple[str, ...]:
        """The environment variables that give it, ours first."""
        return (self.variable, self.contract) if self.contract else (self.variable,)


OPTIONS: tuple[Option, ...] = (
    Option("code-dir", "the model folder, as the contract spells it", "FOLDER", contract="CODE_DIR"),
    Option("address", "where to listen", "HOST:PORT", "127.0.0.1:8080", "ADDRESS"),
    Option("url-prefix", "path in front of every route", "PATH", contract="URL_PREFIX"),
    Option("target-type", "must be textgeneration", "TYPE", contract="TARGET_TYPE"),
    Option(
        "runtime-params-file", "YAML file of runtime parameter values", "FILE", contract="RUNTIME_PARAMS_FILE"
    ),
    Option("auth", "key, or none: a proxy in front guards the service", "key|none"),
    Option("api-key-file", "file with one accepted key a line, read again at SIGHUP", "FILE"),
    Option("tls-cert", "certificate chain (PEM) to serve HTTPS with, read again at SIGHUP", "FILE"),
    Option("tls-key", "its private key (PEM, no passphrase); default: in the file of --tls-cert", "FILE"),
    Option("workers", "gateway processes", "N", "1"),
    Option("max-in-flight", "requests at the engine at once; default: as many as it runs at once", "N"),
    Option("max-queue", "requests that wait beyond those, before 429; default: half as many", "N"),
    Option("row-concurrency", "rows at the engine at once", "N", "64"),
    Option("json-body-limit", "largest JSON request", "SIZE", "8MiB"),
    Option("row-body-limit", "largest CSV request", "SIZE", "64MiB"),
    Option("max-n", "completions that a request may ask for each of its prompts", "N", "8"),
    Option("idle-timeout", "seconds that a connection may be idle, and take for a request's header", "SECONDS", "75"),
    Option("drain-timeout", "seconds for running requests after a stop signal", "SECONDS", "25"),
    Option("hang-timeout", "seconds without progress before the engine is restarted; 0: never", "SECONDS", "120"),
    Option("hook-timeout", "seconds for custom.py", "SECONDS", "7200"),
    Option("hook-path", "packages for custom.py, found after the engine's; folders joined by :", "FOLDERS"),
    Option("start-timeout", "seconds for the engine to become ready; 0: no limit", "SECONDS", "0"),
    Option(
        "with-error-server", "stay up and answer 513 after a final failure", contract="WITH_ERROR_SERVER"
    ),
    Option("engine-python", "Python that has vLLM; default: ours", "FILE"),
    Option("upstream", "serve in front of this OpenAI server, start no engine", "URL"),
    Option("upstream-key-file", "file with the key of the upstream", "FILE"),
    Option("sidecar", "the upstream is http://OPENAI_HOST:OPENAI_PORT"),
    Option("state-dir", "folder that keeps caches between runs", "FOLDER"),
    Option("runtime-dir", "folder for sockets of this run", "FOLDER"),
    Option("logging-level", "debug, info, warning or error", "LEVEL", "info"),
    Option("verbose", "the same as --logging-level debug"),
)  # fmt: skip

KEYS_VARIABLE = "VLLM_DROPIN_API_KEYS"
"""Accepted keys, separated by white space. No flag: every user of a machine can read its command lines."""

BY_KEY: Mapping[str, Option] = {option.key: option for option in OPTIONS}


@dataclass(frozen=True)
class Flags:
    """What stands on our command line. `options` has only those given, by key; a switch is "true"."""

    folder: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    params: tuple[str, ...] = ()
    engine_args: tuple[str, ...] = ()
