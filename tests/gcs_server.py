"""The server of tests/gcs_emulator.py, run as a process: `python tests/gcs_server.py ADDRESS` prints where it listens.

Objects live in memory. Conditional requests are real: an `ifGenerationMatch` is checked and applied
under one lock, so `0` creates atomically and a stale generation never overwrites. Generations only grow.
Not here: gRPC, hierarchical namespaces, object versions, access control.

Reference: https://cloud.google.com/storage/docs/json_api/v1
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import google_crc32c

BUCKET = "bucket"


class Refused(Exception):
    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Object:
    data: bytes
    generation: int
    resource: dict[str, Any]


@dataclass
class Upload:
    bucket: str
    query: dict[str, str]
    metadata: dict[str, Any]
    content_type: str
    data: bytearray = field(default_factory=bytearray)


class Store:
    """Buckets of objects; every method holds the lock for as long as its check and its effect need."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.lock = threading.RLock()
        self.buckets: dict[str, dict[str, Object]] = {BUCKET: {}}
        self.uploads: dict[str, Upload] = {}
        self.generations = itertools.count(time.time_ns() // 1000)
        self.upload_ids = itertools.count(1)

    def objects(self, bucket: str) -> dict[str, Object]:
        if bucket not in self.buckets:
            raise Refused(404, f"The specified bucket does not exist: {bucket}")
        return self.buckets[bucket]

    def get(self, bucket: str, name: str, query: dict[str, str]) -> Object:
        with self.lock:
            found = self.objects(bucket).get(name)
        if found is None or query.get("generation", str(found.generation)) != str(found.generation):
            raise Refused(404, f"No such object: {bucket}/{name}")
        if query.get("ifGenerationMatch", str(found.generation)) != str(found.generation):
            raise Refused(412, "conditionNotMet")
        if query.get("ifGenerationNotMatch") == str(found.generation):
            raise Refused(304)
        return found

    def put(self, bucket: str, name: str, data: bytes, *, query: dict[str, str], metadata: dict[str, Any], content_type: str) -> Object:
        crc32c = base64.b64encode(google_crc32c.Checksum(data).digest()).decode()
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        if metadata.get("crc32c", crc32c) != crc32c or metadata.get("md5Hash", md5) != md5:
            raise Refused(400, "the checksum does not match the data")
        with self.lock:
            objects = self.objects(bucket)
            self._check(objects.get(name), query)
            generation = next(self.generations)
            now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{time.time_ns() // 1_000_000 % 1000:03d}Z"
            path = f"/b/{bucket}/o/{quote(name, safe='')}"
            resource = {
                "kind": "storage#object",
                "id": f"{bucket}/{name}/{generation}",
                "selfLink": f"{self.endpoint}/storage/v1{path}",
                "mediaLink": f"{self.endpoint}/download/storage/v1{path}?generation={generation}&alt=media",
                "bucket": bucket,
                "name": name,
                "generation": str(generation),
                "metageneration": "1",
                "contentType": metadata.get("contentType", content_type),
                "storageClass": "STANDARD",
                "size": str(len(data)),
                "md5Hash": md5,
                "crc32c": crc32c,
                "etag": f"E{generation}",
                "timeCreated": now,
                "updated": now,
                **({"metadata": metadata["metadata"]} if metadata.get("metadata") else {}),
            }
            objects[name] = Object(data, generation, resource)
            return objects[name]

    def delete(self, bucket: str, name: str, query: dict[str, str]) -> None:
        with self.lock:
            objects = self.objects(bucket)
            if name not in objects:
                raise Refused(404, f"No such object: {bucket}/{name}")
            self._check(objects[name], query)
            del objects[name]

    def list(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end, after = query.get("startOffset", ""), query.get("endOffset"), query.get("pageToken", "")
        limit = int(query.get("maxResults", 1000))
        with self.lock:
            objects = dict(self.objects(bucket))
        entries: dict[str, dict[str, Any] | None] = {}  # a prefix has no resource
        for name in sorted(objects):
            if not name.startswith(prefix) or name < start or (end is not None and name >= end):
                continue
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            entries[name if cut < 0 else name[: cut + len(delimiter)]] = objects[name].resource if cut < 0 else None
        names = [name for name in entries if name > after]
        page = names[:limit]
        items = [resource for name in page if (resource := entries[name]) is not None]
        listing: dict[str, Any] = {"kind": "storage#objects", "items": items, "prefixes": [name for name in page if entries[name] is None]}
        return listing | ({"nextPageToken": page[-1]} if len(names) > limit else {})

    @staticmethod
    def _check(found: Object | None, query: dict[str, str]) -> None:
        present = str(found.generation if found else 0)
        if query.get("ifGenerationMatch", present) != present or query.get("ifGenerationNotMatch") == present:
            raise Refused(412, "conditionNotMet")
        if query.get("ifMetagenerationMatch", "1") != "1":
            raise Refused(412, "conditionNotMet")


def split_multipart(body: bytes, content_type: str) -> list[bytes]:
    """The parts of a multipart body, headers included. Clients end lines with CRLF or with LF alone."""
    found = re.search(r'boundary="?([^";]+)"?', content_type)
    if not found:
        raise Refused(400, "multipart without boundary")
    mark = b"--" + found[1].encode()
    newline = b"\r\n" if body.lstrip().startswith(mark + b"\r\n") else b"\n"
    parts = (newline + body).split(newline + mark)[1:-1]
    return [part.removeprefix(newline) for part in parts]


def head_and_content(part: bytes) -> tuple[bytes, bytes]:
    head, *content = re.split(rb"\r\n\r\n|\n\n", part, maxsplit=1)
    return head, content[0] if content else b""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive
    disable_nagle_algorithm = True  # without it every answer waits 40 ms

    @property
    def store(self) -> Store:
        assert isinstance(self.server, Server)
        return self.server.store

    def handle_any(self) -> None:
        body = self._body()
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        try:
            self._route(url.path, query, body)
        except Refused as refused:
            self._refuse(refused)

    do_GET = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815 - the base class calls them so

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            size = int(self.headers.get("Content-Length") or 0)
            if len(body := self.rfile.read(size)) < size:
                raise ConnectionAbortedError("the client has gone in the middle of a request: nothing of it counts")
            return body
        chunks = bytearray()
        while size := int(self.rfile.readline().strip(), 16):
            chunks += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(chunks)

    def _route(self, path: str, query: dict[str, str], body: bytes) -> None:
        if path == "/batch/storage/v1":
            return self._batch(body)
        found = re.fullmatch(
            r"(?P<service>/upload|/download)?(?:/resumable)?/storage/v1/b(?:/(?P<bucket>[^/]+))?(?:/o(?:/(?P<rest>.+))?)?", path
        )
        if not found:
            raise Refused(404, f"unknown path {path}")
        bucket = unquote(found["bucket"] or "")
        if not bucket:
            return self._json({"kind": "storage#buckets", "items": [self._bucket(name) for name in self.store.buckets]})
        if found["service"] == "/upload":
            return self._upload(bucket, query, body)
        if found["rest"] is None:
            is_listing = path.rstrip("/").endswith("/o")
            return self._json(self.store.list(bucket, query) if is_listing else self._bucket(bucket))
        self._object(bucket, found["rest"], query, body)

    def _bucket(self, bucket: str) -> dict[str, Any]:
        self.store.objects(bucket)
        return {"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US", "storageClass": "STANDARD", "metageneration": "1"}

    def _object(self, bucket: str, rest: str, query: dict[str, str], body: bytes) -> None:
        store = self.store
        names = [unquote(part) for part in re.split(r"/(?:copyTo|rewriteTo|moveTo|compose)(?:/b/[^/]+/o/|/o/|$)", rest)]
        name = names[0]
        if self.command == "DELETE":
            store.delete(bucket, name, query)
            return self._send(204)
        if self.command == "POST" and len(names) > 1:
            verb = re.search(r"/(copyTo|rewriteTo|moveTo|compose)(?:/b/([^/]+))?", rest)
            assert verb is not None
            if verb[1] == "compose":
                sources = [store.get(bucket, source["name"], {}).data for source in json.loads(body)["sourceObjects"]]
                return self._json(self._copy(bucket, name, b"".join(sources), query, json.loads(body).get("destination") or {}))
            with store.lock:
                source = store.get(bucket, name, {})
                copy = self._copy(unquote(verb[2] or "") or bucket, names[1], source.data, query, source.resource)
                if verb[1] == "moveTo":
                    store.delete(bucket, name, {})
            if verb[1] != "rewriteTo":
                return self._json(copy)
            size = copy["size"]
            return self._json(
                {"kind": "storage#rewriteResponse", "done": True, "totalBytesRewritten": size, "objectSize": size, "resource": copy}
            )
        if self.command != "GET":
            raise Refused(405, f"{self.command} is not supported here")
        found = store.get(bucket, name, query)
        if query.get("alt") == "media":
            return self._media(found)
        self._json(found.resource)

    def _copy(self, bucket: str, name: str, data: bytes, query: dict[str, str], like: dict[str, Any]) -> dict[str, Any]:
        kept = {key: like[key] for key in ("contentType", "metadata") if key in like}
        return self.store.put(bucket, name, data, query=query, metadata=kept, content_type="application/octet-stream").resource

    def _media(self, found: Object) -> None:
        size = len(found.data)
        headers = {
            "Content-Type": found.resource["contentType"],
            "ETag": found.resource["etag"],
            "x-goog-generation": str(found.generation),
            "x-goog-metageneration": "1",
            "x-goog-stored-content-length": str(size),
            "x-goog-hash": f"crc32c={found.resource['crc32c']},md5={found.resource['md5Hash']}",
        }
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "").strip())
        if not wanted or not (wanted[1] or wanted[2]):
            return self._send(200, found.data, headers)
        if wanted[1]:
            first, last = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
        else:
            first, last = max(0, size - int(wanted[2])), size - 1
        if first >= size:
            raise Refused(416, f"range outside of {size} bytes")
        self._send(206, found.data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{size}"})

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        store, kind = self.store, query.get("uploadType")
        content_type = self.headers.get("Content-Type", "application/octet-stream")
        if "upload_id" in query:
            return self._continue(query["upload_id"], body)
        if kind == "media":
            found = store.put(bucket, query["name"], body, query=query, metadata={}, content_type=content_type)
        elif kind == "multipart":
            parts = [head_and_content(part) for part in split_multipart(body, content_type)]
            if len(parts) != 2:
                raise Refused(400, "a multipart upload has two parts")
            metadata = json.loads(parts[0][1])
            declared = re.search(rb"(?i)content-type: *([^\r\n]+)", parts[1][0])
            part_type = declared[1].decode() if declared else "application/octet-stream"
            name = metadata.get("name") or query["name"]
            found = store.put(bucket, name, parts[1][1], query=query, metadata=metadata, content_type=part_type)
        elif kind == "resumable":
            metadata = json.loads(body or b"{}")
            upload_id = str(next(store.upload_ids))
            kept = {**query, "name": metadata.get("name") or query["name"]}
            part_type = self.headers.get("X-Upload-Content-Type", "application/octet-stream")
            store.uploads[upload_id] = Upload(bucket, kept, metadata, part_type)
            where = f"{store.endpoint}/upload/storage/v1/b/{quote(bucket)}/o?uploadType=resumable&upload_id={upload_id}"
            return self._send(200, b"", {"Location": where})
        else:
            raise Refused(400, f"unknown uploadType {kind!r}")
        self._json(found.resource)

    def _continue(self, upload_id: str, body: bytes) -> None:
        store = self.store
        upload = store.uploads.get(upload_id)
        if upload is None:
            raise Refused(404, "no such upload")
        if self.command == "DELETE":
            del store.uploads[upload_id]
            return self._send(499)
        span = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range", ""))
        if span and span[1] and int(span[1]) > len(upload.data):
            raise Refused(400, "a chunk is missing")
        if body:
            del upload.data[int(span[1]) if span and span[1] else 0 :]
            upload.data += body
        if span and (span[3] == "*" or int(span[3]) > len(upload.data)):
            return self._send(308, b"", {"Range": f"bytes=0-{len(upload.data) - 1}"} if upload.data else {})
        del store.uploads[upload_id]
        name, data = upload.query["name"], bytes(upload.data)
        found = store.put(upload.bucket, name, data, query=upload.query, metadata=upload.metadata, content_type=upload.content_type)
        self._json(found.resource)

    def _batch(self, body: bytes) -> None:
        """Deletions and metadata reads, many in one request."""
        answers: list[str] = []
        for part in split_multipart(body, self.headers.get("Content-Type", "")):
            request = re.search(r"(DELETE|GET) \S*/storage/v1/b/([^/]+)/o/([^\s?]+)\??(\S*)", part.decode())
            if not request:
                answers.append("HTTP/1.1 501 Not Implemented\r\n\r\n")
                continue
            bucket, name, query = unquote(request[2]), unquote(request[3]), dict(parse_qsl(request[4]))
            try:
                if request[1] == "DELETE":
                    self.store.delete(bucket, name, query)
                    answers.append("HTTP/1.1 204 No Content\r\n\r\n")
                else:
                    resource = json.dumps(self.store.get(bucket, name, query).resource)
                    answers.append(f"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{resource}")
            except Refused as refused:
                answers.append(
                    f"HTTP/1.1 {refused.status} Refused\r\nContent-Type: application/json\r\n\r\n{self._error(refused).decode()}"
                )
        mark = "batch_of_answers"
        parts = [f"--{mark}\r\nContent-Type: application/http\r\n\r\n{answer}\r\n" for answer in answers]
        self._send(200, ("".join(parts) + f"--{mark}--").encode(), {"Content-Type": f"multipart/mixed; boundary={mark}"})

    @staticmethod
    def _error(refused: Refused) -> bytes:
        return json.dumps({"error": {"code": refused.status, "message": str(refused), "errors": [{"message": str(refused)}]}}).encode()

    def _refuse(self, refused: Refused) -> None:
        if refused.status == 304:
            return self._send(304)
        self._send(refused.status, self._error(refused), {"Content-Type": "application/json; charset=UTF-8"})

    def _json(self, value: dict[str, Any]) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json; charset=UTF-8"})

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: str) -> None:
        super().__init__((address, 0), Handler)
        self.store = Store(f"http://{address}:{self.server_port}")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone, as one that was killed, is no trouble of the server's."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def main() -> None:
    server = Server(sys.argv[1])
    print(server.store.endpoint, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while os.read(0, 4096):  # the parent's end of standard input closes when it leaves the block, or dies
        pass


if __name__ == "__main__":
    main()
