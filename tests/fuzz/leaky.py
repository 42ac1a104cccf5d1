"""What a careless program does with secrets: prints them in every usual form, in pieces, and in what it dies of.

Standard library only: the hook and the engine of the canary test have it beside them. LEAKS names a JSON list of texts.
"""

import base64
import json
import logging
import os
import sys
import time
import urllib.parse


def forms(secret):
    """A secret as programs write it: alone, in a URL, in JSON, in headers (base64, also behind a user's name)."""
    data = secret.encode()
    yield secret
    yield urllib.parse.quote(secret)
    yield urllib.parse.quote(secret, safe="")
    yield urllib.parse.quote_plus(secret)
    yield base64.b64encode(data).decode()
    yield base64.urlsafe_b64encode(data).decode()
    for user in ("u:", "us:", "use:"):
        yield base64.b64encode(user.encode() + data + b"@more").decode()
    yield json.dumps({"key": secret})
    yield repr(secret)


def known():
    with open(os.environ["LEAKS"], encoding="utf-8") as file:
        return json.load(file)


def leak():
    """Print every secret in every form, in two writes, in an endless line, and the whole environment."""
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    for secret in known():
        for form in forms(secret):
            print(f"INFO the value is {form} and that was it", flush=True)
        logging.warning("token=%s&more=%s", secret, urllib.parse.quote_plus(secret))
        sys.stderr.write(f"a line in two writes: {secret[:-9]}")
        sys.stderr.flush()
        time.sleep(0.02)
        sys.stderr.write(secret[-9:] + "\n")
        print("x" * 16380 + secret + "y" * 16380, flush=True)
    for name, value in os.environ.items():
        print(f"{name}={value}")


class Trouble(Exception):
    """Dies with every secret in its message."""

    def __init__(self):
        super().__init__("can't go on: " + " ".join(form for secret in known() for form in forms(secret)))
