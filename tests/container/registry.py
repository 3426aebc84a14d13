"""An image registry in memory, as much of it as a push and a look at a tag need.

Reference: https://github.com/opencontainers/distribution-spec/blob/main/spec.md
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class Registry(ThreadingHTTPServer):
    """`blobs` by digest, `manifests` by `name:tag` and `name@digest`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.blobs: dict[str, bytes] = {}
        self.uploads: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Registry

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        body = self._body()
        if url.path == "/v2/":
            return self._answer(200)
        if match := re.fullmatch(r"/v2/(.+)/blobs/uploads/", url.path):
            upload = f"/v2/{match[1]}/blobs/uploads/{len(self.server.uploads)}"
            self.server.uploads[upload] = b""
            return self._answer(202, Location=upload)
        if url.path in self.server.uploads:
            self.server.uploads[url.path] += body
            if self.command == "PATCH":
                return self._answer(202, Location=url.path, Range=f"0-{len(self.server.uploads[url.path]) - 1}")
            (digest,) = parse_qs(url.query)["digest"]
            self.server.blobs[digest] = self.server.uploads[url.path]
            return self._answer(201, Docker_Content_Digest=digest)
        if match := re.fullmatch(r"/v2/.+/blobs/(sha256:.+)", url.path):
            found = self.server.blobs.get(match[1])
            return self._answer(404) if found is None else self._answer(200, length=len(found), Docker_Content_Digest=match[1])
        if match := re.fullmatch(r"/v2/(.+)/manifests/(.+)", url.path):
            if self.command != "PUT":
                kept = self.server.manifests.get(f"{match[1]}:{match[2]}")
                return self._answer(404) if kept is None else self._answer(200, length=len(kept), Docker_Content_Digest=_digest(kept))
            digest = _digest(body)
            self.server.manifests |= {f"{match[1]}:{match[2]}": body, f"{match[1]}@{digest}": body}
            return self._answer(201, Docker_Content_Digest=digest)
        return self._answer(404)

    do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = handle_any  # noqa: N815  (the base class calls these)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts: list[bytes] = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, length: int = 0, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@contextmanager
def registry() -> Generator[Registry]:
    with Registry() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
