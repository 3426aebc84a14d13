"""A plain HTTP door to the API server that kills its client between two calls."""

from __future__ import annotations

import base64
import http.client
import json
import os
import ssl
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.cluster.tools import kubectl


class Door:
    """Counts the changing calls that the server has answered; after `kill_after` of them the client dies unanswered."""

    def __init__(self) -> None:
        view = json.loads(kubectl("config", "view", "--raw", "--minify", "-o", "json"))
        cluster, user = view["clusters"][0]["cluster"], view["users"][0]["user"]
        self.address = urlsplit(cluster["server"])
        self.trust = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
        self.token = user["token"]
        self.url = ""
        self.victim: int | None = None
        self.kill_after = 0
        self.changes: list[str] = []

    def kubeconfig(self) -> dict[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "door",
            "clusters": [{"name": "door", "cluster": {"server": self.url}}],
            "users": [{"name": "door", "user": {"token": "none"}}],
            "contexts": [{"name": "door", "context": {"cluster": "door", "user": "door"}}],
        }


@contextmanager
def door() -> Generator[Door]:
    inside = Door()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kept = {key: value for key, value in self.headers.items() if key.lower() in ("content-type", "accept")}
            connection = http.client.HTTPSConnection(inside.address.hostname or "", inside.address.port, context=inside.trust)
            connection.request(self.command, self.path, body or None, {**kept, "Authorization": f"Bearer {inside.token}"})
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            if self.command != "GET" and "dryRun" not in self.path:
                inside.changes.append(f"{self.command} {urlsplit(self.path).path.rsplit('/', 1)[-1]}")
                if inside.victim is not None and len(inside.changes) == inside.kill_after:
                    os.kill(inside.victim, 9)
                    return
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_DELETE = _pass_on  # noqa: N815  (names that http.server looks up)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        inside.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield inside
        finally:
            server.shutdown()
            thread.join()
