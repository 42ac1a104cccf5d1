"""A stand-in for vLLM's server: the same routes, shapes and log lines, deterministic words, and faults on request.

    python tests/fake_engine.py --uds PATH [--host H --port P] [--served-model-name NAME…] [any flag of vLLM]

Faults and sizes are words in the prompt, so that CSV rows can ask for them too:

    tokens=20        how many tokens to generate (default: max_tokens, else 5)
    delay=0.5        seconds before the first byte
    token_delay=0.1  seconds before each token of a stream
    status=503       answer with this error
    die=3            the process exits when 3 tokens of a stream are out; in other answers, halfway through the body
    core_dies=3      an error frame and [DONE], as vLLM's front end does when its core is dead
    aborted=3        finish_reason abort and [DONE]
    fragment=7       send the body in pieces of 7 bytes
    error_bytes=N    pad the error message
    bytes=N          an answer of N characters

`/fake/stats` counts what started, finished and was aborted by its client; `/fake/requests` shows what came in.
Environment: FAKE_ENGINE_LOAD_SECONDS (before it listens), FAKE_ENGINE_LIFE_SECONDS (then it exits with 0, as a vLLM
whose core was killed does), FAKE_ENGINE_FAIL (exit code, instead of loading).
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from granian.constants import HTTPModes, Interfaces
from granian.server.embed import Server

_WORD = re.compile(r"\b(tokens|delay|token_delay|status|die|core_dies|aborted|fragment|error_bytes|bytes)=([\d.]+)")
_ERRORS = {400: "BadRequestError", 404: "NotFoundError", 429: "TooManyRequests", 500: "InternalServerError"}
_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def words(text: str) -> dict[str, float]:
    """The faults and sizes that a prompt asks for."""
    return {name: float(value) for name, value in _WORD.findall(text)}


def joined(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """The headers by name; what comes twice is joined by a comma, so that a test sees it."""
    found: dict[str, str] = {}
    for name, value in headers:
        before = found.get(name.decode())
        found[name.decode()] = value.decode("latin-1") if before is None else f"{before}, {value.decode('latin-1')}"
    return found


class FakeEngine:
    """The ASGI application."""

    def __init__(self, models: list[str], max_model_len: int) -> None:
        self.models = models
        self.max_model_len = max_model_len
        self.stats = {"started": 0, "finished": 0, "aborted": 0, "running": 0, "most_running": 0}
        self.tokens = 0
        self.requests: deque[dict[str, Any]] = deque(maxlen=200)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        body = b"".join(parts)
        path = scope["path"]
        if path.startswith("/fake/"):
            shown: Any = self.stats if path == "/fake/stats" else list(self.requests)
            await self.reply(send, 200, shown)
            return
        self.requests.append(
            {
                "method": scope["method"],
                "path": path,
                "query": scope["query_string"].decode(),
                "headers": joined(scope["headers"]),
                "sha256": hashlib.sha256(body).hexdigest(),
                "body": body[:65536].decode("utf-8", "replace"),
            }
        )
        if path == "/health":
            await self.raw(send, 200, b"", b"text/plain")
        elif path == "/metrics":
            await self.raw(send, 200, self.metrics(), b"text/plain; version=0.0.4; charset=utf-8")
        elif path == "/v1/models":
            models = [{"id": name, "object": "model", "created": 1, "owned_by": "vllm"} for name in self.models]
            await self.reply(send, 200, {"object": "list", "data": models})
        elif path == "/version":
            await self.reply(send, 200, {"version": "0.32.0"})
        else:
            await self.counted(path, body, scope, receive, send)

    async def counted(self, path: str, body: bytes, scope: Any, receive: Any, send: Any) -> None:
        self.stats["started"] += 1
        self.stats["running"] += 1
        self.stats["most_running"] = max(self.stats["most_running"], self.stats["running"])
        work = asyncio.ensure_future(self.infer(path, body, scope, send))
        gone = asyncio.ensure_future(self.gone(receive))
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        self.stats["running"] -= 1
        if work.done():
            gone.cancel()
            self.stats["finished"] += 1
            work.result()
            return
        self.stats["aborted"] += 1
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work

    @staticmethod
    async def gone(receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def infer(self, path: str, body: bytes, scope: Any, send: Any) -> None:
        if path.startswith("/v1/audio/"):
            await self.reply(send, 200, {"text": f"{len(body)} bytes"})
            return
        if scope["method"] != "POST":
            await self.reply(send, 200, {"path": path, "method": scope["method"]})
            return
        try:
            request = json.loads(body)
        except ValueError:
            await self.error(send, 400, "JSON decode error")
            return
        known = {
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.completions,
            "/v1/embeddings": self.embeddings,
            "/tokenize": self.tokenize,
        }
        handler = known.get(path)
        if handler is not None:
            await handler(request, send)
        elif path.startswith(("/v1/responses", "/v1/messages")) and request.get("stream"):
            await self.named_events(request, send)
        else:
            await self.reply(send, 200, {"path": path, "got": request})

    async def refused(self, request: dict[str, Any], prompt: str, send: Any) -> bool:
        """Answer with the error that is due, if one is."""
        asked = words(prompt)
        await asyncio.sleep(asked.get("delay", 0))
        model = request.get("model")
        if model and model not in self.models:
            await self.error(send, 404, f"The model `{model}` does not exist.")
        elif "status" in asked:
            status = int(asked["status"])
            message = _DEAD if "dead core" in prompt else f"asked for {status}" + "x" * int(asked.get("error_bytes", 0))
            await self.error(send, status, message)
        elif not prompt:
            await self.error(send, 400, "The prompt is empty")
        elif (request.get("n") or 1) > 1 and request.get("temperature") == 0:
            await self.error(send, 400, "n must be 1 when using greedy sampling")
        elif len(prompt.split()) > self.max_model_len:
            text = f"This model's maximum context length is {self.max_model_len} tokens."
            await self.error(send, 400, text)
        else:
            return False
        return True

    async def chat(self, request: dict[str, Any], send: Any) -> None:
        messages = request.get("messages")
        if not isinstance(messages, list) or not messages:
            text = "1 validation error:\n  {'type': 'missing', 'loc': 'messages', 'msg': 'Field required', 'input': "
            await self.error(send, 400, text + repr(request) + "}")
            return
        content = messages[-1].get("content")
        prompt = content if isinstance(content, str) else json.dumps(content)
        if await self.refused(request, prompt, send):
            return
        asked = words(prompt)
        count = int(asked.get("tokens", request.get("max_completion_tokens") or request.get("max_tokens") or 5))
        model = request.get("model") or self.models[0]
        base = {"id": "chatcmpl-fake", "created": 1, "model": model}
        if request.get("stream"):
            await self.chat_stream(request, base, prompt, count, send)
            return
        text = "x" * int(asked["bytes"]) if "bytes" in asked else echo(prompt, count)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": f"{text} #{index}" if index else text},
                "finish_reason": "stop",
            }
            for index in range(request.get("n") or 1)
        ]
        usage = self.usage(prompt, count * len(choices))
        payload = {**base, "object": "chat.completion", "choices": choices, "usage": usage}
        await self.reply(send, 200, payload, asked)

    async def chat_stream(
        self, request: dict[str, Any], base: dict[str, Any], prompt: str, count: int, send: Any
    ) -> None:
        asked = words(prompt)
        chunk = {**base, "object": "chat.completion.chunk"}
        out = Events(send, int(asked.get("fragment", 0)))
        await out.start()
        tokens = echo(prompt, count).split(" ")
        for number, token in enumerate(tokens):
            for stop in ("die", "core_dies", "aborted"):
                if asked.get(stop) == number:
                    await self.stop_stream(stop, chunk, out)
                    return
            await asyncio.sleep(asked.get("token_delay", 0))
            self.tokens += 1
            for index in range(request.get("n") or 1):
                choice = {"index": index, "delta": {"content": token + " "}, "finish_reason": None}
                await out.event({**chunk, "choices": [choice]})
        last = {"index": 0, "delta": {}, "finish_reason": "stop"}
        await out.event({**chunk, "choices": [last]})
        if (request.get("stream_options") or {}).get("include_usage"):
            await out.event({**chunk, "choices": [], "usage": self.usage(prompt, count)})
        await out.done()

    async def stop_stream(self, how: str, chunk: dict[str, Any], out: Events) -> None:
        if how == "die":
            await out.write(b'data: {"id": "half an ev')
            await asyncio.sleep(0.05)
            os._exit(1)
        if how == "core_dies":
            await out.event({"error": {"message": _DEAD, "type": "InternalServerError", "param": None, "code": 500}})
        else:
            await out.event({**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]})
        await out.done()

    async def completions(self, request: dict[str, Any], send: Any) -> None:
        prompt = str(request.get("prompt", ""))
        if await self.refused(request, prompt, send):
            return
        asked = words(prompt)
        count = int(asked.get("tokens", request.get("max_tokens") or 5))
        base = {"id": "cmpl-fake", "object": "text_completion", "created": 1, "model": self.models[0]}
        if not request.get("stream"):
            choices = [{"index": 0, "text": echo(prompt, count), "finish_reason": "stop", "logprobs": None}]
            await self.reply(send, 200, {**base, "choices": choices, "usage": self.usage(prompt, count)}, asked)
            return
        out = Events(send, int(asked.get("fragment", 0)))
        await out.start()
        for number, token in enumerate(echo(prompt, count).split(" ")):
            if asked.get("core_dies") == number:
                await self.stop_stream("core_dies", base, out)
                return
            await asyncio.sleep(asked.get("token_delay", 0))
            await out.event({**base, "choices": [{"index": 0, "text": token, "finish_reason": None}]})
        await out.done()

    async def named_events(self, request: dict[str, Any], send: Any) -> None:
        asked = words(str(request.get("input") or request.get("messages")))
        out = Events(send, int(asked.get("fragment", 0)))
        await out.start()
        for number in range(int(asked.get("tokens", 3))):
            if asked.get("die") == number:
                await self.stop_stream("die", {}, out)
            line = f"event: delta\r\ndata: {json.dumps({'delta': f'w{number}', 'end': {}})}\r\n\r\n"
            await out.write(line.encode())
        await out.finish()

    async def embeddings(self, request: dict[str, Any], send: Any) -> None:
        given = request.get("input", "")
        texts = given if isinstance(given, list) else [given]
        data = [
            {"object": "embedding", "index": index, "embedding": [len(str(text)) / 100, 0.5]}
            for index, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        payload = {"object": "list", "data": data, "model": self.models[0], "usage": usage}
        await self.reply(send, 200, payload, zipped=request.get("user") == "gzip")

    async def tokenize(self, request: dict[str, Any], send: Any) -> None:
        tokens = list(range(len(str(request.get("prompt", "")).split())))
        payload = {"count": len(tokens), "max_model_len": self.max_model_len, "tokens": tokens}
        await self.reply(send, 200, payload)

    def usage(self, prompt: str, completion: int) -> dict[str, int]:
        self.tokens += completion
        count = len(prompt.split())
        return {"prompt_tokens": count, "completion_tokens": completion, "total_tokens": count + completion}

    def metrics(self) -> bytes:
        lines = [
            "# HELP vllm:num_requests_running Number of requests in model execution batches.",
            "# TYPE vllm:num_requests_running gauge",
            f'vllm:num_requests_running{{model_name="{self.models[0]}"}} {self.stats["running"]}',
            "# TYPE vllm:prompt_tokens_total counter",
            f"vllm:prompt_tokens_total {self.stats['started']}",
            "# TYPE vllm:generation_tokens_total counter",
            f"vllm:generation_tokens_total {self.tokens}",
            "# TYPE vllm:iteration_tokens_total histogram",
            f"vllm:iteration_tokens_total_count {self.tokens}",
            "# TYPE vllm:kv_cache_usage_perc gauge",
            "vllm:kv_cache_usage_perc 0.0",
        ]
        return "\n".join(lines).encode() + b"\n"

    async def error(self, send: Any, status: int, message: str) -> None:
        kind = _ERRORS.get(status, "ServiceUnavailable")
        await self.reply(send, status, {"error": {"message": message, "type": kind, "param": None, "code": status}})

    async def reply(
        self, send: Any, status: int, payload: Any, asked: dict[str, float] | None = None, *, zipped: bool = False
    ) -> None:
        body = json.dumps(payload, separators=(",", ":")).encode()
        headers = []
        if zipped:
            body = gzip.compress(body, mtime=0)
            headers.append((b"content-encoding", b"gzip"))
        await self.raw(send, status, body, b"application/json", asked or {}, headers)

    async def raw(
        self,
        send: Any,
        status: int,
        body: bytes,
        kind: bytes,
        asked: dict[str, float] | None = None,
        headers: list[tuple[bytes, bytes]] | None = None,
    ) -> None:
        asked = asked or {}
        start = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *(headers or [])]
        await send({"type": "http.response.start", "status": status, "headers": start})
        size = int(asked.get("fragment", 0)) or min(65536, max(1, len(body) // 4))
        for at in range(0, len(body), size):
            if "die" in asked and at >= len(body) // 2:
                break
            await send({"type": "http.response.body", "body": body[at : at + size], "more_body": True})
        if "die" in asked:
            await asyncio.sleep(0.2)  # for what is sent to leave
            os._exit(1)
        await send({"type": "http.response.body", "body": b""})


class Events:
    """Server-sent events, whole or in pieces of `fragment` bytes."""

    def __init__(self, send: Any, fragment: int) -> None:
        self._send = send
        self._fragment = fragment

    async def start(self) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def event(self, payload: Any) -> None:
        await self.write(b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n")

    async def write(self, data: bytes) -> None:
        size = self._fragment or len(data)
        for at in range(0, len(data), size):
            await self._send({"type": "http.response.body", "body": data[at : at + size], "more_body": True})

    async def done(self) -> None:
        await self.write(b"data: [DONE]\n\n")
        await self.finish()

    async def finish(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})


def echo(prompt: str, count: int) -> str:
    """`count` words that depend on the prompt alone."""
    source = prompt.split() or ["nothing"]
    return " ".join(source[index % len(source)] for index in range(count))


def log(line: str) -> None:
    print(f"INFO {time.strftime('%m-%d %H:%M:%S')} [fake.py:1] {line}", flush=True)


async def serve(options: argparse.Namespace) -> None:
    load = float(os.environ.get("FAKE_ENGINE_LOAD_SECONDS", "0"))
    for line in (
        "Resolved architecture: FakeForCausalLM",
        "Initializing a V1 LLM engine (v0.32.0) with config: fake",
        "Starting to load model fake...",
        "Loading safetensors checkpoint shards: 100% Completed | 1/1 [00:00<00:00, 9.00it/s]",
        "Loading weights took 0.01 seconds",
        "GPU KV cache size: 1,024 tokens",
        "init engine (profile, create kv cache, warmup model) took 0.01 seconds",
    ):
        log(line)
        await asyncio.sleep(load / 7)
    if "FAKE_ENGINE_FAIL" in os.environ:
        print("ValueError: the fake engine was told to fail", file=sys.stderr, flush=True)
        os._exit(int(os.environ["FAKE_ENGINE_FAIL"]))
    app = FakeEngine(options.served_model_name, options.max_model_len)
    uds = Path(options.uds) if options.uds else None
    if uds is not None:
        uds.unlink(missing_ok=True)
    server = Server(
        app,
        address=options.host,
        port=options.port,
        uds=uds,
        interface=Interfaces.ASGINL,
        http=HTTPModes.http1,
        websockets=False,
        log_enabled=False,
        backlog=4096,
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, os._exit, 0)
    if "FAKE_ENGINE_LIFE_SECONDS" in os.environ:
        loop.call_later(float(os.environ["FAKE_ENGINE_LIFE_SECONDS"]), os._exit, 0)
    loop.call_later(0.05, log, "Application startup complete.")
    await server.serve()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--uds")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", nargs="+", default=["datarobot-deployed-llm"])
    parser.add_argument("--max-model-len", type=int, default=2048)
    options, _ = parser.parse_known_args()
    asyncio.run(serve(options))


if __name__ == "__main__":
    main()
