"""Files where they are: a local path or gs://. Writes are atomic: a name is absent or holds all of its bytes.

gs:// goes through gcsfs, imported only when a path needs it. Reads of many objects are concurrent.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np

from trainer.errors import DataError


@dataclass(frozen=True)
class SourceFile:
    path: str
    size: int  # bytes
    checksum: str  # of the bytes in gs://; empty for a local file, whose bytes have to be read for it


@dataclass(frozen=True)
class Span:
    """Items `start` to `stop` of a file of fixed-size items."""

    name: str
    start: int
    stop: int


class Folder(Protocol):
    """A flat directory of the cache."""

    url: str

    def read(self, names: Sequence[str]) -> list[bytes]: ...
    def write(self, name: str, data: bytes | memoryview) -> None: ...
    def exists(self, name: str) -> bool: ...
    def size(self, name: str) -> int: ...
    def sizes(self) -> dict[str, int]: ...
    def spans(self, spans: Sequence[Span], dtype: np.dtype[Any]) -> list[np.ndarray]: ...
    def clean(self) -> None: ...


class LocalFolder:
    def __init__(self, url: str) -> None:
        self.url = url
        self._maps: dict[str, np.ndarray] = {}
        try:
            os.makedirs(url, exist_ok=True)
        except OSError as error:
            raise DataError(f"the data cache {url} cannot be made: {error.strerror}", hint="set data.cache_directory") from error

    def read(self, names: Sequence[str]) -> list[bytes]:
        with accessing(self.url):
            return [Path(self.url, name).read_bytes() for name in names]

    def write(self, name: str, data: bytes | memoryview) -> None:
        target = os.path.join(self.url, name)
        temporary = f"{target}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except FileNotFoundError:
            if not os.path.exists(target):  # else another process committed the same bytes and cleaned up
                raise
        except OSError as error:
            with suppress(OSError):
                os.unlink(temporary)
            raise DataError(
                f"the data cache {self.url} cannot be written: {error.strerror}", hint="make room, or set data.cache_directory"
            ) from error

    def exists(self, name: str) -> bool:
        return os.path.exists(os.path.join(self.url, name))

    def size(self, name: str) -> int:
        try:
            with open(os.path.join(self.url, name), "rb") as file:  # opened: a network file system answers it from the server
                return os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return 0

    def sizes(self) -> dict[str, int]:
        with os.scandir(self.url) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if not entry.name.endswith(".tmp")}

    def spans(self, spans: Sequence[Span], dtype: np.dtype[Any]) -> list[np.ndarray]:
        return [self._map(span.name, dtype)[span.start : span.stop] for span in spans]

    def _map(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        found = self._maps.get(name)
        if found is None:
            found = self._maps[name] = np.memmap(os.path.join(self.url, name), dtype, mode="r").view(np.ndarray)
        return found

    def clean(self) -> None:
        for path in glob.glob(os.path.join(glob.escape(self.url), "*.tmp")):  # of processes that were killed
            with suppress(FileNotFoundError):
                os.unlink(path)


class BucketFolder:
    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs = bucket_client()

    def read(self, names: Sequence[str]) -> list[bytes]:
        with accessing(self.url):
            found: dict[str, bytes] = self._fs.cat([f"{self.url}/{name}" for name in names])
        return [found[f"{self.url.removeprefix('gs://')}/{name}"] for name in names]

    def write(self, name: str, data: bytes | memoryview) -> None:
        with accessing(f"{self.url}/{name}", "written"):
            self._fs.pipe_file(f"{self.url}/{name}", bytes(data))

    def exists(self, name: str) -> bool:
        with accessing(self.url):
            return self._fs.isfile(f"{self.url}/{name}")

    def size(self, name: str) -> int:
        with accessing(self.url), suppress(FileNotFoundError):
            return self._fs.info(f"{self.url}/{name}")["size"]
        return 0

    def sizes(self) -> dict[str, int]:
        with accessing(self.url), suppress(FileNotFoundError):
            return {entry["name"].rpartition("/")[2]: entry["size"] for entry in self._fs.ls(self.url, detail=True, refresh=True)}
        return {}

    def spans(self, spans: Sequence[Span], dtype: np.dtype[Any]) -> list[np.ndarray]:
        paths = [f"{self.url}/{span.name}" for span in spans]
        size = dtype.itemsize
        with accessing(self.url):
            read = self._fs.cat_ranges(paths, [span.start * size for span in spans], [span.stop * size for span in spans], on_error="raise")
        return [np.frombuffer(data, dtype) for data in read]

    def clean(self) -> None:
        pass  # an object appears whole or not at all


def open_folder(url: str) -> Folder:
    return BucketFolder(url) if url.startswith("gs://") else LocalFolder(url)


def bucket_client() -> Any:
    """A gcsfs client (fsspec keeps one a thread), without its cache of listings: other processes write what we wait to see."""
    # Read at gcsfs's import. On, every first use of a bucket asks a gRPC service that needs a permission of its own.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    if "GCSFS_DEBUG" not in os.environ:  # it logs a traceback of every error that it also raises
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return fsspec.filesystem("gcs", use_listings_cache=False)


def find_files(pattern: str) -> list[SourceFile]:
    """The files a path or glob names, sorted by path. Raises DataError when it names none."""
    if pattern.startswith("gs://"):
        found = _find_in_bucket(pattern)
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", pattern):
        raise DataError(f"{pattern}: only local paths and gs:// can be read", hint="copy the files there")
    else:
        expanded = os.path.expanduser(pattern)
        paths = [expanded] if os.path.isfile(expanded) else glob.glob(expanded, recursive=True)
        found = [SourceFile(path, os.path.getsize(path), "") for path in paths if os.path.isfile(path)]
    if not found:
        is_folder = not pattern.startswith("gs://") and os.path.isdir(os.path.expanduser(pattern))
        raise DataError(
            f"no file matches {pattern}" + (" (it is a folder)" if is_folder else ""),
            hint=f"write {pattern.rstrip('/')}/** for everything below it"
            if is_folder
            else "check the path and the glob; ** crosses folders",
        )
    return sorted(found, key=lambda file: file.path)


def _find_in_bucket(pattern: str) -> list[SourceFile]:
    with accessing(pattern):
        client = bucket_client()
        entries: dict[str, dict[str, Any]] = client.glob(pattern, detail=True)
        return [
            SourceFile(f"gs://{name}", entry["size"], entry.get("md5Hash") or entry["crc32c"])
            for name, entry in entries.items()
            if entry["type"] == "file" and not name.endswith("/")
        ]


@contextmanager
def accessing(path: str, what: str = "read") -> Iterator[None]:
    """Turns what goes wrong with `path` in the file system or its client into DataError."""
    try:
        yield
    except (OSError, *_client_errors(path)) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path} cannot be {what}: {reason}", hint="check that it exists and that this process may do it") from error


def _client_errors(path: str) -> tuple[type[Exception], ...]:
    if not path.startswith("gs://"):
        return ()
    from aiohttp import ClientError
    from gcsfs.retry import HttpError
    from google.auth.exceptions import GoogleAuthError

    return (HttpError, GoogleAuthError, ClientError)


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """A seekable stream of bytes. A local path may begin at `~`, as those that `find_files` takes."""
    with accessing(path):
        in_bucket = path.startswith("gs://")
        file = bucket_client().open(path, "rb", cache_type="readahead") if in_bucket else open(os.path.expanduser(path), "rb")
        with cast(BinaryIO, file):
            yield file


def read_files(paths: Sequence[str]) -> Iterator[bytes]:
    """The bytes of every file, in order; those in buckets are fetched together, because each has to be waited for."""
    remote = [path for path in paths if path.startswith("gs://")]
    fetched: dict[str, bytes] = {}
    if remote:
        with accessing(remote[0]):
            fetched = bucket_client().cat(remote)
    for path in paths:
        if path.startswith("gs://"):
            yield fetched[path.removeprefix("gs://")]
        else:
            with accessing(path):
                data = Path(path).read_bytes()
            yield data


@contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local path with the bytes of `path`, for readers that know nothing else."""
    if not path.startswith("gs://"):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder, accessing(path):
        target = os.path.join(folder, "copy")
        bucket_client().get_file(path, target)
        yield target


def content_hash(path: str) -> str:
    """Of a local file's bytes."""
    with accessing(path), open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()  # pyright: ignore[reportArgumentType]
