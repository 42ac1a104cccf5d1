"""Where we listen and who may ask (decision 15)."""

from __future__ import annotations

import ipaddress
import stat
from pathlib import Path

from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.secret import Secret
from vllm_dropin.settings import choices
from vllm_dropin.settings.choices import Choices
from vllm_dropin.settings.settings import Listen


def read_listen(options: Choices, warnings: list[str]) -> Listen:
    """The public address and its keys. Raises ConfigurationError for an open door that nobody asked for."""
    host, port = options.read("address", choices.address)
    prefix = options.read("url_prefix", choices.url_prefix)
    workers = options.read("workers", choices.count(1))
    wanted = options.text("auth")
    file = options.path("api_key_file")
    keys = read_keys(file, warnings) if file else ()
    match wanted:
        case None:
            auth = "key" if keys else "none"
            options.tell("auth", auth, "default: there are keys" if keys else "default: only this machine can ask")
        case "key" if not keys:
            raise ConfigurationError("auth is 'key' and there are no keys", "Give them with --api-key-file.")
        case "none" if keys:
            raise ConfigurationError(
                f"auth is 'none' ({options.source('auth')}) and {file} has keys", "Take one of the two away."
            )
        case "key" | "none":
            auth = wanted
        case _:
            raise ConfigurationError(f"auth ({options.source('auth')}): '{wanted}' is not key or none")
    if not keys and wanted != "none" and not is_loopback(host):
        raise ConfigurationError(
            f"{host} ({options.source('address')}) can be reached from other machines, and no key is asked for",
            "Give keys with --api-key-file, or say --auth none where a proxy or platform guards the service.",
        )
    return Listen(host, port, prefix, workers, "key" if auth == "key" else "none", keys)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host. A name other than localhost could be anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(file: Path, warnings: list[str]) -> tuple[Secret, ...]:
    """One key a line; empty lines and lines that start with `#` do not count. Raises ConfigurationError."""
    try:
        text = file.read_text(encoding="utf-8")
        mode = file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the keys in {file}: {error}") from None
    keys = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigurationError(f"{file} has no key", "Write one key a line.")
    if any(not key.isascii() or " " in key or "\t" in key for key in keys):
        raise ConfigurationError(f"{file} has a key with spaces or non-ASCII characters: no client could send it")
    if mode & (stat.S_IRWXO):
        warnings.append(f"{file} can be read by every user of this machine: chmod 600 it")
    return tuple(Secret(key) for key in keys)
