"""The few file operations checkpoints need, for a local folder and for gs://. No JAX here.

Paths are relative to the storage's root, with `/` between parts. A missing file is FileNotFoundError, an
existing one FileExistsError, on both kinds; other trouble is OSError (folder) or GoogleAPICallError (gs://).
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import google_crc32c

if TYPE_CHECKING:
    from google.cloud.storage import Bucket

CHUNK_BYTES: Final = 8 * 2**20
DELETES_AT_ONCE: Final = 16


@dataclass(frozen=True)
class File:
    bytes: int
    crc32c: str | None  # base64 of the big-endian value, as GCS reports it; None where only reading would tell


class Storage(Protocol):
    root: str

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

    def crc32c(self, path: str) -> str:
        """Checksum of the stored content."""
        ...

    def remove(self, path: str) -> None:
        """Delete a file; fine when it is not there."""
        ...

    def remove_tree(self, folder: str) -> None:
        """Delete everything under `folder`; fine when it is not there."""
        ...


def open_storage(directory: str) -> Storage:
    return _Bucket(directory) if directory.startswith("gs://") else _Folder(directory)


def checksum(data: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


class _Folder:
    def __init__(self, directory: str) -> None:
        self.root = directory

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


class _Bucket:
    def __init__(self, directory: str) -> None:
        self.root = directory.rstrip("/")
        self._name, _, prefix = self.root.removeprefix("gs://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""

    @cached_property
    def _bucket(self) -> Bucket:
        from google.auth.credentials import AnonymousCredentials
        from google.cloud.storage import Client

        if os.environ.get("STORAGE_EMULATOR_HOST"):
            return Client(project="emulator", credentials=AnonymousCredentials()).bucket(self._name)
        return Client().bucket(self._name)

    def files(self, folder: str = "") -> dict[str, File]:
        prefix = self._prefix + (f"{folder}/" if folder else "")
        blobs = self._bucket.list_blobs(prefix=prefix, fields="items(name,size,crc32c),nextPageToken")
        # Names that end in "/" are the placeholders some clients write for folders.
        return {
            blob.name.removeprefix(self._prefix): File(blob.size or 0, blob.crc32c)
            for blob in blobs
            if blob.name and not blob.name.endswith("/")
        }

    def read(self, path: str) -> bytes:
        from google.api_core.exceptions import NotFound

        try:
            return self._bucket.blob(self._prefix + path).download_as_bytes()
        except NotFound:
            raise FileNotFoundError(f"{self.root}/{path}") from None

    def write(self, path: str, data: bytes) -> None:
        self._bucket.blob(self._prefix + path).upload_from_string(data, content_type="application/json", checksum="crc32c")

    def write_new(self, path: str, data: bytes) -> None:
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self._prefix + path)
        try:
            blob.upload_from_string(data, content_type="application/json", checksum="crc32c", if_generation_match=0)
        except PreconditionFailed:
            # A retry after a lost acknowledgement meets its own write: that is success.
            if self.read(path) != data:
                raise FileExistsError(f"{self.root}/{path}") from None

    def crc32c(self, path: str) -> str:
        blob = self._bucket.get_blob(self._prefix + path)
        if blob is None or blob.crc32c is None:
            raise FileNotFoundError(f"{self.root}/{path}")
        return blob.crc32c

    def remove(self, path: str) -> None:
        from google.api_core.exceptions import NotFound

        with contextlib.suppress(NotFound):
            self._bucket.blob(self._prefix + path).delete()

    def remove_tree(self, folder: str) -> None:
        names = [blob.name for blob in self._bucket.list_blobs(prefix=f"{self._prefix}{folder}/", fields="items(name),nextPageToken")]
        with ThreadPoolExecutor(DELETES_AT_ONCE) as pool:
            for _ in pool.map(lambda name: self.remove(name.removeprefix(self._prefix)), names):
                pass
