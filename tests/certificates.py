"""Certificates for tests, made by openssl: a self-signed one, its key, and what a client needs to trust it."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificate:
    """Two PEM files, `cert` and `key`; `name` is the common name. It is for 127.0.0.1."""

    name: str
    cert: Path
    key: Path

    @property
    def both(self) -> str:
        """Key and certificate as one text."""
        return self.key.read_text() + self.cert.read_text()

    @property
    def trust(self) -> ssl.SSLContext:
        """A client's context that trusts this certificate and no other."""
        return ssl.create_default_context(cafile=str(self.cert))


def make_certificate(folder: Path, name: str, curve: str = "prime256v1") -> Certificate:
    """A new key on this curve, and a certificate of it, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Certificate(name, folder / f"{name}.crt", folder / f"{name}.key")
    argv = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", f"ec_paramgen_curve:{curve}", "-nodes", "-days", "2",
        "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(made.key),
        "-out", str(made.cert),
    ]  # fmt: skip
    subprocess.run(argv, check=True, capture_output=True, timeout=30)
    made.key.chmod(0o600)
    return made


def served_name(port: int) -> str:
    """The common name of the certificate that a server on 127.0.0.1 shows."""
    pem = ssl.get_server_certificate(("127.0.0.1", port), timeout=10)
    argv = ["openssl", "x509", "-noout", "-subject", "-nameopt", "multiline"]
    told = subprocess.run(argv, input=pem, text=True, check=True, capture_output=True, timeout=30).stdout
    return told.rpartition("= ")[2].strip()
