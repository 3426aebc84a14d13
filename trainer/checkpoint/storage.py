"""The few file operations checkpoints need, for a local folder and for gs://. No JAX here.

Paths are relative to the storage's root, with `/` between parts. All trouble is OSError: FileNotFoundError for a
missing file, FileExistsError for one that must not be there, PermissionError, ConnectionError where a restart may find it better.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import google_crc32c

if TYPE_CHECKING:
    from google.cloud.storage import Blob, Bucket

CHUNK_BYTES: Final = 2**18  # summing holds the interpreter for 50 microseconds at a time
REQUESTS_AT_ONCE: Final = 16


@dataclass(frozen=True)
class File:
    bytes: int
    crc32c: str | None  # base64 of the big-endian value, as GCS reports it; None where only reading would tell


class Storage(Protocol):
    root: str
    lists_checksums: bool  # whether `files` tells checksums without reading

    def files(self, folder: str = "") -> dict[str, File]:
        """Every file under `folder`, by path from the root; empty when there is none."""
        ...

    def read(self, path: str) -> bytes: ...

    def write(self, path: str, data: bytes) -> None:
        """Create or replace; durable on return."""
        ...

    def write_new(self, path: str, data: bytes) -> None:
        """Create all of it or nothing; FileExistsError when it is there. Durable on return."""
        ...

    def claim(self, path: str, data: bytes) -> bytes:
        """Create all of it unless somebody has: the content that is there then, of the first of all writers. Durable on return."""
        ...

    def crc32c(self, path: str) -> str:
        """Checksum of the stored content."""
        ...

    def remove(self, path: str) -> None:
        """Delete a file; fine when it is not there."""
        ...

    def remove_tree(self, folder: str) -> None:
        """Delete everything under `folder`; fine when it is not there."""
        ...

    def move_tree(self, source: str, target: str) -> None: ...


def open_storage(directory: str) -> Storage:
    return _Bucket(directory) if directory.startswith("gs://") else _Folder(directory)


def checksum(data: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


class _Folder:
    lists_checksums = False

    def __init__(self, directory: str) -> None:
        self.root = os.path.abspath(directory)  # Orbax takes no other

    def files(self, folder: str = "") -> dict[str, File]:
        return dict(self._walk(Path(self.root, folder), f"{folder}/" if folder else ""))

    def _walk(self, directory: Path, prefix: str) -> Iterator[tuple[str, File]]:
        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except FileNotFoundError:  # deleted while we looked
            return
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(Path(entry.path), f"{prefix}{entry.name}/")
            else:
                with contextlib.suppress(FileNotFoundError):
                    yield prefix + entry.name, File(entry.stat().st_size, None)

    def read(self, path: str) -> bytes:
        return Path(self.root, path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        target = Path(self.root, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def write_new(self, path: str, data: bytes) -> None:
        # One process writes; the check guards against mistakes, not against races (hard links, which would,
        # do not exist on FUSE mounts).
        if Path(self.root, path).exists():
            raise FileExistsError(f"{self.root}/{path}")
        self.write(path, data)

    def claim(self, path: str, data: bytes) -> bytes:
        target = Path(self.root, path)
        draft = f"{path}.{os.getpid()}.{uuid.uuid4().hex}.tmp"
        self.write(draft, data)
        try:
            os.link(Path(self.root, draft), target)  # atomic, and refused where the name is taken
        except FileExistsError:
            return self.read(path)
        except FileNotFoundError:  # somebody has cleared the folder, the draft with it: that says nothing of links
            raise
        except OSError as error:
            reason = f"{error.strerror}: this file system has no hard links; give the bucket itself, as gs://"
            raise PermissionError(errno.EACCES, reason, str(target)) from error
        finally:
            self.remove(draft)
        return data

    def crc32c(self, path: str) -> str:
        checksum = google_crc32c.Checksum()
        with open(Path(self.root, path), "rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                checksum.update(chunk)
        return base64.b64encode(checksum.digest()).decode()

    def remove(self, path: str) -> None:
        Path(self.root, path).unlink(missing_ok=True)

    def remove_tree(self, folder: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(Path(self.root, folder))

    def move_tree(self, source: str, target: str) -> None:
        destination = Path(self.root, target)
        destination.parent.mkdir(parents=True, exist_ok=True)
        Path(self.root, source).rename(destination)


class _Bucket:
    lists_checksums = True

    def __init__(self, directory: str) -> None:
        self.root = directory.rstrip("/")
        self._name, _, prefix = self.root.removeprefix("gs://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""

    @cached_property
    def _bucket(self) -> Bucket:
        from google.auth.credentials import AnonymousCredentials
        from google.cloud.storage import Client

        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # many readers at once are no news: "pool is full"
        if os.environ.get("STORAGE_EMULATOR_HOST"):
            return Client(project="emulator", credentials=AnonymousCredentials()).bucket(self._name)
        return Client().bucket(self._name)

    def files(self, folder: str = "") -> dict[str, File]:
        # Names that end in "/" are the placeholders some clients write for folders.
        return {path: File(blob.size or 0, blob.crc32c) for path, blob in self._list(folder).items() if not path.endswith("/")}

    def read(self, path: str) -> bytes:
        with self._as_os_error(path):
            return self._blob(path).download_as_bytes()

    def write(self, path: str, data: bytes) -> None:
        with self._as_os_error(path):
            self._blob(path).upload_from_string(data, content_type="application/json", checksum="crc32c")

    def write_new(self, path: str, data: bytes) -> None:
        try:
            with self._as_os_error(path):
                blob = self._blob(path)
                blob.upload_from_string(data, content_type="application/json", checksum="crc32c", if_generation_match=0)
        except FileExistsError:
            # A retry after a lost acknowledgement meets its own write: that is success.
            if self.read(path) != data:
                raise

    def claim(self, path: str, data: bytes) -> bytes:
        try:
            with self._as_os_error(path):
                self._blob(path).upload_from_string(data, content_type="application/json", checksum="crc32c", if_generation_match=0)
        except FileExistsError:
            return self.read(path)
        return data

    def crc32c(self, path: str) -> str:
        with self._as_os_error(path):
            blob = self._blob(path)
            blob.reload()
            return str(blob.crc32c)

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._as_os_error(path):
            self._blob(path).delete()

    def remove_tree(self, folder: str) -> None:
        self._at_once(self.remove, self._list(folder))

    def move_tree(self, source: str, target: str) -> None:
        def move(path: str) -> None:
            with self._as_os_error(path):
                self._bucket.rename_blob(self._blob(path), f"{self._prefix}{target}{path.removeprefix(source)}")

        self._at_once(move, self._list(source))

    def _blob(self, path: str) -> Blob:
        return self._bucket.blob(self._prefix + path)

    def _list(self, folder: str) -> dict[str, Blob]:
        prefix = self._prefix + (f"{folder}/" if folder else "")
        with self._as_os_error(folder):
            blobs = self._bucket.list_blobs(prefix=prefix, fields="items(name,size,crc32c),nextPageToken")
            return {str(blob.name).removeprefix(self._prefix): blob for blob in blobs}

    @staticmethod
    def _at_once(action: Callable[[str], None], paths: Iterable[str]) -> None:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            list(pool.map(action, paths))

    @contextlib.contextmanager
    def _as_os_error(self, path: str) -> Iterator[None]:
        from google.api_core import exceptions as api
        from google.auth.exceptions import GoogleAuthError, TransportError
        from google.cloud.storage.exceptions import DataCorruption

        where = f"{self.root}/{path}"
        try:
            yield
        except api.NotFound as error:
            raise FileNotFoundError(errno.ENOENT, error.message, where) from error
        except api.PreconditionFailed as error:
            raise FileExistsError(errno.EEXIST, error.message, where) from error
        except TransportError as error:  # the way to whoever gives tokens, not the credentials
            raise ConnectionError(errno.EIO, str(error), where) from error
        except (api.Forbidden, api.Unauthorized, GoogleAuthError) as error:
            raise PermissionError(errno.EACCES, f"{os.strerror(errno.EACCES)}: {error}", where) from error
        except (api.TooManyRequests, api.ServerError, api.RetryError, DataCorruption) as error:
            # Tried again for two minutes, or an answer that was cut off or changed on its way: it may pass.
            raise ConnectionError(errno.EIO, str(error), where) from error
        except api.GoogleAPIError as error:
            raise OSError(errno.EIO, str(error), where) from error
