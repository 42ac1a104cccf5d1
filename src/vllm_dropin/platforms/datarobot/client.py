"""The SDK's HTTP client, with what a command line needs: the platform's own words, retries that can't do a thing
twice, a token that goes to one origin only, and a rehearsal that sends nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import requests
import trafaret
from datarobot.rest import RESTClientObject
from datarobot.utils import to_api
from requests_toolbelt import MultipartEncoder
from urllib3 import Retry

from vllm_dropin.errors import DropinError, InputOutputError, PlatformError
from vllm_dropin.platforms.datarobot.account import ENDPOINT, TOKEN, Account
from vllm_dropin.platforms.datarobot.rehearsal import Rehearsal

_ATTEMPTS = 4
_PASSING = frozenset({429, 500, 502, 503, 504})
_AGAIN = "Run the same command again: what is done already is not done twice."
_LONGEST = 2000  # characters of an answer that are shown


class Refused(Exception):
    """An answer of 400 or more, with the platform's message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Client(RESTClientObject):
    """One platform. All calls of the SDK pass through `request`."""

    def __init__(self, account: Account, pause: float, rehearsal: Rehearsal | None = None) -> None:
        # Only what never reached the platform is sent again below us; the rest is decided in `request`. The SDK's own
        # rule repeats a POST after a 502 or 504, which may then have been done twice.
        unsent = Retry(total=None, connect=_ATTEMPTS - 1, read=0, status=0, other=0, redirect=5, backoff_factor=pause)
        super().__init__(account.token.reveal(), account.endpoint, max_retries=unsent, use_tcp_keepalive=True)
        self.auth = _keep_header
        self.hooks["response"].append(_raise_refusals)
        self._pause = pause
        self._rehearsal = rehearsal

    def request(self, method: str, url: str, *args: Any, **kwargs: Any) -> requests.Response:  # type: ignore[override]
        """Send one call. Raises Refused, or what requests raises for a platform that can't be reached."""
        if self._rehearsal is not None:
            return self._rehearsal.answer(method.upper(), url, kwargs.get("params"), _body(kwargs))
        url = self._at_home(url)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return super().request(method, url, *args, **kwargs)
            except Refused as refused:
                # 429 says that the call was not taken up. Any other may have been, so only reading is repeated.
                repeatable = method.upper() == "GET" or (refused.status == 429 and "json" in _kind(kwargs))
                if refused.status not in _PASSING or not repeatable or attempt == _ATTEMPTS:
                    raise
            except (requests.ConnectionError, requests.Timeout):
                if method.upper() != "GET" or attempt == _ATTEMPTS:
                    raise
            time.sleep(self._pause * 2**attempt)
        raise AssertionError

    def _at_home(self, url: str) -> str:
        """Where the platform sends us (next pages, status of jobs), at the origin that the user named.

        A platform behind a proxy may name itself differently, and the token must go nowhere else.
        """
        if not url.startswith("http"):
            return url
        there, home = urlsplit(url), urlsplit(self.endpoint)
        if not there.path.startswith(home.path.rstrip("/") + "/"):
            raise Refused(0, f"it sends us to {there.netloc}{there.path}, outside of {self.endpoint}")
        return urlunsplit((home.scheme, home.netloc, there.path, there.query, ""))


def _keep_header(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Without any authentication set, requests would put what it finds in ~/.netrc in the token's place."""
    return request


def _kind(kwargs: dict[str, Any]) -> str:
    return "stream" if isinstance(kwargs.get("data"), MultipartEncoder) else "json"


def _body(kwargs: dict[str, Any]) -> object:
    data = kwargs.get("json") if kwargs.get("json") is not None else kwargs.get("data")
    return data if data is None or isinstance(data, MultipartEncoder) else to_api(data)


def _raise_refusals(response: requests.Response, *args: object, **kwargs: object) -> None:
    """Before the SDK looks: its own errors fail over answers that are no JSON."""
    if response.status_code < 400:
        return
    try:
        answer = response.json()
    except ValueError:
        answer = None
    # Pages of proxies name no charset, and requests would take them for Latin-1.
    message = response.content.decode("utf-8", "replace").strip() or response.reason
    if isinstance(answer, dict) and answer.get("message"):
        message = str(answer["message"])
        if answer.get("errors"):
            message += f" {json.dumps(answer['errors'], ensure_ascii=False)}"
    raise Refused(response.status_code, "".join(c for c in message if c.isprintable() or c == "\n")[:_LONGEST])


@contextmanager
def explained(what: str, remedies: dict[int, str] | None = None) -> Iterator[None]:
    """Calls of the SDK, whose failures become errors for people. `what` is what is being done."""
    try:
        yield
    except DropinError:
        raise
    except Refused as refused:
        if refused.status >= 500 or refused.status == 429:
            raise InputOutputError(f"{what}: the platform answers {refused.status}: {refused}", _AGAIN) from None
        remedy = (remedies or {}).get(refused.status) or _REMEDIES.get(refused.status, "")
        status = f" {refused.status}" if refused.status else ""
        raise PlatformError(f"{what}: the platform answers{status}: {refused}", remedy) from None
    except requests.exceptions.SSLError as error:
        raise InputOutputError(
            f"{what}: the platform's certificate is not accepted: {_reason(error)}",
            "Name the authority's file with REQUESTS_CA_BUNDLE when it is one of your own.",
        ) from None
    except (requests.ConnectionError, requests.Timeout) as error:
        raise InputOutputError(
            f"{what}: the platform can't be reached: {_reason(error)}", f"Check {ENDPOINT} and the network. {_AGAIN}"
        ) from None
    except (requests.RequestException, trafaret.DataError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputOutputError(
            f"{what}: the platform's answer is not understood ({type(error).__name__}: {_reason(error)})",
            f"Check that {ENDPOINT} is the platform's API, as in https://…/api/v2, and that the SDK is not older.",
        ) from None


_REMEDIES = {
    401: f"Check {TOKEN}, and that it belongs to {ENDPOINT}.",
    403: "The token's user has no right to do this: ask the platform's administrator, or the owner to share it.",
    404: f"Check the id, and that {ENDPOINT} ends as in https://…/api/v2.",
    413: "The platform takes no upload of that size: raise its limit, or fetch the weights in custom.py.",
    422: "Correct the value that it names.",
}


def _reason(error: BaseException) -> str:
    """The innermost cause, which is where the words are."""
    seen: BaseException = error
    while (below := seen.__cause__ or seen.__context__ or getattr(seen, "reason", None)) and isinstance(
        below, BaseException
    ):
        seen = below
    return str(seen).strip()[:300] or type(seen).__name__


Say = Callable[[str], None]
