"""A stand-in for the hub's HTTP API: what huggingface_hub needs to list and fetch the files of model repositories."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.serving import serving

BLOCK = 1 << 20


@dataclass
class Repo:
    """Files by name. `announced` are sizes that are claimed instead of the true ones."""

    files: dict[str, bytes]
    commit: str = "c0ffee" * 6 + "c0de"
    needs_token: str | None = None
    gated: bool = False
    announced: dict[str, int] = field(default_factory=dict)


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class FakeHub:
    """`cut` drops the connection once after so many bytes of a file; `pause` is slept before each MiB."""

    url: str
    repos: dict[str, Repo]
    requests: list[Request] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    pause: float = 0.0
    status: int | None = None

    def fetched(self) -> list[str]:
        """The names of the files whose bytes were asked for, in order."""
        paths = [request.path for request in self.requests if request.method == "GET"]
        return [path.split("/", 5)[5] for path in paths if "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        """Silence: the tests look at `requests`."""

    def answer(self) -> None:
        hub = self.hub
        authorization = self.headers.get("Authorization")
        path = self.path.partition("?")[0]
        hub.requests.append(Request(self.command, path, self.headers.get("Range"), authorization))
        if hub.status is not None:
            return self.refuse(hub.status)
        match = re.fullmatch(r"/api/models/(.+?)/revision/(.+)", path) or re.fullmatch(
            r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path
        )
        if match is None or match[1] not in hub.repos:
            return self.refuse(401 if match else 404, "RepoNotFound")
        repo = hub.repos[match[1]]
        if repo.needs_token and authorization != f"Bearer {repo.needs_token}":
            return self.refuse(401, "RepoNotFound")
        if repo.gated:
            return self.refuse(403, "GatedRepo")
        if match[2] not in ("main", repo.commit):
            return self.refuse(404, "RevisionNotFound")
        if path.startswith("/api/"):
            return self.describe(match[1], repo)
        if match[3] not in repo.files:
            return self.refuse(404, "EntryNotFound")
        return self.give(repo, match[3])

    def refuse(self, status: int, code: str | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def describe(self, name: str, repo: Repo) -> None:
        siblings = [
            {"rfilename": file, "size": repo.announced.get(file, len(data)), "blobId": hashlib.sha1(data).hexdigest()}
            for file, data in repo.files.items()
        ]
        body = json.dumps({"_id": "1", "id": name, "sha": repo.commit, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def give(self, repo: Repo, name: str) -> None:
        data = repo.files[name]
        start = int(match[1]) if (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")) else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", repo.commit)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = self.hub.cut.pop(name, len(data))
        for offset in range(start, end, BLOCK):
            time.sleep(self.hub.pause)
            try:
                self.wfile.write(data[offset : min(offset + BLOCK, end)])
            except OSError:
                break
        self.close_connection = end != len(data)


@contextlib.contextmanager
def serve(repos: dict[str, Repo]) -> Iterator[FakeHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}", repos)
    server.RequestHandlerClass = type("BoundHandler", (Handler,), {"hub": hub})
    server.daemon_threads = True
    with serving(server):
        yield hub
