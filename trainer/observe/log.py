"""Append-only files of metrics: a real append in a folder; on gs:// through the parent, which outlives what is unsent here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from trainer.checkpoint.bucket_log import BucketLog
from trainer.parent import link


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


class ParentLog:
    """On gs://, sent by the parent's uploader, so that an abort of this process loses nothing of it."""

    def __init__(self, stem: str, suffix: str) -> None:
        self._stem, self._suffix = stem, suffix

    def append(self, data: bytes) -> None:
        link.append(self._stem, self._suffix, data)

    def flush(self, *, now: bool = False) -> None:
        pass


def open_log(directory: str, stem: str, suffix: str = "") -> Log:
    """The log `<stem><suffix>` in a folder, continued where it exists; `<stem>-PART<suffix>` on gs://, behind the parts that exist."""
    if not directory.startswith("gs://"):
        return FolderLog(Path(directory, f"{stem}{suffix}"))
    folder = link.below_uploads(directory)
    return BucketLog(directory, stem, suffix) if folder is None else ParentLog(f"{folder}/{stem}", suffix)
