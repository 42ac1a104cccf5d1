"""Where we listen, who may ask (decision 15), and the certificate that we show."""

from __future__ import annotations

import ipaddress
import os
import ssl
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vllm_dropin.errors import ConfigurationError
from vllm_dropin.model.secret import Secret
from vllm_dropin.settings import choices
from vllm_dropin.settings.choices import Choices
from vllm_dropin.settings.options import KEYS_VARIABLE
from vllm_dropin.settings.settings import Keys, Listen, Settings, Tls


def read_listen(options: Choices, environ: Mapping[str, str], warnings: list[str]) -> Listen:
    """The public address, its keys and its certificate.

    Raises ConfigurationError for an open door that nobody asked for, and for keys or a certificate that can't be used.
    """
    host, port = options.read("address", choices.address)
    prefix = options.read("url_prefix", choices.url_prefix)
    workers = options.read("workers", choices.count(1))
    wanted = options.text("auth")
    keys = _keys(options.path("api_key_file"), environ, warnings)
    where = " and ".join([KEYS_VARIABLE] * bool(keys.fixed) + [str(keys.file)] * bool(keys.file))
    match wanted:
        case None:
            auth = "key" if keys.accepted else "none"
            options.tell("auth", auth, "default: there are keys" if where else "default: only this machine can ask")
        case "key" if not keys.accepted:
            raise ConfigurationError(
                "auth is 'key' and there are no keys", f"Give them with --api-key-file or {KEYS_VARIABLE}."
            )
        case "none" if keys.accepted:
            raise ConfigurationError(
                f"auth is 'none' ({options.source('auth')}) and there are keys in {where}", "Take one of the two away."
            )
        case "key" | "none":
            auth = wanted
        case _:
            raise ConfigurationError(f"auth ({options.source('auth')}): '{wanted}' is not key or none")
    if not keys.accepted and wanted != "none" and not is_loopback(host):
        raise ConfigurationError(
            f"{host} ({options.source('address')}) can be reached from other machines, and no key is asked for",
            f"Give keys with --api-key-file or {KEYS_VARIABLE}, or say --auth none where a proxy or platform guards "
            "the service.",
        )
    tls = _tls(options.path("tls_cert"), options.path("tls_key"), warnings)
    return Listen(host, port, prefix, workers, "key" if auth == "key" else "none", keys, tls)


def reread(settings: Settings, warnings: list[str]) -> Settings:
    """The same service, with the files of its keys, its certificate and its upstream's key read again.

    Raises ConfigurationError when they can't be used: what was read before is still good then.
    """
    listen, keys = settings.listen, settings.listen.keys
    if keys.file is not None:
        keys = replace(keys, accepted=_united(keys.fixed, read_keys(keys.file, warnings)))
    tls = read_tls(listen.tls.cert, listen.tls.key, warnings) if listen.tls else None
    file = settings.upstream_key_file
    return replace(
        settings,
        listen=replace(listen, keys=keys, tls=tls),
        upstream_key=read_keys(file, warnings)[0] if file else settings.upstream_key,
    )


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
    text = _text(file, "the keys", warnings)
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        key = line.strip()
        if key and not key.startswith("#"):
            keys.append(_key(key, f"{file}, line {number}"))
    if not keys:
        raise ConfigurationError(f"{file} has no key", "Write one key a line.")
    return tuple(keys)


def read_tls(cert: Path, key: Path, warnings: list[str]) -> Tls:
    """A certificate chain and its key, which may be one file. Raises ConfigurationError unless they fit together."""
    private = _text(key, "the private key", warnings)
    # The key's file first: of several keys or certificates the first counts, and both files may have both.
    pem = private if key == cert else f"{private}\n{_text(cert, 'the certificate', [])}"
    if "ENCRYPTED" in private:
        raise ConfigurationError(
            f"the private key in {key} has a passphrase, and nobody is there to type it",
            f"Write it without one: openssl pkey -in {key.name} -out plain.pem",
        )
    try:
        _check_pair(pem)
    except ssl.SSLError as error:
        if "VALUES_MISMATCH" in (error.reason or ""):
            raise ConfigurationError(
                f"{key} is not the private key of {cert}", "Give the key that the certificate was made for."
            ) from None
        raise ConfigurationError(
            f"{cert} and {key} are no certificate and private key in PEM form ({error.reason or error})",
            "Give --tls-cert the chain, the server's own certificate first, and --tls-key its key.",
        ) from None
    return Tls(cert, key, Secret(pem))


def _keys(file: Path | None, environ: Mapping[str, str], warnings: list[str]) -> Keys:
    fixed = tuple(_key(word, KEYS_VARIABLE) for word in environ.get(KEYS_VARIABLE, "").split())
    return Keys(_united(fixed, read_keys(file, warnings) if file else ()), fixed, file)


def _united(fixed: tuple[Secret, ...], read: tuple[Secret, ...]) -> tuple[Secret, ...]:
    return tuple({key.reveal(): key for key in (*fixed, *read)}.values())


def _key(text: str, place: str) -> Secret:
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigurationError(f"{place}: a key with spaces or non-ASCII characters, which no client could send")
    return Secret(text)


def _tls(cert: Path | None, key: Path | None, warnings: list[str]) -> Tls | None:
    if cert is None and key is not None:
        raise ConfigurationError("tls_key is given and tls_cert is not", "Give the certificate with --tls-cert.")
    return read_tls(cert, key or cert, warnings) if cert else None


def _text(file: Path, what: str, warnings: list[str]) -> str:
    """A file of ours with secrets in it; warns when others can read it."""
    try:
        text = file.read_text(encoding="utf-8")
        mode = file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read {what} in {file}: {getattr(error, 'strerror', None) or error}") from None
    if mode & stat.S_IRWXO:
        warnings.append(f"{file} can be read by every user of this machine: chmod 600 it")
    return text


def _check_pair(pem: str) -> None:
    """Raises SSLError unless the text has a certificate and its key. What was read is checked, not the files again."""
    descriptor = os.memfd_create("tls")
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem.encode())
        file.flush()
        # An empty passphrase, because OpenSSL would ask for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(f"/proc/self/fd/{descriptor}", password="")
