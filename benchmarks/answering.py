"""A server that answers every chat at once, with as little work as an ASGI server can do: answering.py PORT.

What benchmarks/scale.py asks: the machine's time is then the scorer's.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import uvloop
from granian.constants import HTTPModes, Interfaces
from granian.server.embed import Server

Header = tuple[bytes, bytes]


def reply(payload: dict[str, Any]) -> tuple[list[Header], bytes]:
    body = json.dumps(payload).encode()
    return [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())], body


MODELS = reply({"object": "list", "data": [{"id": "m", "object": "model"}]})
ANSWER = reply(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "It is what it is."}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 12, "completion_tokens": 6, "total_tokens": 18},
    }
)


async def app(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    found = scope["path"] in ("/v1/models", "/v1/chat/completions")
    headers, body = MODELS if scope["path"] == "/v1/models" else ANSWER
    await send({"type": "http.response.start", "status": 200 if found else 404, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def main(port: int) -> None:
    server = Server(
        app,
        address="127.0.0.1",
        port=port,
        interface=Interfaces.ASGINL,
        http=HTTPModes.http1,
        websockets=False,
        log_enabled=False,
        backlog=4096,
    )
    await asyncio.create_task(server.serve())


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
