"""Which of our environment each child gets (decision 9)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from vllm_dropin.model.parameters import ENVELOPE_PREFIX, ParameterValues, exported
from vllm_dropin.settings.options import KEYS_VARIABLE

HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
PLATFORM_TOKEN = "DATAROBOT_API_TOKEN"  # noqa: S105 (the name of a variable)
_OURS = "VLLM_DROPIN_"
# vLLM would ask the gateway for this key, and clients are the gateway's to check.
_ENGINE_KEY = "VLLM_API_KEY"


def for_hook(environ: Mapping[str, str], parameters: ParameterValues, code_dir: str) -> dict[str, str]:
    """Everything but the platform's token and the clients' keys, with CODE_DIR and the parameters as envelopes."""
    kept = {name: value for name, value in environ.items() if name not in (PLATFORM_TOKEN, KEYS_VARIABLE)}
    return {**kept, **exported(parameters), "CODE_DIR": code_dir}


def for_engine(environ: Mapping[str, str], parameters: ParameterValues) -> dict[str, str]:
    """Without parameters, credentials, the platform's variables and ours. Also what the download starts from."""
    gone = set(stripped(environ, parameters))
    return {name: value for name, value in environ.items() if name not in gone}


def for_gateway(environ: Mapping[str, str], parameters: ParameterValues) -> dict[str, str]:
    """What the engine gets, without the hub's token: a gateway needs no secret but the keys in its own file."""
    return {name: value for name, value in for_engine(environ, parameters).items() if name not in HUB_TOKENS}


def stripped(environ: Mapping[str, str], parameters: ParameterValues) -> tuple[str, ...]:
    """The names that neither the engine nor the gateway gets, sorted."""
    credentials = set(_credential_variables(environ, parameters))
    return tuple(
        sorted(
            name
            for name in environ
            if name.startswith((ENVELOPE_PREFIX, "DATAROBOT_", _OURS)) or name == _ENGINE_KEY or name in credentials
        )
    )


def merge(environ: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """The environment after a hook's changes; None deletes."""
    merged = {**environ, **{name: value for name, value in changes.items() if value is not None}}
    return {name: value for name, value in merged.items() if changes.get(name, value) is not None}


def _credential_variables(environ: Mapping[str, str], parameters: ParameterValues) -> Iterator[str]:
    """The bare form `<NAME>` of each credential and the unpacked forms `<NAME>_<FIELD>`, in any case and spelling."""
    for value in parameters.by_name.values():
        if value.type != "credential":
            continue
        credential = parameters.credential(value.name)
        fields = {_plain(name) for name in (*(credential.field_names() if credential else ()), *_FIELDS)}
        prefix = _plain(value.name)
        yield from (name for name in environ if _is_form(_plain(name), prefix, fields))


def _is_form(name: str, prefix: str, fields: Iterable[str]) -> bool:
    return name == prefix or (name.startswith(prefix) and name.removeprefix(prefix) in set(fields))


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


# Fields of the contract's credential types: an unpacked form is hidden even when the envelope is missing.
_FIELDS = (
    "credentialType", "apiToken", "token", "user", "password", "awsAccessKeyId", "awsSecretAccessKey",
    "awsSessionToken", "gcpKey", "azureConnectionString", "clientId", "clientSecret", "azureTenantId",
    "databricksAccessToken",
)  # fmt: skip
