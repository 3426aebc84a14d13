"""Append-only files of metrics: a real append in a folder, numbered whole objects on gs://, which has no append."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final, Protocol

from trainer.checkpoint.storage import open_storage

SEGMENT_BYTES: Final = 4 * 2**20
"""An object on gs:// is written again as it grows, up to this size; then the next one begins."""
UPLOAD_SECONDS: Final = 30.0
"""Objects on gs:// are at most this old while the run lives."""
UNSENT_BYTES: Final = 64 * 2**20
"""With storage out of reach, the oldest records beyond this are given up."""


class Log(Protocol):
    def append(self, data: bytes) -> None:
        """Add bytes; they may be kept back until `flush` finds it time to send them. Raises OSError."""
        ...

    def flush(self, *, now: bool = False) -> None:
        """Send what is due, or everything with `now`."""
        ...


class FolderLog:
    """One local file. Each append is one write call, so a killed process tears at most its last record."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def append(self, data: bytes) -> None:
        os.write(self._descriptor, data)

    def flush(self, *, now: bool = False) -> None:
        pass


class BucketLog:
    """Objects `<stem>-00000<suffix>`, `-00001`, ... each uploaded whole while it grows."""

    def __init__(self, directory: str, stem: str, suffix: str, *, upload_seconds: float = UPLOAD_SECONDS) -> None:
        self._storage = open_storage(directory)
        self._stem, self._suffix = stem, suffix
        self._upload_seconds = upload_seconds
        self._segments: dict[int, bytearray] = {0: bytearray()}  # those not fully sent, oldest first
        self._newest = 0
        self._sent_at = time.monotonic()
        self._dirty = False

    def append(self, data: bytes) -> None:
        if len(self._segments[self._newest]) >= SEGMENT_BYTES:
            self._newest += 1
            self._segments[self._newest] = bytearray()
            while len(self._segments) * SEGMENT_BYTES > UNSENT_BYTES:
                del self._segments[min(self._segments)]
        self._segments[self._newest] += data
        self._dirty = True
        self.flush()

    def flush(self, *, now: bool = False) -> None:
        if not self._dirty or (not now and time.monotonic() - self._sent_at < self._upload_seconds):
            return
        self._sent_at = time.monotonic()  # also after a failure: the next try waits its turn
        for index in sorted(self._segments):
            self._storage.write(f"{self._stem}-{index:05d}{self._suffix}", bytes(self._segments[index]))
            if index != self._newest:
                del self._segments[index]
        self._dirty = False


def open_log(directory: str, stem: str, suffix: str = "") -> Log:
    """The log `<stem><suffix>` in a folder, continued where it exists; `<stem>-PART<suffix>` on gs://, begun anew."""
    if directory.startswith("gs://"):
        return BucketLog(directory, stem, suffix)
    return FolderLog(Path(directory, f"{stem}{suffix}"))
