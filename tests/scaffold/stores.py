"""Just enough of Azure Blob Storage and Google Cloud Storage for their real clients to list and fetch, on 127.0.0.1."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from tests.serving import serving

Answer = tuple[int, Mapping[str, str], bytes]


class Store:
    """Objects by name. `seen` has the Authorization header of each request."""

    def __init__(self, objects: Mapping[str, bytes]) -> None:
        self.objects = dict(objects)
        self.seen: list[str] = []
        self.url = ""
        self.broken: frozenset[str] = frozenset()
        """Names that are listed, and fail when they are fetched."""

    def answer(self, method: str, path: str, query: Mapping[str, list[str]]) -> Answer:
        raise NotImplementedError

    @contextmanager
    def serving(self) -> Iterator[Store]:
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                store.seen.append(self.headers.get("Authorization") or "")
                url = urlsplit(self.path)
                status, headers, body = store.answer(self.command, unquote(url.path), parse_qs(url.query))
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = handle_one

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}"
        with serving(server):
            yield self


class Azure(Store):
    """One container `models` of the account `acct`."""

    def connection_string(self, key: str) -> str:
        return f"BlobEndpoint={self.url}/acct;AccountName=acct;AccountKey={key}"

    def answer(self, method: str, path: str, query: Mapping[str, list[str]]) -> Answer:
        prefix = query.get("prefix", [""])[0]
        if path == "/acct/models" and query.get("comp") == ["list"]:
            blobs = "".join(
                f"<Blob><Name>{name}</Name><Properties><Content-Length>{len(data)}</Content-Length>"
                "<BlobType>BlockBlob</BlobType></Properties></Blob>"
                for name, data in self.objects.items()
                if name.startswith(prefix)
            )
            text = f'<?xml version="1.0"?><EnumerationResults><Blobs>{blobs}</Blobs><NextMarker /></EnumerationResults>'
            return 200, {"Content-Type": "application/xml"}, text.encode()
        data = self.objects.get(path.removeprefix("/acct/models/"))
        if data is None or path.removeprefix("/acct/models/") in self.broken:
            return 403, {"x-ms-error-code": "AuthorizationFailure"}, b""
        headers = {
            "Content-Type": "application/octet-stream", "ETag": '"1"', "x-ms-blob-type": "BlockBlob",
            "Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}", "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT",
        }  # fmt: skip
        return 206, headers, data


class Gcs(Store):
    """One bucket `models`, and the server that changes a service account's signature for a token."""

    def answer(self, method: str, path: str, query: Mapping[str, list[str]]) -> Answer:
        kind = {"Content-Type": "application/json"}
        if path == "/token":
            return 200, kind, json.dumps({"access_token": "gcs-token", "expires_in": 3600}).encode()
        prefix = query.get("prefix", [""])[0]
        if path == "/storage/v1/b/models/o":
            items = [
                {"name": name, "bucket": "models", "size": str(len(data)), "generation": "1"}
                for name, data in self.objects.items()
                if name.startswith(prefix)
            ]
            return 200, kind, json.dumps({"kind": "storage#objects", "items": items}).encode()
        name = path.rpartition("/b/models/o/")[2]
        data = self.objects.get(name)
        if data is None or name in self.broken:
            return 403, kind, b'{"error": {"code": 403, "message": "no"}}'
        digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        return 200, {"Content-Type": "application/octet-stream", "X-Goog-Hash": f"md5={digest}"}, data
