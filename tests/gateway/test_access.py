from __future__ import annotations

import pytest

from vllm_dropin.gateway.access import PUBLIC, Access
from vllm_dropin.gateway.errors import HttpError
from vllm_dropin.gateway.request import canonical_path


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        (b"Bearer one", True),
        (b"bearer two", True),
        (b"Bearer  two ", True),
        (b"Bearer three", False),
        (b"Bearer ", False),
        (b"Basic one", False),
        (b"one", False),
        (b"", False),
        (b"Bearer one\xff", False),
    ],
)
def test_keys(header: bytes, allowed: bool) -> None:
    assert Access(["one", "two"]).allows(header) is allowed


def test_without_keys_everybody_may_ask() -> None:
    Access([]).require("/v1/chat/completions", "POST", {})


@pytest.mark.parametrize("path", sorted(PUBLIC))
def test_probes_are_public_for_reading_only(path: str) -> None:
    access = Access(["one"])
    access.require(path, "GET", {})
    with pytest.raises(HttpError) as caught:
        access.require(path, "POST", {})
    assert caught.value.status == 401


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"/predict/", "/predict"),
        (b"/", "/"),
        (b"/v1/models", "/v1/models"),
        (b"/%70redict", "/predict"),
        (b"//", None),
        (b"//health", None),
        (b"/health//", None),
        (b"/a%2fb", None),
        (b"/%2E%2e/status", None),
        (b"/./status", None),
        (b"/a/..", None),
        (b"/a\\b", None),
        (b"/a%5cb", None),
        (b"/a%00", None),
        (b"/a%0a", None),
        (b"/%252e", None),
        (b"*", None),
        (b"/..well", "/..well"),
    ],
)
def test_canonical_path(raw: bytes, path: str | None) -> None:
    from urllib.parse import unquote

    assert canonical_path({"raw_path": raw, "path": unquote(raw.decode())}) == path
