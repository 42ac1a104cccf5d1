"""A stand-in for vLLM's API server, standard library only, so that any interpreter can run it.

It is started under the name `vllm.entrypoints.openai.api_server` from a bare virtual environment (drivers.py makes
it), takes `--host/--port` or `--uds`, ignores every other flag, and writes what it saw to its record folder:
`launch.json` (argv, environment, pid) and `requests.jsonl` (one line a request, with its outcome). A prompt steers the
answer with marks:

    [[sleep 1.5]]    seconds before the answer, or between the chunks of a stream as a whole
    [[status 500]]   an OpenAI-shaped error of that status
    [[chars 60000]]  an answer of that length; otherwise the answer is "echo: " and the prompt
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

MARK = re.compile(r"\[\[(\w+) ([\d.]+)\]\]")
CHUNKS = 8


class Left(Exception):
    """The client went away while we worked for it."""


class Stub:
    """The server: one record folder, the names that it answers to."""

    def __init__(self, record: Path, served: list[str]) -> None:
        self.record = record
        self.served = served
        self.active = 0

    def note(self, entry: dict[str, Any]) -> None:
        with (self.record / "requests.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    async def serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self.serve_request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def serve_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ", 2)
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
        body = await read_body(reader, headers)
        self.active += 1
        entry = {
            "method": method,
            "target": target,
            "headers": headers,
            "body": body.decode("utf-8", "replace")[:4096],
            "size": len(body),
            "active": self.active,
            "started": time.time(),
            "outcome": "failed",
        }
        try:
            await self.answer(method, target.partition("?")[0], body, reader, writer)
            entry["outcome"] = "done"
        except (Left, ConnectionError):
            entry["outcome"] = "aborted"
            return False
        finally:
            self.active -= 1
            entry["ended"] = time.time()
            if not target.startswith(("/health", "/metrics")):
                self.note(entry)
        return headers.get("connection", "").lower() != "close"

    async def answer(
        self, method: str, path: str, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if path == "/health":
            await send(writer, 200, b"", "text/plain")
        elif path == "/v1/models":
            cards = [{"id": name, "object": "model", "created": 1, "owned_by": "vllm"} for name in self.served]
            await send_json(writer, 200, {"object": "list", "data": cards})
        elif path == "/metrics":
            running = self.active - 1
            text = f"vllm:num_requests_running {running}\nvllm:generation_tokens_total {time.time()}\n"
            await send(writer, 200, text.encode(), "text/plain; version=0.0.4")
        elif path == "/version":
            await send_json(writer, 200, {"version": "0.32.0"})
        elif path == "/v1/embeddings" and method == "POST":
            # Compressed on purpose, whatever the client accepts: a door must hand the bytes on as they are.
            payload = {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5] * 64}]}
            packed = gzip.compress(json.dumps(payload).encode())
            await send(writer, 200, packed, "application/json", "Content-Encoding: gzip\r\n")
        elif path in ("/v1/chat/completions", "/v1/completions", "/tokenize") and method == "POST":
            await self.generate(path, json.loads(body), reader, writer)
        else:
            await send_json(writer, 404, {"detail": "Not Found"})

    async def generate(
        self, path: str, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        model = request.get("model") or self.served[0]
        if model not in self.served:
            await send_error(writer, 404, f"The model `{model}` does not exist.", "NotFoundError")
        elif path == "/v1/chat/completions" and not isinstance(request.get("messages"), list):
            await send_error(writer, 400, "messages: Field required", "BadRequestError")
        elif path == "/tokenize":
            await send_json(writer, 200, {"tokens": [1, 2], "count": 2, "max_model_len": 2048})
        else:
            await self.complete(request, model, reader, writer)

    async def complete(
        self, request: dict[str, Any], model: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        prompt = request["messages"][-1].get("content") or "" if "messages" in request else request["prompt"]
        marks = dict(MARK.findall(prompt))
        delay = float(marks.get("sleep", 0))
        if "status" in marks:
            await pause(delay, reader)
            await send_error(writer, int(marks["status"]), "asked for", "BadRequestError")
            return
        text = "y" * int(marks["chars"]) if "chars" in marks else f"echo: {prompt[:200]}"
        kind = "chat.completion" if "messages" in request else "text_completion"
        base = {"id": f"stub-{time.time_ns()}", "created": int(time.time()), "model": model}
        usage = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
        if request.get("stream"):
            await self.stream({**base, "object": kind + ".chunk"}, text, delay, reader, writer)
            return
        await pause(delay, reader)
        count = request.get("n") or 1
        choices = [
            {"index": i, "message": {"role": "assistant", "content": text}, "text": text, "finish_reason": "stop"}
            for i in range(count)
        ]
        await send_json(writer, 200, {**base, "object": kind, "choices": choices, "usage": usage})

    async def stream(
        self,
        base: dict[str, Any],
        text: str,
        delay: float,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        step = -(-len(text) // CHUNKS)
        for at in range(0, len(text), step):
            piece = text[at : at + step]
            choice = {"index": 0, "delta": {"content": piece}, "text": piece, "finish_reason": None}
            await send_chunk(writer, f"data: {json.dumps({**base, 'choices': [choice]})}\n\n".encode())
            await pause(delay / CHUNKS, reader)
        choice = {"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}
        await send_chunk(writer, f"data: {json.dumps({**base, 'choices': [choice]})}\n\n".encode())
        await send_chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()


async def read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("content-length", 0)))
    body = b""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return body


async def pause(seconds: float, reader: asyncio.StreamReader) -> None:
    """Sleep, but notice a client that leaves: vLLM aborts its request then, and so do we. Raises Left."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if reader.at_eof():
            raise Left
        await asyncio.sleep(min(left, 0.02))


