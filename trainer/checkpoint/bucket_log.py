"""Append-only files on gs://, which has no append: numbered objects, each written again while it grows."""

from __future__ import annotations

import time
from typing import Final

from trainer.checkpoint.storage import open_storage

SEGMENT_BYTES: Final = 4 * 2**20
"""An object is written again as it grows, up to this size; then the next one begins."""
UPLOAD_SECONDS: Final = 30.0
"""Objects are at most this old while their writer lives."""
UNSENT_BYTES: Final = 64 * 2**20
"""With storage out of reach, the oldest bytes beyond this are given up."""


class BucketLog:
    """Objects `<stem>-00000<suffix>`, `-00001`, ...; begun behind those that are there, which an earlier process has left."""

    def __init__(self, directory: str, stem: str, suffix: str, *, upload_seconds: float = UPLOAD_SECONDS) -> None:
        self._storage = open_storage(directory)
        self._stem, self._suffix = stem, suffix
        self._upload_seconds = upload_seconds
        self._segments: dict[int, bytearray] = {0: bytearray()}  # those not fully sent, oldest first
        self._newest = 0
        self._there: int | None = None  # objects of an earlier process; None: nothing is sent yet
        self._sent_at = time.monotonic()
        self._dirty = False

    def append(self, data: bytes) -> None:
        """Add bytes, which stay together in one object; they may be kept back until it is time to send them. Raises OSError."""
        if len(self._segments[self._newest]) >= SEGMENT_BYTES:
            self._newest += 1
            self._segments[self._newest] = bytearray()
            while len(self._segments) * SEGMENT_BYTES > UNSENT_BYTES:
                del self._segments[min(self._segments)]
        self._segments[self._newest] += data
        self._dirty = True
        self.flush()

    def flush(self, *, now: bool = False) -> None:
        """Send what is due, or everything with `now`. Raises OSError; the next try sends it."""
        if not self._dirty or (not now and time.monotonic() - self._sent_at < self._upload_seconds):
            return
        self._sent_at = time.monotonic()  # also after a failure: the next try waits its turn
        for index in sorted(self._segments):
            self._send(index)
            if index != self._newest:
                del self._segments[index]
        self._dirty = False

    def _send(self, index: int) -> None:
        if self._there is None:
            self._there = self._count(index)
        self._storage.write(self._name(index + self._there), bytes(self._segments[index]))

    def _count(self, number: int) -> int:
        """How many objects are there already, from `number` on."""
        there = 0
        while True:
            try:
                self._storage.crc32c(self._name(number + there))
            except FileNotFoundError:
                return there
            there += 1

    def _name(self, number: int) -> str:
        return f"{self._stem}-{number:05d}{self._suffix}"
