"""Who may ask: bearer keys on every route but six probes (decision 15)."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from hashlib import sha256

from vllm_dropin.gateway.errors import HttpError

PUBLIC = frozenset({"/", "/ping", "/health", "/livez", "/readyz", "/startupz"})


class Access:
    """The keys, several for rotation. No keys: everybody may ask."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.renew(keys)

    def renew(self, keys: Iterable[str]) -> None:
        """Accept these from the next request on, and no others."""
        # Digests have one length, so a comparison tells nothing about a key's length either.
        self._digests = tuple(sha256(key.encode()).digest() for key in keys)

    def allows(self, authorization: bytes) -> bool:
        """Whether this Authorization header carries one of the keys; every key is compared, in constant time."""
        if not self._digests:
            return True
        scheme, _, token = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        given = sha256(token.strip()).digest()
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(given, digest)
        return found

    def require(self, path: str | None, method: str, headers: Mapping[bytes, bytes]) -> None:
        """Raises HttpError 401 unless the path is a public probe or the request carries a key."""
        if path in PUBLIC and method in ("GET", "HEAD"):
            return
        if not self.allows(headers.get(b"authorization", b"")):
            raise HttpError(401, "a valid API key is needed", [(b"www-authenticate", b"Bearer")])