async def send(writer: asyncio.StreamWriter, status: int, body: bytes, kind: str, extra: str = "") -> None:
    head = f"HTTP/1.1 {status} Stub\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    writer.write(head.encode() + body)
    await writer.drain()


async def send_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    await writer.drain()


async def send_json(writer: asyncio.StreamWriter, status: int, payload: dict[str, Any]) -> None:
    await send(writer, status, json.dumps(payload).encode(), "application/json")


async def send_error(writer: asyncio.StreamWriter, status: int, message: str, kind: str) -> None:
    error = {"message": message, "type": kind, "param": None, "code": status}
    await send_json(writer, status, {"error": error})


def option(argv: list[str], name: str) -> list[str]:
    """All values after the last `name`, up to the next flag; `name=value` too."""
    values: list[str] = []
    for at, token in enumerate(argv):
        if token == name:
            rest = argv[at + 1 :]
            stop = next((i for i, t in enumerate(rest) if t.startswith("-")), len(rest))
            values = rest[:stop]
        elif token.startswith(name + "="):
            values = [token.partition("=")[2]]
    return values


async def run(record: Path, argv: list[str]) -> None:
    record.mkdir(parents=True, exist_ok=True)
    launch = {"argv": argv, "environ": dict(os.environ), "pid": os.getpid()}
    temporary = record / f"launch.{os.getpid()}"
    temporary.write_text(json.dumps(launch), encoding="utf-8")
    temporary.replace(record / "launch.json")
    stub = Stub(record, option(argv, "--served-model-name") or option(argv, "--model") or ["stub"])
    print("INFO Starting to load model", flush=True)
    load_seconds = float((record / "load_seconds").read_text())
    if load_seconds < 0:
        raise SystemExit("asked to die")
    await asyncio.sleep(load_seconds)
    if uds := option(argv, "--uds"):
        Path(uds[0]).unlink(missing_ok=True)
        server = await asyncio.start_unix_server(stub.serve_connection, uds[0], limit=1 << 20)
    else:
        host, port = (option(argv, "--host") or ["127.0.0.1"])[0], int(option(argv, "--port")[0])
        server = await asyncio.start_server(stub.serve_connection, host, port, limit=1 << 20)
    print("INFO:     Application startup complete.", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(run(Path(__file__).parents[3] / "record", sys.argv[1:]))
