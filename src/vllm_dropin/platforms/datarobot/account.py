"""Who we are on which platform: the variables that the platform's own tools read."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.secret import Secret

TOKEN = "DATAROBOT_API_TOKEN"  # noqa: S105 (the name of a variable)
ENDPOINT = "DATAROBOT_ENDPOINT"
_EXAMPLE = f"Set {ENDPOINT} to the platform's API, such as https://app.example.com/api/v2."
_API = "/api/v2"


@dataclass(frozen=True)
class Account:
    """An endpoint without a trailing slash, and the token for it."""

    endpoint: str
    token: Secret


def read_account(environ: Mapping[str, str]) -> Account:
    """Raises ConfigurationError for a variable that is missing, or an endpoint that would expose the token."""
    token = environ.get(TOKEN, "").strip()
    if not token:
        raise ConfigurationError(f"{TOKEN} is not set", "Create a key in the platform's developer tools and export it.")
    if not token.isprintable() or " " in token or not token.isascii():
        raise ConfigurationError(f"{TOKEN} holds characters that no key has", "Copy the key once more.")
    return Account(_endpoint(environ.get(ENDPOINT, "").strip()), Secret(token))


def _endpoint(text: str) -> str:
    if not text:
        raise ConfigurationError(f"{ENDPOINT} is not set", _EXAMPLE)
    try:
        url = urlsplit(text)
        _ = url.port
    except ValueError:
        raise ConfigurationError(f"{ENDPOINT} is no URL", _EXAMPLE) from None
    if url.username or url.password:  # not repeated: it may be a password
        raise ConfigurationError(f"{ENDPOINT} holds a user name or password", _EXAMPLE)
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
        raise ConfigurationError(f"{ENDPOINT} is {text!r}, which is no address of an API", _EXAMPLE)
    if url.scheme == "http" and not _loopback(url):
        raise ConfigurationError(
            f"{ENDPOINT} is {text!r}: over http everybody on the way could read the token", "Use https."
        )
    path = url.path.rstrip("/") or _API
    return f"{url.scheme}://{url.netloc}{path}"


def _loopback(url: SplitResult) -> bool:
    host = url.hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
